"""`ibisagent teach`: an agent of the user's own from a few labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibisagent.cli.options import JsonOption, PolicyOption, SeedOption, SegmenterOption
from ibisagent.cli.output import new_table, print_json, progress, status, stderr, stdout
from ibisagent.errors import ConfigError, IbisError
from ibisagent.files import one_line

if TYPE_CHECKING:
    from ibisagent.training.teach import Found, Taught, TeachProgress


def teach(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Labelled images: data set folders or manifests.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="AGENT", help="Folder of the agent; new, or to resume.")
    ] = None,
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    check: Annotated[
        bool,
        typer.Option(help="Compare with the old agent by cross-validation, and keep it where teaching does not help."),
    ] = True,
    suggest: Annotated[
        int | None,
        typer.Option(metavar="N", help="Teach nothing: say which N images of the folder DATA to label next.", min=1),
    ] = None,
    query: Annotated[
        str | None, typer.Option(help="With --suggest: what is to be labelled. Default: what the agent was taught.")
    ] = None,
    labelled: Annotated[
        list[Path] | None, typer.Option(metavar="DATA", help="With --suggest: images that have labels; repeat it.")
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Teach the agent objects of your own from a few labelled images; use it as --policy AGENT.

    Three images are enough to begin, ten are better; any names, one object or more. An empty mask says that the
    object is not there. It takes minutes on two cores. Every other object is answered as before. The check says for
    each object, on images that were kept from it, what teaching gained; where it gained nothing the old agent goes on
    answering. A stopped run resumes.
    """
    if suggest is None and (query is not None or labelled):
        raise ConfigError("--query and --labelled say what to label next: give them with --suggest N")
    if suggest is not None:
        if out is not None:
            raise ConfigError("--suggest teaches nothing, so there is no agent for --out: leave one of the two out")
        _suggest(data, suggest, query, labelled or [], policy, segmenter, as_json=as_json)
        return
    if out is None:
        raise ConfigError("say where the agent is to be: --out AGENT; or ask what to label next: --suggest N")
    from ibisagent.training.teach import teach as run

    with progress(None, "teaching", quiet=as_json) as advance:

        def report(now: TeachProgress) -> None:
            if now.stage in ("learning", "checking"):
                advance(done=now.done, total=now.total)

        def tell(found: Found) -> None:
            if not as_json:
                _print_found(found)

        taught = run(
            data, out, policy=policy, segmenter=segmenter, check=check, seed=seed, report=report, on_found=tell
        )
    if as_json:
        said = {"agent": str(taught.folder), "found": asdict(taught.found)}
        objects = [asdict(one) for one in taught.objects]
        print_json({**said, "objects": objects, "calibrated_on": taught.calibrated_on})
    else:
        _print_taught(taught)


def _print_found(found: Found) -> None:
    """What there is to learn from, in two or three lines."""
    sizes = ", ".join(f"{width} x {height}" for height, width in found.sizes[:3]) + (" ..." if found.sizes[3:] else "")
    stderr.print(f"{found.images} images of {found.patients} patients, {sizes} pixels")
    absent = {name: f", absent from {count}" for name, count in found.absent.items()}
    objects = [f"{one_line(name)} ({count}{absent.get(name, '')})" for name, count in found.objects.items()]
    stderr.print(f"objects, with the images that show them: {'; '.join(objects)}")
    for own, name in found.renamed.items():
        stderr.print(f"'{one_line(own)}' is taught as '{one_line(name)}', which means the same")
    if found.duplicates:
        stderr.print(f"{found.duplicates} pairs are there twice: counted once")
    if found.left_out:
        stderr.print(f"{len(found.left_out)} pairs are left out, for the reasons above")
    if found.left_aside:
        stderr.print(f"{found.left_aside} pairs for validation or testing are left aside: judge the agent on them")
    if found.images < 3:
        stderr.print("fewer than three images teach little, and hardly show whether it helped: label more if you can")


def _print_taught(taught: Taught) -> None:
    from ibisagent.training.teach.agents import how_sure

    table = new_table("mean IoU on images kept from it", "object", "images", "before", "after", "gain, 95%", "answers")
    for one in taught.objects:
        span = "" if one.interval is None else f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}"
        means = ["" if value is None else f"{value:.3f}" for value in (one.before, one.after)]
        table.add_row(one_line(one.name), str(one.images), *means, span, "taught" if one.kept else "as before")
    stdout.print(table)
    for one in taught.objects:
        if not one.kept or one.before is None:
            stdout.print(f"{one_line(one.name)}: {one.reason}")
        for image in one.doubtful:
            stdout.print(f"{one_line(one.name)}: the mask of {image} is unlike the others: look whether it is right")
    stdout.print(how_sure(taught.calibrated_on))
    stdout.print(f"agent: {taught.folder}\nuse it with --policy {taught.folder}")


def _suggest(
    folders: Sequence[Path],
    count: int,
    query: str | None,
    labelled: Sequence[Path],
    policy: str,
    segmenter: str,
    *,
    as_json: bool,
) -> None:
    """Print which images of a folder to label next, and why."""
    if len(folders) != 1:
        raise ConfigError(f"--suggest looks through one folder, not {len(folders)}: give one that holds all")
    with status("loading", quiet=as_json):
        from ibisagent.datasets import CaseSource, read_cases
        from ibisagent.evaluation.selection import images_in, suggest
        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter

        known = CaseSource([row for path in labelled for row in read_cases(path).rows], "") if labelled else None
        agent, engine = load_policy(policy), load_segmenter(segmenter)
        asked = query or _taught_names(policy)
    failed: list[str] = []
    with progress(len(images_in(folders[0])), "images", quiet=as_json) as advance:

        def done(_path: Path, error: IbisError | None) -> None:
            advance()
            if error is not None:
                failed.append(one_line(error, 300))

        chosen = suggest(folders[0], asked, count, policy=agent, segmenter=engine, labelled=known, on_image=done)
    if as_json:
        print_json({"query": asked, "images": [asdict(one) for one in chosen], "failed": failed})
        return
    for number, one in enumerate(chosen, 1):
        stdout.print(f"{number:3}  {one.name}\n     {one.reason}")
    for reason in failed:
        stderr.print(f"left out: {reason}")


def _taught_names(policy: str) -> str:
    """A request for all that an agent was taught. ConfigError where it is no taught agent, or one sentence is not
    enough."""
    from ibisagent.policies import source_of
    from ibisagent.policies.agents import AGENT_FILE, Agent
    from ibisagent.query import requests

    folder = Path(source_of(policy))
    names = Agent.read(folder).names if (folder / AGENT_FILE).is_file() else ()
    if not names:
        raise ConfigError(f"say what is to be labelled, as {policy} was taught nothing: --query 'optic disc'")
    asked = ", ".join(f"the {name}" for name in names)
    if [one.asked for one in requests(asked, set(names))] != list(names):
        raise ConfigError(f"no sentence asks for all that {policy} was taught ({asked}): choose with --query")
    return asked
