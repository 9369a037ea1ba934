"""Teach an agent objects of the user's own from a handful of labelled images: `ibisagent teach DATA -o AGENT`.

An agent is a folder: the weights that learned the taught objects, answering for their names alone, and `agent.json`,
which says what taught it and which policy answers for everything else (`policies.taught`). So what the old policy knew
is not forgotten, and an object for which a check on the user's own images shows no gain stays with the old policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TeachProgress:
    """How far the teaching is.

    stage: "reading", "learning", "checking" or "writing". done, total: of this stage, in units of its own. seconds_left:
    of all stages together, None until it can be told.
    """

    stage: str
    done: int
    total: int
    seconds_left: float | None


@dataclass(frozen=True, slots=True)
class TaughtObject:
    """One object that was taught.

    images: how many show it. before, after: mean IoU of the old and the taught agent on the user's own images, each
    judged by weights that had not seen its patient; None where nothing was checked. interval: 95% of after - before,
    None where fewer than two patients show the object. kept: the taught weights answer for it; else the old agent does.
    """

    name: str
    images: int
    before: float | None
    after: float | None
    interval: tuple[float, float] | None
    kept: bool


@dataclass(frozen=True, slots=True)
class Found:
    """What the data holds, told before any teaching.

    objects: images that show each object, by name. absent: images that are known not to show it, by name. sizes: of the
    images, (height, width), the commonest first. duplicates: images that are there more than once, counted once.
    unreadable: pairs left out, each with its reason in one line.
    """

    objects: dict[str, int]
    absent: dict[str, int]
    images: int
    patients: int
    sizes: tuple[tuple[int, int], ...]
    duplicates: int
    unreadable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Taught:
    """A finished agent: `folder` is given to --policy."""

    folder: Path
    objects: tuple[TaughtObject, ...]
    found: Found


def ignore_progress(_progress: TeachProgress) -> None:
    """The report of a teaching that nobody follows."""


def ignore_found(_found: Found) -> None:
    """For callers that read `Taught.found` at the end."""


def teach(
    data: Sequence[Path],
    out: Path,
    *,
    policy: str = "ibis-nano",
    segmenter: str = "ibis-click",
    check: bool = True,
    seed: int = 0,
    report: Callable[[TeachProgress], None] = ignore_progress,
    on_found: Callable[[Found], None] = ignore_found,
) -> Taught:
    """Teach `policy` the objects of `data`; the agent is in the folder `out`, for `load_policy` and --policy.

    Killed at any moment and started again with the same arguments it resumes; where the agent is finished, it is
    returned at once. An exception that `report` raises ends it likewise.

    Args:
        data: labelled images, in any layout that `datasets.read_cases` reads.
        out: folder of the agent; it must be new, or hold the same teaching.
        policy: who is taught: "ibis-nano", the folder of an ibis-nano or of an agent, or any model for `mllm`.
        segmenter: who turns its clicks into masks, in teaching and in the check.
        check: compare with the old agent by cross-validation, and keep the old one where the taught is not better.
        seed: of whatever is drawn.
        report: told of the progress, often.
        on_found: told once what the data holds, before anything is learned.

    Raises:
        DataError: for data that cannot be read, or is too little.
        ConfigError: for a folder that holds something else, and unknown policies.
    """
    raise NotImplementedError
