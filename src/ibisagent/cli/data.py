"""`ibisagent data`: which benchmarks there are, what is wrong with a copy or with masks, training data from masks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibisagent.cli.options import DeviceOption, JsonOption, LimitOption, SeedOption, SegmenterOption, SplitOption
from ibisagent.cli.output import EXIT_ERROR, new_table, print_json, progress, status, stderr, stdout
from ibisagent.errors import ConfigError
from ibisagent.files import one_line

if TYPE_CHECKING:
    from ibisagent.volumes.series import Series

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Labelled data: list, check, audit, build, prompts."
)


@app.command("list")
def list_benchmarks(as_json: JsonOption = False) -> None:
    """List the public benchmarks that can be read: their sources, licences and rules."""
    from ibisagent.datasets.catalogue import BENCHMARKS

    if as_json:
        print_json({name: asdict(benchmark) for name, benchmark in BENCHMARKS.items()})
        return
    for name, one in BENCHMARKS.items():
        stdout.print(f"{name:12} {one.title}")
        facts = {
            "from": one.source,
            "licence": one.licence,
            "get it": one.how_to_get,
            "files": one.layout,
            "scored on": one.test_split or "nothing public",
            "rules": one.rules,
        }
        for word, fact in facts.items():
            stdout.print(f"{'':12} {word + ':':10} {fact}")


@app.command("series")
def list_dicom_series(
    place: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder of DICOM files, or a study's DICOMweb URL.")],
    as_json: JsonOption = False,
) -> None:
    """List every DICOM series below FOLDER: what it shows, its slices and spacing, and what is wrong with it.

    The numbers are those that 'segment --series' takes for this folder; --select chooses by the other columns.
    """
    from ibisagent.volumes.series import list_series

    found = []
    with status("reading headers", quiet=as_json):
        for one in list_series(place):
            found.append(one)
            if not as_json:
                stdout.print(_in_a_line(one))
    if as_json:
        print_json({"series": [one.to_json() for one in found]})


def _in_a_line(series: Series) -> str:
    spacing = "" if series.spacing_mm is None else " x ".join(f"{side:.3g}" for side in series.spacing_mm) + " mm"
    weights = [f"TE {value:g} ms" for value in series.echo_times_ms] + [f"b {value:g}" for value in series.b_values]
    facts = (
        f"'{one_line(series.description, 60)}'" if series.description else "",
        f"series {series.series_number}" if series.series_number else "",
        f"{series.slices} slices of {series.size[0]} x {series.size[1]}" if series.slices else "",
        spacing,
        series.plane,
        *weights[:6],
    )
    problem = f"cannot be used: {series.problem}" if series.problem else ""
    remarks = "; ".join(part for part in (problem, *series.notes) if part)
    line = f"{series.number:3}  {series.modality or '?':3} {', '.join(fact for fact in facts if fact)}"
    return f"{line}  ({one_line(remarks, 300)})" if remarks else line


@app.command()
def check(
    data: Annotated[Path, typer.Argument(help="A local copy of a benchmark, a data set folder, or a manifest.")],
    against: Annotated[
        Path | None, typer.Option(help="Look for images and patients that DATA shares with this.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Decode this many cases of DATA, spread over it; 0: all.", min=0)] = 50,
    bits: Annotated[
        int | None, typer.Option(help="Images whose 256-bit fingerprints differ so little are the same (default 6).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check a local copy of a public benchmark, or of any DATA: what is in it, and whether it can be read.

    With --against: also images that look alike and patients in both; give it the data that a model was trained on.
    Exit code 2 if cases cannot be read, or something is shared.
    """
    from ibisagent.datasets import read_cases
    from ibisagent.datasets.catalogue import BENCHMARKS, check_copy
    from ibisagent.datasets.leaks import NEAR_BITS, find_leaks

    with status("reading the data", quiet=as_json):
        copy = check_copy(data, limit=limit or None)
    leaks = None
    if against is not None:
        mine, theirs = read_cases(data), read_cases(against)
        total = len({row.image for row in mine.rows}) + len({row.image for row in theirs.rows})
        with progress(total, "images", quiet=as_json) as advance:
            leaks = find_leaks(mine, theirs, bits=NEAR_BITS if bits is None else bits, on_image=advance)
    if as_json:
        print_json({"copy": asdict(copy), "leaks": None if leaks is None else asdict(leaks)})
    else:
        known = BENCHMARKS.get(copy.layout)
        stdout.print(f"{data}: {known.title if known else 'a manifest'}")
        stdout.print(
            f"  {copy.pairs} pairs, {copy.images} images, {copy.objects} objects, {copy.patients} patients named"
        )
        for title, counts in (("splits", copy.splits), ("modalities", copy.modalities)):
            stdout.print(f"  {title}: {', '.join(f'{one_line(name, 40)} {count}' for name, count in counts.items())}")
        if known:
            stdout.print(f"  rules: {known.rules}")
        stdout.print(f"  decoded {copy.checked} cases, {len(copy.problems)} could not be read")
        for problem in copy.problems:
            stderr.print(f"  {one_line(problem, 300)}")
        if leaks is not None:
            stdout.print(f"  compared {leaks.compared[0]} images with {leaks.compared[1]} of {against}")
            stdout.print(f"  images that look alike: {len(leaks.images)}, patients in both: {len(leaks.patients)}")
            if not all(leaks.patients_known):
                stdout.print("  patients cannot be compared: not both name them")
            for name, other, distance in leaks.images:
                stdout.print(f"  {one_line(name, 200)} = {one_line(other, 200)} ({distance} of 256 bits differ)")
            for patient in leaks.patients:
                stdout.print(f"  patient {one_line(patient)}")
            for problem in leaks.unread:
                stderr.print(f"  {one_line(problem, 300)}")
    shared = leaks is not None and (leaks.images or leaks.patients or leaks.unread)
    if copy.problems or shared:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def audit(
    data: Annotated[Path, typer.Argument(help="Data set folder, a manifest, or a public benchmark's files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, the table and the images.")],
    split: Annotated[str | None, typer.Option(help="Only these masks; they are held against all of DATA.")] = None,
    segmenter: Annotated[str, typer.Option("--segmenter", "-s", help="Draws what leaks and is missed.")] = "ibis-click",
    limit: LimitOption = None,
    images: Annotated[int, typer.Option(help="Images of so many of the worst.", min=0)] = 50,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """List the masks of DATA that disagree with their name or their image, worst first.

    Writes index.html with images of the worst, findings.csv and findings.json with all. Masks that cannot be read are
    listed and make the exit code 2.
    """
    with status("reading the data and loading the segmenter", quiet=as_json):
        from ibisagent.datasets import read_cases
        from ibisagent.evaluation import audit as auditing
        from ibisagent.files import try_folder
        from ibisagent.segmenters import load_segmenter

        everything = read_cases(data)
        cases = everything if split is None else read_cases(data, split=split)
        cases = cases.filter(lambda row: row.mask is not None).spread(limit)
        try_folder(output)
        engine = load_segmenter(segmenter, device=device)
    with progress(len(cases), "masks", quiet=as_json) as advance:
        found = auditing.audit(cases, engine, among=everything, on_mask=advance)
    page = auditing.write_report(found, cases, output, images=images)
    if as_json:
        print_json({"findings": [one.to_json() for one in found.findings], "failures": dict(found.failures)})
    else:
        for number, one in enumerate(found.findings[:20], start=1):
            reasons = "; ".join(one.reasons) or "nothing weighs much"
            stdout.print(f"{number:3}  {one.suspicion:.2f}  {one_line(one.case_id, 90)}: {one_line(reasons, 200)}")
        stdout.print(f"{len(found.findings)} masks, worst first: {page}")
        for why in found.failures.values():
            stderr.print(f"could not be looked at: {one_line(why, 300)}")
    if found.failures:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def trajectories(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an unfinished one is continued.")],
    split: SplitOption = None,
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

    A run that was killed resumes, and ends with the same files as one that was not.
    """
    with status("reading the data and loading the segmenter", quiet=as_json):
        from ibisagent.datasets import read_cases
        from ibisagent.generation import trajectories as maker
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
    with progress(len(cases), "cases", quiet=as_json) as advance:
        summary = maker.generate(cases, engine, output, config, lambda now, _: advance(done=now), batch_size=batch_size)
    if as_json:
        print_json(asdict(summary))
    else:
        table = new_table(str(output), "", "episodes", "IoU", "turns", "clicks", f"IoU >= {iou_threshold:g}")
        for name, group in {"all": summary.overall, **summary.by_modality}.items():
            if group is not None:
                numbers = (group.mean_iou, group.mean_turns, group.mean_clicks, group.reached)
                table.add_row(name, str(group.episodes), *(f"{number:.3f}" for number in numbers))
        stdout.print(table)
        if summary.failed:
            stderr.print(f"{summary.failed} of {summary.cases} cases failed, see {output / maker.FAILURES_NAME}")
    if summary.failed:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def build(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; an unfinished one is continued.")],
    config: Annotated[Path | None, typer.Option("--config", "-c", help="TOML file, such as recipes/data.toml.")] = None,
    stage: Annotated[list[str] | None, typer.Option(help="Only this stage; may be repeated.")] = None,
    split: SplitOption = None,
    licence_class: Annotated[str | None, typer.Option(help="Only pairs of this class, from that column.")] = None,
    hold_out: Annotated[
        bool, typer.Option(help="Without the patients, one in sixteen, that 'train nano' keeps to choose settings on.")
    ] = False,
    limit: LimitOption = None,
    workers: Annotated[int | None, typer.Option(help="Processes, on Ray; default: this one alone.", min=1)] = None,
    ray: Annotated[str | None, typer.Option(help="Address of a Ray cluster that sees DATA and OUT.")] = None,
    dry_run: Annotated[bool, typer.Option(help="Only say what the teacher would cost.")] = False,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Make training data from image-mask pairs: questions, expert episodes with thoughts, files for SFT and RL.

    Stages: trajectories, questions, thoughts, reflection, filter, export. A run that was killed resumes and ends with
    the same bytes. OUT/card.md says what was made, and what was rejected and why.
    """
    with status("reading the data", quiet=as_json):
        from ibisagent.datasets import read_cases
        from ibisagent.generation import stages as factory
        from ibisagent.generation.config import STAGES, FactoryConfig, Stage

        settings = FactoryConfig() if config is None else FactoryConfig.read(config)
        if unknown := next((name for name in stage or () if name not in STAGES), None):
            raise ConfigError(f"unknown stage '{unknown}'; there are: {', '.join(STAGES)}")
        chosen: list[Stage] = [name for name in STAGES if not stage or name in stage]
        licences = {licence_class} if licence_class else None
        cases = read_cases(data, split=split, licence_classes=licences)
        if hold_out:
            from ibisagent.training.click.states import is_development

            cases = cases.filter(lambda row: not is_development(row.patient))
        cases = cases.spread(limit)
        plan = factory.Plan(cases, output, settings, device)
    if dry_run:
        print_json(factory.estimate(plan))
        return
    run_shards = None
    if workers is not None or ray is not None:
        from ibisagent.generation.on_ray import on_ray

        run_shards = on_ray(workers or 2, ray)
    card = factory.build(
        plan,
        chosen,
        progress=None if as_json else lambda name, done, total: stderr.print(f"{name}: {done} of {total} shards"),
        run_shards=run_shards,
    )
    if as_json:
        print_json(card)
    else:
        stdout.print((output / "card.md").read_text(encoding="utf-8"))
    if card["failed_pairs"]:
        stderr.print(f"{card['failed_pairs']} pairs could not be used; {output / 'card.json'} says why")
        raise typer.Exit(EXIT_ERROR)


@app.command()
def prompts(
    checkout: Annotated[Path, typer.Argument(help="A checkout of the paper's public code, Yankai96/IBISAgent.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The TOML file to write.")],
) -> None:
    """Read what the paper's public code tells its weights, for --prompts. The code is parsed, not run."""
    from ibisagent.policies.wording import wording_of_checkout, write_wording

    write_wording(wording_of_checkout(checkout), output)
    stdout.print(f"{output}: for --prompts {output}, with the public weights")
