"""Oracle episodes for every image-mask pair: the raw material of the cold start (paper, section 3.1, D_cold).

A run's folder holds run.json (what made it), shards `episodes-000000.parquet`, ... of `shard_cases` cases each,
failures.jsonl and summary.json. Shard k holds cases k * shard_cases and following, whatever happened before, and every
random draw depends on the seed and the case alone; so a run that was killed and started again, however often, ends with
the same bytes as one that was not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.domain import Case, Episode, Undo, kept_prompts
from ibisagent.environment import SegmentationEnv, package_version, rollout
from ibisagent.errors import ConfigError, DataError, PolicyError, SegmenterError
from ibisagent.images import write_whole
from ibisagent.masks import iou
from ibisagent.policies.oracle import IOU_THRESHOLD, MAX_CLICKS, OraclePolicy
from ibisagent.segmenters import Segmenter
from ibisagent.store import EpisodeStore

RUN_NAME, FAILURES_NAME, SUMMARY_NAME = "run.json", "failures.jsonl", "summary.json"


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
    """Write one oracle episode per case into the folder `out`; go on where an earlier run of the same kind stopped.

    progress: called with (cases done, cases in all) after every shard, first with what an earlier run did. batch_size:
    environments that are rolled out together; it changes no result. Cases that fail (files, segmenter) are listed in
    failures.jsonl, with one line each, and are tried again by the next start. Raises ConfigError when the folder holds
    a run of another kind (config, data, segmenter, version), DataError when it cannot be written.
    """
    config = config or TrajectoryConfig()
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; give 1 or more")
    store = EpisodeStore(out)
    made_by = {**segmenter.describe(), "segmenter": segmenter.name, "ibisagent": package_version()}
    _claim(store, _run_facts(cases, config, made_by))
    made_by |= {name: str(value) for name, value in asdict(config).items() if name != "shard_cases"}
    blocks = range(0, len(cases), config.shard_cases)
    finished = {shard for shard in store.shards if not store.notes(shard)["failures"]}
    done = sum(
        len(cases.rows[start : start + config.shard_cases]) for start in blocks if _shard(start, config) in finished
    )
    if progress is not None:
        progress(done, len(cases))
    for start in blocks:
        if _shard(start, config) in finished:
            continue
        rows = cases.rows[start : start + config.shard_cases]
        episodes: list[Episode] = []
        notes: dict[str, list[dict[str, Any]]] = {"results": [], "failures": []}
        for first in range(0, len(rows), batch_size):
            _run_batch(cases, rows[first : first + batch_size], segmenter, config, made_by, episodes, notes)
        store.append(episodes, shard=_shard(start, config), notes=notes)
        done += len(rows)
        if progress is not None:
            progress(done, len(cases))
    return _finish(store, len(cases))


def undone_turns(episode: Episode) -> frozenset[int]:
    """Turns (0-based) none of whose prompts outlived the Undos of later turns: the wrong ones, which training masks."""
    return frozenset(
        index
        for index, turn in enumerate(episode.turns[:-1])
        if (lone := kept_prompts([turn]))
        and any(isinstance(action, Undo) for later in episode.turns[index + 1 :] for action in later.reply.actions)
        and not _survives(episode, index, len(lone))
    )


def _survives(episode: Episode, index: int, prompts: int) -> bool:
    """Whether a prompt of turn `index` still stands at the end."""
    standing = len(kept_prompts(episode.turns[: index + 1])) - prompts
    lowest = min(len(kept_prompts(episode.turns[: end + 1])) for end in range(index, len(episode.turns)))
    return lowest > standing


def _shard(start: int, config: TrajectoryConfig) -> int:
    return start // config.shard_cases


def _run_facts(cases: CaseSource, config: TrajectoryConfig, made_by: Mapping[str, str]) -> dict[str, Any]:
    """What must be the same for a run to be continued."""
    digest = hashlib.sha256()
    for row in cases.rows:
        digest.update(repr((row.id, row.query, row.label)).encode("utf-8", "surrogateescape"))
    return {**asdict(config), **made_by, "cases": len(cases), "cases_sha256": digest.hexdigest()}


def _claim(store: EpisodeStore, facts: Mapping[str, Any]) -> None:
    """Write run.json, or check that the one there says the same."""
    path = store.folder / RUN_NAME
    if not path.exists():
        if store.shards:
            raise ConfigError(f"{store.folder}: holds episodes but no {RUN_NAME}; choose another folder")
        _write_json(facts, path)
        return
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: is damaged ({error}); choose another folder") from error
    if not isinstance(earlier, dict):
        raise DataError(f"{path}: is damaged; choose another folder")
    for name in sorted({*facts, *earlier}):
        if facts.get(name) != earlier.get(name):
            raise ConfigError(
                f"{store.folder}: was made with {name} {earlier.get(name)}, now it is {facts.get(name)};"
                " choose another folder or the old value"
            )


def _run_batch(
    cases: CaseSource,
    rows: Sequence[CaseRow],
    segmenter: Segmenter,
    config: TrajectoryConfig,
    made_by: Mapping[str, str],
    episodes: list[Episode],
    notes: Mapping[str, list[dict[str, Any]]],
) -> None:
    """Roll out `rows` together and add to `episodes` and `notes`; one by one if any of them fails."""
    try:
        batch = [cases.decode(row) for row in rows]
        oracle = config.oracle({case.id: case for case in batch})
        envs = [
            SegmentationEnv(case, segmenter, dialect=config.dialect, max_turns=oracle.max_turns, made_by=made_by)
            for case in batch
        ]
        made = rollout(oracle, envs)
    except (DataError, SegmenterError, PolicyError) as error:
        if len(rows) > 1:
            for row in rows:
                _run_batch(cases, [row], segmenter, config, made_by, episodes, notes)
        else:
            notes["failures"].append({"case_id": rows[0].id, "error": f"{type(error).__name__}: {error}"})
        return
    for case, episode in zip(batch, made, strict=True):
        episodes.append(episode)
        notes["results"].append(_result(case, episode, config.iou_threshold))


def _result(case: Case, episode: Episode, threshold: float) -> dict[str, Any]:
    nothing = {name: truth & False for name, truth in (case.targets or {}).items()}
    reached = [iou(episode.masks.get(name, nothing[name]), truth) for name, truth in (case.targets or {}).items()]
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
    _write_json(asdict(summary), store.folder / SUMMARY_NAME)
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


def _write_json(facts: Mapping[str, Any], path: Path) -> None:
    write_whole((json.dumps(facts, indent=1, sort_keys=True) + "\n").encode(), path)
