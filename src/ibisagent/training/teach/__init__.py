"""Teach an agent objects of the user's own from a handful of labelled images: `ibisagent teach DATA -o AGENT`.

An agent is a folder: the weights that learned the taught objects, answering for their names alone, and `agent.json`,
which says what taught it and which policy answers for everything else (`policies.agents`). So what the old policy knew
is not forgotten, and an object for which a check on the user's own images shows no gain stays with the old policy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.files import claim, make_folder, one_line, same_run, try_folder, weights_sha256
from ibisagent.inference.api import DEFAULT_POLICY, DEFAULT_SEGMENTER
from ibisagent.policies import is_hub_id, source_of
from ibisagent.policies.agents import AGENT_FILE, CALIBRATION, Agent
from ibisagent.policies.vocabulary import Vocabulary
from ibisagent.segmenters import load_segmenter
from ibisagent.training.finetune.recipes import require_libraries
from ibisagent.training.teach.agents import found_of, objects_of, record_of, write_agent
from ibisagent.training.teach.part import Result, Task, result_of
from ibisagent.training.teach.reading import Found, TeachingData, folds_of, read_teaching_data
from ibisagent.training.teach.recipe import PartRecipe, TeachRecipe
from ibisagent.training.teach.running import run_all
from ibisagent.training.teach.self_check import TaughtObject, calibration_of, decide, decide_together

__all__ = ["Found", "Taught", "TaughtObject", "TeachProgress", "TeachRecipe", "teach"]

WORK = ".teaching"  # folder of what is under way, in that of the agent
MOST_SEEDS = 2**63  # torch takes no more


@dataclass(frozen=True, slots=True)
class TeachProgress:
    """How far the teaching is.

    stage: "reading", "learning", "checking" (which learns as well) or "writing". done, total: of this stage, in units
    of its own. seconds_left: of all stages together, None until it can be told.
    """

    stage: str
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class Taught:
    """A finished agent: `folder` is given to --policy. calibrated_on: masks of the self-check that say how sure it is
    of the taught objects (`evaluation.reliability`); 0: too few."""

    folder: Path
    objects: tuple[TaughtObject, ...]
    found: Found
    calibrated_on: int


def ignore_progress(_progress: TeachProgress) -> None:
    """The report of a teaching that nobody follows."""


def ignore_found(_found: Found) -> None:
    """For callers that read `Taught.found` at the end."""


def teach(
    data: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    policy: str = DEFAULT_POLICY,
    segmenter: str = DEFAULT_SEGMENTER,
    check: bool = True,
    seed: int = 0,
    recipe: TeachRecipe | None = None,
    report: Callable[[TeachProgress], None] = ignore_progress,
    on_found: Callable[[Found], None] = ignore_found,
) -> Taught:
    """Teach `policy` the objects of `data`; the agent is in the folder `out`, for `load_policy` and --policy.

    Killed at any moment and started again with the same arguments it resumes; where the agent is finished, it is
    returned at once. An exception that `report` raises ends it likewise.

    Args:
        data: labelled images, in any layout that `datasets.read_cases` reads; multiple are learned from together.
        out: folder of the agent; it must be new, or hold the same teaching.
        policy: who is taught: "ibis-nano", the folder of an ibis-nano or of an agent, or any model for `mllm`.
        segmenter: who turns its clicks into masks in the check.
        check: compare with the old agent by cross-validation, and keep the old one where the taught is not better.
        seed: of whatever is drawn; at least 0.
        recipe: other settings than those that were measured to be good.
        report: told of the progress, often.
        on_found: told once what the data holds, before anything is learned.

    Raises:
        DataError: for data that cannot be read, or is too little.
        ConfigError: for a folder that holds something else, and unknown policies and segmenters.
        PolicyError: for weights that are missing, an agent that is damaged, and where a process dies.
        SegmenterError: as `load_segmenter`.
    """
    out, recipe = Path(out), recipe or TeachRecipe.model_validate({})
    places = [Path(one) for one in ([data] if isinstance(data, str | Path) else data)]
    if not 0 <= seed < MOST_SEEDS:
        raise ConfigError(f"seed {seed}: give one from 0 to {MOST_SEEDS - 1}")
    _check_is_own(out)
    try_folder(out)
    report(TeachProgress("reading", 0, 1, None))
    old = _old_agent(policy)
    if segmenter != DEFAULT_SEGMENTER:
        load_segmenter(segmenter)  # what cannot be used is to be said now, not when all is learned
    material = read_teaching_data(places, _known_names(old))
    facts = _facts(places, material, policy, old, segmenter, check, seed, recipe)
    if (out / AGENT_FILE).exists():
        return _finished(out, facts, on_found)
    on_found(material.found)
    if not _is_nano(old.base):
        require_libraries()
    begun = out / WORK / "run.json"
    _refuse_changed_data(_facts_in(begun), facts, begun)
    claim(begun, facts, free=_FREE)
    try:
        with FileLock(out / WORK / "lock", timeout=0):
            tasks = _tasks(out / WORK, material, old, policy, segmenter, check, seed, recipe)
            _run(tasks, recipe, report)
            report(TeachProgress("writing", 0, 1, 0.0))
            taught = _written(tasks, out, material, old, facts)
    except Timeout:
        raise ConfigError(f"{out}: is being taught by another process; wait until it is done") from None
    shutil.rmtree(out / WORK, ignore_errors=True)
    report(TeachProgress("writing", 1, 1, 0.0))
    return taught


_FREE = {"ibisagent", "data", "workers", "policy"}
"""Facts that may differ between two starts of a teaching: where things are, and what they run on."""


def _check_is_own(out: Path) -> None:
    """ConfigError for a folder in which something else lies, that an agent's files could replace."""
    if not out.is_dir() or (out / AGENT_FILE).exists() or (out / WORK).is_dir():
        return
    others = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    if others:
        raise ConfigError(f"{out}: holds other files ({one_line(others[0])}); choose a new folder for the agent")


def _old_agent(policy: str) -> Agent:
    """Who is taught, as an agent; one without experts where it is a bare policy. ConfigError for what cannot be."""
    folder = Path(source_of(policy))
    if not (folder / AGENT_FILE).is_file():
        return Agent(policy, (), None, ())
    old = Agent.read(folder)
    if old.adapter is not None:
        raise ConfigError(f"policy '{policy}' is an adapter for {old.base}: teach {old.base} with the data of both")
    return old


def _is_nano(base: str) -> bool:
    """Whether experts are made of a policy, in place of adapters. ConfigError for none that can be taught."""
    folder = Path(source_of(base))
    if not folder.is_dir() and is_hub_id(str(folder)):
        return False
    try:
        return bool(json.loads((folder / "config.json").read_bytes())["model_type"] == "ibis_nano")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"policy '{base}' cannot be taught ({one_line(error)}): give ibis-nano, or the folder of a model or agent"
        ) from error


def _known_names(old: Agent) -> set[str]:
    """What the old agent learned by name; none where it makes no claim."""
    folder = Path(source_of(old.base))
    vocabulary = Vocabulary.read(folder)
    if vocabulary is None and _is_nano(old.base):
        raise ConfigError(f"{folder}: declares no names (objects.json), so nothing can be taught beside them")
    return {*(vocabulary.learned if vocabulary else ()), *old.names}


def _facts(
    data: Sequence[Path],
    material: TeachingData,
    policy: str,
    old: Agent,
    segmenter: str,
    check: bool,
    seed: int,
    recipe: TeachRecipe,
) -> dict[str, Any]:
    """What makes a teaching: all that must be the same for it to be resumed, and where it came from."""
    folders = (Path(source_of(old.base)), *(one.folder for one in old.experts))
    weights = [weights_sha256(folder) if folder.is_dir() else str(folder) for folder in folders]
    return {
        "ibisagent": package_version(),
        "data": [str(path) for path in data],
        "content_sha256": material.sha256,
        "policy": policy,
        "policy_weights_sha256": hashlib.sha256(" ".join(weights).encode()).hexdigest(),
        "segmenter": segmenter,
        "check": check,
        "seed": seed,
        "recipe": recipe.model_dump(mode="json"),
    }


def _facts_in(run: Path) -> Mapping[str, Any]:
    """The facts of the teaching that was begun; none where there is none, or a file that `claim` will refuse."""
    try:
        said = json.loads(run.read_bytes())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _refuse_changed_data(earlier: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """ConfigError where a teaching with these facts, if any, had other data: by far the likeliest fact to differ."""
    if earlier.get("content_sha256", now["content_sha256"]) != now["content_sha256"]:
        raise ConfigError(
            f"{where}: is of other images, masks, names or patients than the data hold now; to teach with these, choose"
            " another folder for the agent, or put the old ones back"
        )


def _finished(out: Path, facts: dict[str, Any], on_found: Callable[[Found], None]) -> Taught:
    """The agent that is there already. ConfigError where another teaching made it."""
    records = Agent.read(out).records
    if not records:
        raise PolicyError(f"{out / AGENT_FILE}: tells of no teaching; choose another folder")
    last = records[-1]
    _refuse_changed_data(last, facts, out / AGENT_FILE)
    same_run({name: last.get(name) for name in facts}, facts, out / AGENT_FILE, free=_FREE | {"recipe"})
    try:
        finished = Taught(out, objects_of(last), found_of(last), int(last["calibrated_on"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PolicyError(f"{out / AGENT_FILE}: is damaged ({one_line(error)}); choose another folder") from error
    shutil.rmtree(out / WORK, ignore_errors=True)
    on_found(finished.found)
    return finished


def _tasks(
    work: Path,
    material: TeachingData,
    old: Agent,
    policy: str,
    segmenter: str,
    check: bool,
    seed: int,
    recipe: TeachRecipe,
) -> list[Task]:
    """The runs: one for each fold of the check, and the last on everything."""
    folds = folds_of(material, recipe.folds) if check else []
    begun = [one.folder for one in old.experts if set(material.names) & set(one.names)]
    start = str([Path(source_of(old.base)), *begun][-1]) if _is_nano(old.base) else ""

    def task(name: str, held_out: Sequence[str]) -> Task:
        made = PartRecipe.model_validate({**recipe.model_dump(), "out": work / name, "seed": seed})
        learned = [row for row in material.rows if material.patient[row.id] not in held_out]
        names = {row.object for row in learned if row.mask is not None}  # of others it can learn nothing to be judged
        judged = [row for row in material.rows if material.patient[row.id] in held_out and row.object in names]
        return Task(made, tuple(learned), tuple(judged), material.patient, start, policy, segmenter)

    checks = [task(f"fold-{number}", held_out) for number, held_out in enumerate(folds, 1) if len(folds) > 1]
    tasks = [*(one for one in checks if one.judged), task("all", ())]
    for one in tasks:
        make_folder(one.recipe.out)
        one.write()
    return tasks


def _run(tasks: Sequence[Task], recipe: TeachRecipe, report: Callable[[TeachProgress], None]) -> None:
    total = sum(task.steps for task in tasks)
    stage = "checking" if len(tasks) > 1 else "learning"
    started = time.monotonic()
    first: int | None = None

    def told(done: int) -> None:
        nonlocal first
        first = done if first is None else first
        passed = time.monotonic() - started
        left = passed / (done - first) * (total - done) if done > first else None
        report(TeachProgress(stage, done, total, left))

    run_all(tasks, min(recipe.workers, os.cpu_count() or 1), told)


def _written(tasks: Sequence[Task], out: Path, material: TeachingData, old: Agent, facts: Mapping[str, Any]) -> Taught:
    """The agent, of what the tasks found."""
    results, run = [result_of(task.recipe.out) for task in tasks], tasks[-1].recipe.out
    are_experts = bool(tasks[-1].start)
    objects = _decided(results, material, old, check=facts["check"], together=not are_experts)
    calibration = calibration_of(objects, results) if are_experts else None
    if calibration is not None:
        calibration.write(run / "expert" / CALIBRATION)
    taught = Taught(out, objects, material.found, 0 if calibration is None else calibration.cases)
    write_agent(out, old, run, objects, record_of(material.found, objects, taught.calibrated_on, facts))
    return taught


def _decided(
    results: Sequence[Result], material: TeachingData, old: Agent, *, check: bool, together: bool
) -> tuple[TaughtObject, ...]:
    compared = [one for result in results for one in result.compared]
    known = _known_names(old)
    found = [
        decide(name, images, name in known, compared, check=check) for name, images in material.found.objects.items()
    ]
    return tuple(decide_together(found, compared) if together else found)
