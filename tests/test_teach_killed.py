"""A teaching that is killed at any moment, and started again with the same arguments, ends as if nobody had."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ibisagent.domain import Image
from ibisagent.inference.corrections import MANIFEST_NAME, add_to_data_set
from ibisagent.policies import load_policy
from ibisagent.policies.agents import Agent
from ibisagent.training.teach import TeachRecipe, teach

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes as Linux lists them")

BRIEF = TeachRecipe(examples=8, batch_size=4, eval_every=4, folds=2, workers=0)
SECONDS = 900
ORPHAN_SECONDS = 240  # one that goes on would take hours; a busy machine may need a while to start it at all
STARTS_A_CHILD = """
import sys
from pathlib import Path
from ibisagent.training.teach import TeachRecipe, teach
teach([Path(sys.argv[1])], Path(sys.argv[2]), check=False, recipe=TeachRecipe(examples=80_000, workers=1))
"""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ibisagent.training.teach.learning", "ibisagent.evaluation", "openvino"])


def brief_teaching(data: Path, out: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    teach([data / MANIFEST_NAME], out, segmenter="region", recipe=BRIEF)


def teaching_from(place: Path, data: Path, out: Path) -> None:
    os.chdir(place)
    brief_teaching(data, out)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for number in range(3):
        pixels = np.random.default_rng(number).integers(60, 90, (48, 64, 3), dtype=np.uint8)
        mask = np.zeros((48, 64), bool)
        mask[8 + number : 30, 20 : 44 - number] = True
        pixels[mask] = 220
        masks = {"plaque": mask}
        if number == 0:  # what one image shows cannot be checked, and is kept: so there are weights to compare
            masks["stone"] = np.roll(mask, 6, axis=0)
        add_to_data_set(folder, Image(pixels), masks, "")
    return folder


def wait_for(what: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


WORK = ".teaching"
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "reading": Path.is_dir,
    "learning": lambda out: (out / WORK / "fold-1" / "checkpoint.pt").is_file(),
    "checking": lambda out: (out / WORK / "fold-1" / "learned").is_file(),
    "checked": lambda out: (out / WORK / "fold-1" / "result.json").is_file(),
    "saving": lambda out: (out / WORK / "all" / "expert.part").is_dir() or (out / WORK / "all" / "learned").is_file(),
    "writing": lambda out: (out / "experts").is_dir(),
}


def test_killed_at_six_moments_it_ends_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def started(out: Path) -> multiprocessing.process.BaseProcess:
        process = FORKS.Process(target=brief_teaching, args=(data, out))
        process.start()
        return process

    uninterrupted = started(whole)
    uninterrupted.join(SECONDS)
    assert uninterrupted.exitcode == 0
    for moment, has_come in MOMENTS.items():
        process = started(broken)
        wait_for(lambda has_come=has_come, process=process: has_come(broken) or not process.is_alive())
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
    last = started(broken)
    last.join(SECONDS)
    assert last.exitcode == 0
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
    found, wanted = Agent.read(broken), Agent.read(whole)
    assert found.records[0]["objects"] == wanted.records[0]["objects"]
    assert found.names == wanted.names
    assert "stone" in found.names
    for one, other in zip(found.experts, wanted.experts, strict=True):
        assert (one.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()
    load_policy(str(broken))


def test_killed_it_goes_on_from_another_folder(data: Path, tmp_path: Path) -> None:
    """A folder that is named from where the user is may be named otherwise at the next start, or be moved."""

    def started(place: Path, out: str) -> multiprocessing.process.BaseProcess:
        process = FORKS.Process(target=teaching_from, args=(place, data, Path(out)))
        process.start()
        return process

    here, agent = tmp_path / "here", tmp_path / "here" / "agent"
    here.mkdir()
    process = started(here, "agent")
    wait_for(lambda: MOMENTS["checking"](agent) or not process.is_alive())
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    agent.rename(tmp_path / "moved")
    process = started(tmp_path, "moved")
    process.join(SECONDS)
    assert process.exitcode == 0
    assert "stone" in Agent.read(tmp_path / "moved").names


def children_of(out: Path) -> list[int]:
    """Processes that learn for the agent in `out`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has just ended
            continue
        if b"ibisagent.training.teach" in words and any(one.startswith(os.fsencode(out)) for one in words):
            found.append(int(entry.name))
    return found


def test_what_learns_ends_with_whoever_asked_for_it(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STARTS_A_CHILD, str(data / MANIFEST_NAME), str(tmp_path / "agent")]
    with subprocess.Popen(command) as process:
        wait_for(lambda: children_of(tmp_path) or process.poll() is not None)
        assert children_of(tmp_path)
        process.kill()
    wait_for(lambda: not children_of(tmp_path), ORPHAN_SECONDS)
