"""`ibisagent teach`: an agent of the user's own from a few labelled images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibisagent.cli.options import JsonOption, PolicyOption, SeedOption, SegmenterOption
from ibisagent.cli.output import new_table, print_json, progress, stderr, stdout

if TYPE_CHECKING:
    from ibisagent.training.teach import Found, Taught, TeachProgress


def teach(
    data: Annotated[
        list[Path], typer.Argument(metavar="DATA...", help="Labelled images: data set folders or manifests.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="AGENT", help="Folder of the agent; new, or to resume.")],
    policy: PolicyOption = "ibis-nano",
    segmenter: SegmenterOption = "ibis-click",
    check: Annotated[
        bool,
        typer.Option(help="Compare with the old agent by cross-validation, and keep it where teaching does not help."),
    ] = True,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Teach the agent objects of your own from a few labelled images; use it as --policy AGENT.

    Three images are enough to begin, ten are better; any names, one object or several. An empty mask says that the
    object is not there. It takes minutes on two cores. Every other object is answered as before. The check says for
    each object, on images that were kept from it, what teaching gained; where it gained nothing the old agent goes on
    answering. A stopped run resumes.
    """
    from ibisagent.training.teach import teach as run

    with progress(None, "teaching", quiet=as_json) as advance:
        before = 0

        def report(now: TeachProgress) -> None:
            nonlocal before
            if now.stage in ("learning", "checking"):
                advance(now.done - before, total=now.total)
                before = now.done

        def tell(found: Found) -> None:
            if not as_json:
                _print_found(found)

        taught = run(
            data, out, policy=policy, segmenter=segmenter, check=check, seed=seed, report=report, on_found=tell
        )
    if as_json:
        print_json({"agent": str(taught.folder), "objects": [asdict(one) for one in taught.objects]})
    else:
        _print_taught(taught)


def _print_found(found: Found) -> None:
    """What there is to learn from, in two or three lines."""
    sizes = ", ".join(f"{width} x {height}" for height, width in found.sizes[:3]) + (" ..." if found.sizes[3:] else "")
    stderr.print(f"{found.images} images of {found.patients} patients, {sizes} pixels")
    absent = {name: f", absent from {count}" for name, count in found.absent.items()}
    objects = [f"{name} ({count}{absent.get(name, '')})" for name, count in found.objects.items()]
    stderr.print(f"objects, with the images that show them: {'; '.join(objects)}")
    for own, name in found.renamed.items():
        stderr.print(f"'{own}' is taught as '{name}', the name that the agent knows for it")
    if found.duplicates:
        stderr.print(f"{found.duplicates} pairs are there twice: counted once")
    if found.left_aside:
        stderr.print(f"{found.left_aside} pairs for validation or testing are left aside: judge the agent on them")
    if found.images < 3:
        stderr.print("fewer than three images teach little, and hardly show whether it helped: label more if you can")


def _print_taught(taught: Taught) -> None:
    table = new_table("mean IoU on images kept from it", "object", "images", "before", "after", "gain, 95%", "answers")
    for one in taught.objects:
        span = "" if one.interval is None else f"{one.interval[0]:+.2f} to {one.interval[1]:+.2f}"
        figures = ["" if value is None else f"{value:.3f}" for value in (one.before, one.after)]
        table.add_row(one.name, str(one.images), *figures, span, "taught" if one.kept else "as before")
    stdout.print(table)
    for one in taught.objects:
        if not one.kept or one.before is None:
            stdout.print(f"{one.name}: {one.reason}")
        for image in one.doubtful:
            stdout.print(f"{one.name}: the mask of {image} is unlike the others: look whether it is right")
    stdout.print(f"agent: {taught.folder}\nuse it with --policy {taught.folder}")
