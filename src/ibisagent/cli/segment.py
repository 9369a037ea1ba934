"""`ibisagent segment` and `ibisagent replay`: masks of files, and the same masks once more from their records."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibisagent.cli.options import (
    DeviceOption,
    Drawing,
    JsonOption,
    PolicyChoice,
    SegmenterOption,
    SelectionOption,
    TurnsOption,
    spread_options,
)
from ibisagent.cli.output import EXIT_ERROR, JsonStream, print_error, print_json, progress, status, stderr, stdout
from ibisagent.domain import check_mask_selection
from ibisagent.errors import ConfigError, DataError, IbisError, PolicyError
from ibisagent.files import one_line, try_folder

if TYPE_CHECKING:
    from ibisagent.domain import Turn
    from ibisagent.evaluation.reliability import Queue
    from ibisagent.inference.batch import Batch, ImageResult, Listener, Result, VolumeOptions, VolumeResult

LOW_PRESENCE = 0.5
"""Below this an object is as likely missing as there."""


@dataclass(frozen=True)
class VolumeChoice:
    """The options of volumes, `inference.batch.VolumeOptions`."""

    label: Annotated[
        str | None, typer.Option(help="Volumes: the object of the start mask that is meant, by name or number.")
    ] = None
    axis: Annotated[str, typer.Option(help="Volumes: slices to look at: auto, axial, coronal, sagittal.")] = "auto"
    slices: Annotated[
        str | None,
        typer.Option(help="Volumes: key slices, such as 12,40:60:5, or 'instance 12,40'. Default: searched."),
    ] = None
    window: Annotated[
        str, typer.Option(help="Volumes: auto, lung, bone, 'soft tissue', brain, ..., LEVEL/WIDTH, or 1-99%.")
    ] = "auto"
    channel: Annotated[int | None, typer.Option(help="Volumes: which of those on one grid, from 0.", min=0)] = None
    series: Annotated[
        str | None, typer.Option(help="Volumes: which DICOM series of a folder: number, UID, or 1/2 for its stack 2.")
    ] = None
    recheck: Annotated[
        int, typer.Option(help="Volumes: ask the agent again after so many slices; 0 never asks again.", min=0)
    ] = 10
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format", help="Volumes: nifti (default), labels, seg.nrrd, seg, sr, rtstruct, png, rle; may be repeated."
        ),
    ] = None
    store: Annotated[
        str | None, typer.Option(help="Volumes: DICOMweb server to send DICOM results to; the images stay here.")
    ] = None

    def checked(self) -> VolumeOptions:
        """As the batch takes them."""
        from ibisagent.inference.batch import VolumeOptions

        return VolumeOptions(**{**vars(self), "formats": tuple(self.formats or ("nifti",))})


@dataclass(frozen=True)
class ReviewChoice:
    """The options of the review queue."""

    review_queue: Annotated[
        bool,
        typer.Option(help="Score every mask (of volumes: their slices); review.csv and .json list them worst first."),
    ] = False
    calibration: Annotated[
        Path | None, typer.Option(help="What 'eval calibrate' wrote: makes scores expected IoUs, in the review queue.")
    ] = None
    samples: Annotated[int, typer.Option(help="Review queue: further episodes an image, as for 'eval calibrate'.")] = 0

    def __post_init__(self) -> None:
        if not self.review_queue and (self.calibration is not None or self.samples):
            raise ConfigError("--calibration and --samples are for the review queue: give --review-queue")

    def queue(self, batch: Batch, seed: int) -> Queue | None:
        """The queue of a batch; None where none is asked for."""
        from ibisagent.evaluation.reliability import Queue, Reliability, Reviewer

        if not self.review_queue:
            return None
        reviewer = Reviewer(batch.policy, batch.segmenter, batch.mask_selection, self.samples, batch.max_turns, seed)
        return Queue(reviewer, None if self.calibration is None else Reliability.read(self.calibration))


@spread_options
def segment(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Images (PNG, JPEG, TIFF, BMP), volumes (NIfTI, DICOM, NRRD, MHA, MGH, ZIP), folders with a DICOM"
            " series, or the DICOMweb address of one.",
        ),
    ],
    query: Annotated[str, typer.Argument(metavar="QUERY", help='What to segment, such as "the optic disc".')],
    *,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("ibisagent-output"),
    choice: PolicyChoice,
    segmenter: SegmenterOption = "ibis-click",
    max_turns: TurnsOption = None,
    mask_selection: SelectionOption = None,
    drawing: Drawing,
    start_mask: Annotated[
        list[Path] | None, typer.Option(help="Mask to refine (0 outside); once per image, in their order.")
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            help="IMAGEs are folders of studies: segment these series, such as 'CT axial >= 20 slices', or all."
        ),
    ] = None,
    volumes: VolumeChoice,
    review: ReviewChoice,
    overwrite: Annotated[
        bool, typer.Option(help="Make results that are there already again, in their place. Default: they are kept.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Segment what QUERY names in each IMAGE.

    Writes for each image NAME_mask_TARGET.png (its size, 255 inside), NAME_overlay.png and NAME_record.json, from
    which 'ibisagent replay' rebuilds the mask. For each volume NAME_mask_TARGET.nii.gz on its grid, or the formats
    asked for, NAME_measures.json and .csv, NAME_overlay.png, NAME_record.json, and a record per slice that was asked.

    NAME is that of the image. Results of other images and queries are never replaced: where NAME is taken, the object
    and a hash are added. A result that is there already is kept, so a stopped run resumes; one of other settings is
    refused without --overwrite. A failing image does not stop the others; the exit code is then 2.

    With --json each result is one line, as soon as it is there.
    """
    query = _check_query(query)
    selection = None if mask_selection is None else check_mask_selection(mask_selection)
    for spec in (choice.policy.removeprefix("one-shot:"), segmenter):
        if spec.startswith(("endpoint:", "remote:")):
            stderr.print(f"images are sent to {one_line(spec.partition(':')[2].partition('#')[0])}")
    try_folder(output)
    with status("loading the models", quiet=as_json):
        from ibisagent.inference.batch import Batch
        from ibisagent.segmenters import load_segmenter

        options, writer = volumes.checked(), choice.load(**vars(drawing))
        engine = load_segmenter(segmenter, device=choice.device)
        batch = Batch(writer, engine, query, output, max_turns, selection, options, overwrite)
    batch.review = queue = review.queue(batch, drawing.seed)
    failed = _run_batch(batch, images, start_mask or [], select or [], queue, as_json)
    if queue is not None and not as_json:
        meaning = "expected IoU" if queue.calibrated else "a score that only sorts"
        stdout.print(f"to be reviewed, worst first, with {meaning} ({output / 'review.csv'}):")
        for entry in queue.worst_first:
            stdout.print(f"  {entry['score']:.2f}  {one_line(str(entry['image']), 200)}")
    if failed:
        raise typer.Exit(EXIT_ERROR)


def _run_batch(
    batch: Batch, images: list[str], starts: list[Path], select: list[str], queue: Queue | None, as_json: bool
) -> int:
    """Print every result as it comes; how many inputs failed."""
    from ibisagent.inference.studies import LIST, segment_studies
    from ibisagent.volumes.series import parse_selection

    if select and starts:
        raise ConfigError("--start-mask is for single images: leave it or --select out")
    failed = kept = passed = 0
    if not as_json:
        batch.listener = _printer(batch.query)
    with (
        _results(batch.query, as_json) as stream,
        progress(None if select else len(images), "images", quiet=as_json or len(images) == 1) as advance,
    ):
        chosen = [parse_selection(text) for text in select]
        for result in segment_studies(batch, images, chosen) if select else batch.run(images, starts):
            value = result.to_json()
            failed += "error" in value
            kept += "kept" in value
            passed += "passed_over" in value
            if stream is not None:
                stream.add(value)
            else:
                _print_result(result)
            advance()
        if queue is not None:
            queue.write(batch.folder)
            if stream is not None:
                stream.after["review"] = queue.worst_first
    if kept:
        of = "" if select else f" of {len(images)}"
        stderr.print(f"{kept}{of} results were there already and are kept (--overwrite makes them again)")
    if passed:
        stderr.print(f"{passed} series were passed over: {batch.folder / LIST} says why")
    return failed


@contextmanager
def _results(query: str, as_json: bool) -> Iterator[JsonStream | None]:
    if not as_json:
        yield None
        return
    with JsonStream("results", {"query": query}) as stream:
        yield stream


def replay(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD...", help="Records that 'segment' wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rebuilt files here.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Where the image or volume is now, or the folder of multiple images.")
    ] = None,
    series: Annotated[str | None, typer.Option(help="Volumes: which DICOM series of a folder: number or UID.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Rebuild the masks of each RECORD from its clicks, without the policy, and check them bit for bit.

    The record of a volume needs those of its slices beside it. Images and volumes are looked for beside their record,
    images also one folder higher and where you are.
    """
    from ibisagent.inference.replay import replay_records

    results: list[dict[str, Any]] = []
    for replayed in replay_records(records, output, image=image, series=series, device=device):
        result: dict[str, Any] = {"record": str(replayed.record)}
        if isinstance(replayed.found, IbisError):
            result["error"] = str(replayed.found)
            if not as_json:
                print_error(replayed.found)
        else:
            found = replayed.found
            result |= {"targets": list(found.targets), "turns": found.turns, "identical": True}
            if output is not None:
                result["masks"] = {target: str(path) for target, path in found.masks.items()}
            if not as_json:
                listed = ", ".join(one_line(target, 60) for target in found.targets) or "no mask"
                stdout.print(f"{replayed.record}: {found.turns} turns give the recorded masks bit for bit ({listed})")
        results.append(result)
    if as_json:
        print_json({"results": results})
    if any("error" in result for result in results):
        raise typer.Exit(EXIT_ERROR)


def _check_query(query: str) -> str:
    from ibisagent.domain import check_query

    query = check_query(query)
    if os.path.isfile(query):
        raise ConfigError(f'{query}: is a file, and the last argument is the query; end with, say, "optic disc"')
    return query


def _printer(query: str) -> Listener:
    """Prints what happens in a batch as it happens: turns, slices, what leaves the machine."""
    from ibisagent.domain import Episode
    from ibisagent.inference.batch import Listener
    from ibisagent.inference.image import describe_actions
    from ibisagent.inference.volume import Why
    from ibisagent.volumes import SliceView

    class Printer(Listener):
        number = 0

        def started(self, path: str) -> None:
            self.number = 0
            stdout.print(f"{path}: {one_line(query, 200)}")

        def turn(self, turn: Turn) -> None:
            self.number += 1
            said = [describe_actions(turn.reply.actions)] if turn.reply.actions else []
            if turn.reply.problem is not None:
                said.append(f"malformed: {turn.reply.problem}")
            score = "" if turn.segmenter_score is None else f" [mask score {turn.segmenter_score:.2f}]"
            thought = f' "{one_line(turn.reply.thought)}"' if turn.reply.thought else ""
            stdout.print(f"  turn {self.number}:{thought} -> {one_line('; '.join(said), 300)}{score}")

        def opened(self, view: SliceView) -> None:
            volume = view.volume
            sides = " x ".join(str(side) for side in volume.shape)
            spacing = " x ".join(f"{side:.3g}" for side in volume.spacing_mm)
            size = f"{sides} voxels of {spacing} mm" if volume.spacing_known else f"{sides} voxels"
            stdout.print(f"  {volume.name}: {size}, {view.count} {view.axis} slices, window {view.window_source}")
            self.noted(volume.notes)

        def noted(self, notes: Sequence[str]) -> None:
            for note in notes:
                stdout.print(f"  note: {one_line(note, 400)}")

        def asked(self, index: int, why: Why, episode: Episode) -> None:
            found = ", ".join(one_line(name, 60) for name, mask in episode.answer_masks.items() if mask.any())
            turns = len(episode.turns)
            stdout.print(f"  slice {index} ({why}): {episode.stop} after {turns} turns, {found or 'nothing'}")

        def sending(self, address: str) -> None:
            stderr.print(f"masks and measurements are sent to {one_line(address)}, under the source's patient")

    return Printer()


def _print_result(result: Result) -> None:
    from ibisagent.inference.batch import Failed, ImageResult, PassedOver, VolumeResult

    if isinstance(result, Failed):
        print_error(result.error)
    elif isinstance(result, PassedOver):
        stdout.print(f"{result.path}: passed over, {one_line(result.why, 200)}")
    elif isinstance(result, ImageResult):
        _print_image(result)
    elif isinstance(result, VolumeResult):
        _print_volume(result)
    else:
        stdout.print(f"  kept:    {result.record} (was there already)")
        _print_failed(result.failed)


def _print_image(result: ImageResult) -> None:
    episode, outputs = result.episode, result.outputs
    if result.kept:
        stdout.print(f"  kept:    {outputs.record} (was there already)")
        return
    count = len(episode.turns)
    answer = f' "{one_line(episode.answer.answer)}"' if episode.answer.answer else ""
    stdout.print(f"  {episode.stop} after {count} turn{'s' * (count != 1)} in {result.seconds:.1f} s{answer}")
    masks = episode.answer_masks
    for target, file in outputs.masks.items():
        pixels = int(masks[target].sum())
        stdout.print(f"  mask:    {file} ({one_line(target, 60)}, {pixels} pixels)")
    if not outputs.masks:
        stdout.print("  mask:    none was made")
    for line in _doubts(result):
        stdout.print(f"  note:    {line}")
    stdout.print(f"  overlay: {outputs.overlay}")
    stdout.print(f"  record:  {outputs.record}")
    if (problem := result.problem) is not None:
        print_error(PolicyError(problem))


def _doubts(result: ImageResult) -> Iterator[str]:
    """What a user should know before trusting a mask: names that the policy never learned, objects hardly there."""
    from ibisagent.inference.image import asked_objects

    for one in asked_objects(result.episode):
        name, presence = one_line(one["name"], 60), one["presence"]
        if not one["known"]:
            nearest = f"; the nearest that it knows: {one['nearest']}" if one["nearest"] else ""
            yield f"the policy never learned '{name}'{nearest}"
        if presence < LOW_PRESENCE:
            yield f"'{name}' is likely not in this image (presence {presence:.2f} of 1)"


def _print_volume(result: VolumeResult) -> None:
    outputs, cost = result.outputs, result.cost
    stdout.print(
        f"  {cost.policy_calls} turns, {cost.encoder_calls} slices opened, {cost.predictions} masks"
        f" in {result.seconds:.1f} s"
    )
    for target, files in outputs.masks.items():
        values = outputs.measures[target]
        size = f"{values.voxels} voxels" if values.volume_ml is None else f"{values.volume_ml:.3g} ml"
        for file in files.values() or ("in the DICOM objects",):
            stdout.print(f"  mask:    {file} ({one_line(target, 60)}, {size})")
    if not outputs.masks:
        stdout.print("  mask:    none was made")
    for file in outputs.dicom:
        stdout.print(f"  DICOM:   {file} (names the patient as its source does)")
    stdout.print(f"  overlay: {outputs.overview}")
    stdout.print(f"  record:  {outputs.record}")
    _print_failed(outputs.failed)


def _print_failed(messages: Sequence[str]) -> None:
    for message in messages:
        print_error(DataError(message))
