"""The server over real HTTP on loopback: sessions, jobs, streams, limits, and what it refuses."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import loopback
import numpy as np
import PIL.Image
import pytest
from loopback import free_port, png

from ibisagent.domain import Completion, Image, Observation
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.imaging.masks import iou
from ibisagent.policies.base import Policy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app
from ibisagent.server.batching import SharedPolicy
from ibisagent.server.client import Client
from ibisagent.server.service import LARGE_RUNS, Limits, Service, plain_name

SIZE = (61, 83)
CLICK = "<think>The bright one.</think><action>click + (0.3133, 0.3197) bright box</action>"
STOP = "<think>It fits.</think><action>stop</action><answer>Done.</answer>"
OWNERSHIP = {"server.lock", "server.json"}


def ground_truth(shift: int = 0) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[10 + shift : 30 + shift, 12:40] = True
    return mask


class SlowPolicy(ScriptedPolicy):
    """Takes its time, the same for a batch as for one, and notes the batches."""

    def __init__(self, replies: Sequence[str] = (CLICK, STOP), seconds: float = 0.0) -> None:
        super().__init__(replies)
        self.seconds, self.batches = seconds, list[int]()

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        self.batches.append(len(observations))
        time.sleep(self.seconds)
        return super().respond(observations)


@contextmanager
def serving(folder: Path, policy: Policy | None = None, token: str | None = None, **limits: Any) -> Iterator[str]:
    """A real server on a free loopback port; its address."""
    service = Service(policy or SlowPolicy(), RegionSegmenter(), folder, limits=Limits(**limits))
    with loopback.serving(create_app(service, token=token)) as address:
        yield address


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(tmp_path_factory.mktemp("data")) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url, token="") as one:
        yield one


def test_one_shot(client: Client) -> None:
    masks = client.segment(png(), "Segment the bright box.")
    assert iou(masks["bright box"], ground_truth()) > 0.8


def test_large_images_take_turns(tmp_path: Path) -> None:
    """Thirty that came as 50 KB each took four gigabytes while they were worked on together."""

    def most_together(pixels: int) -> int:
        policy = SlowPolicy(seconds=0.2)
        with serving(tmp_path / str(pixels), policy, pixels=pixels) as url:

            def ask() -> int:
                sent = {"data": {"query": "bright box"}, "files": {"image": ("a.png", png())}}
                return httpx.post(f"{url}/v1/segment", timeout=60, **sent).status_code

            with ThreadPoolExecutor(12) as threads:
                answers = [threads.submit(ask) for _ in range(12)]
                assert {answer.result() for answer in answers} == {200}
        return max(policy.batches)

    assert most_together(SIZE[0] * SIZE[1]) <= LARGE_RUNS
    assert most_together(100 * SIZE[0] * SIZE[1]) > LARGE_RUNS


def test_a_session_from_end_to_end(client: Client, tmp_path: Path) -> None:
    (tmp_path / "eye.png").write_bytes(png())
    session = client.open(tmp_path / "eye.png", "Segment the bright box.")
    assert (session.view["image"], session.view["width"], session.view["height"]) == ("eye.png", 83, 61)
    turns = list(session.stream())
    assert [turn["thought"] for turn in turns] == ["The bright one.", "It fits."]
    assert turns[0]["actions"][0]["kind"] == "click"
    assert turns[0]["predicted_quality"] > 0
    assert len(session.view["turns"]) == 2
    before = session.masks()
    assert iou(before["bright box"], ground_truth()) > 0.8
    session.click(70, 50, target="background")
    session.box(10, 8, 42, 32, target="bright box")
    assert session.undo()["can_redo"]
    session.redo()
    assert [target["name"] for target in session.view["targets"]] == ["bright box", "background"]
    fork = session.fork(2)
    assert [turn["by"] for turn in fork.view["turns"]] == ["agent", "agent"]
    assert np.array_equal(fork.masks()["bright box"], before["bright box"])
    fork.reset()
    assert fork.view["turns"] == []
    assert fork.ask("Segment the bright box.")["turns"][0]["by"] == "agent"
    with zipfile.ZipFile(io.BytesIO(session.export())) as archive:
        names = set(archive.namelist())
        mask = np.array(PIL.Image.open(archive.open("eye_mask_bright_box.png"))) > 0
    assert {"eye_record.json", "eye_overlay.png", "eye_report.html"} <= names
    assert np.array_equal(mask, session.masks()["bright box"])
    session.accept(absent=["spleen"])
    assert ("spleen", 0) in [(target["name"], target["pixels"]) for target in session.view["targets"]]
    for path in ("image", "overlay", "report"):
        assert client.call("GET", f"/v1/sessions/{session.id}/{path}").content
    session.close()
    with pytest.raises(ConfigError, match="expired"):
        session.refresh()


def test_what_is_expected_of_a_session_is_asked_before_anything_is_done(client: Client) -> None:
    """Who works ahead on a list of a while ago never goes over what somebody did meanwhile."""
    session = client.open(png(), "bright box")
    session.click(50, 40)
    for path, expected in (("run", "new"), ("run", "agent"), ("reset", "agent")):
        with pytest.raises(ConfigError, match=r"'corrected' by now.*409"):
            client.call("POST", f"/v1/sessions/{session.id}/{path}", json={"expected": expected})
    with pytest.raises(DataError, match="expected"):
        client.call("POST", f"/v1/sessions/{session.id}/reset", json={"expected": "none of them"})
    assert [turn["by"] for turn in session.refresh()["turns"]] == ["user"]
    session.reset()
    client.call("POST", f"/v1/sessions/{session.id}/run", json={"expected": "new"})
    client.call("POST", f"/v1/sessions/{session.id}/reset", json={"expected": "agent"})
    assert not session.refresh()["turns"]


def test_a_mask_to_refine(client: Client) -> None:
    encoded = io.BytesIO()
    PIL.Image.fromarray(ground_truth().astype(np.uint8) * 255).save(encoded, format="PNG")
    session = client.open(png(), "bright box", start_mask=encoded.getvalue())
    assert np.array_equal(session.masks()["bright box"], ground_truth())
    with pytest.raises(DataError, match="pixels"):
        client.open(png(size=(70, 90)), "bright box", start_mask=encoded.getvalue())


def test_a_job_has_results_and_names_its_failures(client: Client, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(png())
    (tmp_path / "c.png").write_bytes(b"no image")
    job = client.submit([tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"], "bright box")
    job = client.wait(job["id"], every=0.05)
    assert (job["state"], job["done"], job["images"]) == ("done", 3, 3)
    assert list(job["failures"]) == ["c.png"]
    with zipfile.ZipFile(io.BytesIO(client.results(job["id"]))) as archive:
        assert {"a_record.json", "b_record.json", "a_mask_bright_box.png"} <= set(archive.namelist())
    client.call("DELETE", f"/v1/jobs/{job['id']}")
    with pytest.raises(ConfigError, match="no job"):
        client.job(job["id"])


def test_a_job_can_be_cancelled(tmp_path: Path) -> None:
    with serving(tmp_path / "data", SlowPolicy(seconds=0.2)) as url, Client(url, token="") as client:
        (tmp_path / "a.png").write_bytes(png())
        job = client.submit([tmp_path / "a.png"] * 40, "bright box")
        with pytest.raises(DataError, match="cancel it first"):
            client.call("DELETE", f"/v1/jobs/{job['id']}")
        client.cancel(job["id"])
        job = client.wait(job["id"], every=0.05)
        assert job["state"] == "cancelled"
        assert job["done"] < 40


def test_state_pages(client: Client) -> None:
    assert client.call("GET", "/health").json() == {"status": "ok"}
    assert client.call("GET", "/ready").json() == {"status": "ready"}
    models = client.models()
    assert models["segmenter"]["licence"] == "Apache-2.0"
    assert models["policy"]["name"] == "scripted"
    client.segment(png(), "bright box")
    metrics = client.call("GET", "/metrics").text
    assert re.search(r'ibisagent_requests_total\{area="segment",method="POST",status="200"\} [1-9]', metrics)
    assert "ibisagent_mean_batch" in metrics
    assert client.call("GET", "/openapi.json").json()["info"]["title"] == "ibisagent"


def test_whoever_hangs_up_takes_over(tmp_path: Path) -> None:
    policy = SlowPolicy([CLICK.replace("0.3133", f"0.{number}") for number in range(30, 45)], seconds=0.2)
    with serving(tmp_path, policy) as url, Client(url, token="") as client:
        session = client.open(png(), "bright box")
        for turn in session.stream(max_turns=15):
            assert turn["number"] == 1
            with pytest.raises(ConfigError, match=r"at work.*409"):
                session.ask()
            break
        deadline = time.time() + 5
        while session.refresh()["running"] and time.time() < deadline:
            time.sleep(0.05)
        assert not session.view["running"]
        assert len(session.view["turns"]) < 6


def test_a_model_that_fails_after_a_client_hung_up_is_no_crash(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path, SlowPolicy([CLICK], seconds=0.3)) as url, Client(url, token="") as client:
        session = client.open(png(), "bright box")
        for _ in session.stream():
            break  # the second turn fails: there is no reply for it
        deadline = time.time() + 20
        while session.refresh()["running"] and time.time() < deadline:
            time.sleep(0.05)
        assert not session.view["running"]
    gc.collect()
    assert not [record for record in caplog.records if "never retrieved" in record.getMessage()]


def test_turns_of_different_sessions_are_answered_together(tmp_path: Path) -> None:
    policy = SlowPolicy(seconds=0.1)
    with serving(tmp_path, policy) as url, Client(url, token="") as client:
        sessions = [client.open(png(shift=shift), "bright box") for shift in range(12)]
        threads = [threading.Thread(target=session.run) for session in sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # Counted, not timed: the model's calls are what is saved, and a busy machine does not change them much.
        assert sum(policy.batches) == 12 * 2
        assert len(policy.batches) <= 12
        for session in sessions:
            assert [turn["by"] for turn in session.view["turns"]] == ["agent", "agent"]


def test_one_bad_turn_does_not_harm_the_batch() -> None:
    class Picky(SlowPolicy):
        def respond(self, observations: Sequence[Observation]) -> list[Completion]:
            if any(observation.case_id == "bad" for observation in observations):
                raise PolicyError("picky: not this one")
            return super().respond(observations)

    policy = SharedPolicy(Picky(seconds=0.1))
    image = Image(np.zeros((5, 7, 3), dtype=np.uint8))
    results: dict[str, Any] = {}

    def ask(name: str) -> None:
        try:
            results[name] = policy.respond([Observation(name, image, "q")])[0].text
        except PolicyError as error:
            results[name] = str(error)

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("first", "good", "bad", "fine")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {"first": CLICK, "good": CLICK, "bad": "picky: not this one", "fine": CLICK}
    policy.close()
    with pytest.raises(PolicyError, match="stopping"):
        policy.respond([Observation("late", image, "q")])


def test_a_failing_model_is_503(tmp_path: Path) -> None:
    with serving(tmp_path, SlowPolicy([])) as url, Client(url, token="") as client:
        session = client.open(png(), "bright box")
        with pytest.raises(PolicyError, match=r"503.*replies"):
            session.run()
        with pytest.raises(PolicyError, match="replies"):
            list(session.stream())
        assert session.refresh()["turns"] == []
        session.click(20, 20)  # people are not stopped by it


# ----------------------------------------------------------------------------------------------------- refused


def zip_bomb() -> bytes:
    """A PNG of 30000 x 30000 pixels in a few kilobytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )


UPLOADS: dict[str, tuple[str, bytes, int]] = {
    "garbage": ("eye.png", os.urandom(2000), 422),
    "empty": ("eye.png", b"", 422),
    "cut off": ("eye.png", png()[:-40], 422),
    "bomb": ("eye.png", zip_bomb(), 422),
    "too many pixels": ("eye.png", png(size=(300, 400)), 413),
    "a zip": ("eye.png", b"PK\x03\x04" + bytes(50), 422),
    "a volume": ("brain.nii.gz", b"\x1f\x8b" + bytes(50), 422),
    "html": ("<script>alert(1)</script>.png", b"<html>", 422),
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_bad_uploads(kind: str, tmp_path: Path) -> None:
    name, content, status = UPLOADS[kind]
    with serving(tmp_path / "data", pixels=100_000) as url:
        files = {"image": (name, content)}
        answer = httpx.post(f"{url}/v1/sessions", data={"query": "eye"}, files=files)
        assert answer.status_code == status, answer.text
        assert plain_name(name) in answer.json()["detail"]
        assert str(tmp_path) not in answer.text
        assert not list((tmp_path / "data" / "uploads").iterdir())
        assert httpx.get(f"{url}/v1/sessions").json() == []


@pytest.mark.parametrize("name", ["../../evil.png", "/etc/passwd", "..\\..\\evil.png", "a\x00b.png", "x" * 300, "."])
def test_names_never_become_paths(name: str, tmp_path: Path) -> None:
    with serving(tmp_path / "data") as url, Client(url, token="") as client:
        view = httpx.post(f"{url}/v1/sessions", data={"query": "eye"}, files={"image": (name, png())}).json()
        assert "/" not in view["image"]
        session = client.session(view["id"])
        session.click(20, 20, target="../../etc/passwd")
        with zipfile.ZipFile(io.BytesIO(session.export())) as archive:
            assert not any("/" in member or "\\" in member for member in archive.namelist())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert {path.name for path in (tmp_path / "data").iterdir()} == {"sessions", "jobs", "uploads", *OWNERSHIP}


@pytest.mark.parametrize("id_", ["..", "../..", "%2e%2e", "0" * 32, "a" * 5000, "é"])
def test_ids_never_become_paths(id_: str, url: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/export"), ("POST", "/undo")):
        assert httpx.request(method, f"{url}/v1/sessions/{id_}{path}").status_code in (404, 405)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("click", {"x": 83, "y": 0}, 422),
        ("click", {"x": -1, "y": 0}, 422),
        ("click", {"x": 10**400, "y": 0}, 422),
        ("click", {"x": 1.5, "y": 0}, 422),
        ("click", {"x": "1", "y": 0}, 422),
        ("click", {"x": 1}, 422),
        ("click", {"x": 1, "y": 1, "colour": "red"}, 422),
        ("click", {"x": 1, "y": 1, "target": " \n"}, 422),
        ("click", [], 422),
        ("box", {"x0": 5, "y0": 5, "x1": 5, "y1": 9}, 422),
        ("ask", {"query": "x" * 2001}, 422),
        ("run", {"max_turns": 0}, 422),
        ("fork", {"turn": 3}, 422),
        ("undo", None, 422),
        ("redo", None, 422),
    ],
)
def test_bad_actions(path: str, body: Any, status: int, client: Client) -> None:
    session = client.open(png(), "bright box")
    answer = httpx.post(f"{client.url}/v1/sessions/{session.id}/{path}", json=body)
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json()["detail"], str)
    assert session.refresh()["turns"] == []
    session.close()


def test_bodies_that_are_no_bodies(url: str) -> None:
    for content in (b"{", b"\xff\xfe", b'{"query": "\\ud800"}', b"[" * 50_000):
        answer = httpx.post(
            f"{url}/v1/sessions/{'0' * 32}/ask", content=content, headers={"content-type": "application/json"}
        )
        assert 400 <= answer.status_code < 500, answer.text
    broken = {"content-type": "multipart/form-data; boundary=x"}
    for content in (b"", b"--x\r\n", b"no form at all"):
        assert 400 <= httpx.post(f"{url}/v1/segment", content=content, headers=broken).status_code < 500


def test_what_is_beyond_a_limit_is_refused(tmp_path: Path) -> None:
    limits = {"sessions": 2, "upload_bytes": 50_000, "jobs": 1, "job_images": 2, "turns": 5}
    with serving(tmp_path, **limits) as url, Client(url, token="") as client:
        client.open(png(), "a")
        second = client.open(png(), "b")
        with pytest.raises(ConfigError, match="429"):
            client.open(png(), "c")
        with pytest.raises(ConfigError, match="429"):
            second.fork(0)
        second.close()
        client.open(png(), "c")
        noise = io.BytesIO()
        PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(noise, "PNG")
        with pytest.raises(DataError, match="50000"):
            client.segment(noise.getvalue(), "a")
        assert httpx.post(f"{url}/v1/segment", content=bytes(2 * 2**20)).status_code == 413
        assert httpx.post(f"{url}/v1/segment", content=iter([b"a", b"b"])).status_code == 411
        with pytest.raises(DataError, match="1 to 5"):
            client.segment(png(), "a", max_turns=6)
        (tmp_path / "a.png").write_bytes(png())
        with pytest.raises(DataError, match="1 to 2"):
            client.submit([tmp_path / "a.png"] * 3, "a")
        client.wait(client.submit([tmp_path / "a.png"], "a")["id"], every=0.02)
        with pytest.raises(ConfigError, match="jobs"):
            client.submit([tmp_path / "a.png"], "a")
    with pytest.raises(ConfigError, match="limit turns"):
        Limits(turns=0)


def test_nothing_but_the_token_opens_the_server(tmp_path: Path) -> None:
    with serving(tmp_path, token="secret") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secre"}, {"cookie": "x=secret"}):
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert answer.status_code == 401
            assert "token" in answer.json()["detail"]
            assert httpx.get(f"{url}/docs", headers=headers).status_code == 401
        with Client(url, token="secret") as client:
            assert client.models()["version"]
        browser = httpx.Client(base_url=url, headers={"accept": "text/html"})
        assert browser.get("/v1/models").headers["location"] == "/login"
        assert "token" in browser.get("/login").text
        assert browser.post("/login", data={"token": "wrong"}).status_code == 401
        assert browser.post("/login", data={"token": "secret"}).status_code == 303
        assert browser.get("/v1/models").status_code == 200
        browser.close()


def test_other_pages_and_names_are_not_answered(url: str) -> None:
    assert httpx.get(f"{url}/health", headers={"host": "evil.example"}).status_code == 400
    answer = httpx.post(f"{url}/v1/segment", headers={"origin": "http://evil.example"})
    assert answer.status_code == 403
    assert "access-control-allow-origin" not in answer.headers
    own = httpx.get(f"{url}/health", headers={"origin": url})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers
    assert own.headers["x-content-type-options"] == "nosniff"


def test_plain_names() -> None:
    assert plain_name("a/b\\c.png") == "c.png"
    assert plain_name("") == plain_name("..//") == "image"
    assert plain_name("a" * 300 + ".nii.gz") == "a" * 93 + ".nii.gz"  # the ending says how to read it
    assert plain_name("a\nb\x1b[31m.png") == "a_b_[31m.png"


# ----------------------------------------------------------------------------------------- expiry and restarts


def test_idle_sessions_expire_with_their_files(tmp_path: Path) -> None:
    service = Service(SlowPolicy(), RegionSegmenter(), tmp_path, limits=Limits(idle_seconds=100))
    kept = service.open(service.read_upload(png(), "a.png"), "a")
    gone = service.open(service.read_upload(png(), "b.png"), "b")
    service._touched[gone.id] -= 200
    assert service.expire() == 1
    assert service.session_ids == [kept.id]
    assert [path.name for path in (tmp_path / "sessions").iterdir()] == [kept.id]
    assert service.expire(time.time() + 101) == 1
    assert not list((tmp_path / "sessions").iterdir())
    service.close()


def test_a_server_looks_for_idle_sessions_again_and_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibisagent.server.app.EXPIRY_SECONDS", 0.02)
    with serving(tmp_path, idle_seconds=0.1) as url, Client(url, token="") as client:
        for _ in range(2):
            client.open(png(), "bright box")
            deadline = time.time() + 30
            while client.call("GET", "/v1/sessions").json():
                assert time.time() < deadline
                time.sleep(0.02)


@contextmanager
def process(folder: Path, port: int, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    script = folder.with_suffix(".json")
    script.write_text(json.dumps([CLICK] * 400))
    arguments = ["serve", "--policy", f"scripted:{script}", "-s", "region", "--data", folder, "--port", port]
    command = [sys.executable, "-m", "ibisagent", *map(str, arguments)]
    with subprocess.Popen(command, env={**os.environ, **environment}, cwd=folder.parent) as running:
        try:
            loopback.wait_until_up(f"http://127.0.0.1:{port}", running)
            yield running
        finally:
            running.kill()


def test_killed_under_load_and_started_again(tmp_path: Path) -> None:
    port = free_port()
    seen: dict[str, list[dict[str, Any]]] = {}
    watched = {name: tmp_path / name for name in ("home", "tmp")}
    for folder in watched.values():
        folder.mkdir()
    environment = {"HOME": str(watched["home"]), "TMPDIR": str(watched["tmp"])}

    def use(number: int) -> None:
        with Client(f"http://127.0.0.1:{port}", token="") as client:
            session = client.open(png(shift=number), f"bright box {number}")
            try:
                for column in range(200):
                    session.click(column % 83, 2 + column // 83)
                    seen[session.id] = session.view["turns"]
                    session.ask()
                    seen[session.id] = session.view["turns"]
            except PolicyError:
                pass  # killed

    with process(tmp_path / "data", port, **environment) as running:
        threads = [threading.Thread(target=use, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and (len(seen) < 6 or min(map(len, [*seen.values()])) < 4):
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join()
    with process(tmp_path / "data", port, **environment), Client(f"http://127.0.0.1:{port}", token="") as client:
        assert set(client.call("GET", "/v1/sessions").json()) == set(seen)
        for id_, turns in seen.items():
            session = client.session(id_)
            assert session.view["turns"][: len(turns)] == turns
            assert len(session.view["turns"]) <= len(turns) + 1
            session.click(80, 60)
    for folder in watched.values():
        assert not [path for path in folder.rglob("*") if path.is_file()], "written outside the data folder"


def test_a_damaged_session_is_no_500(tmp_path: Path) -> None:
    service = Service(SlowPolicy(), RegionSegmenter(), tmp_path)
    id_ = service.open(service.read_upload(png(), "a.png"), "a").id
    service.close()
    (tmp_path / "sessions" / id_ / "session.json").write_text("{")
    (tmp_path / "sessions" / ("b" * 32)).mkdir()  # killed before its first file
    with serving(tmp_path) as url:
        assert httpx.get(f"{url}/v1/sessions").json() == [id_]
        answer = httpx.get(f"{url}/v1/sessions/{id_}")
        assert answer.status_code == 422
        assert "damaged" in answer.json()["detail"]
        assert httpx.delete(f"{url}/v1/sessions/{id_}").status_code == 204


def test_the_client_needs_no_torch() -> None:
    code = (
        "import sys, ibisagent.server.client; print([one for one in ('torch', 'transformers') if one in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_client_says_what_is_wrong(tmp_path: Path) -> None:
    with Client(f"http://127.0.0.1:{free_port()}", token="") as client:
        with pytest.raises(PolicyError, match=r"cannot be reached.*ibisagent serve"):
            client.models()
        with pytest.raises(DataError, match=r"none\.png"):
            client.segment(tmp_path / "none.png", "a")
