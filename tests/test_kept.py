"""Nothing that somebody made is lost: idle times, restarts, a second server, a full disk, a stop in the middle."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import loopback
import nibabel
import numpy as np
import PIL.Image
import pytest
from loopback import Slow, png
from volume_phantoms import GRIDS, blob, hounsfield

from ibisagent.domain import Image
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.inference.session import Session
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app
from ibisagent.server.client import Client
from ibisagent.server.scans import SCAN_FILE, Scan, Scans
from ibisagent.server.service import IN_HAND_SECONDS, LOADED_IMAGES, FullError, Limits, MissingError, Service
from ibisagent.server.volumes import PackageVolumes
from ibisagent.server.worklist import Worklist

CLICK = "<action>click + (0.3133, 0.3197) bright box</action>"
STOP = "<action>stop</action>"
DAY = 24 * 3600.0


def service_in(folder: Path, policy: ScriptedPolicy | None = None, address: str = "", **limits: Any) -> Service:
    policy = policy or ScriptedPolicy([CLICK, STOP])
    return Service(policy, RegionSegmenter(), folder, limits=Limits(**limits), address=address)


def opened(service: Service, **how: Any) -> Session:
    return service.open(service.read_upload(png(), "a.png"), "bright box", **how)


@pytest.mark.parametrize("worked", ["click", "run", "accept", "start mask", "another request"])
def test_the_work_of_yesterday_is_there_tomorrow(worked: str, tmp_path: Path) -> None:
    service = service_in(tmp_path)
    mask = np.zeros((61, 83), dtype=bool)
    mask[12:20, 12:30] = True
    session = opened(service, start=mask if worked == "start mask" else None)
    if worked == "click":
        session.click(20, 20)
    elif worked == "run":
        session.run()
    elif worked == "accept":
        session.accept()
    elif worked == "another request":
        session.run()
        session.reset()
        session.request("other box")
        session.click(20, 20)
    shown = {name: mask.copy() for name, mask in session.masks.items()}
    service.close()
    for path in (*(tmp_path / "sessions").rglob("*"), tmp_path / "sessions" / session.id):
        os.utime(path, (time.time() - 14 * 3600,) * 2)
    again = service_in(tmp_path)
    assert again.expire() == 0
    assert again.expire(time.time() + 400 * DAY) == 0
    assert again.session_ids == [session.id]
    back = again.session(session.id)
    assert back.masks.keys() == shown.keys()
    assert all(np.array_equal(back.masks[name], shown[name]) for name in shown)
    back.click(70, 50, target="background")
    again.close()


def test_a_page_that_idles_goes_on_where_it_was(tmp_path: Path) -> None:
    service = service_in(tmp_path, sessions=1, idle_seconds=100)
    session = opened(service, owner="somebody")
    session.click(20, 20)
    untouched = opened(service, owner="somebody")
    with pytest.raises(FullError):
        opened(service)
    for one in (session, untouched):
        service._touched[one.id] -= 200
    assert service.expire() == 0
    opened(service)  # those who idle take nobody's place, and no memory
    assert service.session(session.id) is not session
    assert len(service.session(session.id).steps) == 1
    assert {untouched.id, session.id} < set(service.ids_for("somebody"))
    service.close()


def test_memory_is_bounded_by_the_size_of_the_images(tmp_path: Path) -> None:
    service = service_in(tmp_path, pixels=61 * 83, sessions=100)
    sessions = [opened(service, owner="somebody") for _ in range(LOADED_IMAGES)]
    for one in sessions[:3]:
        service._touched[one.id] -= 2 * IN_HAND_SECONDS
    opened(service, owner="somebody")
    stay = [service.session(one.id) is one for one in sessions[1:]]
    assert all(stay), "more was put away than had to be"
    assert service.session(sessions[0].id) is not sessions[0]
    more = [opened(service, owner="somebody") for _ in range(3 * LOADED_IMAGES)]  # a large folder, all at once
    assert sum(service.loaded(one.id) is not None for one in more) <= LOADED_IMAGES
    for id_ in service.session_ids:
        service.session(id_)
        service._touched[id_] -= 2 * IN_HAND_SECONDS
    service.expire()  # users pause: what was in hand is no longer
    assert sum(service.loaded(id_) is not None for id_ in service.session_ids) == LOADED_IMAGES
    service.close()


def test_a_session_in_which_somebody_acts_stays_in_memory(tmp_path: Path) -> None:
    """A click on a busy machine takes longer than a session is in hand: who asks meanwhile must not read it anew."""
    service = service_in(tmp_path, pixels=61 * 83, sessions=100)
    sessions = [service.session(opened(service).id) for _ in range(LOADED_IMAGES + 2)]
    for one in sessions:
        service._touched[one.id] -= 2 * IN_HAND_SECONDS
    acting, done = threading.Event(), threading.Event()

    def act() -> None:
        with sessions[0]._lock:
            acting.set()
            done.wait(30)

    user = threading.Thread(target=act)
    user.start()
    acting.wait(30)
    service.expire()
    service._put_away(sessions[0].id, float("inf"))
    assert service.loaded(sessions[0].id) is sessions[0]
    done.set()
    user.join()
    service._put_away(sessions[0].id, float("inf"))
    assert service.loaded(sessions[0].id) is None
    service.close()


def test_a_stream_says_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ibisagent.server.app.ALIVE_SECONDS", 0.1)
    with (
        loopback.serving(create_app(service_in(tmp_path, Slow([CLICK, STOP], seconds=0.5)))) as url,
        Client(url, token="") as client,
    ):
        session = client.open(png(), "bright box")
        raw = httpx.post(f"{url}/v1/sessions/{session.id}/run/stream", json={"max_turns": 1}, timeout=60)
        assert ": still at work" in raw.text
        assert raw.headers["x-accel-buffering"] == "no"
        assert len(list(session.stream())) == 1  # what it says to proxies is no turn


def test_what_goes_is_what_nobody_worked_on(tmp_path: Path) -> None:
    service = service_in(tmp_path, idle_seconds=100)
    untouched, agents = opened(service), opened(service, passing=True)
    agents.click(20, 20)
    fork = service.fork(agents.id, 1)
    assert service.expire(time.time() + 50) == 0
    service.close()
    again = service_in(tmp_path, idle_seconds=100)  # whose it is, is known after a restart as well
    assert again.expire(time.time() + 101) == 3
    for one in (untouched, agents, fork):
        with pytest.raises(MissingError):
            again.session(one.id)
    assert not list((tmp_path / "sessions").iterdir())
    again.close()


def test_everything_goes_where_that_is_asked_for(tmp_path: Path) -> None:
    service = service_in(tmp_path, delete_seconds=10 * DAY)
    opened(service).click(20, 20)
    job = service.submit([("a.png", png())], "bright box")
    wait(lambda: job.over)
    assert service.expire(time.time() + 9 * DAY) == 0
    assert service.expire(time.time() + 11 * DAY) == 2
    assert not service.session_ids
    assert not service.jobs
    service.close()


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    notes = [tmp_path / "sessions" / "notes.txt", tmp_path / "jobs" / "old" / "a.txt", tmp_path / "thesis.doc"]
    for note in notes:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text("mine")
    service = service_in(tmp_path)
    service.expire(time.time() + 400 * DAY)
    service.close()
    assert all(note.read_text() == "mine" for note in notes)


def wait(holds: Any) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_results_wait_until_they_are_fetched(tmp_path: Path) -> None:
    service = service_in(tmp_path, jobs=1)
    job = service.submit([("a.png", png()), ("b.png", b"no image")], "bright box")
    wait(lambda: job.over)
    service.close()
    again = service_in(tmp_path, jobs=1)
    [back] = again.jobs
    assert (back.state, back.done, list(back.failures)) == ("done", 2, ["b.png"])
    assert again.expire(time.time() + 400 * DAY) == 0
    with pytest.raises(FullError, match="fetch or delete"):
        again.submit([("a.png", png())], "bright box")
    assert b"a_record.json" in again.results(job.id)
    assert again.expire(time.time() + 400 * DAY) == 0
    again.note_fetched(job.id)
    assert again.expire(time.time() + 60) == 0
    again.close()
    last = service_in(tmp_path, jobs=1)
    last.submit([("a.png", png())], "bright box")  # what was fetched takes no place
    assert last.expire(time.time() + 2 * 3600) == 1
    last.close()


def test_half_a_download_is_none(tmp_path: Path) -> None:
    app = create_app(service_in(tmp_path, jobs=1))
    small = httpx.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])  # little is under way
    with (
        loopback.serving(app) as url,
        httpx.Client(base_url=url, timeout=120) as web,
        httpx.Client(base_url=url, timeout=120, transport=small) as hasty,
    ):
        job = web.post("/v1/jobs", data={"query": "box"}, files={"images": ("a.png", png(noise=1600))}).json()["id"]
        wait(lambda: web.get(f"/v1/jobs/{job}").json()["state"] == "done")

        def another() -> int:
            return web.post("/v1/jobs", data={"query": "box"}, files={"images": ("a.png", png())}).status_code

        with hasty.stream("GET", f"/v1/jobs/{job}/results") as results:
            next(results.iter_raw(1000))
        assert another() == 429, "what was only begun is kept, and takes the only place"
        whole = web.get(f"/v1/jobs/{job}/results")
        assert len(whole.content) == int(whole.headers["content-length"])
        assert another() == 202


def test_a_clock_that_is_set_forward_makes_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = service_in(tmp_path, delete_seconds=10 * DAY)
    worked, fresh = opened(service), opened(service, passing=True)
    worked.click(20, 20)
    job = service.submit([("a.png", png())], "bright box")
    wait(lambda: job.over)
    service.note_fetched(job.id)
    real = time.time
    for years in (5, -5):
        monkeypatch.setattr(time, "time", lambda later=years * 365 * DAY: real() + later)
        service.session(worked.id)
        assert service.job(job.id)
        assert service.expire() == 0
        assert set(service.session_ids) == {worked.id, fresh.id}
    service.close()


def a_scan(scans: Scans, name: str = "ct.nii", query: str = "blob") -> Scan:
    volume = nibabel.Nifti1Image(hounsfield(blob((20, 18, 9))), GRIDS["RAS-uneven"])
    return scans.open([(name, volume.to_bytes())], query, None)


def scans_in(folder: Path, **limits: Any) -> tuple[Service, Scans]:
    models = ScriptedPolicy([CLICK, STOP]), RegionSegmenter()
    service = Service(*models, folder, limits=Limits(**limits), volumes=PackageVolumes())
    return service, Scans(service)


def test_a_slice_stays_as_long_as_its_scan(tmp_path: Path) -> None:
    service, scans = scans_in(tmp_path, delete_seconds=10 * DAY)
    scan = a_scan(scans)
    session = scans.session_to_act_in(scan, "axial", 4, "auto")
    session.brush([(9.5, 8.5)], 3, add=True)
    later = time.time() + 11 * DAY
    os.utime(scans.folder(scan), (later, later))  # somebody looks at the scan, day after day
    assert service.expire(later) == 0
    assert scans.masks(scan, "axial", 4)["blob"][8, 9]
    assert service.expire(later + 11 * DAY) == 1
    assert not service.session_ids
    service.close()


def test_a_scan_can_be_labelled_on_more_slices_than_there_may_be_sessions(tmp_path: Path) -> None:
    service, scans = scans_in(tmp_path, sessions=2)
    scan = a_scan(scans)
    for index in range(6):
        scans.session_to_act_in(scan, "axial", index, "auto").click(3, 2)
    for _ in range(2):
        opened(service)
    with pytest.raises(FullError, match="2 sessions in use"):
        opened(service)
    service.close()


def test_accepted_images_are_exported_as_png_under_names_that_stay_inside(tmp_path: Path) -> None:
    service, scans = scans_in(tmp_path / "data")
    opened(service).click(20, 20)  # not accepted
    session = opened(service)
    session.click(20, 20, target="../../bright box")
    session.accept()
    with Worklist(service, scans).exported(None, "png") as path, zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        assert not [name for name in names if name.startswith("/") or ".." in Path(name).parts]
        [mask] = [name for name in names if "_mask" in name]
        archive.extract(mask, tmp_path)
    exported = np.array(PIL.Image.open(tmp_path / mask)) > 0
    assert np.array_equal(exported, session.masks["../../bright box"])
    service.close()


def test_scans_of_the_same_name_are_all_exported_and_empty_ones_stop_nothing(tmp_path: Path) -> None:
    service, scans = scans_in(tmp_path / "data")
    worklist = Worklist(service, scans)
    three = [a_scan(scans) for _ in range(3)]
    for scan in three[:2]:
        scans.session_to_act_in(scan, "axial", 4, "auto").brush([(9.5, 8.5)], 3, add=True)
    scans.accept(three[2])
    with pytest.raises(ConfigError, match="nothing to export"), worklist.exported(None, "nifti"):
        pass
    for scan in three[:2]:
        scans.accept(scan)
    for kind in ("nifti", "coco", "seg"):
        with worklist.exported(None, kind) as path, zipfile.ZipFile(path) as archive:
            assert len([name for name in archive.namelist() if name.endswith(".nii.gz")]) == 2, kind
    service.close()


def test_a_stop_ends_what_goes_through_a_scan(tmp_path: Path) -> None:
    class Stopping(RegionSegmenter):
        """Somebody stops the server as it opens its fifth image."""

        opened = 0

        def open(self, image: Image) -> Any:
            Stopping.opened += 1
            if Stopping.opened == 5:
                service.stop()
            return super().open(image)

    service = Service(ScriptedPolicy([CLICK, STOP]), Stopping(), tmp_path, volumes=PackageVolumes())
    scans = Scans(service)
    volume = nibabel.Nifti1Image(hounsfield(blob((30, 28, 60))), GRIDS["RAS-uneven"])
    scan = scans.open([("ct.nii", volume.to_bytes())], "blob", None)
    scans.session_to_act_in(scan, "axial", 30, "auto").click(12, 28)
    before = scans.masks(scan, "axial", 30)
    with pytest.raises(PolicyError, match="the server stops"):
        scans.propagate(scan, "axial", 30)
    assert Stopping.opened < 10
    assert scan.progress is None
    assert np.array_equal(scans.masks(scan, "axial", 30)["blob"], before["blob"])
    assert not scans.masks(scan, "axial", 31)
    service.close()


def test_a_damaged_scan_is_left_alone_and_keeps_no_server_from_starting(tmp_path: Path) -> None:
    service, scans = scans_in(tmp_path)
    whole, damaged = a_scan(scans), a_scan(scans)
    service.close()
    file = tmp_path / "scans" / damaged.id / SCAN_FILE
    file.write_text("{")
    again, back = scans_in(tmp_path)
    again.expire(time.time() + 400 * DAY)
    assert [one.id for one in back.of(None)] == [whole.id]
    assert file.exists()
    again.close()


def test_a_job_goes_on_after_a_restart(tmp_path: Path) -> None:
    service = service_in(tmp_path, Slow([CLICK, STOP]))
    job = service.submit([(f"{number}.png", png()) for number in range(12)], "bright box")
    waiting = service.submit([("a.png", png())], "bright box")
    cancelled = service.submit([("a.png", png())], "bright box")
    service.cancel(cancelled.id)
    wait(lambda: job.done)
    service.close()
    assert not job.over
    again = service_in(tmp_path)
    states = {one.id: one for one in again.jobs}
    wait(lambda: states[job.id].over and states[waiting.id].over)
    assert (states[job.id].state, states[job.id].done, states[job.id].failures) == ("done", 12, {})
    assert states[waiting.id].state == "done"
    assert states[cancelled.id].state == "cancelled"
    assert len(list((tmp_path / "jobs" / job.id / "out").glob("*_record.json"))) == 12
    again.close()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    service = service_in(tmp_path, address="http://127.0.0.1:8002")
    session = opened(service)
    (tmp_path / "uploads" / "being-read").write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* at http://127.0.0.1:8002, since .*--data"):
        service_in(tmp_path)
    assert (tmp_path / "uploads" / "being-read").exists(), "the second one touched the files of the first"
    assert service.session(session.id) is session
    service.close()
    service_in(tmp_path).close()


def test_a_file_that_is_too_large_says_the_limit(tmp_path: Path) -> None:
    service = service_in(tmp_path, upload_bytes=100_000)
    with loopback.serving(create_app(service)) as url:
        for size in (110_000, 3_000_000):
            answer = httpx.post(f"{url}/v1/sessions", data={"query": "a"}, files={"image": ("a.png", bytes(size))})
            assert answer.status_code == 413
            assert any(limit in answer.json()["detail"] for limit in ("100000", str(100_000 + 2**20)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root can mount a small disk here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def filled(disk: Path) -> Path:
    """A file that takes all the room there is."""
    filler = disk / "filler"
    with filler.open("wb") as file:
        for size in (2**16, 2**12):
            with suppress(OSError):
                while True:
                    os.write(file.fileno(), bytes(size))
    return filler


def test_a_full_disk_changes_nothing_of_a_scan(small_disk: Path) -> None:
    service, scans = scans_in(small_disk / "data")
    scan = a_scan(scans)
    session = scans.session_to_act_in(scan, "axial", 4, "auto")
    session.brush([(9.5, 8.5)], 3, add=True)
    filler = filled(small_disk)
    before = scans.shown_slices(scan, "axial"), scans.state(scan), scan.query
    for act in (
        lambda: scans.propagate(scan, "axial", 4),
        lambda: scans.find(scan, "axial"),
        lambda: scans.ask(scan, "another"),
        lambda: scans.accept(scan),
        lambda: scans.session_to_act_in(scan, "axial", 5, "auto"),
    ):
        with pytest.raises(DataError, match="No space left"):
            act()
        assert (scans.shown_slices(scan, "axial"), scans.state(scan), scan.query) == before
        assert service.session_ids == [session.id]
        assert not scans.can_undo(scan)
    worklist = Worklist(service, scans)
    assert worklist.thumbnail(scans.folder(scan), lambda: session.image.pixels).startswith(b"\xff\xd8")
    filler.unlink()
    scans.propagate(scan, "axial", 4)
    assert scans.can_undo(scan)
    service.close()


def test_a_full_disk(small_disk: Path) -> None:
    service = service_in(small_disk / "data")
    with loopback.serving(create_app(service)) as url, httpx.Client(base_url=url, timeout=60) as web:
        sent: dict[str, Any] = {"data": {"query": "bright box"}}
        id_ = web.post("/v1/sessions", **sent, files={"image": ("a.png", png())}).json()["id"]
        web.post(f"/v1/sessions/{id_}/click", json={"x": 20, "y": 20})
        assert web.get("/ready").status_code == 200
        filler = filled(small_disk)
        assert "full" in web.get("/ready").json()["detail"] or "space" in web.get("/ready").json()["detail"]
        for path, files in (("sessions", {"image": ("a.png", png(400))}), ("jobs", {"images": ("a.png", png(400))})):
            answer = web.post(f"/v1/{path}", **sent, files=files)
            assert answer.status_code == 507, answer.text
            assert "No space left" in answer.json()["detail"]
            assert str(small_disk) not in answer.text
        answer = web.post(f"/v1/sessions/{id_}/click", json={"x": 60, "y": 50})
        assert answer.status_code == 507
        assert web.get("/v1/jobs").json() == []
        assert web.get("/v1/sessions").json() == [id_]
        assert len(web.get(f"/v1/sessions/{id_}").json()["turns"]) == 1
        filler.unlink()
        assert web.get("/ready").status_code == 200
        assert len(web.post(f"/v1/sessions/{id_}/click", json={"x": 60, "y": 50}).json()["turns"]) == 2
        job = web.post("/v1/jobs", **sent, files={"images": ("a.png", png())}).json()["id"]
        wait(lambda: web.get(f"/v1/jobs/{job}").json()["state"] == "done")
        assert web.get(f"/v1/jobs/{job}").json()["failures"] == {}


SERVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_kept import CLICK, STOP, Slow, service_in
from ibisagent.server.app import serve
clicks = [f"<action>click + (0.{n:02d}, 0.5) bright box</action>" for n in range(10, 90)]
print("ready", flush=True)
serve(service_in(Path(sys.argv[2]), Slow([*clicks, STOP], 0.3)), port=int(sys.argv[3]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_the_middle(number: signal.Signals, tmp_path: Path) -> None:
    port = loopback.free_port()
    command = [sys.executable, "-c", SERVE, str(Path(__file__).parent), str(tmp_path / "data"), str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == b"ready\n"
            url = f"http://127.0.0.1:{port}"
            loopback.wait_until_up(url, running)
            with httpx.Client(base_url=url, timeout=60) as web:
                files = {"image": ("a.png", png())}
                ids = [web.post("/v1/sessions", data={"query": "box"}, files=files).json()["id"] for _ in range(2)]
                plain: list[httpx.Response] = []
                asked = threading.Thread(
                    target=lambda: plain.append(httpx.post(f"{url}/v1/sessions/{ids[1]}/run", json={}, timeout=60))
                )
                asked.start()
                web.post("/v1/jobs", data={"query": "box"}, files=[("images", (f"{n}.png", png())) for n in range(9)])
                with web.stream("POST", f"/v1/sessions/{ids[0]}/run/stream", json={}) as stream:
                    lines = stream.iter_lines()
                    assert next(lines) == "event: turn"
                    stopped = time.monotonic()
                    running.send_signal(number)
                    said = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
                asked.join()
            running.wait(20)
        finally:
            running.kill()
        took = time.monotonic() - stopped
        assert running.stderr is not None
        errors = running.stderr.read().decode()
    assert took < 5
    assert "Traceback" not in errors, errors
    assert said[-1]["ended"] == "interrupted"
    assert plain[0].json()["ended"] == "interrupted"
    again = service_in(tmp_path / "data")
    assert all(again.session(id_).steps for id_ in ids)
    [job] = again.jobs
    wait(lambda: job.over)
    assert job.done == 9
    again.close()
