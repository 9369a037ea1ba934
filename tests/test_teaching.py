"""The server's teacher: what users accepted is learned from in another process, and whatever happens nothing is lost.

The process is a stand-in that takes no time: what the real one learns is tested where it is at home, and on the page.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import nibabel
import numpy as np
import pytest
from loopback import png, serving
from volume_phantoms import GRIDS

from ibisagent.datasets import read_cases
from ibisagent.domain import Image
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.inference.corrections import add_to_data_set
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.annotate import mount_annotate
from ibisagent.server.app import create_app
from ibisagent.server.labelled import Labelled
from ibisagent.server.monai import mount_monai
from ibisagent.server.service import Service
from ibisagent.server.teaching import Teacher, verdict
from ibisagent.server.teaching_routes import mount_teaching
from ibisagent.server.volumes import PackageVolumes

STAND_IN = """
import json, os, shutil, sys, time
from pathlib import Path
asked = json.loads(sys.argv[1])
say, out = Path(asked["say"]), Path(asked["out"])
told = json.loads(Path(r"PLAN").read_text())
out.mkdir(parents=True, exist_ok=True)
runs = out / "runs"
runs.write_text(str(int(runs.read_text()) + 1 if runs.exists() else 1))
shutil.copytree(Path(asked["data"]).parent, Path(r"PLAN").parent / "seen", dirs_exist_ok=True)
step = {"stage": "learning", "done": 1, "total": 4, "seconds_left": 100.0}
(say / "progress.json").write_text(json.dumps(step))
while not Path(r"PLAN").with_name("go").exists():
    time.sleep(0.02)
if told.get("signal"):
    os.kill(os.getpid(), told["signal"])
(say / "result.json").write_text(json.dumps(told["result"]))
"""


def objects(*, kept: bool = True, name: str = "bright box") -> list[dict[str, Any]]:
    return [{"name": name, "images": 3, "before": 0.41, "after": 0.67, "interval": [0.1, 0.4], "kept": kept}]


class World:
    """A server in one folder that can be stopped and started again, and what its teacher will do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan, self.go = folder / "plan.json", folder / "go"
        script = folder / "stand_in.py"
        script.write_text(STAND_IN.replace("PLAN", str(self.plan)))
        self.command = (sys.executable, str(script))
        self.will({"objects": objects()})
        self.loaded: list[str] = []

    def will(self, result: dict[str, Any] | None, *, signal: int = 0, at_once: bool = True) -> None:
        self.plan.write_text(json.dumps({"result": result, "signal": signal}))
        self.go.touch() if at_once else self.go.unlink(missing_ok=True)

    def load(self, folder: str) -> ScriptedPolicy:
        if not (Path(folder) / "runs").is_file():
            raise PolicyError(f"{folder}: holds no agent")
        self.loaded.append(folder)
        return ScriptedPolicy(["<action>stop</action>"] * 9, name=folder)

    @contextmanager
    def served(self, learn_every: int | None = None) -> Iterator[tuple[httpx.Client, Service]]:
        policy = ScriptedPolicy(["<action>click + (0.3, 0.3) bright box</action>", "<action>stop</action>"])
        service = Service(policy, RegionSegmenter(), self.folder / "data", volumes=PackageVolumes())
        teaching = partial(mount_teaching, learn_every=learn_every, process=self.command, load=self.load)
        app = create_app(service, mounts=(mount_annotate, mount_monai, teaching))
        with serving(app) as url, httpx.Client(base_url=url, timeout=30) as web:
            yield web, service

    @property
    def seen(self) -> dict[str, int]:
        """What the process was given: images by object."""
        found: dict[str, int] = {}
        for row in read_cases(self.folder / "seen" / "manifest.csv").rows:
            found[row.object] = found.get(row.object, 0) + 1
        return found


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def label(web: httpx.Client, count: int, *, first: int = 0, accept: bool = True) -> list[str]:
    """Images with a box each that a user drew, and accepted."""
    ids = []
    for number in range(first, first + count):
        image = {"image": (f"{number}.png", png(noise=2 + number))}
        id_ = web.post("/v1/sessions", files=image, data={"query": "bright box"}).json()["id"]
        web.post(f"/v1/sessions/{id_}/box", json={"x0": 10, "y0": 8, "x1": 42, "y1": 32, "target": "bright box"})
        if accept:
            assert web.post(f"/v1/sessions/{id_}/accept", json={}).status_code == 200
        ids.append(id_)
    return ids


def after(web: httpx.Client, state: str = "running") -> dict[str, Any]:
    """How it stands once it is no longer in a state."""
    deadline = time.monotonic() + 30
    while (now := web.get("/v1/teaching").json())["state"] == state:
        assert time.monotonic() < deadline, now
        time.sleep(0.05)
    return dict(now)


def test_what_was_accepted_teaches_and_the_new_agent_answers(world: World) -> None:
    with world.served() as (web, service):
        assert web.get("/v1/teaching").json()["state"] == "none"
        open_session = label(web, 1, accept=False)[0]  # corrected, and still open
        label(web, 3, first=1)
        begun = web.post("/v1/teaching")
        assert begun.status_code == 202
        told = after(web)
        assert told["state"] == "done"
        verdict_told, _, place = told["said"].partition(" It is ")
        assert verdict_told == "bright box: 0.41 -> 0.67 on your images; the new agent is used."
        assert place == "agents/1 in the data folder, for --policy."
        assert Path(told["folder"]) == world.folder / "data" / "agents" / "1"
        assert (service.policy.name, world.loaded) == ("agents/1", [told["folder"]])
        assert world.seen == {"bright box": 4}
        assert not (world.folder / "data" / "teaching" / "data").exists()  # no copy of anybody's images stays
        ended = web.post(f"/v1/sessions/{open_session}/run", json={"query": "bright box"})
        assert ended.json()["ended"] == "stopped"  # by the new agent, in the session that was open
        assert (told["labelled"], told["new"]) == (4, 0)
    with world.served() as (web, service):  # it is still there tomorrow
        assert service.policy.name == "agents/1"
        assert web.get("/v1/teaching").json()["agent"] == 1
        assert web.delete("/v1/teaching/agent").json()["agent"] == 0
        assert service.policy.name == "scripted"
        assert web.delete("/v1/teaching/agent").status_code == 422


def test_the_old_agent_is_kept_where_the_new_one_is_not_better(world: World) -> None:
    world.will({"objects": objects(kept=False)})
    with world.served() as (web, service):
        label(web, 3)
        before = service.policy.name
        web.post("/v1/teaching")
        told = after(web)
        assert "not surely better on your images (0.41 -> 0.67); the old agent is kept" in told["said"]
        assert (told["agent"], service.policy.name) == (0, before)
        assert not list((world.folder / "data" / "agents").iterdir())


def test_too_few_images_two_starts_and_a_stop(world: World) -> None:
    world.will({"objects": objects()}, at_once=False)
    with world.served() as (web, _):
        label(web, 2)
        refused = web.post("/v1/teaching")
        assert refused.status_code == 422
        assert refused.json()["detail"] == "2 images are accepted or corrected, it takes 3: do more first"
        assert web.delete("/v1/teaching").status_code == 422
        label(web, 1, first=2)
        assert web.post("/v1/teaching").status_code == 202
        assert web.post("/v1/teaching").status_code == 409
        deadline = time.monotonic() + 20
        while (now := web.get("/v1/teaching").json())["share"] is None:
            assert time.monotonic() < deadline
        assert now["said"] == "Learning from 3 images: learning, about 2 minutes left."
        assert (now["share"], now["seconds_left"]) == (0.25, 100.0)
        stopped = web.delete("/v1/teaching").json()
        assert (stopped["state"], stopped["agent"]) == ("stopped", 0)
        world.go.touch()
        web.post("/v1/teaching")  # the same labels: where it was
        told = after(web)
        assert told["state"] == "done"
        assert (world.folder / "data" / "agents" / "1" / "runs").read_text() == "2"


def test_objects_that_nobody_named_teach_nothing(world: World) -> None:
    with world.served() as (web, _):
        for id_ in label(web, 3):
            web.post(f"/v1/sessions/{id_}/rename", json={"target": "bright box", "name": "target"})
        web.post("/v1/teaching")
        told = after(web)
        assert told["state"] == "failed"
        assert "name the objects" in told["said"]


def test_a_teacher_that_is_killed_harms_nothing(world: World) -> None:
    world.will(None, signal=9)
    with world.served() as (web, service):
        label(web, 3)
        before = service.policy.name
        web.post("/v1/teaching")
        told = after(web)
        assert told["state"] == "failed"
        assert "signal 9" in told["said"]
        assert "nothing has changed" in told["said"]
        assert service.policy.name == before
        world.will({"error": "images: the disk is full"})
        web.post("/v1/teaching")
        assert after(web)["said"].endswith("images: the disk is full")
        world.will({"objects": objects()})
        web.post("/v1/teaching")
        assert after(web)["agent"] == 1
        assert (world.folder / "data" / "agents" / "1" / "runs").read_text() == "3"


def test_a_server_that_ends_takes_its_teaching_up_again(world: World) -> None:
    world.will({"objects": objects()}, at_once=False)
    with world.served() as (web, _):
        label(web, 3)
        web.post("/v1/teaching")
        deadline = time.monotonic() + 20
        while not (world.folder / "data" / "agents" / "1" / "runs").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
    world.go.touch()
    with world.served() as (web, service):
        assert after(web)["state"] == "done"
        assert service.policy.name.endswith("1")
    assert (world.folder / "data" / "agents" / "1" / "runs").read_text() == "2"


def test_it_begins_by_itself_after_so_many_accepted_images(world: World) -> None:
    with world.served(learn_every=4) as (web, _):
        label(web, 3)
        assert web.get("/v1/teaching").json()["state"] == "none"
        label(web, 1, first=3)
        assert after(web)["agent"] == 1
        label(web, 3, first=4)
        assert web.get("/v1/teaching").json()["new"] == 3
        label(web, 1, first=7)
        assert after(web)["agent"] == 2
        assert world.seen == {"bright box": 8}


def test_labels_of_monai_label_and_slices_of_scans_teach_as_well(world: World, tmp_path: Path) -> None:
    values, mask = np.zeros((20, 24, 30), np.int16), np.zeros((20, 24, 30), np.uint8)
    mask[5:12, 6:14, 4:26] = 2
    values[mask > 0] = 300
    values += np.arange(30, dtype=np.int16)  # no slice is like another
    for name, content in (("scan", values), ("label", mask)):
        nibabel.save(nibabel.Nifti1Image(content, GRIDS["RAS-even"]), tmp_path / f"{name}.nii.gz")
    said = {"params": json.dumps({"label_info": [{"name": "cyst", "idx": 2}, {"name": "stone", "idx": 1}]})}
    with world.served() as (web, _):
        label(web, 2)
        web.put("/datastore/?image=one", files={"file": ("one.nii.gz", (tmp_path / "scan.nii.gz").read_bytes())})
        sent = {"label": ("label.nii.gz", (tmp_path / "label.nii.gz").read_bytes())}
        assert web.put("/datastore/label?image=one", files=sent, data=said).status_code == 200
        trained = web.post("/train/ibisagent", json={"max_epochs": 50}).json()
        assert trained["status"] == "RUNNING"
        after(web)
        assert web.get("/train/").json()["status"] == "DONE"
        assert web.get("/train/?check_if_running=true").status_code == 404
        assert world.seen == {"bright box": 2, "cyst": 8}
        rows = read_cases(world.folder / "seen" / "manifest.csv").rows
        assert len({row.patient for row in rows if row.object == "cyst"}) == 1


def test_the_queue_ranks_what_teaches_most_and_old_scores_go_with_the_old_masks(world: World) -> None:
    with world.served() as (web, _):
        ids = label(web, 3)
        for number in range(20, 23):
            image = {"image": (f"{number}.png", png(noise=number))}
            id_ = web.post("/v1/sessions", files=image, data={"query": "bright box"}).json()["id"]
            web.post(f"/v1/sessions/{id_}/run", json={})
            assert 0 <= web.get(f"/v1/sessions/{id_}/reliability").json() <= 1
        items = web.get("/v1/worklist").json()
        assert sorted(item["rank"] for item in items if item["id"] not in ids) == [1, 2, 3]
        assert all(item["rank"] is None for item in items if item["id"] in ids)
        web.post(f"/v1/sessions/{id_}/reset")
        web.post(f"/v1/sessions/{id_}/run", json={})
        [again] = [item for item in web.get("/v1/worklist").json() if item["id"] == id_]
        assert again["reliability"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "lesion: 0.41 -> 0.67 on your images; the new agent is used."),
        ({"kept": False}, "lesion: not surely better on your images (0.41 -> 0.67); the old agent is kept."),
        ({"before": None, "after": None}, "lesion: learned from 3 images, not checked; the new agent is used."),
        ({"before": None, "kept": False, "images": 1}, "lesion: 1 image, too little to tell; the old agent is kept."),
    ],
)
def test_the_verdict_is_said_in_words(changes: dict[str, Any], said: str) -> None:
    assert verdict([{**objects(name="lesion")[0], **changes}]) == said


def test_the_policy_that_was_taught_is_not_another_one(world: World) -> None:
    with world.served() as (web, _):
        label(web, 3)
        web.post("/v1/teaching")
        after(web)
    service = Service(ScriptedPolicy([], name="other"), RegionSegmenter(), world.folder / "data")
    teacher = Teacher(service, [], process=world.command, load=world.load)
    teacher.take_up()
    assert service.policy.name == "other"
    assert teacher.folder is None
    with pytest.raises(ConfigError, match="nothing is being learned"):
        teacher.stop()
    service.close()


BRIEF = """
import sys
from ibisagent.server.teacher_process import main
from ibisagent.training.teach import TeachRecipe
main(sys.argv[1], TeachRecipe(examples=8, batch_size=8, eval_every=8, folds=2, workers=0))
"""


def test_the_process_itself_teaches_the_packaged_weights_and_checks(tmp_path: Path) -> None:
    """Too short to learn anything: what counts here is that all parts fit together."""

    def example(number: int) -> Labelled:
        pixels = np.random.default_rng(number).integers(60, 90, (48, 64, 3), dtype=np.uint8)
        mask = np.zeros((48, 64), bool)
        mask[10 + number : 30, 20 : 44 - number] = True
        pixels[mask] = 220
        return Labelled(
            str(number), True, lambda folder: bool(add_to_data_set(folder, Image(pixels), {"plaque": mask}, ""))
        )

    (tmp_path / "brief.py").write_text(BRIEF)
    service = Service(ScriptedPolicy([], name="ibis-nano"), RegionSegmenter(), tmp_path / "data")
    process = (sys.executable, str(tmp_path / "brief.py"))
    teacher = Teacher(service, [example(number) for number in range(4)], process=process)
    teacher.start()
    while teacher.now.state == "running":
        time.sleep(0.2)
    assert teacher.now.state == "done", teacher.said
    assert "plaque: " in teacher.said
    assert (teacher.folder is None) == ("old agent is kept" in teacher.said)
    service.close()
