"""A recorded volume once more: the agent's recorded replies, and the segmenter between them, without the policy."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.domain import MASK_SELECTION, Completion, Episode, Observation
from ibisagent.environment import cannot_be_rebuilt, load_recorded_segmenter
from ibisagent.errors import DataError
from ibisagent.store import read_record
from ibisagent.volume_agent import segment_volume, slice_id
from ibisagent.volume_agent.files import RECORD_FORMAT, RECORD_VERSION, VolumeOutputs, VolumeWriter, mask_sha256
from ibisagent.volumes import SliceView, read_volume
from ibisagent.volumes.grid import scratch

_NEEDED = (
    *("volume", "channel", "shape", "affine", "axis", "window", "query"),
    *("recheck", "max_turns", "made_by", "asked", "masks_sha256"),
)
_SLICE_RECORD = re.compile(r"(.+)_slice-\d{4,}(?:-\d+)?_record\.json")
_ENDINGS = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", "")


@dataclass(frozen=True, slots=True)
class Replayed:
    """What was rebuilt. outputs: None where nothing was written."""

    targets: tuple[str, ...]
    turns: int
    outputs: VolumeOutputs | None


def is_volume_record(path: str | Path) -> bool:
    """Whether this is the record of a volume rather than of a picture; False also for what cannot be read."""
    try:
        record = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("format") == RECORD_FORMAT


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
    made_by = record["made_by"]
    engine = load_recorded_segmenter(made_by, str(path), device)
    episodes = _episodes(record, path)
    keys = sorted({asked["slice"] for asked in record["asked"] if asked["why"] == "key"})
    policy = _Recorded(view, episodes, str(made_by.get("policy", "")), str(path))
    with VolumeWriter(Path(output), name or volume.name, formats) if output else nullcontext() as files:
        if files:
            files.prepare(volume, made_by)
        found = segment_volume(
            view,
            record["query"],
            policy,
            engine,
            keys=keys or None,
            recheck=record["recheck"],
            max_turns=record["max_turns"],
            mask_selection=policy.mask_selection,
            start=_starts(view, episodes, keys),
            made_by={key: value for key, value in made_by.items() if key not in ("policy", "ibisagent")},
            on_episode=files.episode if files else None,
        )
        masks = record["masks_sha256"]
        for target in dict.fromkeys([*masks, *found.masks]):
            if target not in found.masks or mask_sha256(found.masks[target]) != masks.get(target):
                raise cannot_be_rebuilt(path, target, made_by, engine)
        outputs = files.finish(found, view, record["query"], made_by, channel=record["channel"]) if files else None
    return Replayed(tuple(found.masks), found.cost.policy_calls, outputs)


def _read(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_bytes())
    if record.get("version") != RECORD_VERSION:
        raise DataError(f"{path}: is of version {record.get('version')}, {RECORD_VERSION} is replayed; make it again")
    known = (
        "volume",
        "shape",
        "affine",
        "axis",
        "window",
        "query",
        "made_by",
        "asked",
        "recheck",
        "max_turns",
        "channel",
    )
    if missing := [key for key in (*known, "masks_sha256") if key not in record]:
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
            view.write_mask(starts.setdefault(target, scratch(view.volume.shape, np.bool_)), key, mask)
    return starts or None


class _Recorded:
    """Answers as the record did."""

    def __init__(self, view: SliceView, episodes: Mapping[int, Sequence[Episode]], name: str, where: str) -> None:
        self.name, self._where = name, where
        dialects = {episode.made_by.get("dialect", "ibis") for several in episodes.values() for episode in several}
        if len(dialects) > 1:
            raise DataError(f"{where}: its slices are in several dialects ({', '.join(sorted(dialects))})")
        self.dialect = dialects.pop() if dialects else "ibis"
        selections = {episode.mask_selection for several in episodes.values() for episode in several}
        if len(selections) > 1:
            raise DataError(f"{where}: its slices select their masks in several ways ({', '.join(sorted(selections))})")
        self.mask_selection = selections.pop() if selections else MASK_SELECTION
        self._waiting = {slice_id(view, index): list(several) for index, several in episodes.items()}

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """See `Policy`."""
        return [self._one(observation) for observation in observations]

    def _one(self, observation: Observation) -> Completion:
        waiting = self._waiting.get(observation.case_id)
        if not waiting or len(observation.turns) >= len(waiting[0].turns):
            raise DataError(f"{self._where}: has no reply for {observation.image.source}; the masks come out otherwise")
        episode = waiting[0]
        if episode.image_sha256 != observation.image.sha256:
            raise DataError(f"{observation.image.source}: is not the picture of the record {self._where}")
        if len(observation.turns) == len(episode.turns) - 1:
            waiting.pop(0)
        return episode.turns[len(observation.turns)].completion
