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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ibisagent.datasets import CaseSource
from ibisagent.domain import Case, Episode
from ibisagent.environment import package_version, run_episodes
from ibisagent.errors import ConfigError
from ibisagent.files import FileHashes, claim, try_folder, write_json, write_whole
from ibisagent.imaging.masks import iou
from ibisagent.inference.cases import Streak, judge_cases
from ibisagent.policies.oracle import IOU_THRESHOLD, MAX_CLICKS, OraclePolicy
from ibisagent.segmenters import Segmenter
from ibisagent.store import EpisodeStore

log = logging.getLogger(__name__)

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
    cannot be
    written, and the last error again where the machinery is broken (`judge_cases`).
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

    def rolled_out(batch: Sequence[Case]) -> list[tuple[Episode, dict[str, Any]]]:
        oracle = config.oracle({case.id: case for case in batch})
        episodes = run_episodes(
            oracle,
            segmenter,
            batch,
            max_turns=oracle.max_turns,
            mask_selection="last",  # the expert sees the ground truth: the mask that it stops at is its answer
            provenance=provenance,
        )
        return [(one, _result(case, one, config.iou_threshold)) for case, one in zip(batch, episodes, strict=True)]

    streak = Streak()
    for start in blocks:
        if _shard(start, config) in finished:
            continue
        block = cases[start : start + config.shard_cases]
        made, failed = judge_cases(block, rolled_out, batch_size=batch_size, streak=streak)
        notes = {
            "results": [facts for _, facts in made],
            "failures": [{"case_id": failure.case_id, "error": failure.error} for failure in failed],
            "contents": contents[start : start + config.shard_cases],
        }
        store.append([episode for episode, _ in made], shard=_shard(start, config), notes=notes)
        done += len(block)
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
