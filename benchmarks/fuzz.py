"""Requests that break something: none may be answered with 500, or hang.

    python benchmarks/fuzz.py [--requests 2000] [--malformed 500] [--seed 0]

Those that schemathesis makes of the server's OpenAPI document, and bytes that are nearly HTTP, or nearly a form.
`tests/test_fuzz.py` runs a smaller number. The models are the fakes `scripted` and `region`.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import uvicorn

from ibisagent.domain import Image
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.listening import options
from ibisagent.server.service import Limits, Service

CLICK = "<action>click + (0.4, 0.4) thing</action>"


@contextmanager
def _serving(folder: Path) -> Iterator[tuple[str, Any, str]]:
    """A server's address, its OpenAPI document, and the id of a session in it."""
    limits = Limits(upload_bytes=2**20, pixels=2**16, sessions=50)
    service = Service(ScriptedPolicy([CLICK] * 1000), RegionSegmenter(), folder, limits=limits)
    known = service.open(Image(np.zeros((40, 50, 3), dtype=np.uint8)), "thing").id
    app = create_app(service, mounts=standard_mounts(page=False))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", **options()))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app.openapi(), known
    finally:
        server.should_exit = True
        thread.join()


def fuzz(requests: int, seed: int, folder: Path) -> dict[str, int]:
    """How many answers there were of each status; 500 and above, or none at all, is RuntimeError."""
    with _serving(folder) as (url, document, known):
        return dict(_count(url, document, known, requests, seed))


def malformed(requests: int, seed: int, folder: Path) -> dict[str, int]:
    """How raw requests ended, by status or "closed"; 500 and above, or a server that is gone, is RuntimeError."""
    random = np.random.default_rng(seed)
    ends: collections.Counter[str] = collections.Counter()
    with _serving(folder) as (url, _, known):
        place = urlsplit(url)
        for _ in range(requests):
            sent = _broken(random, place.netloc, known)
            with socket.create_connection((place.hostname, place.port), timeout=5) as connection:
                with suppress(OSError):  # what is refused is not read to its end
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                answer = b""
                with suppress(OSError):
                    answer = connection.recv(2**16)
            status = answer[9:12].decode("latin-1") if answer.startswith(b"HTTP/1.") else "closed"
            ends[status] += 1
            if status >= "500" and status != "closed" and b"replies" not in answer:
                raise RuntimeError(f"{answer[:300]!r} for {sent[:300]!r}")
        if httpx.get(f"{url}/health").status_code != 200:
            raise RuntimeError("the server is gone")
    return dict(ends)


def _broken(random: np.random.Generator, host: str, known: str) -> bytes:
    """A request in which some bytes are not what they should be."""
    form = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n\x89PNG\r\n--x--\r\n'
    requests = (
        ("POST /v1/segment", "multipart/form-data; boundary=x", form),
        ("POST /infer/ibisagent?image=", "multipart/form-data; boundary=x", form.replace(b'"image"', b'"file"')),
        (f"POST /v1/sessions/{known}/click", "application/json", b'{"x": 3, "y": 4, "positive": true}'),
        ("PUT /datastore/label?image=a", "multipart/form-data; boundary=x", form),
        ("POST /auth/token", "application/x-www-form-urlencoded", b"username=a&password=b"),
        ("POST /mcp", "application/json", b'{"jsonrpc": "2.0", "id": 1, "method": "tools/list"}'),
    )
    what, kind, body = requests[random.integers(len(requests))]
    head = f"{what} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    content = bytearray(head.encode() + body)
    for _ in range(int(random.integers(1, 6))):
        at, way = int(random.integers(len(content))), int(random.integers(4))
        if way == 0:
            content[at] = int(random.integers(256))
        elif way == 1:
            del content[at : at + int(random.integers(1, 20))]
        elif way == 2:
            content[at:at] = random.bytes(int(random.integers(1, 40)))
        else:
            content[at:at] = (b"\r\n", b"\0", b"%00", b"--x", b"Transfer-Encoding: chunked\r\n")[random.integers(5)]
        if not content:
            break
    return bytes(content)


def _count(url: str, document: dict[str, Any], known: str, requests: int, seed: int) -> collections.Counter[str]:
    import schemathesis
    from hypothesis.errors import NonInteractiveExampleWarning

    warnings.simplefilter("ignore", NonInteractiveExampleWarning)
    schema = schemathesis.openapi.from_dict(json.loads(json.dumps(document)))
    statuses: collections.Counter[str] = collections.Counter()
    operations = [result.ok() for result in schema.get_all_operations()]
    if requests < 10 * len(operations):  # a short run: deeper into some rather than hardly into all
        operations = operations[seed % 5 :: 5]
    streams = [_cases(operation, 2 * requests // len(operations) + 2, seed) for operation in operations]
    for number, case in enumerate(_in_turn(streams)):
        if statuses.total() >= requests:
            break
        if number % 2 and "id" in (case.path_parameters or {}):
            case.path_parameters["id"] = known  # half of them act on a session that is there
        if case.operation.method.upper() == "DELETE" and known in str(case.path_parameters):
            continue
        answer = case.call(base_url=url, timeout=30)
        statuses[str(answer.status_code)] += 1
        if answer.status_code >= 500 and "replies" not in answer.text:  # the fake's list may end: 503
            raise RuntimeError(f"{answer.status_code} for {case.as_curl_command()}: {answer.text[:500]}")
    return statuses


def _cases(operation: Any, count: int, seed: int) -> Iterator[Any]:
    """About `count` cases, valid and invalid by turns."""
    import hypothesis
    import schemathesis

    found: list[Any] = []
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        try:
            strategy = operation.as_strategy(generation_mode=mode)

            @hypothesis.seed(seed)
            @hypothesis.settings(
                max_examples=max(1, count // 2),
                database=None,
                deadline=None,
                phases=[hypothesis.Phase.generate],
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(strategy)
            def collect(case: Any) -> None:
                found.append(case)

            collect()
        except hypothesis.errors.Unsatisfiable:
            continue  # nothing about this operation can be wrong
    return iter(found)


def _in_turn(streams: list[Iterator[Any]]) -> Iterator[Any]:
    for cases in itertools.zip_longest(*streams):
        yield from (case for case in cases if case is not None)


def main() -> None:
    """Run and print the statuses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--malformed", type=int, default=500)
    asked = parser.parse_args()
    for count, made in ((asked.requests, fuzz), (asked.malformed, malformed)):
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            statuses = made(count, asked.seed, Path(folder))
        seconds = round(time.perf_counter() - started, 1)
        facts = {"made by": made.__name__, "requests": sum(statuses.values()), "seconds": seconds}
        print(json.dumps({**facts, "statuses": statuses}), flush=True)


if __name__ == "__main__":
    main()
