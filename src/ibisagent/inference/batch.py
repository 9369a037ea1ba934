"""Many files into one folder: images and volumes, each result once, resumable after a stop.

A result is called as its input: `STEM_record.json`, `STEM_mask_TARGET.png`, ... Where that name holds the result of
another image or query, this one is called `STEM_OBJECT-HASH`, from the query and the content; so no order of inputs,
and no second run, takes the place of a result. A result that is there already, of the same content, query and settings,
is kept and not made again; one of other settings is refused unless `overwrite` is set.
"""

from __future__ import annotations

import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ibisagent.domain import Case, Episode, Image, MaskSelection, Turn, check_query, same_masks
from ibisagent.environment import mask_choice
from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import make_folder, safe_name, same_run
from ibisagent.inference.image import Outputs, asked_objects, export, outputs_of, provenance_of, read_case, run_case
from ibisagent.inference.volume import Cost, Why, choose_slices, run_volume
from ibisagent.inference.volume_files import DICOM_FORMATS, VolumeOutputs, VolumeWriter, volume_record
from ibisagent.policies.base import Policy
from ibisagent.query import target_of
from ibisagent.segmenters import Segmenter
from ibisagent.store import read_record
from ibisagent.volumes import SliceView, Volume, dicomweb, is_volume, read_volume, whole_series
from ibisagent.volumes.label_maps import choose_start
from ibisagent.volumes.writing import masks_on

_OF_MACHINE = {"ibisagent", "torch", "transformers", "runtime", "policy_device", "policy_runtime"}
"""Facts of a record that may differ between the starts of one run."""


@dataclass(frozen=True, slots=True)
class VolumeOptions:
    """How volumes are read, walked through and written; see `read_volume`, `SliceView`, `run_volume`, `FORMATS`.

    slices: as for `choose_slices`; None searches. store: address of a DICOMweb server that gets the DICOM objects.
    label: which object of a start mask is refined, see `choose_start`.
    """

    axis: str = "auto"
    slices: str | None = None
    window: str = "auto"
    channel: int | None = None
    series: str | None = None
    recheck: int = 10
    formats: tuple[str, ...] = ("nifti",)
    store: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.store is not None and not set(DICOM_FORMATS) & set(self.formats):
            raise ConfigError("--store sends DICOM objects: ask for them with --format seg, sr or rtstruct")


@dataclass(frozen=True, slots=True)
class ImageResult:
    """What came of one image. score: of the review, where there is one, in [0, 1]. kept: it was there already."""

    path: str
    episode: Episode
    outputs: Outputs
    seconds: float
    score: float | None = None

    kept: bool = False

    @property
    def problem(self) -> str | None:
        """Why there is nothing that could be an answer; None where there is."""
        episode = self.episode
        if episode.stop != "malformed" or any(mask.any() for mask in episode.answer_masks.values()):
            return None
        why = episode.turns[-1].reply.problem
        return f"{self.path}: no mask was made, as the policy's replies could not be read ({why}); ask in other words"

    def to_json(self) -> dict[str, Any]:
        """As plain values. known, nearest, presence: of the only object, as in `objects` (`image.asked_objects`)."""
        answer = self.episode.answer
        asked = asked_objects(self.episode)
        return {
            "image": self.path,
            "masks": {target: str(file) for target, file in self.outputs.masks.items()},
            "overlay": str(self.outputs.overlay),
            "record": str(self.outputs.record),
            "answer": answer.answer,
            "absent": list(answer.absent),
            "stop": self.episode.stop,
            "turns": len(self.episode.turns),
            "seconds": round(self.seconds, 3),
            **({"objects": asked} if asked else {}),
            **({key: asked[0][key] for key in ("known", "nearest", "presence")} if len(asked) == 1 else {}),
            **({} if (problem := self.problem) is None else {"error": problem}),
            **({} if self.score is None else {"score": round(self.score, 4)}),
            **({"kept": True} if self.kept else {}),
        }


@dataclass(frozen=True, slots=True)
class VolumeResult:
    """What came of one volume."""

    path: str
    outputs: VolumeOutputs
    cost: Cost
    seconds: float
    score: float | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        outputs = self.outputs
        return {
            "image": self.path,
            "masks": {name: {kind: str(one) for kind, one in files.items()} for name, files in outputs.masks.items()},
            "dicom": [str(file) for file in outputs.dicom],
            "measures": {target: asdict(values) for target, values in outputs.measures.items()},
            "overlay": str(outputs.overview),
            "record": str(outputs.record),
            "cost": asdict(self.cost),
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            **({} if self.score is None else {"score": round(self.score, 4)}),
            **({"error": "; ".join(outputs.failed)} if outputs.failed else {}),
        }


@dataclass(frozen=True, slots=True)
class KeptVolume:
    """The result of a volume that was there already."""

    path: str
    record: Path
    failed: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        error = {"error": "; ".join(self.failed)} if self.failed else {}
        return {"image": self.path, "record": str(self.record), "kept": True, **error}


@dataclass(frozen=True, slots=True)
class Failed:
    """An input of which nothing came."""

    path: str
    error: IbisError

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"image": self.path, "error": str(self.error)}


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A series that the choice leaves out, and why."""

    path: str
    why: str

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"image": self.path, "passed_over": self.why}


Result = ImageResult | VolumeResult | KeptVolume | Failed | PassedOver


class Review(Protocol):
    """Who scores the masks of images; `evaluation.reliability.Queue` does."""

    def add(self, image: str, episode: Episode, case: Case) -> float:
        """The score of an episode of the image at this path, in [0, 1]."""

    def add_volume(self, image: str, episodes: Iterable[tuple[Episode, Case]]) -> float:
        """The score of a volume of the episodes on its slices, in [0, 1]."""


class Listener:
    """Who wants to know what happens while a batch runs; override what is of interest."""

    def started(self, path: str) -> None:
        """An input is about to be read."""

    def turn(self, turn: Turn) -> None:
        """One more turn on an image."""

    def opened(self, view: SliceView) -> None:
        """A volume was read."""

    def noted(self, notes: Sequence[str]) -> None:
        """What of the source is repaired in the objects that will be written, a line each."""

    def asked(self, index: int, why: Why, episode: Episode) -> None:
        """The agent has answered on one slice of a volume."""

    def sending(self, address: str) -> None:
        """DICOM objects are about to be sent to a server."""


@dataclass
class Batch:
    """Segments what `query` names in one file after another.

    folder: of the results; made where it is not there, before any work. overwrite: make results of the same content and
    query again, whatever their settings were. Raises ConfigError for a query that cannot be one, DataError where the
    folder cannot be used.
    """

    policy: Policy
    segmenter: Segmenter
    query: str
    folder: Path
    max_turns: int | None = None
    mask_selection: MaskSelection | None = None
    volumes: VolumeOptions = field(default_factory=VolumeOptions)
    overwrite: bool = False
    review: Review | None = None
    listener: Listener = field(default_factory=Listener)

    def __post_init__(self) -> None:
        self.query = check_query(self.query)
        make_folder(self.folder)
        self._provenance = provenance_of(self.policy, self.segmenter)
        # by name without case, as many file systems cannot keep two that differ in it alone
        self._records = {record.name.casefold(): record for record in self.folder.glob("*_record.json")}

    def run(self, paths: Sequence[str], starts: Sequence[Path | None] = ()) -> Iterator[Result]:
        """The results, in order. An input that fails becomes `Failed` and does not stop the others.

        paths: files, folders with a DICOM series, or the DICOMweb address of one; slices of one series are one input,
        called by their folder. starts: masks to refine, one for each input, or none at all. ConfigError for another
        number.
        """
        groups = whole_series(paths)
        if starts and len(starts) != len(groups):
            raise ConfigError(f"{len(starts)} start masks for {len(groups)} images: give one per image, in their order")
        for files, start in zip(groups, starts or [None] * len(groups), strict=True):
            path = files[0] if len(files) == 1 else str(Path(files[0]).parent)
            self.listener.started(path)
            try:
                yield self.segment(path, start) if len(files) == 1 else self.segment_volume(path, start, files)
            except IbisError as error:
                yield Failed(path, error)

    def segment(self, path: str, start: Path | None = None) -> ImageResult | VolumeResult | KeptVolume:
        """The result of one input. Raises IbisError."""
        if dicomweb.is_url(path) or is_volume(path):
            return self.segment_volume(path, start)
        return self._image(path, start)

    def _image(self, path: str, start: Path | None) -> ImageResult:
        started = time.perf_counter()
        case = read_case(path, self.query, start)

        def same_input(record: Path) -> bool:
            earlier = _image_record(record)
            if earlier is None or (earlier.image_sha256, earlier.query) != (case.image.sha256, self.query):
                return False
            if not self.overwrite:
                self._check_settings(record, earlier.provenance, {"mask_selection": earlier.mask_selection})
                if not same_masks(earlier.start, case.start):
                    raise ConfigError(f"{record}: was made with another start mask; --overwrite makes it again")
            return True

        name, record = self._name(Path(path).stem, case.image.sha256, same_input)
        earlier = None if record is None else _image_record(record)
        if earlier is not None and not self.overwrite:
            score = None if self.review is None else self.review.add(path, earlier, case)
            outputs = outputs_of(self.folder, name, earlier.answer_masks)
            return ImageResult(path, earlier, outputs, time.perf_counter() - started, score, kept=True)
        episode = run_case(
            case,
            self.policy,
            self.segmenter,
            max_turns=self.max_turns,
            mask_selection=self.mask_selection,
            on_turn=self.listener.turn,
        )
        score = None if self.review is None else self.review.add(path, episode, case)
        outputs = export(episode, case.image, self.folder, name)
        if earlier is not None:  # it may have had masks of other objects
            written = set(outputs.masks.values())
            for stale in outputs_of(self.folder, name, earlier.answer_masks).masks.values():
                if stale not in written:
                    stale.unlink(missing_ok=True)
        self._records[outputs.record.name.casefold()] = outputs.record
        return ImageResult(path, episode, outputs, time.perf_counter() - started, score)

    def segment_volume(self, path: str, start: Path | None, files: Sequence[str] = ()) -> VolumeResult | KeptVolume:
        """The result of the volume called `path`; files: where it is those of one DICOM series. Raises IbisError."""
        started, options = time.perf_counter(), self.volumes
        with ExitStack() as until:
            source = Path(path)
            if dicomweb.is_url(path):
                source = Path(until.enter_context(tempfile.TemporaryDirectory(prefix="ibisagent-")))
                dicomweb.fetch_series(path, source)
            volume = read_volume(files or source, channel=options.channel, series=options.series)
            view = SliceView(volume, options.axis, options.window)
            self.listener.opened(view)
            masks = {}
            if start is not None:
                masks = choose_start(masks_on(volume, start), self.query, options.label, start)
            facts = self._volume_facts(volume, start)

            def same_input(record: Path) -> bool:
                earlier = volume_record(record)
                if earlier is None or earlier.get("input", {}).get("sha256") != facts["sha256"]:
                    return False
                if earlier.get("query") != self.query:
                    return False
                if not self.overwrite:
                    self._check_settings(record, earlier["made_by"], {**earlier["input"]}, facts)
                return True

            name, record = self._name(volume.name, facts["sha256"], same_input)
            if record is not None and not self.overwrite:
                self._review_volume(path, record, view)
                return KeptVolume(path, record, tuple((volume_record(record) or {}).get("failed_formats", {}).values()))
            return self._segment_volume(path, view, masks, name, facts, started)

    def _segment_volume(
        self,
        path: str,
        view: SliceView,
        start: Mapping[str, np.ndarray],
        name: str,
        facts: Mapping[str, Any],
        started: float,
    ) -> VolumeResult:
        options = self.volumes
        keys = None if options.slices is None else choose_slices(view, options.slices)
        provenance = {"policy": self.policy.name, **self._provenance}
        with VolumeWriter(self.folder, name, options.formats) as files:
            repaired = files.prepare(view.volume, provenance)
            self.listener.noted(repaired)

            def on_episode(index: int, why: Why, episode: Episode, image: Image) -> None:
                files.episode(index, why, episode, image)
                self.listener.asked(index, why, episode)

            found = run_volume(
                view,
                self.query,
                self.policy,
                self.segmenter,
                keys=keys,
                recheck=options.recheck,
                max_turns=self.max_turns,
                mask_selection=self.mask_selection,
                start=start,
                provenance=self._provenance,
                on_episode=on_episode,
            )
            outputs = files.finish(found, view, self.query, provenance, channel=options.channel, input_facts=facts)
        if options.store is not None and outputs.dicom:
            self.listener.sending(options.store)
            dicomweb.store(options.store, outputs.dicom)
        self._records[outputs.record.name.casefold()] = outputs.record
        score = self._review_volume(path, outputs.record, view)
        notes = (*view.volume.notes, *repaired)
        return VolumeResult(path, outputs, found.cost, time.perf_counter() - started, score, notes)

    def _review_volume(self, path: str, record: Path, view: SliceView) -> float | None:
        """The score of a volume's record by the episodes on its slices; None where nobody reviews."""
        if self.review is None:
            return None
        asked = (volume_record(record) or {}).get("asked", ())
        return self.review.add_volume(path, (pair for row in asked for pair in self._episodes_on(row, record, view)))

    def _episodes_on(self, asked: Mapping[str, Any], record: Path, view: SliceView) -> Iterator[tuple[Episode, Case]]:
        for file in asked["records"]:
            episode = read_record(record.parent / file)
            yield episode, Case(episode.case_id, view.image(asked["slice"]), self.query, start=episode.start)

    def _volume_facts(self, volume: Volume, start: Path | None) -> dict[str, Any]:
        """What a volume's result was made from, for its record."""
        options = asdict(self.volumes)
        options.pop("store")
        options["formats"] = sorted(options["formats"])
        return {
            "sha256": volume.sha256,
            "start_sha256": "" if start is None else _sha256(start),
            "mask_selection": mask_choice(self.policy, self.mask_selection),
            "max_turns": self.max_turns,
            **options,
        }

    def _check_settings(
        self,
        record: Path,
        provenance: Mapping[str, str],
        earlier: Mapping[str, Any],
        now: Mapping[str, Any] | None = None,
    ) -> None:
        """ConfigError where the result of `record` was made with other settings."""
        ours = {"policy": self.policy.name, **self._provenance}
        if self.max_turns is not None and "max_turns" in provenance:
            ours["max_turns"] = str(self.max_turns)
        before = {name: provenance.get(name, value) for name, value in ours.items()}
        try:
            same_run(before, ours, record, free=_OF_MACHINE)
            same_run(
                earlier,
                {"mask_selection": mask_choice(self.policy, self.mask_selection)} if now is None else now,
                record,
            )
        except ConfigError as error:
            raise ConfigError(f"{str(error).partition(';')[0]}; --overwrite makes it again") from error

    def _name(self, stem: str, content: str, same_input: Callable[[Path], bool]) -> tuple[str, Path | None]:
        """What this result's files begin with, and its record where the result is there already."""
        plain = safe_name(stem, set())
        digest = hashlib.sha256(f"{content}\n{self.query}".encode()).hexdigest()[:8]
        target = safe_name(target_of(self.query), set())
        for name in (plain, f"{plain}_{target[:40]}-{digest}"):
            record = self._records.get(f"{name}_record.json".casefold())
            if record is None:
                return name, None
            if same_input(record):
                return record.name.removesuffix("_record.json"), record
        raise DataError(f"{record}: is of another input, though its name says otherwise; choose another folder")


def _image_record(path: Path) -> Episode | None:
    """The episode of a record; None for what is none, such as the record of a volume."""
    try:
        return read_record(path)
    except DataError:
        return None


def _sha256(path: Path) -> str:
    """Hash of a file, or of all files of a folder in the order of their names."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file()):
        digest.update(file.read_bytes())
    return digest.hexdigest()
