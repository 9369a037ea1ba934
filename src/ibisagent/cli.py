"""The command line: one command per verb; parses, calls, prints. Heavy modules are imported inside the commands."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.bar import Bar
from rich.box import SIMPLE_HEAD
from rich.table import Table
from typer.core import TyperGroup

from ibisagent import data_commands
from ibisagent.domain import MASK_SELECTION, MaskSelection, check_mask_selection
from ibisagent.errors import ConfigError, IbisError
from ibisagent.files import file_names, safe_name
from ibisagent.files import one_line as _one_line
from ibisagent.terminal import EXIT_ERROR, stderr, stdout
from ibisagent.terminal import print_error as _print_error
from ibisagent.terminal import print_json as _print_json
from ibisagent.terminal import progress as _progress
from ibisagent.terminal import status as _status

if TYPE_CHECKING:
    from ibisagent.ceiling import Agent, Ceiling, Group
    from ibisagent.doctor import RewardReport
    from ibisagent.domain import Episode, Image, Turn
    from ibisagent.evaluation import Evaluation, GroupBy, Summary
    from ibisagent.metrics import EmptyRule
    from ibisagent.policies.base import Policy
    from ibisagent.segmenters import Segmenter
    from ibisagent.session import Outputs
    from ibisagent.volume_agent import Cost
    from ibisagent.volume_agent.files import VolumeOutputs
    from ibisagent.volumes import Volume

EXIT_CONSTANT = 1  # of 'doctor rewards': nothing failed, but what was looked for is there


class _OneLineErrors(TyperGroup):
    """Every error raised on purpose, and every failing file system, becomes one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        # Read by OpenMP when torch is loaded: threads that spin while they wait for each other cost a batch up to 30
        # times its time where another process, or another thread of a server, has a core (docs/log.md).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            return super().invoke(ctx)
        except (IbisError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            _print_error(error)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Name an object in a biomedical image, get its mask. Research software: not for clinical use.",
)
app.add_typer(data_commands.app)

PolicyOption = Annotated[str, typer.Option("--policy", "-p", help="Who clicks; see 'ibisagent models'.")]
SegmenterOption = Annotated[str, typer.Option("--segmenter", "-s", help="What turns clicks into masks.")]
DialectOption = Annotated[
    str | None, typer.Option(help="Language of the turns: ibis, paper, released. Default: the policy's own.")
]
HistoryOption = Annotated[
    str | None, typer.Option(help="What the policy sees of past turns: none, actions, full. Default: the policy's own.")
]
TurnsOption = Annotated[
    int | None, typer.Option(help="Most turns of one episode (default: the policy's own limit; the paper: 20).", min=1)
]
SelectionOption = Annotated[
    str, typer.Option(help="Which mask of an episode counts: last, or best by the segmenter's own estimate.")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="Numbers of the policy: auto, float32, bfloat16, float16.")]
AdapterOption = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter for the policy.")]
PixelsOption = Annotated[
    int | None, typer.Option(help="Shrink images to this area for the policy, if it takes any size.", min=1)
]
CandidatesOption = Annotated[
    int | None,
    typer.Option(help="First turns that the policy proposes; the best by segmenter and consensus is kept.", min=1),
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest text; above, it is drawn.", min=0)]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn.")]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Another value for a setting of the recipe; give it several times."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of text.")]


@dataclass(frozen=True)
class PolicyChoice:
    """The options of every command that loads a policy (see `_spread`)."""

    policy: PolicyOption = "ibis-nano"
    dialect: DialectOption = None
    history: HistoryOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"
    adapter: AdapterOption = None
    max_pixels: PixelsOption = None

    def load(self, **more: Any) -> Policy:
        """The policy. more: arguments of `load_policy` beyond these."""
        from ibisagent.policies import load_policy

        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "policy"}
        return load_policy(self.policy, **given, **more)


@dataclass(frozen=True)
class Drawing:
    """The options of every command that can draw replies by chance."""

    temperature: TemperatureOption = 0.0
    seed: SeedOption = 0
    candidates: CandidatesOption = None


def _spread(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which each parameter that is a dataclass stands for that class's fields, as options of their own."""
    parameters = inspect.signature(command, eval_str=True).parameters
    bundles: dict[str, Any] = {
        name: each.annotation for name, each in parameters.items() if is_dataclass(each.annotation)
    }
    shown: dict[str, inspect.Parameter] = {}
    for name, each in parameters.items():
        spread = inspect.signature(bundles[name], eval_str=True).parameters if name in bundles else {name: each}
        shown |= {name: one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, one in spread.items()}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, bundle in bundles.items():
            parts = {field.name: given.pop(field.name) for field in fields(bundle) if field.name in given}
            given[name] = bundle(**parts)
        command(**given)

    vars(run)["__signature__"] = inspect.Signature(list(shown.values()))
    run.__annotations__ = {name: one.annotation for name, one in shown.items()}
    return run


@app.command()
@_spread
def segment(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE",
            help="Pictures (PNG, JPEG, TIFF, BMP), volumes (NIfTI, DICOM, NRRD, MHA), folders with a DICOM series, or"
            " the DICOMweb address of one.",
        ),
    ],
    query: Annotated[str, typer.Argument(metavar="QUERY", help='What to segment, such as "the optic disc".')],
    choice: PolicyChoice,
    drawing: Drawing,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("ibisagent-output"),
    segmenter: SegmenterOption = "ibis-click",
    max_turns: TurnsOption = None,
    mask_selection: SelectionOption = MASK_SELECTION,
    start_mask: Annotated[
        list[Path] | None, typer.Option(help="Mask to refine (0 outside); once per image, in their order.")
    ] = None,
    axis: Annotated[str, typer.Option(help="Volumes: slices to look at: auto, axial, coronal, sagittal.")] = "auto",
    slices: Annotated[
        str | None, typer.Option(help="Volumes: key slices, such as 12,40,77 or ::10. Default: searched for.")
    ] = None,
    window: Annotated[
        str, typer.Option(help="Volumes: auto, lung, bone, 'soft tissue', brain, ..., LEVEL/WIDTH, or 1-99%.")
    ] = "auto",
    channel: Annotated[int | None, typer.Option(help="Volumes: which of several on one grid, from 0.", min=0)] = None,
    series: Annotated[str | None, typer.Option(help="Volumes: which DICOM series of a folder: number or UID.")] = None,
    recheck: Annotated[
        int, typer.Option(help="Volumes: ask the agent again after so many slices; 0 never asks again.", min=0)
    ] = 10,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Volumes: nifti (default), seg and sr (DICOM), png, rle; may be repeated."),
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Volumes: DICOMweb server to send seg and sr to; the pictures stay here.")
    ] = None,
    review_queue: Annotated[
        bool, typer.Option(help="Pictures: score every mask; review.csv and .json list them worst first.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="What 'calibrate' wrote: makes scores expected IoUs, in the review queue.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Review queue: further episodes a picture, as for 'calibrate'.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Segment what QUERY names in each IMAGE.

    Writes for each picture NAME_mask_TARGET.png (its size, 255 inside), NAME_overlay.png and NAME_record.json, from
    which 'ibisagent replay' rebuilds the mask. For each volume NAME_mask_TARGET.nii.gz on its grid, or the formats
    asked for, NAME_measures.json and .csv, NAME_overlay.png, NAME_record.json, and a record per slice that was asked.
    A failing image does not stop the others; the exit code is then 2.
    """
    query, selection = _check_query(query), check_mask_selection(mask_selection)
    if not review_queue and (calibration is not None or samples):
        raise ConfigError("--calibration and --samples are for the review queue: give --review-queue")
    if store is not None and not {"seg", "sr"} & set(formats or ()):
        raise ConfigError("--store sends DICOM objects: ask for them with --format seg, and --format sr")
    for spec in (choice.policy.removeprefix("one-shot:"), segmenter):
        if spec.startswith(("endpoint:", "remote:")):
            stderr.print(f"pictures are sent to {_one_line(spec.partition(':')[2].partition('#')[0])}")
    starts: list[Path | None] = [*start_mask] if start_mask else [None] * len(images)
    if len(starts) != len(images):
        raise ConfigError(f"{len(starts)} start masks for {len(images)} images: give one per image, in their order")
    with _status("loading the models", quiet=as_json):
        from ibisagent import session
        from ibisagent.segmenters import load_segmenter

        writer = choice.load(**asdict(drawing))
        engine = load_segmenter(segmenter, device=choice.device)
    results: list[dict[str, Any]] = []
    names = file_names(images)
    reviewed = None
    if review_queue:
        from ibisagent.reliability import Queue, Reliability, Reviewer

        reviewer = Reviewer(writer, engine, selection, samples, max_turns, drawing.seed)
        reviewed = Queue(reviewer, None if calibration is None else Reliability.read(calibration))
    volumes = _Volumes(
        writer,
        engine,
        query,
        output,
        taken={name.casefold() for name in names},
        max_turns=max_turns,
        mask_selection=selection,
        made_by=session.provenance(writer, engine),
        axis=axis,
        slices=slices,
        window=window,
        channel=channel,
        series=series,
        recheck=recheck,
        formats=tuple(formats or ("nifti",)),
        store=store,
        quiet=as_json,
    )
    with _progress(len(images), "images", quiet=as_json or len(images) == 1) as advance:
        for path, name, start in zip(images, names, starts, strict=True):
            if not as_json:
                stdout.print(f"{path}: {_one_line(query, 200)}")
            started = time.perf_counter()
            try:
                if volumes.wants(path):
                    results.append(volumes.segment(path, start))
                    advance()
                    continue
                case = session.read_case(path, query, start)
                turn_printer = None if as_json else _turn_printer()
                episode = session.segment(
                    case, writer, engine, max_turns=max_turns, mask_selection=selection, on_turn=turn_printer
                )
                seconds = time.perf_counter() - started
                outputs = session.export(episode, case.image, output, name)
                if reviewed is not None:
                    reviewed.add(path, episode, case)
            except IbisError as error:
                results.append({"image": path, "error": str(error)})
                if not as_json:
                    _print_error(error)
            else:
                results.append(_segment_result(path, episode, outputs, seconds))
                if not as_json:
                    _print_segmented(episode, outputs, seconds)
            advance()
    if reviewed is not None:
        reviewed.write(output)
    if as_json:
        queue = {} if reviewed is None else {"review": reviewed.worst_first}
        _print_json({"query": query, "results": results, **queue})
    elif reviewed is not None:
        stdout.print(f"to be reviewed, worst first ({output / 'review.csv'}):")
        for entry in reviewed.worst_first:
            stdout.print(f"  {entry['score']:.2f}  {_one_line(str(entry['image']), 200)}")
    if any("error" in result for result in results):
        raise typer.Exit(EXIT_ERROR)


@dataclass
class _Volumes:
    """The volumes of one `segment` command."""

    writer: Policy
    engine: Segmenter
    query: str
    output: Path
    taken: set[str]
    max_turns: int | None
    mask_selection: MaskSelection
    made_by: dict[str, str]
    axis: str
    slices: str | None
    window: str
    channel: int | None
    series: str | None
    recheck: int
    formats: tuple[str, ...]
    store: str | None
    quiet: bool

    def wants(self, path: str) -> bool:
        """Whether `path` is a volume rather than a picture."""
        from ibisagent import pacs
        from ibisagent.volumes import is_volume

        return pacs.is_url(path) or is_volume(path)

    def segment(self, path: str, start: Path | None) -> dict[str, Any]:
        """Segment one volume, write and print what was found; the result for --json."""
        from ibisagent import pacs
        from ibisagent.volumes import read_volume

        with tempfile.TemporaryDirectory(prefix="ibisagent-") as folder:
            if pacs.is_url(path):
                pacs.fetch_series(path, Path(folder))
            source = Path(folder) if pacs.is_url(path) else Path(path)
            volume = read_volume(source, channel=self.channel, series=self.series)
            return self._segment(path, volume, start)

    def _segment(self, path: str, volume: Volume, start: Path | None) -> dict[str, Any]:
        from ibisagent import pacs, volume_agent
        from ibisagent.protocol import target_of
        from ibisagent.volume_agent.files import VolumeWriter
        from ibisagent.volumes import SliceView
        from ibisagent.volumes.writing import masks_on

        started = time.perf_counter()
        view = SliceView(volume, self.axis, self.window)
        if not self.quiet:
            sides = " x ".join(str(side) for side in volume.shape)
            spacing = " x ".join(f"{side:.3g}" for side in volume.spacing_mm)
            size = f"{sides} voxels of {spacing} mm" if volume.spacing_known else f"{sides} voxels"
            stdout.print(f"  {volume.name}: {size}, {view.count} {view.axis} slices, window {view.window_source}")
        masks = {} if start is None else masks_on(volume, start)
        if len(masks) == 1:
            masks = {target_of(self.query): mask for mask in masks.values()}
        keys = None if self.slices is None else volume_agent.parse_slices(self.slices, view.count)
        with VolumeWriter(self.output, self._name(volume), self.formats) as files:

            def on_episode(index: int, why: volume_agent.Why, episode: Episode, image: Image) -> None:
                files.episode(index, why, episode, image)
                if not self.quiet:
                    turns = len(episode.turns)
                    found = ", ".join(_one_line(name, 60) for name, mask in episode.answer_masks.items() if mask.any())
                    stdout.print(f"  slice {index} ({why}): {episode.stop} after {turns} turns, {found or 'nothing'}")

            found = volume_agent.segment_volume(
                view,
                self.query,
                self.writer,
                self.engine,
                keys=keys,
                recheck=self.recheck,
                max_turns=self.max_turns,
                mask_selection=self.mask_selection,
                start=masks,
                made_by=self.made_by,
                on_episode=on_episode,
            )
            facts = {"policy": self.writer.name, **self.made_by}
            outputs = files.finish(found, view, self.query, facts, channel=self.channel)
        if self.store is not None and outputs.dicom:
            stderr.print(f"masks and measurements are sent to {_one_line(self.store)}, under the source's patient")
            pacs.store(self.store, outputs.dicom)
        seconds = time.perf_counter() - started
        if not self.quiet:
            _print_volume(outputs, found.cost, seconds)
        return {
            "image": path,
            "masks": {
                target: {kind: str(file) for kind, file in files.items()} for target, files in outputs.masks.items()
            },
            "dicom": [str(file) for file in outputs.dicom],
            "measures": {target: asdict(values) for target, values in outputs.measures.items()},
            "overlay": str(outputs.overview),
            "record": str(outputs.record),
            "cost": asdict(found.cost),
            "seconds": round(seconds, 3),
        }

    def _name(self, volume: Volume) -> str:
        return safe_name(volume.name, self.taken)


@app.command()
def replay(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD...", help="Records that 'segment' wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rebuilt files here.")] = None,
    image: Annotated[
        Path | None, typer.Option(help="Where the picture or volume is now, or the folder of several pictures.")
    ] = None,
    series: Annotated[str | None, typer.Option(help="Volumes: which DICOM series of a folder: number or UID.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Rebuild the masks of each RECORD from its clicks, without the policy, and check them bit for bit.

    The record of a volume needs those of its slices beside it. Pictures and volumes are looked for beside their record,
    pictures also one folder higher and where you are.
    """
    if image is not None and not image.is_dir() and len(records) > 1:
        raise ConfigError("--image names one file: replay one record at a time with it")
    from ibisagent import session
    from ibisagent.volume_agent.replaying import is_volume_record, replay_volume

    results: list[dict[str, Any]] = []
    for record, name in zip(records, file_names(records), strict=True):
        try:
            name, written = name.removesuffix("_record"), dict[str, str]()
            if is_volume_record(record):
                volume = replay_volume(record, image, series=series, device=device, output=output, name=name)
                targets, turns = list(volume.targets), volume.turns
                if volume.outputs is not None:
                    written = {target: str(files["nifti"]) for target, files in volume.outputs.masks.items()}
            else:
                episode, picture = session.replay_record(record, image=image, device=device)
                targets, turns = list(episode.answer_masks), len(episode.turns)
                if output is not None:
                    files = session.export(episode, picture, output, name)
                    written = {target: str(path) for target, path in files.masks.items()}
            result: dict[str, Any] = {
                "record": str(record),
                "targets": targets,
                "turns": turns,
                "identical": True,
                **({"masks": written} if output is not None else {}),
            }
        except IbisError as error:
            result = {"record": str(record), "error": str(error)}
            if not as_json:
                _print_error(error)
        else:
            if not as_json:
                listed = ", ".join(_one_line(target, 60) for target in targets) or "no mask"
                stdout.print(f"{record}: {turns} turns give the recorded masks bit for bit ({listed})")
        results.append(result)
    if as_json:
        _print_json({"results": results})
    if any("error" in result for result in results):
        raise typer.Exit(EXIT_ERROR)


EmptyOption = Annotated[
    str, typer.Option(help="What two empty masks count as: one, zero, or skip. Positives only are always shown too.")
]
RunFolder = Annotated[Path, typer.Argument(help="Folder that 'evaluate -o' or 'score -o' wrote.")]


@app.command()
@_spread
def evaluate(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    choice: PolicyChoice,
    drawing: Drawing,
    split: Annotated[
        str | None, typer.Option(help="Rows to evaluate. Default: val, else test, else all but train.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the run; an unfinished one is continued. See docs/evaluation.md."
        ),
    ] = None,
    segmenter: SegmenterOption = "ibis-click",
    max_turns: TurnsOption = None,
    mask_selection: SelectionOption = MASK_SELECTION,
    batch_size: Annotated[int, typer.Option(help="Episodes run together.", min=1)] = 16,
    workers: Annotated[int, typer.Option(help="Processes; each loads the models.", min=1)] = 1,
    limit: Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)] = None,
    baselines: Annotated[bool, typer.Option(help="Also run the oracle's clicks and the blind clicks.")] = True,
    by: Annotated[str, typer.Option(help="Group the table by modality, object, size or dataset.")] = "modality",
    empty: EmptyOption = "one",
    as_json: JsonOption = False,
) -> None:
    """Measure a policy with a segmenter on labelled DATA, beside the baselines.

    The location prior is learned from the rows of split 'train'. Cases that fail are listed and left out. A run that
    was killed goes on where it stopped, and ends with the same figures.
    """
    with _status("loading", quiet=as_json):
        from ibisagent.evaluation import runs
        from ibisagent.evaluation.results import check_group
        from ibisagent.metrics import check_empty_rule

        rule, group, selection = check_empty_rule(empty), check_group(by), check_mask_selection(mask_selection)
        setup = runs.Setup(
            data,
            split,
            limit,
            **asdict(choice),
            **asdict(drawing),
            segmenter=segmenter,
            max_turns=max_turns,
            mask_selection=selection,
            baselines=baselines,
            batch_size=batch_size,
        )
    with _progress(None, "cases", quiet=as_json) as advance:
        result = runs.run(
            setup,
            output,
            workers=workers,
            empty=rule,
            on_start=lambda total, done: advance(done, total=total),
            on_case=advance,
        )
    _show_evaluation(result, group, rule, as_json)


@app.command()
def compare(
    run_a: RunFolder,
    run_b: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the tables to this Markdown file.")
    ] = None,
    empty: EmptyOption = "one",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compare two runs on the cases that both have: difference, 95% interval, permutation p; patients are the unit."""
    from ibisagent.evaluation import compare as compare_runs
    from ibisagent.evaluation import runs, tables
    from ibisagent.files import write_whole
    from ibisagent.metrics import check_empty_rule

    evaluations = [runs.Run(folder).evaluation for folder in (run_a, run_b)]
    found = compare_runs(*evaluations, empty=check_empty_rule(empty), seed=seed)
    if output is not None:
        write_whole(tables.comparison_markdown(found).encode(), output)
    if as_json:
        _print_json(asdict(found))
    else:
        stdout.print(tables.comparison_markdown(found), end="")
    for name, lacking in (("only in A", found.only_a), ("only in B", found.only_b)):
        for case_id in lacking:
            stderr.print(f"{name}, left out: {_one_line(case_id)}")


@app.command()
def score(
    made: Annotated[
        Path, typer.Argument(metavar="PRED_DIR", help="Folder of masks (PNG, NIfTI, ...), or a .jsonl file.")
    ],
    data: Annotated[Path, typer.Argument(help="Data set folder, a manifest, or a folder of NIfTI masks.")],
    split: Annotated[
        str | None, typer.Option(help="Rows to score. Default: val, else test, else all but train.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a run that 'compare' and 'report' read.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)] = None,
    resize_targets: Annotated[
        bool, typer.Option(help="Compare masks of another size with the truth resized to theirs (nearest neighbour).")
    ] = False,
    by: Annotated[str, typer.Option(help="Group the table by modality, object, size or dataset.")] = "modality",
    empty: EmptyOption = "one",
    as_json: JsonOption = False,
) -> None:
    """Measure masks that anything made against the masks of DATA; docs/evaluation.md says how they are to be named.

    Masks of wrong size or place, missing, double or unknown ones are listed one by one, never averaged away; then the
    exit code is 2.
    """
    from ibisagent.evaluation import scoring
    from ibisagent.evaluation.results import check_group
    from ibisagent.metrics import check_empty_rule

    group, rule = check_group(by), check_empty_rule(empty)
    with _status("comparing the masks", quiet=as_json):
        found = scoring.score(made, data, output, split=split, limit=limit, resize_targets=resize_targets, empty=rule)
    if as_json:
        _print_json(
            {
                **found.evaluation.to_json(rule),
                "strict": found.strict,
                "problems": [asdict(one) for one in found.problems],
            }
        )
    else:
        _print_evaluation(replace(found.evaluation, failures=()), group, rule)
        count, total = len(found.evaluation.results), int(found.evaluation.made_by["cases"])
        stdout.print(
            f"{count} of {total} cases scored; with 0 for each of the others: mean IoU {found.strict['iou']:.3f},"
            f" Dice {found.strict['dice']:.3f}"
        )
        for problem in found.problems:
            stderr.print(_one_line(f"{problem.kind}: {problem.case_id or problem.file}: {problem.message}", 400))
    if found.problems:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page. Default: report.html in RUN.")
    ] = None,
    shown: Annotated[
        int, typer.Option("--cases", help="So many best, median and worst cases with pictures.", min=1)
    ] = 6,
    empty: EmptyOption = "one",
) -> None:
    """Write one HTML page about RUN that needs nothing else: tables, plots, the best, median and worst cases."""
    from ibisagent.evaluation.report import write_report
    from ibisagent.metrics import check_empty_rule

    page = output or run / "report.html"
    missing = write_report(run, page, cases=shown, empty=check_empty_rule(empty))
    for name in missing:
        stderr.print(f"without its picture, as the file is not there any more or has changed: {_one_line(name)}")
    stdout.print(str(page))


@app.command()
def ceiling(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    split: Annotated[
        str | None, typer.Option(help="Rows to measure. Default: val, else test, else all but train.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for ceiling.json, with every case, and ceiling.png.")
    ] = None,
    segmenter: SegmenterOption = "ibis-click",
    clicks: Annotated[int, typer.Option(help="Most clicks per object; NoC counts a failure as so many.", min=1)] = 20,
    limit: Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)] = None,
    agent: Annotated[
        Path | None,
        typer.Option(help="Folder that 'evaluate -o' wrote: tells whether policy or segmenter limits that agent."),
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what SEGMENTER can reach on the masks of DATA when an expert who sees them clicks.

    Run it before any training: no policy that only prompts this segmenter can be expected to do better. Cases that fail
    are listed and left out.
    """
    with _status("reading the data and loading the segmenter", quiet=as_json):
        from importlib.util import find_spec

        from ibisagent import ceiling as measuring
        from ibisagent.datasets import cases_to_judge
        from ibisagent.segmenters import load_segmenter

        drawable = find_spec("matplotlib") is not None
        if output is not None:
            from ibisagent.files import make_folder

            make_folder(output)
            if not drawable:
                stderr.print("matplotlib is not installed, so no ceiling.png: pip install 'ibisagent[plot]'")
        _, cases = cases_to_judge(data, split, limit)
        engine = load_segmenter(segmenter, device=device)
        compared = None if agent is None else measuring.read_agent(agent, engine, cases)
    with _progress(len(cases), "cases", quiet=as_json) as advance:
        result = measuring.measure_ceiling(
            cases,
            engine,
            max_clicks=clicks,
            seed=seed,
            made_by={"data": str(data), "split": split or "", **engine.describe()},
            on_case=advance,
        )
    plain = result.to_json(compared)
    if output is not None:
        from ibisagent.files import write_whole

        write_whole((json.dumps(plain, indent=1) + "\n").encode(), output / "ceiling.json")
        if drawable and result.results:
            write_whole(measuring.draw(result), output / "ceiling.png")
    if as_json:
        _print_json(plain)
    else:
        _print_ceiling(result, compared)
    if result.failures:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def trajectories(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an unfinished one is continued.")],
    split: Annotated[str | None, typer.Option(help="Only the rows of this split.")] = None,
    segmenter: SegmenterOption = "ibis-click",
    iou_threshold: Annotated[float, typer.Option(help="IoU at which the expert is content.")] = 0.9,
    max_clicks: Annotated[int, typer.Option(help="Most clicks and boxes per target.", min=1)] = 20,
    mistakes: Annotated[float, typer.Option(help="Chance that a click is wrong on purpose and then taken back.")] = 0.0,
    jitter: Annotated[float, typer.Option(help="0 clicks the deepest pixel of an error, 1 any of its pixels.")] = 0.0,
    box_first: Annotated[float, typer.Option(help="Share of the cases that begin with a box.")] = 0.0,
    seed: SeedOption = 0,
    dialect: Annotated[str, typer.Option(help="Language of the turns: ibis, paper, released.")] = "ibis",
    batch_size: Annotated[int, typer.Option(help="Episodes run together; changes no result.", min=1)] = 16,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Write an expert's episode for every image-mask pair of DATA.

    A run that was killed goes on where it stopped, and ends with the same files as one that was not.
    """
    with _status("reading the data and loading the segmenter", quiet=as_json):
        from ibisagent import trajectories as maker
        from ibisagent.datasets import read_cases
        from ibisagent.segmenters import load_segmenter

        config = maker.TrajectoryConfig(
            iou_threshold=iou_threshold,
            max_clicks=max_clicks,
            mistakes=mistakes,
            jitter=jitter,
            box_first=box_first,
            seed=seed,
            dialect=dialect,
        )
        cases = read_cases(data, split=split)
        engine = load_segmenter(segmenter, device=device)
    with _progress(len(cases), "cases", quiet=as_json) as advance:
        done = 0

        def progress(now: int, _total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        summary = maker.generate(cases, engine, output, config, progress, batch_size=batch_size)
    if as_json:
        _print_json(asdict(summary))
    else:
        table = Table(
            "",
            "episodes",
            "IoU",
            "turns",
            "clicks",
            f"IoU >= {iou_threshold:g}",
            title=str(output),
            title_justify="left",
            box=SIMPLE_HEAD,
        )
        groups = {"all": summary.overall, **summary.by_modality}
        for name, group in groups.items():
            if group is not None:
                numbers = (group.mean_iou, group.mean_turns, group.mean_clicks, group.reached)
                table.add_row(name, str(group.episodes), *(f"{number:.3f}" for number in numbers))
        stdout.print(table)
        if summary.failed:
            stderr.print(f"{summary.failed} of {summary.cases} cases failed, see {output / maker.FAILURES_NAME}")
    if summary.failed:
        raise typer.Exit(EXIT_ERROR)


@app.command("build-data")
def build_data(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an unfinished one is continued.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file, such as recipes/data.toml.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; give it several times for several.")] = None,
    split: Annotated[str | None, typer.Option(help="Only the pairs of this split.")] = None,
    licence_class: Annotated[str | None, typer.Option(help="Only pairs of this class, from that column.")] = None,
    hold_out: Annotated[
        bool, typer.Option(help="Without the patients, one in sixteen, that train-nano keeps to choose settings on.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Only this many pairs, spread over the data.", min=1)] = None,
    workers: Annotated[int | None, typer.Option(help="Processes, on Ray; default: this one alone.", min=1)] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that sees DATA and OUT.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what the teacher would cost.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make training data from image-mask pairs: questions, expert episodes with thoughts, files for SFT and RL.

    Stages: trajectories, questions, thoughts, reflection, filter, export. A run that was killed goes on where it
    stopped and ends with the same bytes. OUT/card.md says what was made, and what was rejected and why.
    """
    with _status("reading the data", quiet=as_json):
        from ibisagent.datasets import read_cases
        from ibisagent.factory import stages as factory
        from ibisagent.factory.config import STAGES, FactoryConfig, Stage

        settings = FactoryConfig() if config is None else FactoryConfig.read(config)
        if unknown := next((name for name in stage or () if name not in STAGES), None):
            raise ConfigError(f"unknown stage '{unknown}'; there are: {', '.join(STAGES)}")
        chosen: list[Stage] = [name for name in STAGES if not stage or name in stage]
        licences = {licence_class} if licence_class else None
        cases = read_cases(data, split=split, licence_classes=licences)
        if hold_out:
            from ibisagent.training.click_states import is_development

            cases = cases.filter(lambda row: not is_development(row.patient))
        cases = cases.spread(limit)
        plan = factory.Plan(cases, output, settings, device)
    if dry_run:
        _print_json(factory.estimate(plan))
        return
    run_shards = None
    if workers is not None or ray is not None:
        from ibisagent.factory.on_ray import on_ray

        run_shards = on_ray(workers or 2, ray)
    card = factory.build(
        plan,
        chosen,
        progress=None if as_json else lambda name, done, total: stderr.print(f"{name}: {done} of {total} shards"),
        run_shards=run_shards,
    )
    if as_json:
        _print_json(card)
    else:
        stdout.print((output / "card.md").read_text(encoding="utf-8"))
    if card["failed_pairs"]:
        stderr.print(f"{card['failed_pairs']} pairs could not be used; {output / 'card.json'} says why")
        raise typer.Exit(EXIT_ERROR)


@app.command()
def train_segmenter(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/ibis-click.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a click network on image-mask pairs; use it as --segmenter ibis-click:OUT/ibis-click.safetensors.

    Writes checkpoint, weights and TensorBoard logs to the recipe's folder; a run that was stopped goes on from there.
    """
    with _status("reading the data", quiet=as_json):
        from ibisagent.training.click import ClickRecipe, train

        plan = ClickRecipe.read(recipe, changes or ())
    with _training(plan.states, "states", quiet=as_json) as report:
        weights = train(plan, report)
    if as_json:
        _print_json({"weights": str(weights), "states": plan.states})
    else:
        stdout.print(f"weights: {weights}\nuse them with --segmenter ibis-click:{weights}")


@app.command()
def train_nano(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/ibis-nano.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the small policy on image-mask pairs from scratch; use it as --policy OUT/ibis-nano.

    Writes checkpoint and model to the recipe's folder; a run that was stopped goes on from there.
    """
    with _status("reading the data", quiet=as_json):
        from ibisagent.training.nano import NanoRecipe, train

        plan = NanoRecipe.read(recipe, changes or ())
    with _training(plan.total_examples, "examples", quiet=as_json) as report:
        model = train(plan, report)
    if as_json:
        _print_json({"model": str(model), "examples": plan.examples})
    else:
        stdout.print(f"model: {model}\nuse it with --policy {model}")


def _figures(named: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in named.items())


@contextmanager
def _training(total: int, what: str, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar for a training run, as its report (number done, losses, figures of a look or None)."""
    with _progress(total, what, quiet=quiet) as advance:
        before = 0

        def report(done: int, losses: Mapping[str, float], figures: Mapping[str, float] | None) -> None:
            nonlocal before
            advance(done - before)
            before = done
            if figures is not None and not quiet:
                stderr.print(f"{done} {what}, {_figures(losses)}; held-out patients: {_figures(figures)}")

        yield report


@app.command()
def sft(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/sft-nano.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a policy on episodes with thoughts (the cold start); use it as --policy mllm:OUT/policy.

    Several GPUs: accelerate launch --config_file recipes/accelerate/8-gpu-fsdp.yaml -m ibisagent sft RECIPE. A run that
    was stopped goes on from its last checkpoint.
    """
    _require_training()
    with _status("reading recipe, model and data", quiet=as_json):
        from ibisagent.training.sft import SftRecipe, train

        plan = SftRecipe.read(recipe, changes or ())
    _print_policy(train(plan, _told(quiet=as_json)), as_json)


@app.command()
def rl(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/rl-nano.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a policy by playing whole episodes with a segmenter (GRPO); use it as --policy mllm:OUT/policy.

    Start from a policy that `sft` made: one that never hits learns not to click. Several GPUs and stopped runs: as for
    `sft`.
    """
    _require_training()
    with _status("reading recipe, model and data", quiet=as_json):
        from ibisagent.training.recipes import RlRecipe
        from ibisagent.training.rl import train

        plan = RlRecipe.read(recipe, changes or ())
    _print_policy(train(plan, _told(quiet=as_json)), as_json)


@app.command()
@_spread
def serve_policy(
    choice: PolicyChoice,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine set IBIS_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
) -> None:
    """Serve a model to anything that speaks the OpenAI chat protocol, such as --policy endpoint:URL#MODEL."""
    _require_server()
    with _status("loading the model", quiet=False):
        from ibisagent.policies.mllm import MllmPolicy
        from ibisagent.server.chat import serve

        writer = choice.load()
    if not isinstance(writer, MllmPolicy):
        raise ConfigError(
            f"policy '{choice.policy}' is no model that could be served; give ibis-nano, a folder or a hub id"
        )
    serve(writer, host=host, port=port)


@app.command()
def serve_segmenter(
    segmenter: SegmenterOption = "ibis-click",
    device: DeviceOption = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine set IBIS_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8001,
) -> None:
    """Serve a segmenter to other machines, which use it as --segmenter remote:URL."""
    _require_server()
    with _status("loading the segmenter", quiet=False):
        from ibisagent.segmenters import load_segmenter
        from ibisagent.server.segmenter_app import serve

        engine = load_segmenter(segmenter, device=device)
    serve(engine, host=host, port=port)


DataFolderOption = Annotated[
    Path | None, typer.Option("--data", help="Folder for sessions and jobs. Default: this user's data folder.")
]
HostOption = Annotated[str, typer.Option(help="Address to listen on; beyond this machine set IBIS_TOKEN.")]
SessionsOption = Annotated[int, typer.Option(help="Most sessions at a time.", min=1)]
IdleOption = Annotated[float, typer.Option(help="Minutes after which an idle session and its files go.", min=0.1)]
UploadOption = Annotated[int, typer.Option(help="Largest upload in megabytes.", min=1)]
AreaOption = Annotated[int, typer.Option(help="Largest picture in megapixels.", min=1)]
VoxelsOption = Annotated[int, typer.Option(help="Largest volume in megavoxels of 4 bytes.", min=1)]


@app.command()
@_spread
def serve(
    choice: PolicyChoice,
    segmenter: SegmenterOption = "ibis-click",
    data: DataFolderOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8002,
    max_sessions: SessionsOption = 100,
    idle_minutes: IdleOption = 60.0,
    max_upload: UploadOption = 64,
    max_megapixels: AreaOption = 16,
    max_megavoxels: VoxelsOption = 128,
    page: Annotated[bool, typer.Option(help="Also serve the web page.")] = False,
    open_browser: Annotated[bool, typer.Option("--open-browser", hidden=True)] = False,
) -> None:
    """Serve sessions, one-shot segmentation and batch jobs over HTTP, for programs, 3D Slicer, OHIF and agents (MCP).

    The API is described at /docs. Only this machine is answered unless IBIS_TOKEN holds a secret.
    """
    _require_server()
    with _status("loading the models", quiet=False):
        import platformdirs

        from ibisagent.segmenters import load_segmenter
        from ibisagent.server import app as server
        from ibisagent.server.access import url_of
        from ibisagent.server.service import Limits, Service
        from ibisagent.server.volumes import PackageVolumes

        mounts = server.standard_mounts(page=page)
        writer = choice.load()
        limits = Limits(
            sessions=max_sessions,
            idle_seconds=idle_minutes * 60,
            upload_bytes=max_upload * 2**20,
            pixels=max_megapixels * 2**20,
            voxels=max_megavoxels * 2**20,
        )
        folder = data or Path(platformdirs.user_data_dir("ibisagent")) / "server"
        server.check_host(host)
        engine = load_segmenter(segmenter, device=choice.device)
        service = Service(writer, engine, folder, limits=limits, volumes=PackageVolumes())
    address = url_of(host, port)
    stderr.print(f"{address}{'' if page else '/docs'} - sessions in {folder} - stop with Ctrl+C")
    if open_browser:
        import threading
        import webbrowser

        threading.Timer(2.0, webbrowser.open, [address]).start()
    server.serve(service, host=host, port=port, mounts=mounts)


@app.command()
def ui(
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    device: DeviceOption = "auto",
    data: DataFolderOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8002,
    browser: Annotated[bool, typer.Option(help="Open the page in the web browser.")] = True,
) -> None:
    """The web page: open an image, say what to segment, watch the agent, correct it with your own clicks."""
    serve(
        policy=policy,
        segmenter=segmenter,
        device=device,
        data=data,
        host=host,
        port=port,
        page=True,
        open_browser=browser,
    )


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the policies and segmenters: what each is, and which weights are on this machine."""
    from ibisagent import inventory

    found = inventory.models()
    if as_json:
        _print_json([asdict(model) for model in found])
        return
    for model in found:
        facts = [model.state]
        if model.size_bytes:
            facts.append(f"{model.size_bytes / 1e6:.1f} MB")
        facts += [fact for fact in (model.licence, model.sha256 and f"sha256 {model.sha256[:16]}", model.path) if fact]
        stdout.print(f"{model.kind:9}  {model.spec}\n{'':11}{model.what}\n{'':11}weights: {', '.join(facts)}")


doctor_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None)
app.add_typer(doctor_app, name="doctor")


@doctor_app.callback()
def doctor(context: typer.Context, as_json: JsonOption = False) -> None:
    """Check this machine: versions, devices, weights, folders, and one tiny episode. Exit code 2 if something fails."""
    if context.invoked_subcommand is not None:
        return
    from ibisagent import inventory

    checks = inventory.check_machine()
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            stdout.print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.finding}")
    if not all(check.passed for check in checks):
        raise typer.Exit(EXIT_ERROR)


@doctor_app.command("rewards")
def doctor_rewards(
    episodes: Annotated[
        list[Path], typer.Argument(metavar="EPISODES...", help="Folders of episodes, or records of single ones.")
    ],
    data: Annotated[
        Path, typer.Option(help="The truth: data set folder, manifest, or what 'build-data' made of them.")
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="RL recipe, or a part of one, whose table [rewards] holds them."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that every reward term varies over recorded EPISODES, and which one decides.

    Exit code 1 if a term is the same in all of them: training would not feel it. Episodes of the same case make a
    group, as in GRPO; give several folders to bring them together. Episodes without truth in DATA are listed and left
    out; the exit code is then 2.
    """
    with _status("reading the data", quiet=as_json):
        from ibisagent import doctor as checking
        from ibisagent.rewards import PAPER
        from ibisagent.training.recipes import RlRecipe

        weights = PAPER if config is None else RlRecipe.read_one(config, "rewards")
        cases = checking.read_truth(data)
    replayed = (episode for path in episodes for episode in checking.read_episodes(path))
    report = checking.check_rewards(replayed, cases, weights)
    if as_json:
        _print_json(report.to_json())
    else:
        _print_rewards(report)
    for failure in report.failures:
        stderr.print(f"failed, left out: {failure.case_id}: {_one_line(failure.error, 300)}")
    if constant := [term for term in report.terms if term.constant]:
        listed = ", ".join(f"{term.name} ({term.mean:.3g})" for term in constant)
        stderr.print(f"constant over all {report.episodes} episodes, so nothing can be learnt from it: {listed}")
        raise typer.Exit(EXIT_CONSTANT)
    if report.failures:
        raise typer.Exit(EXIT_ERROR)


def _require_server() -> None:
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "mcp")
    if missing := [name for name in needed if not find_spec(name)]:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'ibisagent[server]'")


def _require_training() -> None:
    from importlib.util import find_spec

    if missing := [name for name in ("trl", "peft", "accelerate", "datasets") if not find_spec(name)]:
        raise ConfigError(f"fine-tuning needs {', '.join(missing)}: pip install 'ibisagent[train]'")


def _told(*, quiet: bool) -> Callable[[int, int, Mapping[str, float]], None]:
    """Prints what a trainer logs on one line of stderr."""
    shown = ("loss", "eval_loss", "mean_token_accuracy", "reward", "path/iou", "path/turns", "path/failed")

    def report(step: int, steps: int, logs: Mapping[str, float]) -> None:
        told = ", ".join(f"{name} {logs[name]:.3g}" for name in shown if name in logs)
        if told and not quiet:
            stderr.print(f"update {step} of {steps}: {told}")

    return report


def _print_policy(folder: Path, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # one process of several says it
        return
    if as_json:
        _print_json({"policy": str(folder)})
    else:
        stdout.print(f"policy: {folder}\nuse it with --policy mllm:{folder}")


def _check_query(query: str) -> str:
    from ibisagent.domain import check_query

    query = check_query(query)
    if os.path.isfile(query):
        raise ConfigError(f'{query}: is a file, and the last argument is the query; end with, say, "optic disc"')
    return query


def _turn_printer() -> Callable[[Turn], None]:
    """Prints numbered turns as they come."""
    from ibisagent.session import describe_actions

    number = 0

    def show(turn: Turn) -> None:
        nonlocal number
        number += 1
        said = [describe_actions(turn.reply.actions)] if turn.reply.actions else []
        if turn.reply.problem is not None:
            said.append(f"malformed: {turn.reply.problem}")
        score = "" if turn.segmenter_score is None else f" [mask score {turn.segmenter_score:.2f}]"
        thought = f' "{_one_line(turn.reply.thought)}"' if turn.reply.thought else ""
        stdout.print(f"  turn {number}:{thought} -> {_one_line('; '.join(said), 300)}{score}")

    return show


def _segment_result(path: str, episode: Episode, outputs: Outputs, seconds: float) -> dict[str, Any]:
    return {
        "image": path,
        "masks": {target: str(file) for target, file in outputs.masks.items()},
        "overlay": str(outputs.overlay),
        "record": str(outputs.record),
        "answer": episode.answer.answer,
        "absent": list(episode.answer.absent),
        "stop": episode.stop,
        "turns": len(episode.turns),
        "seconds": round(seconds, 3),
    }


def _print_segmented(episode: Episode, outputs: Outputs, seconds: float) -> None:
    count = len(episode.turns)
    answer = f' "{_one_line(episode.answer.answer)}"' if episode.answer.answer else ""
    stdout.print(f"  {episode.stop} after {count} turn{'s' * (count != 1)} in {seconds:.1f} s{answer}")
    masks = episode.answer_masks
    for target, file in outputs.masks.items():
        pixels = int(masks[target].sum())
        stdout.print(f"  mask:    {file} ({_one_line(target, 60)}, {pixels} pixels)")
    if not outputs.masks:
        stdout.print("  mask:    none was made")
    stdout.print(f"  overlay: {outputs.overlay}")
    stdout.print(f"  record:  {outputs.record}")


def _print_volume(outputs: VolumeOutputs, cost: Cost, seconds: float) -> None:
    stdout.print(
        f"  {cost.policy_calls} turns, {cost.encoder_calls} slices opened, {cost.predictions} masks in {seconds:.1f} s"
    )
    for target, files in outputs.masks.items():
        values = outputs.measures[target]
        size = f"{values.voxels} voxels" if values.volume_ml is None else f"{values.volume_ml:.3g} ml"
        for file in files.values() or ("in the DICOM objects",):
            stdout.print(f"  mask:    {file} ({_one_line(target, 60)}, {size})")
    if not outputs.masks:
        stdout.print("  mask:    none was made")
    for file in outputs.dicom:
        stdout.print(f"  DICOM:   {file} (names the patient as its source does)")
    stdout.print(f"  overlay: {outputs.overview}")
    stdout.print(f"  record:  {outputs.record}")


_TABLES = {
    "{policy} with {segmenter}": ("iou", "dice", "turns", "seconds", "first_hit", "answer_correct"),
    "the same: by pixels, over positives (pos.: cases that show their object), by cases": (
        *("ciou", "positive_iou", "positive_dice", "precision_50", "presence_f1", "match_f1"),
    ),
    "the same: borders and noise": ("hd95_mm", "nsd_2mm", "hd95_px", "nsd_2px", "extra_components", "speck_share"),
    "the same: how it works": ("clicks", "redundant_clicks", "stop_gap", "parse_failures", "tokens"),
    "blind clicks with {segmenter}": ("prior_iou", "prior_hit", "centre_iou", "centre_hit"),
    "seeing the truth: its box's ellipse, an expert's clicks with {segmenter} (IoU)": (
        "ellipse_iou",
        *(f"oracle_iou_{count}" for count in (1, 2, 3, 5, 10)),
    ),
}


def _show_evaluation(result: Evaluation, by: GroupBy, empty: EmptyRule, as_json: bool) -> None:
    """Print an evaluation; exit code 2 if a case failed."""
    if as_json:
        _print_json(result.to_json(empty))
    else:
        _print_evaluation(result, by, empty)
    if result.failures:
        raise typer.Exit(EXIT_ERROR)


def _print_evaluation(result: Evaluation, by: GroupBy, empty: EmptyRule) -> None:
    from ibisagent.evaluation.tables import HEADINGS

    summaries: dict[str, Summary] = result.summaries(by, empty)
    overall = summaries["all"]
    for title, names in _TABLES.items():
        shown = {HEADINGS[name]: name for name in names if name in overall.means}
        if not shown:
            continue
        table = Table(
            *("", "cases", *shown),
            title=title.format(**result.made_by),
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,  # fits into 80 columns
        )
        for group, summary in summaries.items():
            cells = [f"{summary.means[name]:.3f}" if name in summary.means else "" for name in shown.values()]
            table.add_row(_one_line(group, 20), str(summary.cases), *cells)
        stdout.print(table)
    for name, words in (("iou", f"mean IoU, two empty masks count as {empty}"), ("positive_iou", "positives only")):
        if (interval := overall.intervals.get(name)) is not None:
            low, high = interval
            value = f"{overall.means[name]:.3f}, 95% interval {low:.3f} to {high:.3f}"
            stdout.print(f"{words}: {value} ({overall.patients} patients resampled)")
    if overall.stops:
        stdout.print("episodes ended: " + ", ".join(f"{name} {count}" for name, count in overall.stops.items()))
    for failure in result.failures:
        stderr.print(f"failed, left out: {failure.case_id}: {_one_line(failure.error, 300)}")


def _print_rewards(report: RewardReport) -> None:
    groups = f", {report.groups} of them with several" if report.groups else ""
    table = Table(
        *("", "weight", "min", "mean", "max", "std", "varies", "corr.", "share"),
        title=f"{report.episodes} episodes of {report.cases} cases{groups}",
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,  # fits into 80 columns
    )
    for term in (*report.terms, report.total):
        values = [f"{value + 0.0:.3f}" for value in (term.minimum, term.mean, term.maximum, term.std)]
        varies = "" if term.varies is None else f"{term.varies:.0%}"
        if term is report.total:
            table.add_row(term.name, "", *values, varies, "", "")
        else:
            correlation = "" if term.correlation is None else f"{term.correlation:+.2f}"
            share = "" if term.constant or term.share is None else f"{term.share:.0%}"
            table.add_row(term.name, f"{term.weight:g}", *values, varies, correlation, share)
    stdout.print(table)
    where = "within groups" if report.groups else "over the batch"
    if report.groups:
        stdout.print("varies: in this share of the groups")
    stdout.print(f"corr.: with the total; share: of its variance {where}")
    if (dominant := report.dominant) is not None and dominant.share is not None:
        stdout.print(f"{dominant.name} decides: {dominant.share:.0%} of that variance comes from it")


def _print_ceiling(result: Ceiling, agent: Agent | None) -> None:
    if groups := result.groups():
        _print_groups(result.made_by["segmenter"], result.max_clicks, groups)
    for kind, times in result.milliseconds().items():
        stdout.print(f"{kind}: {times.median:.1f} ms median, {times.p95:.1f} ms p95 ({times.count})")
    if result.peak_memory_bytes is not None:
        stdout.print(f"peak memory of this process: {result.peak_memory_bytes / 1e6:.0f} MB")
    if result.absent:
        stdout.print(f"left out, as they have no mask: {result.absent}")
    for failure in result.failures:
        stderr.print(f"failed, left out: {failure.case_id}: {_one_line(failure.error, 300)}")
    stdout.print(result.verdict(agent))


def _print_groups(segmenter: str, max_clicks: int, groups: Mapping[str, Group]) -> None:
    means = groups["all"].means
    clicks = {name.removeprefix("click_"): name for name in means if name.startswith("click_")}
    boxes = {"ellipse": "ellipse", "box": "box", "±10%": "box_off_10", "±20%": "box_off_20"}
    boxes |= {f"+{name.removeprefix('box_click_')}": name for name in means if name.startswith("box_click_")}
    goals = [name.removeprefix("noc_") for name in means if name.startswith("noc_")]
    middle = "5" if "5" in clicks else str(max_clicks)

    def table(
        title: str, columns: Mapping[str, str], more: Mapping[str, Callable[[Group], str]], digits: int = 3
    ) -> None:
        shown = Table(
            *("", "cases", *columns, *more),
            title=title,
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,  # fits into 80 columns
        )
        for name, group in groups.items():
            cells = [f"{group.means[measure]:.{digits}f}" for measure in columns.values()]
            cells += [cell(group) for cell in more.values()]
            shown.add_row(_one_line(name, 20).removeprefix("area "), str(group.cases), *cells)
        stdout.print(shown)

    def never(goal: str) -> Callable[[Group], str]:
        return lambda group: f"{group.means[f'nof_{goal}'] * group.cases:.0f} ({group.means[f'nof_{goal}']:.0%})"

    table(
        f"{segmenter}: mean IoU after so many clicks of an expert",
        clicks,
        {f"95% at {middle}": lambda group: _interval_text(group, clicks[middle])},
    )
    table("the true box: its ellipse, alone, moved, and with so many clicks (mean IoU)", boxes, {})
    table(
        f"clicks to an IoU in % (NoC; {max_clicks} for each of the cases that never reach it, NoF)",
        {f"NoC{goal}": f"noc_{goal}" for goal in goals},
        {f"NoF{goal}": never(goal) for goal in goals},
        digits=1,
    )
    table(
        "which mask to keep (mean IoU), and the calibration error of the estimated IoU (ECE)",
        {"last mask": "last", "best scored": "best_scored", "best": "best"},
        {"ECE": lambda group: f"{group.calibration.expected_error:.3f}"},
    )
    shown = {f"{number} click{'s' * (number != '1')}": name for number, name in clicks.items()}
    if falls := groups["all"].falls:
        stdout.print(f"the mean IoU is lower than before after click {', '.join(map(str, falls))}")
    _print_bars(groups["all"], {**shown, "true box": "box", "ellipse in it": "ellipse"})


def _print_bars(group: Group, measures: Mapping[str, str]) -> None:
    """Mean IoUs as bars from 0 to 1."""
    title = f"mean IoU, {group.cases} case{'s' * (group.cases != 1)} (95% interval, patients resampled)"
    table = Table("", "", "", "", title=title, title_justify="left", box=None, show_header=False)
    for label, name in measures.items():
        bar = Bar(1, 0, group.means[name], width=40)
        table.add_row(label, bar, f"{group.means[name]:.3f}", _interval_text(group, name))
    stdout.print(table)


def _interval_text(group: Group, measure: str) -> str:
    interval = group.intervals[measure]
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"
