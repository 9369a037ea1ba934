"""The cases of a data set, batch by batch: one that fails is listed and ends nothing, broken machinery ends the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ibisagent.datasets import CaseSource
from ibisagent.domain import Case
from ibisagent.errors import DataError, IbisError, PolicyError, SegmenterError

MAX_FAILURES = 20
"""Failures of policy or segmenter in a row after which a run gives up: then it is not the cases."""

Outcome = TypeVar("Outcome")


@dataclass(frozen=True, slots=True)
class Failure:
    """A case of which nothing came, and why, in one line; machinery: whether policy or segmenter failed."""

    case_id: str
    error: str
    machinery: bool = False


@dataclass
class Streak:
    """How many cases in a row failed by policy or segmenter; files that cannot be used neither count nor end it."""

    length: int = 0

    def add(self, failure: Failure | None, kind: type[IbisError] = IbisError) -> None:
        """One more case; failure: None where it went well. Raises an error of `kind` after MAX_FAILURES in a row."""
        self.length = 0 if failure is None else self.length + failure.machinery
        if failure is not None and self.length == MAX_FAILURES:
            raise kind(f"{MAX_FAILURES} cases in a row failed, the last one: {failure.error}")


def judge_cases(
    cases: CaseSource,
    judge: Callable[[Sequence[Case]], Sequence[Outcome]],
    *,
    batch_size: int = 1,
    on_case: Callable[[Outcome | Failure], None] | None = None,
    streak: Streak | None = None,
) -> tuple[list[Outcome], list[Failure]]:
    """(what `judge` says of every case that can be judged, the failures), both in the order of `cases`.

    judge: one judgement per case of a batch, in order; a batch for which it raises DataError, PolicyError or
    SegmenterError is judged again case by case, errors of other kinds are raised at once. on_case: called after each
    case. streak: of the cases before, where these go on with a run. After MAX_FAILURES failures of policy or segmenter
    in a row the last error is raised again; cases whose files or texts cannot be used do not count, however many they
    are.
    """
    results: list[Outcome] = []
    failures: list[Failure] = []
    streak = streak or Streak()

    def judged(batch: Sequence[Case]) -> Iterator[Outcome | IbisError]:
        try:
            yield from judge(batch)
        except (DataError, PolicyError, SegmenterError) as error:
            if len(batch) == 1:
                yield error
            else:  # find out which of them it was
                for case in batch:
                    yield from judged([case])

    for start in range(0, len(cases), batch_size):
        rows = cases.rows[start : start + batch_size]
        outcomes: dict[str, Outcome | IbisError] = {}
        batch: list[Case] = []
        for row in rows:
            try:
                batch.append(cases.decode(row))
            except DataError as error:
                outcomes[row.id] = error
        outcomes.update(zip((case.id for case in batch), judged(batch) if batch else (), strict=True))
        for row in rows:
            outcome = outcomes[row.id]
            if isinstance(outcome, IbisError):
                failures.append(Failure(row.id, str(outcome), machinery=not isinstance(outcome, DataError)))
                streak.add(failures[-1], type(outcome))
            else:
                results.append(outcome)
                streak.add(None)
            if on_case is not None:
                on_case(failures[-1] if isinstance(outcome, IbisError) else outcome)
    return results, failures
