"""`ibisagent eval`: measure policies, segmenters and masks against labelled data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated

import typer
from rich.bar import Bar
from rich.table import Table

from ibisagent.cli.options import (
    DeviceOption,
    Drawing,
    EmptyOption,
    GroupOption,
    JsonOption,
    JudgedSplitOption,
    LimitOption,
    PolicyChoice,
    PolicyOption,
    RunFolder,
    SeedOption,
    SegmenterOption,
    SelectionOption,
    SplitOption,
    TurnsOption,
    spread_options,
)
from ibisagent.cli.output import EXIT_ERROR, new_table, print_failures, print_json, progress, status, stderr, stdout
from ibisagent.domain import check_mask_selection
from ibisagent.files import one_line, try_file, try_folder

if TYPE_CHECKING:
    from ibisagent.evaluation.ceiling import Agent, Ceiling, Group
    from ibisagent.evaluation.metrics import EmptyRule
    from ibisagent.evaluation.results import Evaluation, GroupBy, Summary

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Measure policies, segmenters and masks on labelled data."
)


@app.command()
@spread_options
def run(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    choice: PolicyChoice,
    drawing: Drawing,
    split: JudgedSplitOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Folder of the run; an unfinished one resumes. See docs/reference/evaluation.md."
        ),
    ] = None,
    segmenter: SegmenterOption = "ibis-click",
    max_turns: TurnsOption = None,
    mask_selection: SelectionOption = None,
    batch_size: Annotated[int, typer.Option(help="Episodes run together.", min=1)] = 16,
    workers: Annotated[int, typer.Option(help="Processes; each loads the models.", min=1)] = 1,
    limit: LimitOption = None,
    baselines: Annotated[bool, typer.Option(help="Also run the oracle's clicks and the blind clicks.")] = True,
    by: GroupOption = "modality",
    empty: EmptyOption = "one",
    as_json: JsonOption = False,
) -> None:
    """Measure a policy with a segmenter on labelled DATA, beside the baselines.

    The location prior is learned from the rows for training. Cases that fail are listed and left out. A run that was
    killed resumes, and ends with the same results; cases whose files have changed since are judged
    again.
    """
    with status("loading", quiet=as_json):
        from ibisagent.evaluation import runs
        from ibisagent.evaluation.metrics import check_empty_rule
        from ibisagent.evaluation.results import check_group

        rule, group = check_empty_rule(empty), check_group(by)
        selection = None if mask_selection is None else check_mask_selection(mask_selection)
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
    with progress(None, "cases", quiet=as_json) as advance:
        result = runs.run(
            setup,
            output,
            workers=workers,
            empty=rule,
            on_start=lambda total, done: advance(done, total=total),
            on_case=advance,
        )
    if as_json:
        print_json(result.to_json(rule))
    else:
        _print_evaluation(result, group, rule)
    if result.failures:
        raise typer.Exit(EXIT_ERROR)


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
    from ibisagent.evaluation import results, runs, tables
    from ibisagent.evaluation.metrics import check_empty_rule

    if output is not None:
        try_file(output)
    first, second = (runs.Run(folder) for folder in (run_a, run_b))
    first.check_same_masks(second)
    found = results.compare(first.evaluation, second.evaluation, empty=check_empty_rule(empty), seed=seed)
    if output is not None:
        tables.write_comparison(found, output)
    if as_json:
        print_json(asdict(found))
    else:
        stdout.print(tables.comparison_markdown(found), end="")
    for name, lacking in (("only in A", found.only_a), ("only in B", found.only_b)):
        for case_id in lacking:
            stderr.print(f"{name}, left out: {one_line(case_id)}")


@app.command()
def score(
    made: Annotated[
        Path, typer.Argument(metavar="PRED_DIR", help="Folder of masks (PNG, NIfTI, ...), or a .jsonl file.")
    ],
    data: Annotated[Path, typer.Argument(help="Data set folder, a manifest, or a folder of NIfTI masks.")],
    split: JudgedSplitOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for a run that 'eval compare' and 'eval report' read.")
    ] = None,
    limit: LimitOption = None,
    resize_targets: Annotated[
        bool,
        typer.Option(help="Compare masks of another size with the ground truth resized to theirs (nearest neighbour)."),
    ] = False,
    by: GroupOption = "modality",
    empty: EmptyOption = "one",
    as_json: JsonOption = False,
) -> None:
    """Measure masks that anything made against the masks of DATA.

    docs/reference/evaluation.md says how they are to be named.

    Masks of wrong size or place, missing, double or unknown ones are listed one by one, never averaged away; then the
    exit code is 2.
    """
    from ibisagent.evaluation import scoring
    from ibisagent.evaluation.metrics import check_empty_rule
    from ibisagent.evaluation.results import check_group

    group, rule = check_group(by), check_empty_rule(empty)
    with status("comparing the masks", quiet=as_json):
        found = scoring.score(made, data, output, split=split, limit=limit, resize_targets=resize_targets, empty=rule)
    if as_json:
        print_json(
            {
                **found.evaluation.to_json(rule),
                "strict": found.strict,
                "problems": [asdict(one) for one in found.problems],
            }
        )
    else:
        _print_evaluation(replace(found.evaluation, failures=()), group, rule)
        count, total = len(found.evaluation.results), int(found.evaluation.provenance["cases"])
        stdout.print(
            f"{count} of {total} cases scored; with 0 for each of the others: mean IoU {found.strict['iou']:.3f},"
            f" Dice {found.strict['dice']:.3f}"
        )
        for problem in found.problems:
            stderr.print(one_line(f"{problem.kind}: {problem.case_id or problem.file}: {problem.message}", 400))
    if found.problems:
        raise typer.Exit(EXIT_ERROR)


@app.command()
def report(
    run: RunFolder,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page. Default: report.html in RUN.")
    ] = None,
    shown: Annotated[int, typer.Option("--cases", help="So many best, median and worst cases with images.", min=1)] = 6,
    empty: EmptyOption = "one",
) -> None:
    """Write one HTML page about RUN that needs nothing else: tables, plots, the best, median and worst cases."""
    from ibisagent.evaluation.metrics import check_empty_rule
    from ibisagent.evaluation.report import write_report

    page = output or run / "report.html"
    missing = write_report(run, page, cases=shown, empty=check_empty_rule(empty))
    for name in missing:
        stderr.print(f"without its image, as the file is not there any more or has changed: {one_line(name)}")
    stdout.print(str(page))


@app.command()
def ceiling(
    data: Annotated[Path, typer.Argument(help="Data set folder, or a manifest (.csv, .jsonl).")],
    split: JudgedSplitOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for ceiling.json, with every case, and ceiling.png.")
    ] = None,
    segmenter: SegmenterOption = "ibis-click",
    clicks: Annotated[int, typer.Option(help="Most clicks per object; NoC counts a failure as so many.", min=1)] = 20,
    limit: LimitOption = None,
    agent: Annotated[
        Path | None,
        typer.Option(help="Folder that 'eval run -o' wrote: tells whether policy or segmenter limits that agent."),
    ] = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Measure what SEGMENTER can reach on the masks of DATA when an expert who sees them clicks.

    Run it before any training: no policy that only prompts this segmenter can be expected to do better. Cases that fail
    are listed and left out.
    """
    with status("reading the data and loading the segmenter", quiet=as_json):
        from ibisagent.datasets import cases_to_judge
        from ibisagent.evaluation import ceiling as measuring
        from ibisagent.segmenters import load_segmenter

        if output is not None:
            try_folder(output)
            if not measuring.CAN_DRAW:
                stderr.print("matplotlib is not installed, so no ceiling.png: pip install 'ibisagent[plot]'")
        _, cases = cases_to_judge(data, split, limit)
        engine = load_segmenter(segmenter, device=device)
        compared = None if agent is None else measuring.read_agent(agent, engine, cases)
    with progress(len(cases), "cases", quiet=as_json) as advance:
        result = measuring.measure_ceiling(
            cases,
            engine,
            max_clicks=clicks,
            seed=seed,
            provenance={"data": str(data), "split": split or "", **engine.describe()},
            on_case=advance,
        )
    if output is not None:
        result.write(output, compared)
    if as_json:
        print_json(result.to_json(compared))
    else:
        _print_ceiling(result, compared)
    if result.failures:
        raise typer.Exit(EXIT_ERROR)


_TABLES = {
    "{policy} with {segmenter}": ("iou", "dice", "turns", "seconds", "first_hit", "answer_correct"),
    "the same: by pixels, over positives (pos.: cases that show their object), by cases": (
        *("ciou", "positive_iou", "positive_dice", "precision_50", "presence_f1", "match_f1"),
    ),
    "the same: borders and noise": ("hd95_mm", "nsd_2mm", "hd95_px", "nsd_2px", "extra_components", "speck_share"),
    "the same: how it works": ("clicks", "redundant_clicks", "stop_gap", "parse_failures", "tokens"),
    "blind clicks with {segmenter}": ("prior_iou", "prior_hit", "centre_iou", "centre_hit"),
    "seeing the ground truth: its box's ellipse, an expert's clicks with {segmenter} (IoU)": (
        "ellipse_iou",
        *(f"oracle_iou_{count}" for count in (1, 2, 3, 5, 10)),
    ),
}


def _print_evaluation(result: Evaluation, by: GroupBy, empty: EmptyRule) -> None:
    from ibisagent.evaluation.tables import HEADINGS

    summaries: dict[str, Summary] = result.summaries(by, empty)
    overall = summaries["all"]
    for title, names in _TABLES.items():
        shown = {HEADINGS[name]: name for name in names if name in overall.means}
        if not shown:
            continue
        table = new_table(title.format(**result.provenance), "", "cases", *shown)
        for group, summary in summaries.items():
            cells = [f"{summary.means[name]:.3f}" if name in summary.means else "" for name in shown.values()]
            table.add_row(one_line(group, 20), str(summary.cases), *cells)
        stdout.print(table)
    for name, words in (("iou", f"mean IoU, two empty masks count as {empty}"), ("positive_iou", "positives only")):
        if (interval := overall.intervals.get(name)) is not None:
            low, high = interval
            value = f"{overall.means[name]:.3f}, 95% interval {low:.3f} to {high:.3f}"
            stdout.print(f"{words}: {value} ({overall.patients} patients resampled)")
    if overall.stops:
        stdout.print("episodes ended: " + ", ".join(f"{name} {count}" for name, count in overall.stops.items()))
    print_failures(result.failures)


def _print_ceiling(result: Ceiling, agent: Agent | None) -> None:
    if groups := result.groups():
        _print_groups(result.provenance["segmenter"], result.max_clicks, groups)
    for kind, times in result.milliseconds().items():
        stdout.print(f"{kind}: {times.median:.1f} ms median, {times.p95:.1f} ms p95 ({times.count})")
    if result.peak_memory_bytes is not None:
        stdout.print(f"peak memory of this process: {result.peak_memory_bytes / 1e6:.0f} MB")
    if result.absent:
        stdout.print(f"left out, as they have no mask: {result.absent}")
    print_failures(result.failures)
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
        shown = new_table(title, "", "cases", *columns, *more)
        for name, group in groups.items():
            cells = [f"{group.means[measure]:.{digits}f}" for measure in columns.values()]
            cells += [cell(group) for cell in more.values()]
            shown.add_row(one_line(name, 20).removeprefix("area "), str(group.cases), *cells)
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


@app.command()
def calibrate(
    data: Annotated[Path, typer.Argument(help="20, better 40 labelled cases like those to be scored, in any layout.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    split: SplitOption = None,
    limit: LimitOption = None,
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    mask_selection: SelectionOption = None,
    samples: Annotated[int, typer.Option(help="Further episodes a case, for their agreement; slower.", min=0)] = 0,
    max_turns: TurnsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Learn on labelled DATA how good a mask is, for 'segment --review-queue --calibration OUTPUT'.

    Use the policy, segmenter, --mask-selection and --samples that will make the masks. Cases that fail are left out
    and told.
    """
    selection = None if mask_selection is None else check_mask_selection(mask_selection)
    try_file(output)
    with status("reading the data and loading the models", quiet=as_json):
        from ibisagent.datasets import read_cases
        from ibisagent.evaluation import reliability
        from ibisagent.inference.cases import judge_cases
        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter

        cases = read_cases(data, split=split).filter(lambda row: row.mask is not None).spread(limit)
        writer = load_policy(policy, device=device, seed=seed, cases=cases.by_id)
        engine = load_segmenter(segmenter, device=device)
        reviewer = reliability.Reviewer(writer, engine, selection, samples, max_turns, seed)

    with progress(len(cases), "cases", quiet=as_json) as advance:
        results, failures = judge_cases(
            cases, lambda batch: [*map(reviewer.measured, batch)], on_case=lambda _: advance()
        )
    found = reliability.fit([one for one, _ in results], [reached for _, reached in results], reviewer.identity)
    found.write(output)
    if as_json:
        print_json({**asdict(found), "failures": [asdict(failure) for failure in failures]})
    else:
        stdout.print(f"{output}: fitted on {found.cases} cases, mean IoU {mean(reached for _, reached in results):.3f}")
        stdout.print(
            f"each case scored by the others: expected calibration error {found.error:.3f},"
            f" dropping the worst 20% changes the mean IoU by {found.kept_gain:+.3f}"
        )
        print_failures(failures)
    if failures:
        raise typer.Exit(EXIT_ERROR)
