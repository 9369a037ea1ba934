"""What is kept: every rejection has a reason that is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ibisagent.datasets import CaseRow, split_kind
from ibisagent.datasets.leaks import near_duplicates
from ibisagent.domain import Episode, Mask, union
from ibisagent.generation.config import FactoryConfig, Question
from ibisagent.generation.teacher.checks import MAX_THOUGHT_CHARS, disagreement, leak
from ibisagent.imaging.masks import dice, iou


def judge(
    question: Question,
    episode: Episode,
    ground_truths: Mapping[str, Mapping[str, Mask]],
    overlaps: Mapping[str, str],
    config: FactoryConfig,
) -> dict[str, Any] | str:
    """The facts of an episode that is kept, or "reason|detail" of one that is not.

    ground_truths: masks by pair and name. overlaps: see `find_overlaps`. Thoughts of turns that are taken back are not
    judged: nobody learns them.
    """
    if reason := overlapping(question, overlaps):
        return reason
    if episode.stop != "stopped" or len(episode.turns) > config.max_turns:
        return f"too long|{len(episode.turns)} turns"
    wanted = {name: ground_truth for row in question.rows for name, ground_truth in ground_truths.get(row, {}).items()}
    asked = {name: wanted[name] for name in question.targets}
    masks = episode.answer_masks
    ious = [iou(union(masks, [name], episode.size), ground_truth) for name, ground_truth in asked.items()]
    if ious and min(ious) < config.min_iou:
        return f"low IoU|{min(ious):.3f}"
    if question.absent and any(mask.any() for mask in masks.values()):
        return "mask of an absent object|"
    wrong = episode.undone_turns
    for number, turn in enumerate(episode.turns):
        if number in wrong:
            continue
        thought = turn.reply.thought
        if not thought.strip() or len(thought) > MAX_THOUGHT_CHARS:
            return f"thought without or beyond measure|turn {number + 1}"
        if kind := leak(thought):
            return f"leak: {kind}|turn {number + 1}: {thought[:160]}"
        if fault := disagreement(thought, turn.reply, turn.before, episode.size, asked):
            return f"thought against action: {fault}|turn {number + 1}: {thought[:160]}"
    dices = [dice(union(masks, [name], episode.size), ground_truth) for name, ground_truth in asked.items()]
    return {
        "id": question.id,
        "family": question.family,
        "modality": question.modality,
        "split": question.split,
        "image": question.image,
        "iou": float(np.mean(ious)) if ious else None,
        "dice": float(np.mean(dices)) if dices else None,
        "area": min(float(ground_truth.mean()) for ground_truth in asked.values()) if asked else None,
        "clicks": episode.clicks,
        "turns": len(episode.turns),
        "wrong": len(wrong),
        "characters": sum(len(turn.completion.text) for turn in episode.turns),
    }


def overlapping(question: Question, overlaps: Mapping[str, str]) -> str | None:
    """Why the question's image must not be used; None if it may."""
    return overlaps.get(question.image)


def find_overlaps(groups: Sequence[Sequence[CaseRow]], hashes: Mapping[str, str], bits: int) -> dict[str, str]:
    """Images to be trained on that show a patient of another split, or look like an image of one, with reasons.

    hashes: `leaks.fingerprint` by image; images that differ in at most `bits` < 16 are alike.
    """
    split_of = {str(rows[0].image): rows[0].split for rows in groups}
    patients = {row.patient for rows in groups for row in rows if row.patient and not is_trained_on(row.split)}
    found = {
        f"{rows[0].image}": "patient in another split"
        for rows in groups
        if is_trained_on(rows[0].split) and any(row.patient in patients for row in rows)
    }
    trained = {image: code for image, code in hashes.items() if is_trained_on(split_of[image]) and image not in found}
    others = {image: code for image, code in hashes.items() if not is_trained_on(split_of[image])}
    return found | dict.fromkeys(near_duplicates(trained, others, bits), "near duplicate in another split")


def is_trained_on(split: str) -> bool:
    """Whether pairs of `split` are learned from: those for training, and those of no split."""
    return split_kind(split or "train") == "train"
