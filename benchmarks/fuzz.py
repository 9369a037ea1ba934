"""Requests that schemathesis makes of the server's OpenAPI document: none may be answered with 500, or hang.

    python benchmarks/fuzz.py [--requests 2000] [--seed 0]

`tests/test_fuzz.py` runs a smaller number. The models are the fakes `scripted` and `region`.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from ibisagent.domain import Image
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.service import Limits, Service

CLICK = "<action>click + (0.4, 0.4) thing</action>"


def fuzz(requests: int, seed: int, folder: Path) -> dict[str, int]:
    """How many answers there were of each status; 500 and above, or none at all, is RuntimeError."""
    limits = Limits(upload_bytes=2**20, pixels=2**16, sessions=50)
    service = Service(ScriptedPolicy([CLICK] * 1000), RegionSegmenter(), folder, limits=limits)
    known = service.open(Image(np.zeros((40, 50, 3), dtype=np.uint8)), "thing").id
    app = create_app(service, mounts=standard_mounts(page=False))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        return dict(_count(url, app.openapi(), known, requests, seed))
    finally:
        server.should_exit = True
        thread.join()


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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        statuses = fuzz(options.requests, options.seed, Path(folder))
    seconds = time.perf_counter() - started
    print(json.dumps({"requests": sum(statuses.values()), "seconds": round(seconds, 1), "statuses": statuses}))


if __name__ == "__main__":
    main()
