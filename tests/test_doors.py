"""What the server lets in and out: every address, tokens, cookies, lengths, slow clients, disks."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx
import loopback
import nibabel
import numpy as np
import PIL.Image
import pytest
from starlette.routing import Mount

from ibisagent.errors import ConfigError
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server import auth as access
from ibisagent.server import listening
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.auth import COOKIE, Keys, WrongTokens, token_for, url_of
from ibisagent.server.client import Client
from ibisagent.server.service import Limits, Service
from ibisagent.server.volumes import PackageVolumes

TOKEN = "a-token-of-the-tests"
CLICK = "<think>The bright one.</think><action>click + (0.31, 0.32) bright box</action>"

# Every address. "file": takes a file; "session", "scan": belongs to one, so to its owner; "plain": neither.
SERVER = {
    "GET /openapi.json": "plain",
    "HEAD /openapi.json": "plain",
    "GET /health": "plain",
    "GET /ready": "plain",
    "GET /metrics": "plain",
    "GET /docs": "plain",
    "GET /v1/models": "plain",
    "POST /v1/segment": "file",
    "POST /v1/sessions": "file",
    "GET /v1/sessions": "plain",
    "GET /v1/sessions/{id}": "session",
    "DELETE /v1/sessions/{id}": "session",
    "POST /v1/sessions/{id}/ask": "session",
    "POST /v1/sessions/{id}/run": "session",
    "POST /v1/sessions/{id}/run/stream": "session",
    "POST /v1/sessions/{id}/click": "session",
    "POST /v1/sessions/{id}/box": "session",
    "POST /v1/sessions/{id}/accept": "session",
    "POST /v1/sessions/{id}/interrupt": "session",
    "POST /v1/sessions/{id}/undo": "session",
    "POST /v1/sessions/{id}/redo": "session",
    "POST /v1/sessions/{id}/reset": "session",
    "POST /v1/sessions/{id}/fork": "session",
    **dict.fromkeys(
        [f"POST /v1/sessions/{{id}}/{act}" for act in ("query", "brush", "rename", "remove", "preview")], "session"
    ),
    **dict.fromkeys([f"GET /v1/sessions/{{id}}/{what}" for what in ("masks", "reliability", "thumbnail")], "session"),
    "GET /v1/worklist": "plain",
    "GET /v1/worklist/export": "plain",
    **dict.fromkeys(["GET /v1/teaching", "POST /v1/teaching", "DELETE /v1/teaching"], "plain"),
    "DELETE /v1/teaching/agent": "plain",
    "POST /v1/scans": "file",
    "GET /v1/scans/{id}": "scan",
    "DELETE /v1/scans/{id}": "scan",
    **dict.fromkeys([f"GET /v1/scans/{{id}}/{what}" for what in ("image", "slice", "shown", "thumbnail")], "scan"),
    **dict.fromkeys(
        [f"POST /v1/scans/{{id}}/{act}" for act in ("session", "propagate", "find", "query", "undo", "accept")], "scan"
    ),
    "GET /v1/sessions/{id}/mask": "session",
    "GET /v1/sessions/{id}/image": "session",
    "GET /v1/sessions/{id}/overlay": "session",
    "GET /v1/sessions/{id}/report": "session",
    "GET /v1/sessions/{id}/record": "session",
    "GET /v1/sessions/{id}/export": "session",
    "GET /v1/sessions/{id}/training": "session",
    "POST /v1/jobs": "file",
    "GET /v1/jobs": "plain",
    "GET /v1/jobs/{id}": "plain",
    "DELETE /v1/jobs/{id}": "plain",
    "POST /v1/jobs/{id}/cancel": "plain",
    "GET /v1/jobs/{id}/results": "plain",
    "GET /info/": "plain",
    "POST /infer/{model}": "file",
    "PUT /session/": "file",
    "GET /session/{session_id}": "plain",
    "DELETE /session/{session_id}": "plain",
    "GET /datastore/": "plain",
    "PUT /datastore/": "file",
    "PUT /datastore/image": "file",
    "GET /datastore/image": "plain",
    "HEAD /datastore/image": "plain",
    "DELETE /datastore/image": "plain",
    "GET /datastore/image/info": "plain",
    "PUT /datastore/label": "file",
    "GET /datastore/label": "plain",
    "HEAD /datastore/label": "plain",
    "DELETE /datastore/label": "plain",
    "GET /datastore/label/info": "plain",
    "PUT /datastore/label/info": "plain",
    "POST /activelearning/{strategy}": "plain",
    "GET /train/": "plain",
    "POST /train/": "plain",
    "POST /train/{model}": "plain",
    "DELETE /train/": "plain",
    "GET /logs/": "plain",
    "GET /auth/": "plain",
    "POST /auth/token": "plain",
    "GET /auth/token/valid": "plain",
    "* /mcp": "mcp",
    "GET /": "plain",
    "GET /s/{id}": "plain",
    "GET /static/{name}": "plain",
    "GET /static/sample/eye.jpg": "plain",
}


def image(seed: int = 0) -> bytes:
    pixels = np.full((61, 83, 3), 30, dtype=np.uint8)
    pixels[10:30, 12:40] = 200
    pixels[0] = np.random.default_rng(seed).integers(0, 255, (83, 3))
    encoded = io.BytesIO()
    PIL.Image.fromarray(pixels).save(encoded, format="PNG")
    return encoded.getvalue()


CLIENTS: list[httpx.Client] = []  # closed with their server


def client(url: str, **headers: str) -> httpx.Client:
    CLIENTS.append(httpx.Client(base_url=url, headers=headers, timeout=60))
    return CLIENTS[-1]


def close_clients(url: str) -> None:
    for one in CLIENTS:
        if str(one.base_url).startswith(url):
            one.close()


def scan(seed: int = 0) -> bytes:
    """A small volume in NIfTI."""
    voxels = np.random.default_rng(seed).integers(0, 900, (9, 8, 5)).astype(np.int16)
    return bytes(nibabel.Nifti1Image(voxels, np.diag([1.0, 1.0, 2.0, 1.0])).to_bytes())


class Visitor:
    """A browser of its own: it keeps its cookie."""

    def __init__(self, url: str, **headers: str) -> None:
        self.web = client(url, **headers)
        assert self.web.get("/", headers={"accept": "text/html"}).status_code == 200

    @property
    def name(self) -> str:
        """What the server keeps it as."""
        name = Keys(None).visitor(self.web.cookies[COOKIE])
        assert name is not None
        return name

    def open(self, content: bytes) -> str:
        """A session on an image; its id."""
        answer = self.web.post("/v1/sessions", data={"query": "box"}, files={"image": ("theirs.png", content)})
        return str(answer.raise_for_status().json()["id"])

    def open_scan(self, content: bytes) -> str:
        """A scan; its id."""
        answer = self.web.post("/v1/scans", data={"query": "box"}, files={"files": ("theirs.nii", content)})
        return str(answer.raise_for_status().json()["id"])


@contextmanager
def serving(folder: Path, token: str | None = None, **limits: Any) -> Iterator[tuple[str, Service, Any]]:
    models = ScriptedPolicy([CLICK]), RegionSegmenter()
    service = Service(*models, folder, limits=Limits(**limits), volumes=PackageVolumes())
    app = create_app(service, token=token, mounts=standard_mounts(page=True))
    with loopback.serving(app, **listening.options()) as url:
        yield url, service, app
    close_clients(url)


class House:
    """A server with a page, a canary that lies outside its folder, and an image and a scan of somebody else in it."""

    def __init__(self, folder: Path, url: str, service: Service, app: Any) -> None:
        self.url, self.service, self.app = url, service, app
        self.data = folder / "data"
        self.canary = folder / "outside" / "canary.png"
        self.canary.parent.mkdir()
        self.canary.write_bytes(image(seed=1))
        self.other = Visitor(url)
        self.session, self.scan = self.other.open(image(seed=2)), self.other.open_scan(scan(seed=2))
        self.image = self.data / "sessions" / self.session / "image.png"
        [self.volume] = (self.data / "scans" / self.scan / "in").iterdir()
        self.theirs = self.image.read_bytes(), self.volume.read_bytes()

    def names(self) -> dict[str, str]:
        """Ways to name a file that is not one's own."""
        up = os.path.relpath(self.canary, self.data)
        return {
            "absolute": str(self.canary),
            "dots": up,
            "dots from a folder": f"sessions/../{up}",
            "encoded": up.replace("..", "%2e%2e").replace("/", "%2f"),
            "encoded absolute": quote(str(self.canary), safe=""),
            "file URL": self.canary.as_uri(),
            "file URL with a host": f"file://localhost{self.canary}",
            "URL": f"{self.url}/health",
            "through the process": f"/proc/self/root{self.canary}",
            "source": "../page.py",
            "their session": self.session,
            "their scan": self.scan,
            "their image": str(self.image),
            "their image from here": f"../../sessions/{self.session}/image.png",
            "zero byte": f"{self.canary}\0.png",
            "folder": ".",
            "empty": "",
        }

    def check(self, said: str | bytes = "") -> None:
        """Nothing of the canary or of the other's files is in what was said or anywhere it should not be."""
        said = said.encode() if isinstance(said, str) else said
        for content in (self.canary.read_bytes(), *self.theirs):
            assert content[50:] not in said
        assert b"def mount_page" not in said
        while any(job.state in ("waiting", "running") for job in self.service.jobs):
            time.sleep(0.01)
        found = [
            path for path in self.data.rglob("*") if path.is_file() and path.read_bytes() == self.canary.read_bytes()
        ]
        assert not found, "the canary was copied"
        assert (self.image.read_bytes(), self.volume.read_bytes()) == self.theirs
        assert self.service.session_ids == [self.session], "a file of somebody else was opened"


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with serving(folder / "data") as served:
        yield House(folder, *served)


@pytest.fixture
def visitor(house: House) -> Visitor:
    return Visitor(house.url)


# ------------------------------------------------------------------------------------------------------- addresses


def addresses(routes: Any) -> Iterator[str]:
    """Method and path of every route, those of included routers as well."""
    for route in routes:
        contexts = getattr(route, "effective_route_contexts", None)  # how newer FastAPI keeps included routers
        for one in [route] if contexts is None else contexts():
            if isinstance(one, Mount):
                yield f"* {one.path or 'page'}"
            else:
                yield from (f"{method} {one.path}" for method in one.methods or "*")


def test_every_address_is_known(house: House) -> None:
    assert set(addresses(house.app.routes)) == set(SERVER), "say in SERVER what the address takes, and test it"


@pytest.mark.parametrize("address", [address for address, kind in SERVER.items() if kind == "plain"])
def test_no_address_of_the_server_gives_a_file(address: str, house: House, visitor: Visitor) -> None:
    method, _, path = address.partition(" ")
    for name in house.names().values():
        for written in {name, quote(name), quote(name, safe="")}:
            url = f"{house.url}{re.sub('{[^}]*}', lambda _, to=written: to, path)}".replace("\0", "%00")
            query = dict.fromkeys(("image", "label", "tag", "id", "session_id", "output", "format", "name"), name)
            answer = visitor.web.request(method, url, params=query)
            assert answer.status_code < 500, url
            house.check(answer.content)


@pytest.mark.parametrize("address", [address for address, kind in SERVER.items() if kind == "file"])
def test_a_file_is_its_content_and_never_its_name(address: str, house: House, visitor: Visitor) -> None:
    method, _, path = address.partition(" ")
    for name in house.names().values():
        field = {"/v1/jobs": "images", "/session/": "files", "/v1/scans": "files"}.get(
            path, "image" if path.startswith("/v1") else "file"
        )
        files = {field: (name.replace("\0", "%00") or "x", b"no image"), "label": ("x", b"")}
        query = {"image": name, "session_id": name, "params": "{}"}
        answer = visitor.web.request(
            method, path.replace("{model}", "ibisagent"), params=query, data={"query": name or "x"}, files=files
        )
        assert 400 <= answer.status_code < 500 or path == "/v1/jobs", answer.text
        house.check(answer.content)
    shutil.rmtree(house.data / "jobs")
    (house.data / "jobs").mkdir()


BODIES: dict[str, Any] = {
    "click": {"x": 1, "y": 1},
    "box": {"x0": 1, "y0": 1, "x1": 9, "y1": 9},
    "fork": {"turn": 0},
    "query": {"query": "box"},
    "brush": {"points": [[1, 1]], "radius": 2},
    "rename": {"target": "box", "name": "other"},
    "remove": {"target": "box"},
    "preview": {"x": 1, "y": 1},
    "find": {"query": "box"},
    **{path: {"axis": "axial", "index": 1} for path in ("session", "propagate")},
    **{path: {} for path in ("ask", "run", "stream", "accept")},
}


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_session_of_the_page_is_its_visitors_alone(token: str | None, tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    with serving(tmp_path / "data", token) as (url, _, _):
        first, second = Visitor(url, **headers), Visitor(url, **headers)
        id_, scan_id = first.open(image()), first.open_scan(scan())
        program = client(url, **headers)
        for web in (second.web, program):
            assert web.get("/v1/sessions").json() == web.get("/v1/worklist").json() == []
            for address in [address for address, kind in SERVER.items() if kind in ("session", "scan")]:
                method, _, path = address.partition(" ")
                sent = {"json": BODIES.get(path.rpartition("/")[2])} if method == "POST" else {}
                known = id_ if SERVER[address] == "session" else scan_id
                answer = web.request(method, path.replace("{id}", known), **sent)
                assert answer.status_code == 404, address
                assert answer.json()["detail"].startswith(f"no {SERVER[address]} '{known}' here"), address
            call = {"name": "look", "arguments": {"session": id_}}
            asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": call}
            accept = {"accept": "application/json, text/event-stream"}
            told = web.post("/mcp", json=asked, headers=accept).json()
            assert told["result"]["isError"]
            assert "no session" in told["result"]["content"][0]["text"]
        assert first.web.get("/v1/sessions").json() == [id_]
        assert {one["id"] for one in first.web.get("/v1/worklist").json()} == {id_, scan_id}
        place = {"axis": "axial", "index": 2}
        slice_id = first.web.post(f"/v1/scans/{scan_id}/session", json=place).json()["id"]
        assert second.web.get(f"/v1/sessions/{slice_id}").status_code == 404
        assert first.web.get(f"/v1/sessions/{id_}/export").status_code == 200
        fork = first.web.post(f"/v1/sessions/{id_}/fork", json={"turn": 0}).json()["id"]
        assert second.web.get(f"/v1/sessions/{fork}").status_code == 404
        shared = program.post("/v1/sessions", data={"query": "box"}, files={"image": ("a.png", image())}).json()["id"]
        assert second.web.get(f"/v1/sessions/{shared}").status_code == 200
    with serving(tmp_path / "data", token) as (url, _, _):  # also after a restart
        for one, status in ((first, 200), (second, 404)):
            web = client(url)
            web.cookies = one.web.cookies
            assert web.get(f"/v1/sessions/{id_}").status_code == status
            assert (id_ in web.get("/v1/sessions").json()) == (status == 200)
            assert shared in web.get("/v1/sessions").json()


def test_what_is_opened_without_a_cookie_is_for_all(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (url, _, _):
        program, browser = client(url), Visitor(url)
        sent = {"data": {"query": "box"}, "files": {"files": ("a.nii", scan())}}
        id_ = program.post("/v1/scans", **sent).json()["id"]
        for web in (program, browser.web):
            assert [one["id"] for one in web.get("/v1/worklist").json()] == [id_]
        assert browser.web.post(f"/v1/scans/{id_}/accept").json()["state"] == "accepted"


def test_nothing_comes_from_elsewhere(house: House) -> None:
    own = urlsplit(house.url).netloc
    for path in ("/", "/docs", "/s/0", "/static/main.js", "/static/page.css"):
        answer = httpx.get(f"{house.url}{path}")
        named = {urlsplit(url).netloc for url in re.findall(r"https?://[^\s\"'<>\\)]+", answer.text)}
        assert named <= {own, "www.w3.org"}, path  # the names of SVG
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self';" in policy
        assert "script-src" not in policy, "scripts are files of the page alone"
    assert httpx.get(f"{house.url}/redoc").status_code == 404
    docs = httpx.get(f"{house.url}/docs").text
    assert "<script" not in docs
    for path in httpx.get(f"{house.url}/openapi.json").json()["paths"]:
        assert path in docs


# ------------------------------------------------------------------------------------------- tokens, names, cookies


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("locked"), TOKEN) as (url, _, _):
        yield url


def test_a_cookie_is_not_the_token(locked: str) -> None:
    browser = client(locked, accept="text/html")
    assert browser.get("/").headers["location"] == "/login"
    assert browser.post("/login", data={"token": "wrong"}).status_code == 401
    answer = browser.post("/login", data={"token": TOKEN})
    assert answer.headers["location"] == "/"
    cookie = answer.headers["set-cookie"]
    assert TOKEN not in cookie
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert browser.get("/").status_code == browser.get("/v1/models").status_code == 200
    value = browser.cookies[COOKIE]
    secret, _, signature = value.partition(".")
    made_up = [TOKEN, secret, f"{secret}.", f"{'0' * 32}.{signature}", Keys(None).new_cookie()]
    made_up += [Keys("another-token").new_cookie(), value[:-1], value.upper(), f"{secret}.{'0' * 64}"]
    for wrong in made_up:
        answer = httpx.get(f"{locked}/v1/models", headers={"cookie": f"{COOKIE}={wrong}"})
        assert answer.status_code == 401, wrong


def test_a_link_elsewhere_keeps_the_visitor(house: House, locked: str) -> None:
    """Browsers hold strict cookies back then: the page asks for itself once more instead of giving a new one."""
    for url in (house.url, locked):
        answer = httpx.get(url, headers={"accept": "text/html", "sec-fetch-site": "cross-site"})
        assert "set-cookie" not in answer.headers
        assert 'http-equiv="refresh"' in answer.text


@pytest.mark.parametrize("host", ["x/health?", "x/health#", "127.0.0.1/ready?a=", "a b", "user@127.0.0.1", "", "::1"])
def test_a_host_opens_no_address(host: str, locked: str) -> None:
    request = f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    assert b" 400 " in exchange(locked, request.encode()).partition(b"\r\n")[0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:1", 200),
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("[::1]:8002", 200),
        ("127.0.0.2", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("127.0.0.1.evil.example", 400),
        ("[::2]", 400),
        ("0.0.0.0", 400),
        ("[::1]evil:80", 400),
    ],
)
def test_without_a_token_names_are_this_machines(host: str, status: int, house: House) -> None:
    assert httpx.get(f"{house.url}/health", headers={"host": host}).status_code == status


def test_origins(house: House) -> None:
    for origin in ("http://evil.example", "null", "http://localhost:1", "http://127.0.0.1", "file://", "http://["):
        answer = httpx.post(f"{house.url}/v1/segment", headers={"origin": origin})
        assert answer.status_code == 403, origin
    named = {"host": "[::1]:8002", "origin": "http://[::1]:8002"}
    assert httpx.get(f"{house.url}/health", headers=named).status_code == 200


@pytest.mark.parametrize(
    "token", ["", "short", "1234567", "with a space", "ünicode-token", "new\nline-token", "\u200b" * 9]
)
def test_tokens_that_are_refused_at_the_start(token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBIS_TOKEN", token)
    for host in ("127.0.0.1", "0.0.0.0"):
        with pytest.raises(ConfigError, match=r"^IBIS_TOKEN[^\n]*openssl rand[^\n]*$"):
            token_for(host)


def test_addresses_to_listen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IBIS_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "[::1]"):
        assert token_for(host) is None
    for host in ("0.0.0.0", "::", "[::]", "192.168.1.1", "example.org", "localhost.example.org", ""):
        with pytest.raises(ConfigError, match="IBIS_TOKEN"):
            token_for(host)
    assert url_of("::1", 80) == url_of("[::1]", 80) == "http://[::1]:80"
    assert url_of("localhost", 80) == "http://localhost:80"


def test_whoever_tries_tokens_is_slowed_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    wrong = WrongTokens(clock=lambda: now[0])
    delays = [wrong.delay("a") for _ in range(20)]
    assert delays[:5] == [0.0] * 5
    assert delays == sorted(delays)
    assert delays[-1] == access.LONGEST_DELAY
    assert wrong.delay("b") == 0.0
    now[0] = 10_000.0
    assert wrong.delay("a") == 0.0
    for number in range(3 * access.WATCHED_CLIENTS):
        wrong.delay(str(number))
    assert len(wrong._seen) == access.WATCHED_CLIENTS

    monkeypatch.setattr(access, "LONGEST_DELAY", 0.5)
    monkeypatch.setattr(access, "HELD_ANSWERS", 4)
    with serving(tmp_path, TOKEN) as (url, _, _):

        async def flood() -> list[int]:
            async with httpx.AsyncClient(base_url=url, timeout=30) as web:
                bad = [web.get("/v1/models", headers={"authorization": f"Bearer {n}"}) for n in range(60)]
                return [one.status_code for one in await asyncio.gather(*bad)]

        seen = asyncio.run(flood())
        assert set(seen) == {401, 429}
        assert seen.count(401) < 20, "many at once are not looked at one by one"
        right = {"authorization": f"Bearer {TOKEN}"}
        time.sleep(0.6)
        began = time.perf_counter()
        assert httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer wrong"}).status_code == 401
        assert time.perf_counter() - began >= 0.45
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200, "a neighbour is not locked out"
        elsewhere = {"authorization": "Bearer wrong", "x-forwarded-for": "203.0.113.9"}
        began = time.perf_counter()
        assert httpx.get(f"{url}/v1/models", headers=elsewhere).status_code == 401
        assert time.perf_counter() - began >= 0.45, "nobody names another client to be taken for"


def test_what_a_proxy_says_counts_where_the_proxy_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    https = {"x-forwarded-proto": "https", "x-forwarded-for": "203.0.113.9"}
    with serving(tmp_path / "alone", TOKEN) as (url, _, _):
        answer = httpx.post(f"{url}/login", data={"token": TOKEN}, headers=https)
        assert "Secure" not in answer.headers["set-cookie"]
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    with serving(tmp_path / "behind", TOKEN) as (url, _, _):
        answer = httpx.post(f"{url}/login", data={"token": TOKEN}, headers=https)
        assert "Secure" in answer.headers["set-cookie"]
        for number in range(access.FREE_ATTEMPTS + 4):
            sent = {"authorization": "Bearer wrong", "x-forwarded-for": f"203.0.113.{number}"}
            began = time.perf_counter()
            assert httpx.get(f"{url}/v1/models", headers=sent).status_code == 401
            assert time.perf_counter() - began < 0.15, "each client of the proxy is one of its own"


# --------------------------------------------------------------------------------------------- lengths and slowness


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    assert address.hostname is not None
    assert address.port is not None
    return socket.create_connection((address.hostname, address.port), timeout=30)


def exchange(url: str, sent: bytes) -> bytes:
    """What the server answers to bytes, until it closes the connection."""
    with connected(url) as one:
        one.sendall(sent)
        got = b""
        with suppress(OSError):
            while piece := one.recv(65536):
                got += piece
        return got


LENGTHS = {
    "both": ("Content-Length: 10\r\nTransfer-Encoding: chunked", 400),
    "both, another order": ("Transfer-Encoding: chunked\r\nContent-Length: 10", 400),
    "both, mixed case": ("content-LENGTH: 10\r\ntransfer-ENCODING: Chunked", 400),
    "chunked": ("Transfer-Encoding: chunked", 411),
    "gzip, chunked": ("Transfer-Encoding: gzip, chunked", (400, 411, 501)),
    "chunked twice": ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", (400, 411, 501)),
    "identity": ("Transfer-Encoding: identity", (400, 411, 501)),
    "a space before the colon": ("Transfer-Encoding : chunked", 400),
    "two lengths": ("Content-Length: 10\r\nContent-Length: 20", 400),
    "a list of lengths": ("Content-Length: 10, 20", 400),
    "negative": ("Content-Length: -1", 400),
    "plus": ("Content-Length: +10", 400),
    "hexadecimal": ("Content-Length: 0x10", 400),
    "other digits": ("Content-Length: \u0661\u0660", 400),
    "empty": ("Content-Length:", 400),
    "huge": (f"Content-Length: {10**17}", 413),
    "huger": (f"Content-Length: {10**40}", 400),
    "too long": ("Content-Length: 99999999", 413),
    "two hosts": ("Host: evil.example\r\nContent-Length: 10", 400),
}


@pytest.mark.parametrize("kind", LENGTHS)
@pytest.mark.parametrize("path", ["/v1/segment", "/v1/sessions/0/ask", "/v1/scans", "/mcp"])
def test_one_reading_of_the_length(kind: str, path: str, tmp_path: Path, small: str) -> None:
    header, status = LENGTHS[kind]
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{header}\r\n\r\n"
    chunk = b"%x\r\n" % 2**16 + bytes(2**16) + b"\r\n"
    with connected(small) as one:
        one.sendall(head.encode("utf-8"))
        sent, got = 0, b""
        with suppress(OSError):
            while sent < 200 and not got:
                one.sendall(chunk)
                sent += 1
                one.settimeout(0.05)
                with suppress(TimeoutError):
                    got = one.recv(65536)
                one.settimeout(30)
        if not got:
            with suppress(OSError):
                got = one.recv(65536)
    line = got.partition(b"\r\n")[0]
    assert any(b" %d " % code in line for code in ((status,) if isinstance(status, int) else status)), line
    assert sent < 200, "it went on to take what it had refused"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("small"), upload_bytes=10_000) as (url, _, _):
        yield url


def test_bytes_are_counted_as_they_come() -> None:
    """Whatever a server before us says of the length."""

    async def reading(scope: Any, receive: Any, send: Any) -> None:
        while (await receive()).get("more_body"):
            read.append(1)
        raise RuntimeError("went on without the body")

    async def drip() -> dict[str, Any]:
        return {"type": "http.request", "body": bytes(1000), "more_body": True}

    async def note(message: Any) -> None:
        answered.append(message)

    read, answered = list[int](), list[dict[str, Any]]()
    middleware = access.AuthMiddleware(reading, keys=Keys(None), max_body=5000)
    scope = {"type": "http", "method": "POST", "path": "/x", "headers": [(b"host", b"localhost")], "scheme": "http"}
    asyncio.run(middleware({**scope, "query_string": b"", "client": ("127.0.0.1", 1)}, drip, note))
    assert answered[0]["status"] == 413
    assert len(read) == 5


@pytest.mark.parametrize("path", ["/v1/sessions/0/click", "/mcp"])
@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=b", "text/plain"])
def test_json_of_very_many_values_is_refused(path: str, kind: str, house: House) -> None:
    """Twenty megabytes of it took half a gigabyte, and four seconds in which nobody else was answered."""
    accepted = {"content-type": kind, "accept": "application/json, text/event-stream"}
    for part in (b"[],", b'{"a":1},', b"1,"):
        answer = httpx.post(f"{house.url}{path}", content=b" [" + part * 200_000 + b"0]", headers=accepted)
        assert answer.status_code == 413, part
    house.check()


def test_slow_clients_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(listening, "IDLE_SECONDS", 0.5)
    monkeypatch.setattr(access, "BODY_GRACE_SECONDS", 0.5)
    with serving(tmp_path) as (url, _, _):
        head = b"POST /v1/sessions/0/ask HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 90\r\n"
        for sent, status in ((b"", b""), (b"GET / HT", b""), (head, b""), (head + b"\r\n{", b" 408 ")):
            with connected(url) as one:
                one.sendall(sent)
                began, got = time.perf_counter(), b""
                for _ in range(200):  # a byte now and then changes nothing
                    one.settimeout(0.1)
                    try:
                        piece = one.recv(1000)
                    except TimeoutError:
                        with suppress(OSError):
                            one.sendall(b"a")
                        continue
                    except OSError:
                        break
                    if not piece:
                        break
                    got += piece
                assert time.perf_counter() - began < 5, sent
                assert status in got.partition(b"\r\n")[0]
        again = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        with connected(url) as one:  # the second request of a connection as well
            one.sendall(again)
            got = b""
            while not got.endswith(b'{"status":"ok"}'):
                got += one.recv(1000)
            one.sendall(again[:20])
            assert one.recv(1000) == b""
        with connected(url) as one:  # also where it begins with the first
            one.sendall(again + again[:20])
            while one.recv(1000):
                pass


def test_a_connection_is_kept_for_the_next_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Clients that keep one for as long as the server does send on it while it is closed, now and then."""
    monkeypatch.setattr(listening, "IDLE_SECONDS", 0.3)
    assert listening.KEPT_SECONDS > 60, "nginx keeps those behind it for a minute"
    with serving(tmp_path) as (url, _, _), connected(url) as one:
        for _ in range(3):
            one.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            got = b""
            while not got.endswith(b'{"status":"ok"}'):
                piece = one.recv(1000)
                assert piece, "closed between two requests"
                got += piece
            time.sleep(1)


def test_answers_that_are_not_taken_end(monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**25

    async def give(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(size)})

    def taken(url: str, pause: float) -> int:
        """Bytes that arrive where the client waits before it takes anything, and then takes what comes."""
        with connected(url) as one:
            one.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            time.sleep(pause)
            got = 0
            with suppress(OSError):
                while piece := one.recv(2**16):
                    got += len(piece)
        return got

    monkeypatch.setattr(listening, "STALL_SECONDS", 0.5)
    with loopback.serving(give, lifespan="off", **listening.options()) as url:
        assert taken(url, 0.1) >= size
        assert taken(url, 2.0) < size


def test_unfinished_requests_make_room(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(listening, "MOST_CONNECTIONS", 20)
    with serving(tmp_path) as (url, _, _):
        waiting = []
        for _ in range(60):
            one = connected(url)
            one.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
            waiting.append(one)
        began = time.perf_counter()
        assert httpx.get(f"{url}/health", timeout=5).status_code == 200
        assert time.perf_counter() - began < 3
        for one in waiting:
            one.close()


# ------------------------------------------------------------------------------------------------------------ disks


def test_a_served_folder_is_private_and_ipv6_works(tmp_path: Path) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
            port = probe.getsockname()[1]
    except OSError:
        pytest.skip("this machine has no IPv6")
    data = tmp_path / "data"
    (data / "sessions").mkdir(parents=True)
    (data / "sessions").chmod(0o755)  # as an earlier version left it
    script = tmp_path / "script.json"
    script.write_text(json.dumps([CLICK]))
    command = [sys.executable, "-m", "ibisagent", "serve", "--page", "--policy", f"scripted:{script}", "-s", "region"]
    command += ["--data", str(data), "--port", str(port), "--host", "[::1]"]
    environment = {name: value for name, value in os.environ.items() if name != "IBIS_TOKEN"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, umask=0o022) as running:
        try:
            assert running.stderr is not None
            url = f"http://[::1]:{port}"
            said = b""
            while b"Ctrl+C" not in said:
                line = running.stderr.readline()
                assert line, said
                said += line
            assert url.encode() in said
            loopback.wait_until_up(url, running)
            visitor = Visitor(url)
            theirs = visitor.open_scan(scan())
            files = {"image": ("a.png", image())}
            id_ = httpx.post(f"{url}/v1/sessions", data={"query": "box"}, files=files, timeout=60).json()["id"]
            httpx.post(f"{url}/v1/sessions/{id_}/click", json={"x": 20, "y": 20}, timeout=60)
            job = {"images": ("a.png", image())}
            begun = httpx.post(f"{url}/v1/jobs", data={"query": "box"}, files=job, timeout=60).raise_for_status().json()
            with Client(url) as client:  # until it is over its files come and go
                assert client.wait(begun["id"], every=0.05)["state"] == "done"
            httpx.put(f"{url}/datastore/", files={"file": ("a.png", image())}, timeout=60).raise_for_status()
            written = list(data.rglob("*"))
            assert data / "scans" / theirs / "scan.json" in written
            assert data / "sessions" / id_ / "image.png" in written
            for path in written:
                mode = stat.S_IMODE(path.stat().st_mode)
                assert mode == (0o700 if path.is_dir() else 0o600), path
        finally:
            running.kill()
            close_clients(url)
