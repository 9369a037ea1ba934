"""One image through the loop, and the files that come of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ibisagent.domain import Action, Box, Case, Click, Episode, Image, Mask, MaskSelection, Turn, Undo, check_query
from ibisagent.environment import run_episodes, turn_limit
from ibisagent.errors import DataError
from ibisagent.files import safe_name, unfinished_folder
from ibisagent.imaging.images import read_image, read_masks, write_mask_png, write_png
from ibisagent.policies.base import Knowing, Policy
from ibisagent.protocol import overlay
from ibisagent.query import target_of
from ibisagent.segmenters import Segmenter
from ibisagent.store import write_record

ASKED_FACT = "objects"
"""The fact of an episode's `provenance` that holds what `asked_objects` reads, as JSON."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the files of one image are; masks by target name."""

    masks: Mapping[str, Path]
    overlay: Path
    record: Path


def read_case(path: str | Path, query: str, start_mask: str | Path | None = None) -> Case:
    """The case of one image file and one query, with a binary mask file to refine where there is one.

    It is called as the file, without its folder: paths name people and machines, and cases become records.
    Raises ConfigError for an empty or too long query and DataError for files that cannot be used, or a start mask that
    is empty or has another size than the image.
    """
    query = check_query(query)
    image = read_image(path)
    start: dict[str, Mask] = {}
    if start_mask is not None:
        mask = read_masks(start_mask)["mask"]
        if mask.shape != image.size:
            (height, width), (image_height, image_width) = mask.shape, image.size
            raise DataError(
                f"{start_mask}: is {width} x {height}, {path} is {image_width} x {image_height} pixels;"
                " resize the mask with nearest neighbour"
            )
        if not mask.any():
            raise DataError(f"{start_mask}: is an empty mask, there is nothing to refine; leave the start mask out")
        start = {target_of(query): mask}
    name = Path(path).name
    return Case(name, replace(image, source=name), query, start=start)


def run_case(
    case: Case,
    policy: Policy,
    segmenter: Segmenter,
    *,
    max_turns: int | None = None,
    mask_selection: MaskSelection | None = None,
    on_turn: Callable[[Turn], None] | None = None,
) -> Episode:
    """One episode of `policy` with `segmenter` on `case`, `provenance` whatever is named there; see its `answer_masks`.

    max_turns: default the policy's own limit. mask_selection: which masks are the answer, see `Episode.answer_masks`;
    default as is usual for the policy's dialect. on_turn: called after every turn. Raises PolicyError and
    SegmenterError when their machinery fails, ConfigError for a query that does not settle what is asked for.
    """
    [episode] = run_episodes(
        policy,
        segmenter,
        [case],
        max_turns=turn_limit(policy, case.query) if max_turns is None else max_turns,
        mask_selection=mask_selection,
        provenance={**provenance_of(policy, segmenter), **asked_facts(policy, case.image, case.query)},
        on_turn=None if on_turn is None else lambda _, turn: on_turn(turn),
    )
    return episode


def provenance_of(policy: Policy, segmenter: Segmenter) -> dict[str, str]:
    """Names, hashes, seeds and versions of policy and segmenter, for the record of what they make."""
    describe = getattr(policy, "describe", dict)  # fakes and baselines have no weights or seeds to name
    return {**segmenter.describe(), **describe()}


def asked_facts(policy: Policy, image: Image, query: str) -> dict[str, str]:
    """What the policy can say of the objects that are asked for, as a fact for the record; none where it can say
    nothing. See `asked_objects`."""
    asked = policy.about(image, query) if isinstance(policy, Knowing) else ()
    return {ASKED_FACT: json.dumps([asdict(one) for one in asked])} if asked else {}


def asked_objects(episode: Episode) -> list[dict[str, Any]]:
    """Of each object that was asked for its `name`, whether the policy learned it (`known`), else the `nearest` name
    that it learned, and how likely the image shows it (`presence`, 0 to 1); none where the policy makes no claim."""
    objects: list[dict[str, Any]] = json.loads(episode.provenance.get(ASKED_FACT, "[]"))
    return objects


def export(episode: Episode, image: Image, folder: str | Path, name: str) -> Outputs:
    """Write `<name>_mask_<target>.png` per target, `<name>_overlay.png` and `<name>_record.json` into `folder`.

    The masks are the episode's answer, of the image's size, 0 outside and 255 inside; all black for what is absent. All
    files are written first and then renamed, the record last: where it is, the others are complete. Raises DataError
    when the folder cannot be written or the disk is full; then older files of the same name are as they were.
    """
    folder = Path(folder)
    masks = episode.answer_masks
    outputs = outputs_of(folder, name, masks)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with unfinished_folder(folder, name) as part:
            for target, file in outputs.masks.items():
                write_mask_png(masks[target], part / file.name)
            write_png(overlay(image, masks), part / outputs.overlay.name)
            write_record(episode, part / outputs.record.name)
            for file in (*outputs.masks.values(), outputs.overlay, outputs.record):
                os.replace(part / file.name, file)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); free space or choose another one") from error
    return outputs


def outputs_of(folder: Path, name: str, targets: Iterable[str]) -> Outputs:
    """Where the files of the result `name` are, with the masks of `targets`."""
    taken: set[str] = set()
    masks = {target: folder / f"{name}_mask_{safe_name(target, taken)}.png" for target in targets}
    return Outputs(masks, folder / f"{name}_overlay.png", folder / f"{name}_record.json")


def describe_actions(actions: Iterable[Action]) -> str:
    """Actions in plain words, for people: "click + (12, 40) liver; stop"."""
    said = []
    for action in actions:
        if isinstance(action, Click):
            said.append(f"click {'+' if action.positive else '-'} ({action.x}, {action.y}) {action.target}")
        elif isinstance(action, Box):
            said.append(f"box ({action.x0}, {action.y0}) ({action.x1}, {action.y1}) {action.target}")
        elif isinstance(action, Undo):
            said.append(f"undo {action.steps}")
        else:
            said.append("stop" + "".join(f", absent: {name}" for name in action.absent))
    return "; ".join(said)
