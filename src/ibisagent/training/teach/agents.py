"""The folder of an agent, see `policies.agents`: written whole, `agent.json` last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ibisagent.errors import DataError
from ibisagent.evaluation.reliability import MIN_CASES
from ibisagent.files import markdown_cell, one_line, weights_sha256, write_json, write_whole
from ibisagent.policies import NANO_FOLDER, source_of
from ibisagent.policies.agents import ADAPTER, AGENT_FILE, BASE, EXPERTS, SCHEMA, Agent
from ibisagent.training.teach.reading import Found
from ibisagent.training.teach.self_check import TaughtObject

CARD = "README.md"


def write_agent(
    out: Path,
    old: Agent,
    run: Path,
    objects: Sequence[TaughtObject],
    record: Mapping[str, Any],
) -> None:
    """Write the agent that what was taught and `old` make together into `out`.

    run: folder of the run on everything, with the weights that were taught; they answer for the objects that are kept.
    record: what taught it.
    """
    names = tuple(one.name for one in objects if one.kept)
    sources = [(one.folder, tuple(name for name in one.names if name not in names)) for one in old.experts]
    sources.append((run / "expert", names if (run / "expert").is_dir() else ()))
    sources = [(folder, kept) for folder, kept in sources if kept]
    experts = []
    for number, (folder, kept) in enumerate(sources, start=1):
        place = f"{EXPERTS}/{number}"
        _copy(folder, out / place)
        experts.append({"folder": place, "names": kept, "weights_sha256": weights_sha256(out / place)})
    base, adapter = old.base, None
    if (run / "sft" / ADAPTER).is_dir() and names:
        _copy(run / "sft" / ADAPTER, out / ADAPTER)
        adapter = ADAPTER
    if Path(source_of(base)).is_dir():
        base = str(Path(source_of(base)).resolve()) if Path(source_of(base)) != NANO_FOLDER else "ibis-nano"
    if (run / "expert").is_dir() and base != "ibis-nano":
        _copy(Path(base), out / BASE)
        base = BASE
    records = [*old.records, record]
    said = {"schema": SCHEMA, "base": base, "experts": experts, "adapter": adapter, "records": records}
    write_whole(_card(out.resolve().name, names, objects, records).encode(), out / CARD)
    write_json(said, out / AGENT_FILE)


def _copy(source: Path, target: Path) -> None:
    """A copy of a folder of weights, which appears whole."""
    part = target.with_name(f"{target.name}.part")
    try:
        for left in (part, target):
            shutil.rmtree(left, ignore_errors=True)
        shutil.copytree(source, part)
        part.rename(target)
    except OSError as error:  # that of shutil names every file
        cause = error.args[0][0][-1] if isinstance(error, shutil.Error) else error.strerror
        raise DataError(f"{target}: cannot be written ({one_line(cause)}); free space, then start it again") from error


def record_of(
    found: Found, objects: Sequence[TaughtObject], calibrated_on: int, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What one teaching leaves in `agent.json`. calibrated_on: see `Taught`. facts: what made it."""
    said = {"found": asdict(found), "objects": [asdict(one) for one in objects], "calibrated_on": calibrated_on}
    return {**facts, **said}


def objects_of(record: Mapping[str, Any]) -> tuple[TaughtObject, ...]:
    """The objects of a record."""
    return tuple(
        TaughtObject(
            **{
                **one,
                "interval": tuple(one["interval"]) if one["interval"] else None,
                "doubtful": tuple(one["doubtful"]),
            }
        )
        for one in record["objects"]
    )


def found_of(record: Mapping[str, Any]) -> Found:
    """What the data of a teaching held."""
    said = record["found"]
    sizes = tuple((int(height), int(width)) for height, width in said["sizes"])
    return Found(**{**said, "sizes": sizes, "left_out": tuple(said["left_out"])})


def _card(
    name: str, names: Sequence[str], objects: Sequence[TaughtObject], records: Sequence[Mapping[str, Any]]
) -> str:
    """The agent's card."""
    last = records[-1]
    found = found_of(last)
    rows = [
        f"| {markdown_cell(one.name)} | {one.images} | {_number(one.before)} | {_number(one.after)} |"
        f" {_span(one.interval)} | {'taught' if one.kept else 'old'} | {one.reason} |"
        for one in objects
    ]
    told = f" It was taught {len(records)} times; this is the last." if len(records) > 1 else ""
    taught = ", ".join(map(markdown_cell, names)) or "nothing that is better than what was there"
    made = f"policy {markdown_cell(last['policy'])}, seed {last['seed']}, {last['recipe']['examples']} turns"
    return "\n".join(
        [
            f"# {markdown_cell(name)}: an agent that was taught objects",
            "",
            f"Give this folder to `--policy`, wherever ibisagent takes one.{told}",
            "",
            f"- **Taught**: {taught}. For every other name it answers as the policy that was taught.",
            f"- **From**: {found.images} images of {found.patients} patients,",
            f"  {markdown_cell(', '.join(last['data']))}; content {last['content_sha256'][:16]}.",
            f"- **By**: ibisagent {last['ibisagent']}, {made} at {last['recipe']['learning_rate']:g}.",
            f"- **How sure it is**: {how_sure(last['calibrated_on'])}.",
            "- **Limits**: it knows images like those that taught it. Judged on few images, its results are rough: see",
            "  the intervals. Not for clinical use.",
            "",
            "Mean IoU on the user's own images, each judged by weights that had not seen its patient:",
            "",
            "| object | images | before | after | 95% of the gain | who answers | why |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def how_sure(calibrated_on: int) -> str:
    """What the scores of its masks of taught objects are."""
    if calibrated_on:
        return f"scores of its masks are expected IoUs, calibrated on {calibrated_on} masks of the self-check"
    return (
        f"scores of its masks only sort them: it takes {MIN_CASES} masks that the self-check judged to calibrate them"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _span(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"
