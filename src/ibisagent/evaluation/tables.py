"""Metrics of an evaluation as CSV, Markdown and LaTeX. Metrics have three decimals; "" where there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from ibisagent.evaluation.metrics import EMPTY_RULE, EmptyRule
from ibisagent.evaluation.results import CaseResult, Comparison, Evaluation, GroupBy, Summary, summarise
from ibisagent.files import csv_text, markdown_cell, write_whole

HEADINGS: Mapping[str, str] = {
    "iou": "IoU",
    "positive_iou": "IoU pos.",
    "ciou": "cIoU",
    "dice": "Dice",
    "dice_median": "Dice median",
    "positive_dice": "Dice pos.",
    "precision_50": "P@0.5",
    "precision_60": "P@0.6",
    "precision_70": "P@0.7",
    "precision_80": "P@0.8",
    "precision_90": "P@0.9",
    "presence_f1": "presence F1",
    "match_f1": "match F1",
    "hd95_mm": "HD95 mm",
    "hd95_px": "HD95 px",
    "nsd_2mm": "NSD 2 mm",
    "nsd_2px": "NSD 2 px",
    "extra_components": "extra parts",
    "speck_share": "specks",
    "first_hit": "first hit",
    "answer_correct": "answer",
    "turns": "turns",
    "clicks": "clicks",
    "redundant_clicks": "redundant",
    "raising_corrections": "corrections that raise",
    "stop_gap": "stop gap",
    "parse_failures": "unreadable",
    "seconds": "seconds",
    "tokens": "tokens",
    "prior_iou": "prior IoU",
    "prior_hit": "prior hit",
    "centre_iou": "centre IoU",
    "centre_hit": "centre hit",
    "ellipse_iou": "ellipse",
    **{f"oracle_iou_{count}": f"oracle {count}" for count in (1, 2, 3, 5, 10)},
}
"""Metric -> heading, in the order of all tables; metrics that are not here come last, by their own names."""
MAIN = ("iou", "positive_iou", "ciou", "dice", "precision_50", "match_f1", "turns")
"""The columns of the Markdown and LaTeX tables."""


def files(evaluation: Evaluation, empty: EmptyRule = EMPTY_RULE) -> dict[str, str]:
    """{file name: content}: cases.csv, summary.csv, summary.md, summary.tex."""
    groups = {("all", "all"): summarise(evaluation.results, empty=empty)}
    for by in get_args(GroupBy):
        found = evaluation.groups(by)
        groups |= {(by, name): summarise(cases, empty=empty) for name, cases in found.items()}
    return {
        "cases.csv": _cases_csv(evaluation.results),
        "summary.csv": _summary_csv(groups),
        "summary.md": _markdown(evaluation, groups, empty),
        "summary.tex": _latex(groups, empty),
    }


def ordered(names: Sequence[str]) -> list[str]:
    """Metrics in the order of HEADINGS."""
    order = list(HEADINGS)
    return sorted(dict.fromkeys(names), key=lambda name: order.index(name) if name in HEADINGS else len(order))


def _cases_csv(results: Sequence[CaseResult]) -> str:
    columns = ordered([name for one in results for name in one.measures])
    facts = ("case_id", "object", "modality", "dataset", "patient", "size", "stop", "quality")
    rows = [
        [*(_plain(getattr(one, fact)) for fact in facts), *(_plain(one.measures.get(name)) for name in columns)]
        for one in results
    ]
    return csv_text([[*facts, *columns], *rows])


def _summary_csv(groups: Mapping[tuple[str, str], Summary]) -> str:
    rows: list[list[str]] = [["by", "group", "metric", "value", "low_95", "high_95", "cases", "positives", "patients"]]
    for (by, group), summary in groups.items():
        counts = [str(summary.cases), str(summary.positives), str(summary.patients)]
        for name in ordered(list(summary.means)):
            low, high = summary.intervals.get(name) or (None, None)
            rows.append([by, group, name, _plain(summary.means[name]), _plain(low), _plain(high), *counts])
    return csv_text(rows)


def _markdown(evaluation: Evaluation, groups: Mapping[tuple[str, str], Summary], empty: EmptyRule) -> str:
    overall = groups["all", "all"]
    facts = evaluation.provenance
    lines = [
        f"# {facts.get('policy', '')} with {facts.get('segmenter', '')}",
        "",
        f"{overall.cases} cases ({overall.positives} show their object) of {overall.patients} patients,"
        f" {len(evaluation.failures)} failed and left out. Two empty masks count as: {empty}."
        " pos.: over the cases that show their object. Intervals: 95%, patients resampled.",
        "",
        "| metric | value | 95% |",
        "|---|---|---|",
    ]
    for name in ordered(list(overall.means)):
        interval = interval_text(overall, name)
        lines.append(f"| {HEADINGS.get(name, name)} | {overall.means[name]:.3f} | {interval} |")
    shown = [name for name in MAIN if name in overall.means]
    for by in get_args(GroupBy):
        lines += ["", f"| {by} | cases | {' | '.join(HEADINGS[name] for name in shown)} |"]
        lines += ["|---" * (len(shown) + 2) + "|"]
        for (kind, group), summary in groups.items():
            if kind == by:
                cells = [_cell(summary, name) for name in shown]
                lines.append(f"| {markdown_cell(group)} | {summary.cases} | {' | '.join(cells)} |")
    if evaluation.failures:
        lines += ["", "Failed, left out:", ""]
        lines += [f"- {markdown_cell(one.case_id)}: {markdown_cell(one.error)}" for one in evaluation.failures]
    return "\n".join(lines) + "\n"


def _latex(groups: Mapping[tuple[str, str], Summary], empty: EmptyRule) -> str:
    shown = [name for name in MAIN if name in groups["all", "all"].means]
    lines = [
        f"% two empty masks count as: {empty}; needs the package booktabs",
        rf"\begin{{tabular}}{{l{'r' * (len(shown) + 1)}}}",
        r"\toprule",
        f" & cases & {' & '.join(_escape(HEADINGS[name]) for name in shown)} \\\\",
    ]
    last = None
    for (by, group), summary in groups.items():
        if by != last:
            lines.append(r"\midrule")
        last = by
        cells = [_escape(group), str(summary.cases), *(_cell(summary, name) for name in shown)]
        lines.append(f"{' & '.join(cells)} \\\\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def interval_text(summary: Summary, name: str) -> str:
    """The interval of a metric as text, "" if there is none."""
    interval = summary.intervals.get(name)
    return "" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"


def write_comparison(found: Comparison, path: Path) -> None:
    """Write `comparison_markdown` to a file."""
    write_whole(comparison_markdown(found).encode(), path)


def comparison_markdown(found: Comparison) -> str:
    """A comparison as Markdown: every metric, then the IoU by group."""
    names = [f"{run.get('policy', '')} with {run.get('segmenter', '')}" for run in (found.a, found.b)]
    lines = [
        f"A: {names[0]}; B: {names[1]}. {found.cases} cases in both;"
        f" left out: {len(found.only_a)} only in A, {len(found.only_b)} only in B.",
        "Difference: B less A; 95%, patients resampled; p: paired permutation of patients, each metric by itself.",
        "",
        "| metric | cases | A | B | B - A | 95% | p |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = {HEADINGS.get(name, name): found.metrics[name] for name in ordered(list(found.metrics))}
    rows |= {f"IoU, {group}": one for groups in found.groups.values() for group, one in groups.items()}
    for label, one in rows.items():
        spread = "" if one.interval is None else f"{one.interval[0]:+.3f} to {one.interval[1]:+.3f}"
        cells = [markdown_cell(label), str(one.cases), f"{one.a:.3f}", f"{one.b:.3f}", f"{one.difference:+.3f}"]
        lines.append(f"| {' | '.join([*cells, spread, f'{one.p:.4f}'])} |")
    return "\n".join(lines) + "\n"


def _cell(summary: Summary, name: str) -> str:
    return f"{summary.means[name]:.3f}" if name in summary.means else ""


def _plain(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    """Text of data as LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    special |= {letter: f"\\{letter}" for letter in "&%$#_{}"}
    return "".join(special.get(letter, letter) for letter in text)
