"""One run of a teaching, in a process of its own: `python -m ibisagent.training.teach FOLDER`.

FOLDER holds task.json. The run leaves its expert there, and result.json: how the old policy and the expert do on the
pairs that were kept from it. A run that was killed resumes; what it is at stands in the file "progress".
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ibisagent import errors
from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.errors import IbisError
from ibisagent.files import one_line, write_whole
from ibisagent.policies.base import Policy
from ibisagent.segmenters import Segmenter
from ibisagent.training.teach.recipe import PartRecipe

TASK, RESULT, PROGRESS, ERROR = "task.json", "result.json", "progress", "error.json"
CHECKED_AT_ONCE = 8  # cases
EXAMPLES_A_CASE = 16  # that can be learned from in the time that it takes to run two policies on a case
WHERE = "the data to teach from"
Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Compared:
    """One pair that an expert was judged on, which had not seen its patient: IoU of the old policy and of the expert,
    and the turns that each took."""

    object: str
    image: str
    patient: str
    before: float
    after: float
    turns_before: float
    turns_after: float


@dataclass(frozen=True, slots=True)
class Task:
    """What a run learns from and is judged on. patient: by row id. policy: the old one. start: folder of the weights
    that an expert begins with; "": it learns an adapter for the policy."""

    recipe: PartRecipe
    learned: tuple[CaseRow, ...]
    judged: tuple[CaseRow, ...]
    patient: Mapping[str, str]
    start: str
    policy: str
    segmenter: str

    @property
    def steps(self) -> int:
        """Examples to learn from, and as many as judging costs about as much time as."""
        return self.recipe.examples + EXAMPLES_A_CASE * len(self.judged)

    def write(self) -> None:
        """Put it into its folder."""
        said = {**asdict(self), "recipe": self.recipe.model_dump(mode="json")}
        write_whole(json.dumps(said, default=str).encode(), self.recipe.out / TASK)

    @classmethod
    def read(cls, folder: Path) -> Task:
        """The task in `folder`."""
        said = json.loads((folder / TASK).read_bytes())
        said["recipe"] = PartRecipe.model_validate(said["recipe"])
        said["learned"], said["judged"] = (tuple(map(_row, said[name])) for name in ("learned", "judged"))
        return cls(**said)


def _row(said: Mapping[str, Any]) -> CaseRow:
    paths = {"image": Path(said["image"]), "mask": said["mask"] and Path(said["mask"])}
    return CaseRow(**{**{one.name: said[one.name] for one in fields(CaseRow)}, **paths})


def result_of(folder: Path) -> list[Compared]:
    """What the finished run in `folder` found."""
    return [Compared(**one) for one in json.loads((folder / RESULT).read_bytes())]


def perform(task: Task, report: Report) -> None:
    """Do a task, from where it stopped. report: told the steps done."""
    folder, source = task.recipe.out, CaseSource(task.learned, WHERE)
    if task.start:
        from ibisagent.training.teach.learning import learn

        weights = learn(task.recipe, source, Path(task.start), report)
    else:
        from ibisagent.training.teach.adapters import learn_adapter

        weights = learn_adapter(task.recipe, source, task.policy, task.segmenter, report)
    report(task.recipe.examples)
    compared = list(_judged(task, weights, report)) if task.judged else []
    write_whole(json.dumps([asdict(one) for one in compared]).encode(), folder / RESULT)


def _judged(task: Task, weights: Path, report: Report) -> Iterator[Compared]:
    from ibisagent.policies import load_policy
    from ibisagent.policies.mllm import MllmPolicy
    from ibisagent.policies.taught import TaughtPolicy
    from ibisagent.segmenters import load_segmenter

    old: Policy = load_policy(task.policy)
    if task.start:
        assert isinstance(old, MllmPolicy | TaughtPolicy)
        base = old.base if isinstance(old, TaughtPolicy) else old
        names = sorted({row.object for row in task.learned if row.mask is not None})
        new: Policy = TaughtPolicy("taught", base, [(MllmPolicy(weights), names)])
    else:
        new = load_policy(task.policy, adapter=weights)
    segmenter = load_segmenter(task.segmenter)
    for start in range(0, len(task.judged), CHECKED_AT_ONCE):
        rows = task.judged[start : start + CHECKED_AT_ONCE]
        cases = CaseSource(rows, WHERE)
        before, after = (measured(policy, segmenter, cases) for policy in (old, new))
        for row in rows:
            if row.id in before and row.id in after:
                (iou, turns), (iou_after, turns_after) = before[row.id], after[row.id]
                yield Compared(row.object, str(row.image), task.patient[row.id], iou, iou_after, turns, turns_after)
        report(task.recipe.examples + EXAMPLES_A_CASE * (start + len(rows)))


def measured(policy: Policy, segmenter: Segmenter, cases: CaseSource) -> dict[str, tuple[float, float]]:
    """IoU and turns of an episode of each case, by id; cases that fail are left out."""
    from ibisagent.environment import mask_choice, turn_limit
    from ibisagent.evaluation import Judge
    from ibisagent.inference.cases import judge_cases

    judge = Judge(policy, segmenter, {}, False, turn_limit(policy), mask_choice(policy, None), {})
    judged, _ = judge_cases(cases, judge, batch_size=CHECKED_AT_ONCE)
    return {one.case.id: (one.result.measures["iou"], one.result.measures["turns"]) for one in judged}


def raise_error_of(folder: Path) -> None:
    """Raise what the run in `folder` ended with, where it was an error."""
    if (folder / ERROR).is_file():
        said = json.loads((folder / ERROR).read_bytes())
        raise getattr(errors, said["kind"], IbisError)(said["text"])


def main(name: str) -> int:
    """Perform the task in a folder, for as long as the process that asked for it lives."""
    folder, parent, shown = Path(name), os.getppid(), -1
    task = Task.read(folder)

    def report(done: int) -> None:
        nonlocal shown
        if os.getppid() != parent:
            raise SystemExit("the teaching was ended")
        if done != shown:
            write_whole(str(done).encode(), folder / PROGRESS)
            shown = done

    try:
        perform(task, report)
    except IbisError as error:
        said = {"kind": type(error).__name__, "text": one_line(error, 600)}
        write_whole(json.dumps(said).encode(), folder / ERROR)
        return 2
    return 0
