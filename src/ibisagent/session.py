"""One image through the loop, and the files that come of it: mask, overlay and record; and a record played again."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ibisagent.domain import Case, Episode, Image, Mask, Masks, Turn, check_query
from ibisagent.environment import SegmentationEnv, replay, rollout
from ibisagent.errors import DataError
from ibisagent.images import read_image, read_masks, write_mask_png, write_png
from ibisagent.policies.base import Policy
from ibisagent.protocol import overlay, target_of
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.segmenters.runtime import RUNTIMES
from ibisagent.store import read_record, write_record

DEFAULT_TURNS = 5
"""Where the packaged policy stops gaining, on held-out training patients (docs/log.md); the paper allows 20."""

MAX_NAME_BYTES = 80
"""Longest part of a file name that is taken from an image's or an object's name; file systems allow 255 in all."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where the files of one image are; masks by target name."""

    masks: Mapping[str, Path]
    overlay: Path
    record: Path


def read_case(path: str | Path, query: str, start_mask: str | Path | None = None) -> Case:
    """The case of one image file and one query, with a binary mask file to refine where there is one.

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
    return Case(str(path), image, query, start=start)


def segment(
    case: Case,
    policy: Policy,
    segmenter: Segmenter,
    *,
    max_turns: int = DEFAULT_TURNS,
    on_turn: Callable[[Turn], None] | None = None,
) -> Episode:
    """One episode of `policy` with `segmenter` on `case`; its `made_by` says all that made it.

    on_turn: called after every turn. Raises PolicyError and SegmenterError when their machinery fails.
    """
    env = SegmentationEnv(
        case, segmenter, dialect=policy.dialect, max_turns=max_turns, made_by=provenance(policy, segmenter)
    )
    [episode] = rollout(policy, [env], on_turn=None if on_turn is None else lambda _, turn: on_turn(turn))
    return episode


def provenance(policy: Policy, segmenter: Segmenter) -> dict[str, str]:
    """Names, hashes, seeds and versions of policy and segmenter, for the record of what they make."""
    describe = getattr(policy, "describe", dict)  # fakes and baselines have no weights or seeds to name
    return {**segmenter.describe(), **describe()}


def file_names(paths: Iterable[str | Path]) -> list[str]:
    """One distinct name per path to begin its output files with: its stem, numbered where a batch has it twice.

    Names that differ only in case count as equal, since many file systems cannot keep both.
    """
    taken: set[str] = set()
    return [_distinct(Path(path).stem, taken) for path in paths]


def export(episode: Episode, image: Image, folder: str | Path, name: str) -> Outputs:
    """Write `<name>_mask_<target>.png` per target, `<name>_overlay.png` and `<name>_record.json` into `folder`.

    A mask has the image's size, 0 outside and 255 inside; an object that was called absent gets an all-black one. All
    files are written first and then renamed, the record last: where it is, the others are complete. Raises DataError
    when the folder cannot be written or the disk is full; then older files of the same name are as they were.
    """
    folder = Path(folder)
    masks = final_masks(episode)
    taken: set[str] = set()
    mask_files = {target: f"{name}_mask_{_distinct(target, taken)}.png" for target in masks}
    overlay_file, record_file = f"{name}_overlay.png", f"{name}_record.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".ibisagent-", dir=folder) as unfinished:
            part = Path(unfinished)
            for target, file in mask_files.items():
                write_mask_png(masks[target], part / file)
            write_png(overlay(image, masks), part / overlay_file)
            write_record(episode, part / record_file)
            for file in (*mask_files.values(), overlay_file, record_file):
                os.replace(part / file, folder / file)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror}); free space or choose another one") from error
    return Outputs(
        {target: folder / file for target, file in mask_files.items()}, folder / overlay_file, folder / record_file
    )


def final_masks(episode: Episode) -> Masks:
    """The episode's masks, and an empty one for each object that its answer calls absent and that has none."""
    empty = np.zeros(episode.size, dtype=bool)
    return {**dict.fromkeys(episode.answer.absent, empty), **episode.masks}


def replay_record(path: str | Path, *, image: str | Path | None = None, device: str = "auto") -> tuple[Episode, Image]:
    """Rebuild the masks of a record from its clicks, without the policy, and check them bit for bit.

    image: where the picture is now; by default where the record says, also looked for beside the record. Raises
    DataError if the masks differ or files cannot be used.
    """
    episode = read_record(path)
    picture = read_image(image if image is not None else _find_image(episode, Path(path)))
    recorded = episode.made_by
    if not recorded.get("segmenter"):
        raise DataError(f"{path}: does not name its segmenter; make the record again")
    runtime = recorded.get("runtime", "").partition(" ")[0]  # "openvino 2026.4.1 f32", "opencv 5.0.0"
    engine = load_segmenter(recorded["segmenter"], device=device, runtime=runtime if runtime in RUNTIMES else "auto")
    masks = replay(episode, picture, engine)
    differing = [
        name
        for name in dict.fromkeys([*episode.masks, *masks])
        if not (name in masks and name in episode.masks and np.array_equal(masks[name], episode.masks[name]))
    ]
    if differing:
        now = engine.describe()
        changed = [key for key in now if key in recorded and recorded[key] != now[key]]
        hint = f"{', '.join(changed)} is not what it was" if changed else "hardware or library versions may differ"
        raise DataError(f"{path}: the mask of '{differing[0]}' cannot be rebuilt bit for bit ({hint})")
    return episode, picture


def _find_image(episode: Episode, record: Path) -> Path:
    """Where the record says, else a file of that name beside the record."""
    source = Path(episode.image_source)
    places = [source, record.parent / source.name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DataError(f"{record}: its image {source} is not there; say where it is with --image")
    return found


def _distinct(name: str, taken: set[str]) -> str:
    """`name` made fit for a file name, numbered if `taken` holds it already; adds it to `taken`."""
    plain = re.sub(r"[^\w.+-]+", "_", name).strip("._") or "image"
    plain = plain.encode()[:MAX_NAME_BYTES].decode(errors="ignore")
    number, chosen = 1, plain
    while chosen.casefold() in taken:
        number += 1
        chosen = f"{plain}-{number}"
    taken.add(chosen.casefold())
    return chosen
