"""The command line: one command per verb; parses, calls, prints. Heavy modules are imported inside the commands."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from ibisagent.errors import ConfigError, IbisError

if TYPE_CHECKING:
    from ibisagent.datasets import CaseSource
    from ibisagent.domain import Episode, Turn
    from ibisagent.evaluation import Evaluation, Summary
    from ibisagent.policies.base import Policy
    from ibisagent.session import Outputs

EXIT_ERROR = 2
stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class _OneLineErrors(TyperGroup):
    """Every error raised on purpose, and every failing file system, becomes one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
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

PolicyOption = Annotated[str, typer.Option("--policy", "-p", help="Who clicks; see 'ibisagent models'.")]
SegmenterOption = Annotated[str, typer.Option("--segmenter", "-s", help="What turns clicks into masks.")]
DialectOption = Annotated[
    str | None, typer.Option(help="Language of the turns: ibis, paper, released. Default: the policy's own.")
]
HistoryOption = Annotated[
    str | None, typer.Option(help="What the policy sees of past turns: none, actions, full. Default: the policy's own.")
]
TurnsOption = Annotated[int | None, typer.Option(help="Most turns of one episode (default 5; the paper: 20).", min=1)]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="Numbers of the policy: auto, float32, bfloat16, float16.")]
AdapterOption = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter for the policy.")]
PixelsOption = Annotated[
    int | None, typer.Option(help="Shrink images to this area for the policy, if it takes any size.", min=1)
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest text; above, it is drawn.", min=0)]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of text.")]


@app.command()
def segment(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files: PNG, JPEG, TIFF, BMP.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help='What to segment, such as "the optic disc".')],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("ibisagent-output"),
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    dialect: DialectOption = None,
    history: HistoryOption = None,
    max_turns: TurnsOption = None,
    start_mask: Annotated[
        list[Path] | None, typer.Option(help="Mask to refine (0 outside); once per image, in their order.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    adapter: AdapterOption = None,
    max_pixels: PixelsOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Segment what QUERY names in each IMAGE.

    Writes for each image NAME_mask_TARGET.png (the image's size, 255 inside), NAME_overlay.png and NAME_record.json,
    from which 'ibisagent replay' rebuilds the mask. A failing image does not stop the others; the exit code is then 2.
    """
    query = _check_query(query)
    starts: list[Path | None] = [*start_mask] if start_mask else [None] * len(images)
    if len(starts) != len(images):
        raise ConfigError(f"{len(starts)} start masks for {len(images)} images: give one per image, in their order")
    with _status("loading the models", quiet=as_json):
        from ibisagent import session
        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter

        writer = load_policy(
            policy,
            dialect=dialect,
            history=history,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
            adapter=adapter,
            max_pixels=max_pixels,
            temperature=temperature,
            seed=seed,
        )
        engine = load_segmenter(segmenter, device=device)
    results: list[dict[str, Any]] = []
    names = session.file_names(images)
    with _progress(len(images), "images", quiet=as_json or len(images) == 1) as advance:
        for path, name, start in zip(images, names, starts, strict=True):
            if not as_json:
                stdout.print(f"{path}: {_one_line(query, 200)}")
            started = time.perf_counter()
            try:
                case = session.read_case(Path(path).resolve(), query, start)
                turn_printer = None if as_json else _turn_printer()
                episode = session.segment(
                    case, writer, engine, max_turns=max_turns or session.DEFAULT_TURNS, on_turn=turn_printer
                )
                seconds = time.perf_counter() - started
                outputs = session.export(episode, case.image, output, name)
            except IbisError as error:
                results.append({"image": path, "error": str(error)})
                if not as_json:
                    _print_error(error)
            else:
                results.append(_segment_result(path, episode, outputs, seconds))
                if not as_json:
                    _print_segmented(episode, outputs, seconds)
            advance()
    if as_json:
        _print_json({"query": query, "results": results})
    if any("error" in result for result in results):
        raise typer.Exit(EXIT_ERROR)


@app.command()
def replay(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD...", help="Records that 'segment' wrote.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the rebuilt files here.")] = None,
    image: Annotated[Path | None, typer.Option(help="Where the image of the one RECORD is now.")] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Rebuild the masks of each RECORD from its clicks, without the policy, and check them bit for bit."""
    if image is not None and len(records) > 1:
        raise ConfigError("--image names one picture: replay one record at a time with it")
    from ibisagent import session

    results: list[dict[str, Any]] = []
    for record, name in zip(records, session.file_names(records), strict=True):
        try:
            episode, picture = session.replay_record(record, image=image, device=device)
            masks = session.final_masks(episode)
            result: dict[str, Any] = {
                "record": str(record),
                "targets": list(masks),
                "turns": len(episode.turns),
                "identical": True,
            }
            if output is not None:
                outputs = session.export(episode, picture, output, name.removesuffix("_record"))
                result["masks"] = {target: str(path) for target, path in outputs.masks.items()}
        except IbisError as error:
            result = {"record": str(record), "error": str(error)}
            if not as_json:
                _print_error(error)
        else:
            if not as_json:
                listed = ", ".join(_one_line(target, 60) for target in masks) or "no mask"
                stdout.print(f"{record}: {len(episode.turns)} turns give the recorded masks bit for bit ({listed})")
        results.append(result)
    if as_json:
        _print_json({"results": results})
    if any("error" in result for result in results):
        raise typer.Exit(EXIT_ERROR)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    split: Annotated[str | None, typer.Option(help="Rows to evaluate. Default: val where it exists, else all.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write all of it to this JSON file.")] = None,
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    dialect: DialectOption = None,
    history: HistoryOption = None,
    max_turns: TurnsOption = None,
    batch_size: Annotated[int, typer.Option(help="Episodes run together.", min=1)] = 16,
    limit: Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)] = None,
    baselines: Annotated[bool, typer.Option(help="Also run the oracle's clicks and the blind clicks.")] = True,
    by: Annotated[str, typer.Option(help="Group the table by modality, dataset or object.")] = "modality",
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    adapter: AdapterOption = None,
    max_pixels: PixelsOption = None,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure a policy with a segmenter on labelled DATA, beside the baselines.

    The location prior is learned from the rows of split 'train'. Cases that fail are listed and left out.
    """
    if by not in ("modality", "dataset", "object"):
        raise ConfigError(f"cannot group by '{by}': give modality, dataset or object")
    with _status("reading the data and loading the models", quiet=as_json):
        from ibisagent import evaluation, session
        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter

        everything, cases = _cases(data, split, limit)
        engine = load_segmenter(segmenter, device=device)
        needs_prior = baselines or policy == "location-prior"
        prior = evaluation.location_prior(everything, cases) if needs_prior else None
        writer: Policy | None
        if policy == "location-prior":
            writer = prior
        else:
            writer = load_policy(
                policy,
                dialect=dialect,
                history=history,  # type: ignore[arg-type]
                device=device,
                dtype=dtype,
                adapter=adapter,
                max_pixels=max_pixels,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
                cases=cases.by_id if policy == "oracle" else None,
            )
        if writer is None:
            raise ConfigError(f"{data}: has no rows of split 'train', from which location-prior learns")
        centre = load_policy("centre-click") if baselines else None
    if prior is None and baselines and not as_json:
        stderr.print(f"{data}: no rows of split 'train', so there is no location prior to compare with")
    with _progress(len(cases), "cases", quiet=as_json) as advance:
        result = evaluation.evaluate(
            cases,
            writer,
            engine,
            prior=prior if baselines else None,
            centre=centre,
            oracle=baselines,
            max_turns=max_turns or session.DEFAULT_TURNS,
            batch_size=batch_size,
            made_by={"data": str(data), "split": split or "", **session.provenance(writer, engine)},
            on_case=lambda _: advance(),
        )
    plain = result.to_json(by)  # type: ignore[arg-type]
    if output is not None:
        from ibisagent.images import write_whole

        write_whole((json.dumps(plain, indent=1) + "\n").encode(), output)
    if as_json:
        _print_json(plain)
    else:
        _print_evaluation(result, by)
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


@app.command()
def serve_policy(
    policy: PolicyOption = "ibis-nano",
    dialect: DialectOption = None,
    history: HistoryOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    adapter: AdapterOption = None,
    max_pixels: PixelsOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine set IBIS_TOKEN.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
) -> None:
    """Serve a model to anything that speaks the OpenAI chat protocol, such as --policy endpoint:URL#MODEL."""
    _require_server()
    with _status("loading the model", quiet=False):
        from ibisagent.policies import load_policy
        from ibisagent.policies.mllm import MllmPolicy
        from ibisagent.server.chat import serve

        writer = load_policy(
            policy,
            dialect=dialect,
            history=history,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
            adapter=adapter,
            max_pixels=max_pixels,
        )
    if not isinstance(writer, MllmPolicy):
        raise ConfigError(f"policy '{policy}' is no model that could be served; give ibis-nano, a folder or a hub id")
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


@app.command()
def serve(
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    dialect: DialectOption = None,
    history: HistoryOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    adapter: AdapterOption = None,
    max_pixels: PixelsOption = None,
    data: DataFolderOption = None,
    host: HostOption = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8002,
    max_sessions: SessionsOption = 100,
    idle_minutes: IdleOption = 60.0,
    max_upload: UploadOption = 64,
    max_megapixels: AreaOption = 16,
    page: Annotated[bool, typer.Option(help="Also serve the web page.")] = False,
    open_browser: Annotated[bool, typer.Option("--open-browser", hidden=True)] = False,
) -> None:
    """Serve sessions, one-shot segmentation and batch jobs over HTTP, for programs, 3D Slicer, OHIF and agents (MCP).

    The API is described at /docs. Only this machine is answered unless IBIS_TOKEN holds a secret.
    """
    _require_server(*(["gradio"] if page else []))
    with _status("loading the models", quiet=False):
        import platformdirs

        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter
        from ibisagent.server import app as server
        from ibisagent.server.service import Limits, Service

        mounts = server.standard_mounts(page=page)
        writer = load_policy(
            policy,
            dialect=dialect,
            history=history,  # type: ignore[arg-type]
            device=device,
            dtype=dtype,
            adapter=adapter,
            max_pixels=max_pixels,
        )
        limits = Limits(
            sessions=max_sessions,
            idle_seconds=idle_minutes * 60,
            upload_bytes=max_upload * 2**20,
            pixels=max_megapixels * 2**20,
        )
        folder = data or Path(platformdirs.user_data_dir("ibisagent")) / "server"
        server.check_host(host)
        service = Service(writer, load_segmenter(segmenter, device=device), folder, limits=limits)
    address = f"http://{host}:{port}"
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
    serve(policy, segmenter, device=device, data=data, host=host, port=port, page=True, open_browser=browser)


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


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Check this machine: versions, devices, weights, folders, and one tiny episode. Exit code 2 if something fails."""
    from ibisagent import inventory

    checks = inventory.check_machine()
    if as_json:
        _print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            stdout.print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.finding}")
    if not all(check.passed for check in checks):
        raise typer.Exit(EXIT_ERROR)


def _require_server(*more: str) -> None:
    from importlib.util import find_spec

    needed = ("fastapi", "uvicorn", "prometheus_client", "python_multipart", "mcp", *more)
    if missing := [name for name in needed if not find_spec(name)]:
        extra = "ui" if "gradio" in missing else "server"
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install 'ibisagent[{extra}]'")


def _check_query(query: str) -> str:
    from ibisagent.domain import check_query

    query = check_query(query)
    if os.path.isfile(query):
        raise ConfigError(f'{query}: is a file, and the last argument is the query; end with, say, "optic disc"')
    return query


def _cases(data: Path, split: str | None, limit: int | None) -> tuple[CaseSource, CaseSource]:
    """(all cases of `data`, those to evaluate)."""
    from ibisagent.datasets import CaseSource, read_cases

    everything = read_cases(data)
    if split is None and any(row.split == "val" for row in everything.rows):
        split = "val"
    cases = everything if split is None else read_cases(data, split=split)
    if limit is not None and limit < len(cases):
        step = len(cases) / limit
        cases = CaseSource([cases.rows[int(index * step)] for index in range(limit)], cases.where)
    return everything, cases


def _one_line(text: str, length: int = 120) -> str:
    """Text of a model or user in one printable line: it must not steer the terminal."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _print_error(error: BaseException) -> None:
    if isinstance(error, OSError) and not isinstance(error, IbisError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    else:
        message = str(error)
    stderr.print(f"error: {_one_line(message, 600)}")


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


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
    for target, file in outputs.masks.items():
        pixels = int(episode.masks[target].sum()) if target in episode.masks else 0
        stdout.print(f"  mask:    {file} ({_one_line(target, 60)}, {pixels} pixels)")
    if not outputs.masks:
        stdout.print("  mask:    none was made")
    stdout.print(f"  overlay: {outputs.overlay}")
    stdout.print(f"  record:  {outputs.record}")


_TABLES = {
    "{policy} with {segmenter}": {
        "IoU": "iou",
        "Dice": "dice",
        "turns": "turns",
        "seconds": "seconds",
        "first hit": "first_hit",
        "answer": "answer_correct",
    },
    "blind clicks with {segmenter}": {
        "prior IoU": "prior_iou",
        "prior hit": "prior_hit",
        "centre IoU": "centre_iou",
        "centre hit": "centre_hit",
    },
    "seeing the truth: its box's ellipse, an expert's clicks with {segmenter} (IoU)": {
        "ellipse": "ellipse_iou",
        "click 1": "oracle_iou_1",
        "2": "oracle_iou_2",
        "3": "oracle_iou_3",
        "5": "oracle_iou_5",
        "10": "oracle_iou_10",
    },
}


def _print_evaluation(result: Evaluation, by: str) -> None:
    summaries: dict[str, Summary] = result.summaries(by)  # type: ignore[arg-type]
    overall = summaries["all"]
    for title, columns in _TABLES.items():
        shown = {column: name for column, name in columns.items() if name in overall.means}
        if not shown:
            continue
        table = Table("", "cases", *shown, title=title.format(**result.made_by), title_justify="left", box=SIMPLE_HEAD)
        for group, summary in summaries.items():
            cells = [f"{summary.means[name]:.3f}" if name in summary.means else "" for name in shown.values()]
            table.add_row(group, str(summary.cases), *cells)
        stdout.print(table)
    if overall.iou_interval is not None:
        low, high = overall.iou_interval
        stdout.print(f"mean IoU {overall.means['iou']:.3f}, 95% interval {low:.3f} to {high:.3f} (patients resampled)")
    stdout.print("episodes ended: " + ", ".join(f"{name} {count}" for name, count in overall.stops.items()))
    for failure in result.failures:
        stderr.print(f"failed, left out: {failure.case_id}: {_one_line(failure.error, 300)}")


@contextmanager
def _status(what: str, *, quiet: bool) -> Iterator[None]:
    if quiet or not stderr.is_terminal:
        yield
        return
    with stderr.status(f"{what} ..."):
        yield


@contextmanager
def _progress(total: int, what: str, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr while the block runs; call what it gives with the number of finished items (default 1)."""
    if quiet or not stderr.is_terminal:
        yield lambda _count=1: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count=1: progress.advance(task, count)
