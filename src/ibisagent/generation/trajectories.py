"""Oracle episodes for every image-mask pair: the material of the cold start (paper, section 3.1, D_cold).

A run's folder holds run.json (what made it), contents.json (the files that it was made of, see `files.FileHashes`),
shards `episodes-000000.parquet`, ... of `shard_cases` cases each, failures.jsonl and summary.json. Shard k holds cases
k * shard_cases and following, whatever happened before, and every random draw depends on the seed and the case alone;
so a run that was killed and started again, however often, ends with the same bytes as one that was not. A shard with
cases whose files have changed since is removed and made again.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.domain import Case, Episode
from ibisagent.environment import SegmentationEnv, package_version, rollout
from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import FileHashes, claim, try_folder, write_json, write_whole
from ibisagent.imaging.masks import iou
from ibisagent.policies.oracle import IOU_THRESHOLD, MAX_CLICKS, OraclePolicy
from ibisagent.segmenters import Segmenter
from ibisagent.store import EpisodeStore

log = logging.getLogger(__name__)

MAX_FAILURES = 20
RUN_NAME, CONTENTS_NAME, FAILURES_NAME, SUMMARY_NAME = "run.json", "contents.json", "failures.jsonl", "summary.json"


@dataclass(frozen=True, slots=True)
class TrajectoryConfig:
    """What the oracle does (see `OraclePolicy`), and how many cases share a shard."""

    iou_threshold: float = IOU_THRESHOLD
    max_clicks: int = MAX_CLICKS
    mistakes: float = 0.0
    jitter: float = 0.0
    box_first: float = 0.0
    seed: int = 0
    dialect: str = "ibis"
    shard_cases: int = 64

    def __post_init__(self) -> None:
        if self.shard_cases < 1:
            raise ConfigError(f"shard_cases is {self.shard_cases}; give 1 or more")
        self.oracle({})

    def oracle(self, cases: Mapping[str, Case]) -> OraclePolicy:
        """The policy that makes the episodes of `cases`. ConfigError for values out of range."""
        options = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "shard_cases"}
        return OraclePolicy(cases, **options)


@dataclass(frozen=True, slots=True)
class Group:
    """Means over the episodes of one modality, or of all: IoU, and turns and clicks per episode."""

    episodes: int
    mean_iou: float
    mean_turns: float
    mean_clicks: float
    reached: float
    """Share of the episodes that reached the IoU threshold on every target."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A finished run: cases asked for, cases that failed, and the episodes over all and by modality."""

    cases: int
    failed: int
    overall: Group | None
    by_modality: Mapping[str, Group]


def generate(
    cases: CaseSource,
    segmenter: Segmenter,
    out: str | Path,
    config: TrajectoryConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    batch_size: int = 16,
) -> Summary:
    """Write one oracle episode per case into the folder `out`; resume an earlier run of the same kind.

    progress: called with (cases done, cases in all) after every shard, first with what an earlier run did. batch_size:
    environments that are rolled out together; it changes no result. Cases that fail (files, segmenter) are listed in
    failures.jsonl, with one line each, and are tried again by the next start. So are cases whose files have changed; a
    warning says how many. One process per folder at a time.

    Raises ConfigError when the folder holds a run of another kind (config, data, segmenter, version), DataError when it
    cannot be written, and the last error again when MAX_FAILURES cases in a row fail by other things than their files:
    then it is the machinery, not the cases.
    """
    config = config or TrajectoryConfig()
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give 1 or more")
    store = EpisodeStore(out)
    try_folder(store.folder)
    for name in ("episodes-*.parquet", RUN_NAME, FAILURES_NAME, SUMMARY_NAME):
        for leftover in store.folder.glob(f".{name}.*.part"):  # of a run that was killed while it wrote
            leftover.unlink()
    provenance = {**segmenter.describe(), "segmenter": segmenter.name, "ibisagent": package_version()}
    claim(store.folder / RUN_NAME, _run_facts(cases, config, provenance), leftovers=store.shards.values())
    provenance |= {name: str(value) for name, value in asdict(config).items() if name != "shard_cases"}
    hashes = FileHashes(store.folder / CONTENTS_NAME)
    contents = cases.contents(hashes)
    hashes.write()
    if changed := _remove_changed(store, contents, config):
        log.warning("%s: the files of %d of %d cases have changed, they are made again", out, changed, len(cases))
    blocks = range(0, len(cases), config.shard_cases)
    finished = {shard for shard in store.shards if not store.notes(shard)["failures"]}
    done = sum(
        len(cases.rows[start : start + config.shard_cases]) for start in blocks if _shard(start, config) in finished
    )
    if progress is not None:
        progress(done, len(cases))
    recent: deque[_Outcome] = deque(maxlen=MAX_FAILURES)
    for start in blocks:
        if _shard(start, config) in finished:
            continue
        rows = cases.rows[start : start + config.shard_cases]
        outcomes: list[_Outcome] = []
        for first in range(0, len(rows), batch_size):
            batch = _run_batch(cases, rows[first : first + batch_size], segmenter, config, provenance)
            outcomes += batch
            recent.extend(batch)
            _check_machinery(recent)
        made = [outcome for outcome in outcomes if isinstance(outcome, _Made)]
        failed = [outcome for outcome in outcomes if isinstance(outcome, _Failed)]
        notes = {
            "results": [case.facts for case in made],
            "failures": [case.facts for case in failed],
            "contents": contents[start : start + config.shard_cases],
        }
        store.append([case.episode for case in made], shard=_shard(start, config), notes=notes)
        done += len(rows)
        if progress is not None:
            progress(done, len(cases))
    return _finish(store, len(cases))


def _shard(start: int, config: TrajectoryConfig) -> int:
    return start // config.shard_cases


def _remove_changed(store: EpisodeStore, contents: Sequence[str], config: TrajectoryConfig) -> int:
    """Remove the shards with cases whose content is not that of `contents` any more; how many cases these are."""
    changed = 0
    for shard, path in store.shards.items():
        now = contents[shard * config.shard_cases : (shard + 1) * config.shard_cases]
        different = sum(old != new for old, new in zip(store.notes(shard)["contents"], now, strict=True))
        if different:
            path.unlink()
        changed += different
    return changed


def _run_facts(cases: CaseSource, config: TrajectoryConfig, provenance: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    return {**asdict(config), **provenance, "cases": len(cases), "cases_sha256": cases.sha256}


@dataclass(frozen=True, slots=True, eq=False)
class _Made:
    episode: Episode
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class _Failed:
    case_id: str
    error: IbisError

    @property
    def facts(self) -> dict[str, Any]:
        return {"case_id": self.case_id, "error": f"{type(self.error).__name__}: {self.error}"}


_Outcome: TypeAlias = _Made | _Failed


def _run_batch(
    cases: CaseSource,
    rows: Sequence[CaseRow],
    segmenter: Segmenter,
    config: TrajectoryConfig,
    provenance: Mapping[str, str],
) -> list[_Outcome]:
    """Roll out `rows` together; one by one if any of them fails."""
    try:
        batch = [cases.decode(row) for row in rows]
        oracle = config.oracle({case.id: case for case in batch})
        envs = [
            SegmentationEnv(
                case,
                segmenter,
                dialect=config.dialect,
                max_turns=oracle.max_turns,
                mask_selection="last",  # the expert sees the ground truth: the mask that it stops at is its answer
                provenance=provenance,
            )
            for case in batch
        ]
        episodes = rollout(oracle, envs)
    except IbisError as error:
        if len(rows) == 1:
            return [_Failed(rows[0].id, error)]
        return [outcome for row in rows for outcome in _run_batch(cases, [row], segmenter, config, provenance)]
    return [
        _Made(episode, _result(case, episode, config.iou_threshold))
        for case, episode in zip(batch, episodes, strict=True)
    ]


def _check_machinery(recent: Iterable[_Outcome]) -> None:
    errors = [outcome.error for outcome in recent if isinstance(outcome, _Failed)]
    if len(errors) == MAX_FAILURES and not any(isinstance(error, DataError) for error in errors):
        raise type(errors[-1])(f"{MAX_FAILURES} cases in a row failed, the last one: {errors[-1]}") from errors[-1]


def _result(case: Case, episode: Episode, threshold: float) -> dict[str, Any]:
    masks = episode.answer_masks
    reached = [
        iou(masks.get(name, ground_truth & False), ground_truth) for name, ground_truth in (case.targets or {}).items()
    ]
    return {
        "case_id": case.id,
        "modality": case.meta.get("modality", ""),
        "iou": sum(reached) / len(reached) if reached else None,
        "turns": len(episode.turns),
        "clicks": episode.clicks,
        "reached": all(value >= threshold for value in reached),
    }


def _finish(store: EpisodeStore, cases: int) -> Summary:
    """Gather the notes of all shards into failures.jsonl and summary.json."""
    notes = [store.notes(shard) for shard in store.shards]
    failures = [failure for note in notes for failure in note["failures"]]
    results = [result for note in notes for result in note["results"]]
    modalities = sorted({result["modality"] for result in results})
    by_modality = {
        modality or "unknown": _group([result for result in results if result["modality"] == modality])
        for modality in modalities
    }
    summary = Summary(cases, len(failures), _group(results) if results else None, by_modality)
    lines = (json.dumps(failure, sort_keys=True) + "\n" for failure in failures)
    write_whole("".join(lines).encode(), store.folder / FAILURES_NAME)
    write_json(asdict(summary), store.folder / SUMMARY_NAME, sort_keys=True)
    return summary


def _group(results: Sequence[Mapping[str, Any]]) -> Group:
    ious = [result["iou"] for result in results if result["iou"] is not None]
    return Group(
        len(results),
        _mean(ious),
        _mean(result["turns"] for result in results),
        _mean(result["clicks"] for result in results),
        _mean(result["reached"] for result in results),
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 6) if values else 0.0
