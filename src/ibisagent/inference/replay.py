"""A record once more: its actions, and the segmenter between them, without the policy; checked bit for bit."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.domain import MASK_SELECTION, Completion, Episode, Image, Masks, Observation
from ibisagent.environment import PromptState
from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import file_names
from ibisagent.imaging.images import read_image
from ibisagent.inference.image import export
from ibisagent.inference.volume import run_volume, slice_id
from ibisagent.inference.volume_files import RECORD_VERSION, VolumeWriter, mask_sha256, volume_record
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.segmenters.runtime import RUNTIMES
from ibisagent.store import read_record
from ibisagent.volumes import SliceView, read_volume
from ibisagent.volumes.grid import scratch_mask

_NEEDED = (
    *("volume", "channel", "shape", "affine", "axis", "window", "query"),
    *("recheck", "max_turns", "made_by", "asked", "masks_sha256"),
)
_SLICE_RECORD = re.compile(r"(.+)_slice-\d{4,}(?:-\d+)?_record\.json")
_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", "")


def replay(episode: Episode, image: Image, segmenter: Segmenter) -> Masks:
    """The final masks, made again from the recorded actions alone; bit for bit with the same segmenter.

    Raises DataError if `image` is not the one of the record, ConfigError if `segmenter` is not, SegmenterError if it
    fails.
    """
    if image.sha256 != episode.image_sha256:
        raise DataError(f"{image.source or 'image'}: is not the image of this record, {episode.image_source}")
    recorded = episode.provenance.get("segmenter", segmenter.name)
    if recorded != segmenter.name:
        raise ConfigError(f"the record was made with segmenter {recorded}, not {segmenter.name}; load that one")
    prompt_state = PromptState(image, segmenter, episode.start, episode.provenance.get("dialect", ""))
    for turn in episode.turns:
        prompt_state.apply(turn.reply.actions, turn.completion.drafts)
    return dict(prompt_state.masks)


def replay_record(path: str | Path, *, image: str | Path | None = None, device: str = "auto") -> tuple[Episode, Image]:
    """Rebuild the masks of a record from its clicks, without the policy, and check them bit for bit.

    image: the image, or the folder that it is in; by default it is looked for beside the record, one folder higher,
    and where the process runs. Raises DataError if the masks differ or files cannot be used.
    """
    episode = read_record(path)
    found = _find_image(episode, Path(path), image)
    recorded = episode.provenance
    engine = load_recorded_segmenter(recorded, str(path), device)
    masks = replay(episode, found, engine)
    differing = [
        name
        for name in dict.fromkeys([*episode.masks, *masks])
        if not (name in masks and name in episode.masks and np.array_equal(masks[name], episode.masks[name]))
    ]
    if differing:
        raise cannot_be_rebuilt(path, differing[0], recorded, engine)
    return episode, found


def load_recorded_segmenter(provenance: Mapping[str, str], where: str, device: str) -> Segmenter:
    """The segmenter that a record names, on the runtime that it names. DataError where it names none."""
    if not provenance.get("segmenter"):
        raise DataError(f"{where}: does not name its segmenter; make the record again")
    runtime = provenance.get("runtime", "").partition(" ")[0]  # "openvino 2026.4.1 f32", "opencv 5.0.0"
    return load_segmenter(provenance["segmenter"], device=device, runtime=runtime if runtime in RUNTIMES else "auto")


def cannot_be_rebuilt(where: object, target: str, provenance: Mapping[str, str], segmenter: Segmenter) -> DataError:
    """What to raise where a record's mask comes out otherwise; says what has changed, as far as is known."""
    now = segmenter.describe()
    changed = [key for key in now if key in provenance and provenance[key] != now[key]]
    hint = f"{', '.join(changed)} is not what it was" if changed else "hardware or library versions may differ"
    return DataError(f"{where}: the mask of '{target}' cannot be rebuilt bit for bit ({hint})")


def _find_image(episode: Episode, record: Path, given: str | Path | None) -> Image:
    """The image of a record, which knows its name and content only."""
    name = Path(episode.image_source).name
    folders = [record.parent, record.parent.parent, Path()] if given is None else [Path(given)]
    if given is not None and not Path(given).is_dir():
        return read_image(given)
    found = [folder / name for folder in folders if (folder / name).is_file()]
    if not found:
        raise DataError(f"{record}: its image {name} is not there; say where it is with --image")
    images = [read_image(path) for path in found]
    return next((image for image in images if image.sha256 == episode.image_sha256), images[0])


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was rebuilt: its targets, how many turns it took, and the mask files by target, where any were written."""

    targets: tuple[str, ...]
    turns: int
    masks: Mapping[str, Path]


@dataclass(frozen=True, slots=True)
class ReplayedRecord:
    """A record, and what was rebuilt of it or why nothing was."""

    record: Path
    found: Replayed | IbisError


def replay_records(
    records: Sequence[Path],
    output: Path | None = None,
    *,
    image: Path | None = None,
    series: str | None = None,
    device: str = "auto",
) -> Iterator[ReplayedRecord]:
    """Rebuild the masks of records of images and volumes, one after the other; a failing one does not stop the others.

    output: a folder to write the files to once more. image: where the image or volume is now, or the folder of all
    images. series: of a DICOM folder, see `read_volume`. ConfigError where `image` is one file of multiple records.
    """
    records = without_slices(records)
    if image is not None and not image.is_dir() and len(records) > 1:
        raise ConfigError("--image names one file: replay one record at a time with it")
    for record, name in zip(records, file_names(records), strict=True):
        name = name.removesuffix("_record")
        try:
            if is_volume_record(record):
                found = replay_volume(record, image, series=series, device=device, output=output, name=name)
            else:
                episode, rebuilt = replay_record(record, image=image, device=device)
                files = {} if output is None else export(episode, rebuilt, output, name).masks
                found = Replayed(tuple(episode.answer_masks), len(episode.turns), files)
        except IbisError as error:
            yield ReplayedRecord(record, error)
        else:
            yield ReplayedRecord(record, found)


def is_volume_record(path: str | Path) -> bool:
    """Whether this is the record of a volume rather than of an image; False also for what cannot be read."""
    return volume_record(Path(path)) is not None


def without_slices(records: Sequence[Path]) -> list[Path]:
    """The records but those of a volume's slices, which are played again with their volume's.

    DataError for one of a slice whose volume's record lies beside it and is not given.
    """
    given = {path.resolve() for path in records}
    kept = []
    for path in records:
        match = _SLICE_RECORD.fullmatch(path.name)
        whole = path.with_name(f"{match[1]}_record.json") if match else None
        if whole is None or not is_volume_record(whole):
            kept.append(path)
        elif whole.resolve() not in given:
            raise DataError(f"{path}: is of one slice of a volume; replay {whole.name}, which takes it along")
    return kept


def replay_volume(
    path: str | Path,
    source: str | Path | None = None,
    *,
    series: str | None = None,
    device: str = "auto",
    output: str | Path | None = None,
    name: str = "",
    formats: Sequence[str] = ("nifti",),
) -> Replayed:
    """Rebuild the masks of a volume's record and check them bit for bit.

    The records of its slices must lie beside it. source: where the volume is now, by default looked for beside the
    record; series: as for `read_volume`. output: a folder to write the files to once more, beginning with `name`.
    Raises DataError where files are missing, the volume is another one, or the masks differ.
    """
    path = Path(path)
    record = _read(path)
    volume = read_volume(_find(record, path) if source is None else source, channel=record["channel"], series=series)
    axis = "auto" if record["axis"] == "stored" else record["axis"]
    view = SliceView(volume, axis, record["window"]["asked"])
    if list(volume.shape) != record["shape"] or not np.allclose(volume.affine, record["affine"]):
        raise DataError(f"{volume.name}: has another grid than the volume of {path}")
    provenance = record["made_by"]
    engine = load_recorded_segmenter(provenance, str(path), device)
    episodes = _episodes(record, path)
    keys = sorted({asked["slice"] for asked in record["asked"] if asked["why"] == "key"})
    policy = _Recorded(view, episodes, str(provenance.get("policy", "")), str(path))
    with VolumeWriter(Path(output), name or volume.name, formats) if output else nullcontext() as files:
        if files:
            files.prepare(volume, provenance)
        found = run_volume(
            view,
            record["query"],
            policy,
            engine,
            keys=keys or None,
            recheck=record["recheck"],
            max_turns=record["max_turns"],
            mask_selection=policy.mask_selection,
            start=_starts(view, episodes, keys),
            provenance={key: value for key, value in provenance.items() if key not in ("policy", "ibisagent")},
            on_episode=files.episode if files else None,
        )
        masks = record["masks_sha256"]
        for target in dict.fromkeys([*masks, *found.masks]):
            if target not in found.masks or mask_sha256(found.masks[target]) != masks.get(target):
                raise cannot_be_rebuilt(path, target, provenance, engine)
        outputs = None
        if files is not None:
            facts = record.get("input")
            outputs = files.finish(
                found, view, record["query"], provenance, channel=record["channel"], input_facts=facts
            )
    written = (
        {}
        if outputs is None
        else {target: files_of["nifti"] for target, files_of in outputs.masks.items() if "nifti" in files_of}
    )
    return Replayed(tuple(found.masks), found.cost.policy_calls, written)


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_bytes())
    if record.get("version") != RECORD_VERSION:
        raise DataError(f"{path}: is of version {record.get('version')}, {RECORD_VERSION} is replayed; make it again")
    if missing := [key for key in _NEEDED if key not in record]:
        raise DataError(f"{path}: is damaged, it lacks '{missing[0]}'; make it again")
    return record


def _find(record: Mapping[str, Any], path: Path) -> Path:
    places = [path.parent / f"{record['volume']}{ending}" for ending in _ENDINGS]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise DataError(f"{path}: its volume {record['volume']} is not there; say where it is with --image")
    return found


def _episodes(record: Mapping[str, Any], path: Path) -> dict[int, list[Episode]]:
    """The recorded episodes of each slice, oldest first."""
    files = {asked["slice"]: asked["records"] for asked in record["asked"]}
    return {index: [read_record(path.parent / file) for file in names] for index, names in files.items()}


def _starts(
    view: SliceView, episodes: Mapping[int, Sequence[Episode]], keys: Sequence[int]
) -> dict[str, np.ndarray] | None:
    """The masks to refine that the key slices began with, as masks of the volume; None where there were none."""
    starts: dict[str, np.ndarray] = {}
    for key in keys:
        for target, mask in episodes[key][0].start.items():
            view.write_mask(starts.setdefault(target, scratch_mask(view.volume.shape)), key, mask)
    return starts or None


class _Recorded:
    """Answers as the record did."""

    def __init__(self, view: SliceView, episodes: Mapping[int, Sequence[Episode]], name: str, where: str) -> None:
        self.name, self._where = name, where
        dialects = {episode.provenance.get("dialect", "ibis") for asked in episodes.values() for episode in asked}
        if len(dialects) > 1:
            raise DataError(f"{where}: its slices are in different dialects ({', '.join(sorted(dialects))})")
        self.dialect = dialects.pop() if dialects else "ibis"
        selections = {episode.mask_selection for asked in episodes.values() for episode in asked}
        if len(selections) > 1:
            raise DataError(f"{where}: its slices select masks in different ways ({', '.join(sorted(selections))})")
        self.mask_selection = selections.pop() if selections else MASK_SELECTION
        self._waiting = {slice_id(view, index): list(asked) for index, asked in episodes.items()}

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """See `Policy`."""
        return [self._one(observation) for observation in observations]

    def _one(self, observation: Observation) -> Completion:
        waiting = self._waiting.get(observation.case_id)
        if not waiting or len(observation.turns) >= len(waiting[0].turns):
            raise DataError(f"{self._where}: has no reply for {observation.image.source}; the masks come out otherwise")
        episode = waiting[0]
        if episode.image_sha256 != observation.image.sha256:
            raise DataError(f"{observation.image.source}: is not the image of the record {self._where}")
        if len(observation.turns) == len(episode.turns) - 1:
            waiting.pop(0)
        return episode.turns[len(observation.turns)].completion
