"""What is learned from a user's corrections: episodes that end at the answer, and a data set of the masks."""

from __future__ import annotations

import csv
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ibisagent.domain import Action, Completion, Episode, Image, Masks, Reply, Standing, Stop, Turn, Undo, stand_after
from ibisagent.files import csv_text, make_folder, plain_cell, png_bytes, safe_name, write_whole
from ibisagent.imaging.images import write_mask_png
from ibisagent.inference.rounds import CodedMasks, Step
from ibisagent.protocol import write

MANIFEST_NAME = "manifest.csv"
_MANIFEST_COLUMNS = ("image", "mask", "object", "query", "patient")


def to_learn_from(episode: Episode, steps: Sequence[Step]) -> Episode:
    """The turns that led to the answer, and a stop. Its last masks are the answer: what the user saw and left it at.

    Of each target, what was given after its answer was made has no part in it and goes, and so do the steps of an Undo
    that took that back. A target's mask is made of its own prompts alone, so the masks of all others stay as they were.
    """
    made = {name: number for name, number in episode.answer_turns.items() if number is not None}
    answer = {one["name"]: one for name, at in made.items() for one in steps[at].plain_masks if one["name"] == name}
    stand: Standing = ()
    turns: list[Turn] = []
    users: list[int] = []
    for number, step in enumerate(steps):
        reply, before = step.turn.reply, stand
        stand = stand_after(before, number, reply.actions)
        actions = [] if stand is before else _that_count(reply.actions, number, before, made)
        if reply.stop is not None and step is steps[-1]:
            actions.append(reply.stop)
        if actions:
            reply = replace(reply, actions=tuple(actions))
            masks = [answer[one["name"]] if number > made.get(one["name"], number) else one for one in step.plain_masks]
            completion = replace(step.turn.completion, text=write(reply, episode.size, dialect="ibis"))
            left = turns[-1].after if turns else episode.start
            turns.append(
                replace(step.turn, completion=completion, reply=reply, before=left, after=CodedMasks.of(masks))
            )
            if step.by == "user":
                users.append(len(turns))
    if not turns or turns[-1].reply.stop is None:
        stop = Reply("", (Stop(),))
        left = turns[-1].after if turns else episode.start
        turns.append(Turn(Completion(write(stop, episode.size, dialect="ibis")), stop, left, left))
        users.append(len(turns))
    facts = {**episode.provenance, "dialect": "ibis", "people_turns": " ".join(map(str, users))}
    return replace(episode, turns=tuple(turns), stop="stopped", provenance=facts, mask_selection="last")


def _that_count(actions: Sequence[Action], number: int, stand: Standing, made: Mapping[str, int]) -> list[Action]:
    """The actions of turn `number`, up to a Stop, without prompts after the turns that `made` names for their targets.

    stand: what stood before. An Undo takes back as many fewer as there are such prompts among those that it took.
    """
    counted: list[Action] = []
    for action in actions:
        if isinstance(action, Stop):
            break
        if isinstance(action, Undo):
            taken = stand[max(0, len(stand) - action.steps) :]
            steps = sum(given <= made.get(prompt.target, given) for given, prompt in taken)
            if steps:
                counted.append(action if steps == len(taken) else Undo(steps))
        elif number <= made.get(action.target, number):
            counted.append(action)
        stand = stand_after(stand, number, (action,))
    return counted


def add_to_data_set(folder: Path, image: Image, masks: Masks, query: str, patient: str = "") -> str:
    """Add an image and its masks to the data set in `folder`, in place of those of the same image and object.

    patient: a name that images share which belong together, such as slices of one scan; "" where nothing is known.
    Returns the image's file, relative to the folder. `datasets.read_cases` reads the manifest. DataError when it cannot
    be written.
    """
    for part in ("images", "masks"):
        make_folder(folder / part)
    stem = image.sha256[:16]
    rendered = f"images/{stem}.png"
    write_whole(png_bytes(image.pixels), folder / rendered)
    rows = []
    for target, mask in masks.items():
        mask_file = ""
        if mask.any():
            mask_file = f"masks/{stem}_{safe_name(target, set())}_{_short_hash(target)}.png"
            write_mask_png(mask, folder / mask_file)
        rows.append((rendered, mask_file, target, query, patient))
    _add_rows(folder / MANIFEST_NAME, rows)
    return rendered


def _add_rows(manifest: Path, rows: Sequence[tuple[str, ...]]) -> None:
    """Add rows to a manifest, in place of those about the same image and object."""
    new = {(row[0], row[2]): row for row in rows}
    kept: list[tuple[str, ...]] = []
    if manifest.exists():
        with manifest.open(newline="", encoding="utf-8") as file:
            for old in csv.DictReader(file):
                row = tuple(plain_cell(old.get(column) or "") for column in _MANIFEST_COLUMNS)
                if (row[0], row[2]) not in new:
                    kept.append(row)
    write_whole(csv_text([_MANIFEST_COLUMNS, *kept, *new.values()]).encode(), manifest)


def _short_hash(text: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, text).hex[:8]
