"""One run of a teaching, in a process of its own: `python -m ibisagent.training.teach FOLDER`.

FOLDER holds task.json. The run leaves its expert there, and result.json: how the old policy and the expert do on the
pairs that were kept from it. Learning and judging are two processes, one after the other, so that what learning took of
the memory is free when it judges. A run that was killed resumes; what it is at stands in the file "progress".
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibisagent import errors
from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.domain import Case
from ibisagent.errors import IbisError
from ibisagent.files import one_line, write_whole
from ibisagent.policies.base import Policy
from ibisagent.segmenters import Segmenter
from ibisagent.training.teach.recipe import PartRecipe

if TYPE_CHECKING:
    from ibisagent.evaluation import Judged
    from ibisagent.evaluation.reliability import Reviewer

TASK, RESULT, PROGRESS, ERROR = "task.json", "result.json", "progress", "error.json"
LEARNED = "learned"  # file that names the folder of the weights, as seen from that of the task, once they are there
CHECKED_AT_ONCE = 8  # cases
EXAMPLES_A_CASE = 16  # that can be learned from in the time that it takes to run two policies on a case
WHERE = "the data to teach from"
Report = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Compared:
    """One pair that an expert was judged on, which had not seen its patient: IoU of the old policy and of the expert,
    and the turns that each took. signals: of the expert's episode (`evaluation.reliability`); none where the object is
    absent."""

    object: str
    image: str
    patient: str
    before: float
    after: float
    turns_before: float
    turns_after: float
    signals: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run found. made_with: what else than the expert made the masks, see `Reviewer.made_with`."""

    compared: tuple[Compared, ...]
    made_with: Mapping[str, str]


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

    @property
    def learned_names(self) -> set[str]:
        """The objects that the learned pairs show."""
        return {row.object for row in self.learned if row.mask is not None}

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


def result_of(folder: Path) -> Result:
    """What the finished run in `folder` found."""
    said = json.loads((folder / RESULT).read_bytes())
    return Result(tuple(Compared(**one) for one in said["compared"]), said["made_with"])


def is_learned(task: Task) -> bool:
    """Whether what is left to do is to judge."""
    return (task.recipe.out / LEARNED).is_file()


def learn(task: Task, report: Report) -> None:
    """Learn, from where it stopped. report: told the steps done."""
    folder, source = task.recipe.out, CaseSource(task.learned, WHERE)
    if task.start:
        from ibisagent.training.teach.learning import learn as learn_expert

        weights = learn_expert(task.recipe, source, Path(task.start), report)
    else:
        from ibisagent.training.teach.adapters import learn_adapter

        weights = learn_adapter(task.recipe, source, task.policy, task.segmenter, report)
    write_whole(os.fsencode(os.path.relpath(weights, folder)), folder / LEARNED)


def judge(task: Task, report: Report) -> None:
    """Judge what was learned. report: told the steps done."""
    report(task.recipe.examples)
    found = _judged(task, report) if task.judged else Result((), {})
    write_whole(json.dumps(asdict(found)).encode(), task.recipe.out / RESULT)


def _judged(task: Task, report: Report) -> Result:
    from ibisagent.evaluation.reliability import Reviewer
    from ibisagent.policies import load_policy
    from ibisagent.policies.mllm import MllmPolicy
    from ibisagent.policies.taught import TaughtPolicy
    from ibisagent.segmenters import load_segmenter

    weights = task.recipe.out / os.fsdecode((task.recipe.out / LEARNED).read_bytes())
    old: Policy = load_policy(task.policy)
    if task.start:
        assert isinstance(old, MllmPolicy | TaughtPolicy)
        base = old.base if isinstance(old, TaughtPolicy) else old
        # torch runs it, as to convert a network that acts on a few images and is thrown away costs more than it saves
        expert = MllmPolicy(weights, device="cpu", dtype="float32")
        new: Policy = TaughtPolicy("taught", base, [(expert, sorted(task.learned_names))])
    else:
        new = load_policy(task.policy, adapter=weights)
    segmenter = load_segmenter(task.segmenter)
    reviewer = Reviewer(new, segmenter)
    compared: list[Compared] = []
    for start in range(0, len(task.judged), CHECKED_AT_ONCE):
        rows = task.judged[start : start + CHECKED_AT_ONCE]
        cases = CaseSource(rows, WHERE)
        before, after = measured(old, segmenter, cases), dict(_scored(reviewer, cases))
        for row in rows:
            if row.id in before and row.id in after:
                (iou, turns), (one, signals) = before[row.id], after[row.id]
                measures = one.result.measures
                compared.append(
                    Compared(
                        row.object,
                        str(row.image),
                        task.patient[row.id],
                        iou,
                        measures["iou"],
                        turns,
                        measures["turns"],
                        signals,
                    )
                )
        report(task.recipe.examples + EXAMPLES_A_CASE * (start + len(rows)))
    return Result(tuple(compared), reviewer.made_with)


def _scored(reviewer: Reviewer, cases: CaseSource) -> Iterator[tuple[str, tuple[Judged, Mapping[str, float]]]]:
    """The reviewer's policy on each case that does not fail, by id, with the signals where the object is there."""
    from ibisagent.inference.cases import judge_cases

    run = _judge_of(reviewer.policy, reviewer.segmenter)

    def scored(batch: Sequence[Case]) -> list[tuple[Judged, Mapping[str, float]]]:
        return [(one, reviewer.signals(one.episode, one.case) if _shows(one.case) else {}) for one in run(batch)]

    found, _ = judge_cases(cases, scored, batch_size=CHECKED_AT_ONCE)
    for one, signals in found:
        yield one.case.id, (one, signals)


def _shows(case: Case) -> bool:
    return any(mask.any() for mask in (case.targets or {}).values())


def measured(policy: Policy, segmenter: Segmenter, cases: CaseSource) -> dict[str, tuple[float, float]]:
    """IoU and turns of an episode of each case, by id; cases that fail are left out."""
    from ibisagent.inference.cases import judge_cases

    judged, _ = judge_cases(cases, _judge_of(policy, segmenter), batch_size=CHECKED_AT_ONCE)
    return {one.case.id: (one.result.measures["iou"], one.result.measures["turns"]) for one in judged}


def _judge_of(policy: Policy, segmenter: Segmenter) -> Callable[[Sequence[Case]], list[Judged]]:
    from ibisagent.environment import mask_choice, turn_limit
    from ibisagent.evaluation import Judge

    return Judge(policy, segmenter, {}, False, turn_limit(policy), mask_choice(policy, None), {})


def raise_error_of(folder: Path) -> None:
    """Raise what the run in `folder` ended with, where it was an error."""
    if (folder / ERROR).is_file():
        said = json.loads((folder / ERROR).read_bytes())
        raise getattr(errors, said["kind"], IbisError)(said["text"])


def main(name: str) -> int:
    """Do the next half of the task in a folder, for as long as the process that asked for it lives: until then it holds
    the other end of the standard input."""
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    folder, shown = Path(name), -1
    task = Task.read(folder)

    def report(done: int) -> None:
        nonlocal shown
        if done != shown:
            write_whole(str(done).encode(), folder / PROGRESS)
            shown = done

    try:
        if not is_learned(task):
            learn(task, report)
            if task.judged:
                return 0
        judge(task, report)
    except IbisError as error:
        said = {"kind": type(error).__name__, "text": one_line(error, 600)}
        write_whole(json.dumps(said).encode(), folder / ERROR)
        return 2
    return 0


def _end_with_the_parent() -> None:
    """At once, as files appear whole or not at all: a run that nobody follows would be in the way of the next one."""
    os.read(sys.stdin.fileno(), 1)  # not through the buffer, whose lock an ending interpreter wants
    os._exit(1)
