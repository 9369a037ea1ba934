"""A teaching that is killed at any moment, and started again with the same command, ends as if nobody had."""

from __future__ import annotations

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
from ibisagent.inference.corrections import add_to_data_set
from ibisagent.policies import load_policy
from ibisagent.policies.agents import Agent

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for processes where Linux does")

TEACH = """
import sys
from pathlib import Path
from ibisagent.training.teach import TeachRecipe, teach
brief = TeachRecipe(examples=8, batch_size=4, eval_every=4, folds=2, workers=1)
teach([Path(sys.argv[1])], Path(sys.argv[2]), segmenter="region", recipe=brief)
"""
SECONDS = 300


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


def started(data: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", TEACH, str(data / "manifest.csv"), str(out)])


def children(out: Path) -> list[int]:
    """Processes that learn or judge for the agent in `out`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:  # it has just ended
            continue
        if b"ibisagent.training.teach" in words and any(one.startswith(os.fsencode(out)) for one in words):
            found.append(int(entry.name))
    return found


def wait_for(what: Callable[[], object], seconds: float = SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill(process: subprocess.Popen[bytes], out: Path, *, with_children: bool) -> None:
    """kill -9; the children end with their parent, or are killed as well."""
    process.kill()
    for child in children(out) if with_children else ():
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    wait_for(lambda: not children(out), 20)


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "reading": Path.is_dir,
    "starting": lambda out: bool(children(out)),
    "learning": lambda out: (out / ".teaching" / "fold-1" / "checkpoint.pt").is_file(),
    "checking": lambda out: (out / ".teaching" / "fold-1" / "learned").is_file() and bool(children(out)),
    "checked": lambda out: (out / ".teaching" / "fold-2" / "result.json").is_file(),
    "writing": lambda out: (out / "experts").is_dir(),
}


def test_killed_at_six_moments_it_ends_as_if_it_had_not_been(data: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert started(data, whole).wait(SECONDS) == 0
    for number, is_there in enumerate(MOMENTS.values()):
        process = started(data, broken)
        wait_for(lambda is_there=is_there, process=process: is_there(broken) or process.poll() is not None)
        kill(process, broken, with_children=number % 2 == 0)
        assert not (broken / "agent.json").exists() or process.returncode == -signal.SIGKILL
    assert started(data, broken).wait(SECONDS) == 0
    assert {path.name for path in broken.iterdir()} == {path.name for path in whole.iterdir()}
    found, wanted = Agent.read(broken), Agent.read(whole)
    assert found.records[0]["objects"] == wanted.records[0]["objects"]
    assert [one.names for one in found.experts] == [one.names for one in wanted.experts]
    assert "stone" in found.names
    for one, other in zip(found.experts, wanted.experts, strict=True):
        assert (one.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()
    load_policy(str(broken))
    assert not children(tmp_path)
