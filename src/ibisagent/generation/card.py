"""The data card: counts, lengths, IoU and DSC by modality (the paper's Table 6), and what was rejected and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ibisagent.files import markdown_cell, write_json, write_whole
from ibisagent.generation.config import read_notes
from ibisagent.store import EpisodeStore

if TYPE_CHECKING:
    from ibisagent.generation.stages import Worker

CARD_NAME, CARD_TEXT_NAME = "card.json", "card.md"
LARGE_AREA = 0.005


def write_card(worker: Worker) -> dict[str, Any]:
    """Gather the notes of all finished files into card.json and card.md; what card.json holds."""
    shards = range(worker.shards)
    failures: list[dict[str, str]] = []
    rejected: list[dict[str, str]] = []
    results: list[dict[str, Any]] = []
    asked: Counter[str] = Counter()
    exported: Counter[str] = Counter()
    reached: list[float] = []
    for shard in shards:
        if worker.path("trajectories", shard).exists():
            notes = EpisodeStore(worker.plan.out / "trajectories").notes(shard)
            failures += notes["failures"]
            reached += [f["episodes"]["plain"] for f in notes["facts"].values() if "episodes" in f]
        if worker.path("questions", shard).exists():
            asked.update(read_notes(worker.path("questions", shard))["counts"])
        if worker.path("reflection", shard).exists():
            notes = EpisodeStore(worker.plan.out / "reflection").notes(shard)
            asked.update(question["family"] for question in notes["questions"])
        if worker.path("filter", shard).exists():
            notes = EpisodeStore(worker.plan.out / "filter").notes(shard)
            rejected += notes["rejected"]
            results += notes["results"]
        if worker.path("export", shard).exists():
            exported.update(json.loads(worker.path("export", shard).read_bytes()))
    drawn = [result for result in results if result["iou"] is not None]
    large = [result for result in drawn if result["area"] >= LARGE_AREA]
    pairs = len(worker.plan.cases)
    card = {
        "pairs": pairs,
        "images": len(worker.groups),
        "failed_pairs": len(failures),
        "failures": failures[:20],
        "questions": sum(asked.values()),
        "questions_per_pair": round(sum(asked.values()) / pairs, 2),
        "questions_by_family": dict(sorted(asked.items())),
        "mean_iou_of_plain_trajectories": _mean(reached),
        "kept": len(results),
        "kept_by_family": dict(sorted(Counter(result["family"] for result in results).items())),
        "rejected": dict(Counter(lost["reason"] for lost in rejected).most_common()),
        "overall": _group(results),
        "overall_area_0.5%": _group(large),
        "by_modality": {
            modality or "unknown": _group([result for result in results if result["modality"] == modality])
            for modality in sorted({result["modality"] for result in results})
        },
        "exported": dict(sorted(exported.items())),
    }
    write_json(card, worker.plan.out / CARD_NAME, sort_keys=True)
    write_whole(_text(card).encode(), worker.plan.out / CARD_TEXT_NAME)
    return card


def _group(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Images and QA; IoU, DSC, clicks and turns of those that segment; characters of all."""
    drawn = [result for result in results if result["iou"] is not None]
    return {
        "images": len({result["image"] for result in results}),
        "qa": len(results),
        "segmenting": len(drawn),
        "iou": _mean([result["iou"] for result in drawn]),
        "dsc": _mean([result["dice"] for result in drawn]),
        "clicks": _mean([result["clicks"] for result in drawn]),
        "turns": _mean([result["turns"] for result in drawn]),
        "characters": _mean([result["characters"] for result in results]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def _text(card: Mapping[str, Any]) -> str:
    rows = [*card["by_modality"].items(), ("all", card["overall"]), ("all, area >= 0.5%", card["overall_area_0.5%"])]
    table = [
        f"| {markdown_cell(name)} | {g['images']} | {g['qa']} | {_shown(g['iou'])} | {_shown(g['dsc'])} "
        f"| {_shown(g['clicks'], 2)} | {_shown(g['turns'], 2)} | {_shown(g['characters'], 0)} |"
        for name, g in rows
    ]
    lines = [
        "# Data card",
        "",
        f"{card['pairs']} image-mask pairs on {card['images']} images, {card['failed_pairs']} of them could not be "
        f"used. {card['questions']} questions ({card['questions_per_pair']} a pair), {card['kept']} kept as episodes.",
        "",
        "| modality | images | QA | mean IoU | mean DSC | mean clicks | mean turns | characters |",
        "|---|---|---|---|---|---|---|---|",
        *table,
        "",
        "IoU, DSC, clicks and turns: over episodes that segment. Ground truth: the masks of the data.",
        "",
        "| questions | asked | kept |",
        "|---|---|---|",
        *(
            f"| {n} | {count} | {card['kept_by_family'].get(n, 0)} |"
            for n, count in card["questions_by_family"].items()
        ),
        "",
        "| not kept because | questions |",
        "|---|---|",
        *(f"| {markdown_cell(reason)} | {count} |" for reason, count in card["rejected"].items()),
        "",
    ]
    return "\n".join(lines)


def _shown(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
