"""Are the rewards alive? What every term does over a batch of recorded episodes, before a training run spends on it.

GRPO learns from differences within a group (multiple episodes of one case), so a term that does not vary teaches
nothing, and one that varies most decides. Two terms of the paper's public release are constant; nothing told so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.datasets import read_cases
from ibisagent.domain import Case, Episode
from ibisagent.errors import DataError, IbisError
from ibisagent.generation.exports import prompt_case, read_grpo
from ibisagent.inference.cases import Failure
from ibisagent.rewards import PAPER, RewardWeights, Score, score
from ibisagent.store import EpisodeStore, read_record

_FLAT = 1e-9  # a spread below this is rounding


@dataclass(frozen=True, slots=True)
class TermReport:
    """One term over the batch.

    varies: share of the groups in which it differs; None without groups. correlation: with the total, in [-1, 1]; None
    if either is constant. share: of the total's variance that comes from this term (covariance of the weighted term and
    the total over the variance of the total; the shares add up to 1), within groups where there are some, else over the
    batch; None if the total is constant there.
    """

    name: str
    weight: float
    minimum: float
    mean: float
    maximum: float
    std: float
    varies: float | None
    correlation: float | None
    share: float | None

    @property
    def constant(self) -> bool:
        """Whether it is the same in every episode."""
        return self.maximum - self.minimum < _FLAT


@dataclass(frozen=True, slots=True)
class RewardReport:
    """A batch: how many episodes, cases and groups (cases with multiple episodes), the total, and every term."""

    episodes: int
    cases: int
    groups: int
    total: TermReport
    terms: tuple[TermReport, ...]
    failures: tuple[Failure, ...]

    @property
    def constant(self) -> list[str]:
        """The terms that are the same in every episode."""
        return [term.name for term in self.terms if term.constant]

    @property
    def dominant(self) -> TermReport | None:
        """The term from which most of the total's variance comes; None if the total is constant."""
        shared = [term for term in self.terms if term.share is not None]
        return max(shared, key=lambda term: term.share or 0.0, default=None)

    def to_json(self) -> dict[str, Any]:
        """All of it as lists, texts and numbers."""
        dominant = self.dominant
        return {**asdict(self), "constant": self.constant, "dominant": dominant.name if dominant else None}


def read_episodes(path: Path) -> Iterator[Episode]:
    """The episodes of a store's folder, or the one of a record. DataError if it is neither, or is damaged."""
    if path.is_file():
        yield read_record(path)
    else:
        yield from EpisodeStore(path).read()


def read_ground_truth(data: Path) -> Mapping[str, Case]:
    """Cases by id, decoded when they are looked up: of labelled data, or of the prompts that 'data build' exported."""
    exported = data / "grpo" if (data / "grpo").is_dir() else data / "export" / "grpo"
    return _Prompts(exported.parent) if exported.is_dir() else read_cases(data).by_id


class _Prompts(Mapping[str, Case]):
    """The exported prompts of every split."""

    def __init__(self, folder: Path) -> None:
        splits = {path.stem.rpartition("-")[0] for path in (folder / "grpo").glob("*.parquet")}
        self._records = {record["id"]: record for split in sorted(splits) for record in read_grpo(folder, split)}

    def __getitem__(self, case_id: str) -> Case:
        record = self._records[case_id]
        return prompt_case(case_id, record["query"], record)

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def __len__(self) -> int:
        return len(self._records)


def check_rewards(
    episodes: Iterable[Episode],
    cases: Mapping[str, Case],
    weights: RewardWeights = PAPER,
) -> RewardReport:
    """Score `episodes` again and report on each term that has a weight.

    Episodes that cannot be scored, as their case is not among `cases` or has no ground truth, are listed and left out.
    DataError if fewer than two are left: then nothing could vary.
    """
    scores: list[tuple[str, Score]] = []
    failures: list[Failure] = []
    last: Case | None = None
    for episode in episodes:
        try:
            if last is None or last.id != episode.case_id:  # episodes of one case mostly lie together
                last = cases[episode.case_id]
            scores.append((episode.case_id, score(episode, last, weights)))
        except KeyError:
            failures.append(Failure(episode.case_id, "the data hold no such case; give those it was made from"))
        except IbisError as error:
            failures.append(Failure(episode.case_id, str(error)))
    if len(scores) < 2:
        first = f"; the first failure: case {failures[0].case_id}: {failures[0].error}" if failures else ""
        raise DataError(f"{len(scores)} episodes could be scored, and what varies can be told from 2 on{first}")
    return _report(scores, weights, tuple(failures))


def _report(scores: list[tuple[str, Score]], weights: RewardWeights, failures: tuple[Failure, ...]) -> RewardReport:
    ids, group_of = np.unique([case_id for case_id, _ in scores], return_inverse=True)
    sizes = np.bincount(group_of)
    totals = np.array([result.total for _, result in scores])

    def report(name: str, weight: float, values: np.ndarray) -> TermReport:
        values = np.round(values, 12) + 0.0  # sums of decimal fractions: no -0.000
        grouped = [values[group_of == group] for group in np.flatnonzero(sizes > 1)]
        spread = [float(np.ptp(values)) >= _FLAT for values in grouped]
        return TermReport(
            name,
            weight,
            float(values.min()),
            float(values.mean()),
            float(values.max()),
            float(values.std()),
            float(np.mean(spread)) if spread else None,
            _correlation(values, totals),
            _share(weight * values / 5, totals, group_of if grouped else np.zeros_like(group_of)),
        )

    terms = tuple(
        report(name, weight, np.array([result.terms[name] for _, result in scores]))
        for name, weight in weights.terms.items()
    )
    groups = int(np.count_nonzero(sizes > 1))
    return RewardReport(len(scores), len(ids), groups, report("total", 5.0, totals), terms, failures)


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if np.ptp(a) < _FLAT or np.ptp(b) < _FLAT:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _share(part: np.ndarray, totals: np.ndarray, group_of: np.ndarray) -> float | None:
    """Covariance of `part` with `totals` over the variance of `totals`, both as deviations from their group."""
    part, totals = (_centred(values, group_of) for values in (part, totals))
    variance = float(totals @ totals)
    return float(part @ totals) / variance if variance > _FLAT**2 else None


def _centred(values: np.ndarray, group_of: np.ndarray) -> np.ndarray:
    means = np.bincount(group_of, weights=values) / np.bincount(group_of)
    centred: np.ndarray = values - means[group_of]
    return centred
