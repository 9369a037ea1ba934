"""Behind a real nginx on loopback: with its defaults alone, and with what docs/guide/server.md says."""

from __future__ import annotations

import getpass
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import loopback
import pytest
from loopback import Slow, png

from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server import listening
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.client import Client
from ibisagent.server.service import Service

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
GUIDE = Path(__file__).parent.parent / "docs" / "guide" / "server.md"
TOKEN = "a-token-of-the-tests"
CLICKS = [f"<action>click + (0.{column}, 0.32) bright box</action>" for column in (20, 25, 30)]

pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian package nginx)")


@contextmanager
def behind_nginx(folder: Path, location: str, settings: str = "", token: str | None = TOKEN) -> Iterator[str]:
    """The address of an nginx in front of a server of ours."""
    port = loopback.free_port()
    service = Service(Slow([*CLICKS, "<action>stop</action>"], 0.5), RegionSegmenter(), folder / "data")
    app = create_app(service, token=token, mounts=standard_mounts(page=False))
    with loopback.serving(app, **listening.options()) as inner:
        places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{name}_temp_path {folder / name};" for name in places)
        (folder / "nginx.conf").write_text(
            f"user {getpass.getuser()}; daemon off; pid {folder / 'pid'};\n"
            f"error_log {folder / 'error.log'}; events {{}}\n"
            f"http {{ access_log off; {temporary}\n"
            f"server {{ listen 127.0.0.1:{port}; {settings}\n"
            f"location / {{ {location.replace('http://127.0.0.1:8002', inner)} }} }} }}\n"
        )
        assert NGINX is not None
        with subprocess.Popen([NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf")]) as running:
            try:
                url = f"http://127.0.0.1:{port}"
                loopback.wait_until_up(url, running)
                yield url
            finally:
                running.terminate()
                running.wait()


def documented() -> tuple[str, str]:
    """What the guide says: of the place "/", and of the server around it without its certificate."""
    [block] = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    [location] = re.findall(r"location / \{(.*?)\}", block, re.DOTALL)
    [size] = re.findall(r"client_max_body_size [^;]*;", block)
    return location, size


def turns_as_they_come(client: Client) -> list[float]:
    """Seconds between the turns of a stream."""
    times = [time.monotonic() for _ in client.open(png(), "bright box").stream()]
    return [after - before for before, after in itertools.pairwise(times)]


def test_the_defaults_of_nginx(tmp_path: Path) -> None:
    with behind_nginx(tmp_path, "proxy_pass http://127.0.0.1:8002;") as url, Client(url, token=TOKEN) as client:
        assert min(turns_as_they_come(client)) > 0.2, "the turns were held back and came all at once"
        session = client.open(png(), "bright box")
        session.click(20, 20)
        assert session.masks()["bright box"].any()
        answer = httpx.post(f"{url}/v1/segment", headers={"authorization": f"Bearer {TOKEN}"}, content=bytes(2**21))
        assert answer.status_code == 413, "what the guide says of client_max_body_size is no longer so"
        origin = {"authorization": f"Bearer {TOKEN}", "origin": url}
        assert httpx.get(f"{url}/v1/sessions", headers=origin).status_code == 403, "proxy_set_header Host is needed"


def test_what_the_guide_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    location, size = documented()
    with behind_nginx(tmp_path, location, size) as url, Client(url, token=TOKEN) as client:
        assert min(turns_as_they_come(client)) > 0.2
        assert client.segment(png(900), "bright box")
        headers = {"authorization": f"Bearer {TOKEN}", "origin": url}
        assert httpx.get(f"{url}/v1/sessions", headers=headers).status_code == 200
        cookie = httpx.post(f"{url}/login", data={"token": TOKEN}).headers["set-cookie"]
        assert "Secure" not in cookie, "this nginx speaks plain HTTP, and says so"
        job = client.call("POST", "/v1/jobs", data={"query": "box"}, files=[("images", ("a.png", png()))]).json()
        assert client.wait(job["id"], every=0.1)["state"] == "done"
        told = httpx.post(
            f"{url}/mcp",
            json={"jsonrpc": "2.0", "id": 1, "method": "tools/list"},
            headers={"authorization": f"Bearer {TOKEN}", "accept": "application/json, text/event-stream"},
        )
        assert "open_image" in json.dumps(told.json())
