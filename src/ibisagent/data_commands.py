"""Commands about labelled data: which benchmarks there are, what is wrong with a copy, with masks, with scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ibisagent.errors import ConfigError
from ibisagent.terminal import EXIT_ERROR, one_line, print_json, progress, status, stderr, stdout

app = typer.Typer()

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of text.")]


@app.command()
def datasets(
    data: Annotated[Path | None, typer.Argument(help="A local copy to check. Default: list the benchmarks.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Look for pictures and patients that DATA shares with this.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Decode this many cases of DATA, spread over it; 0: all.", min=0)] = 50,
    bits: Annotated[int, typer.Option(help="Pictures whose 256-bit fingerprints differ so little are the same.")] = 6,
    as_json: JsonOption = False,
) -> None:
    """List the public benchmarks that can be read, or check a local copy of one, or of any DATA.

    With --against: also pictures that look alike and patients in both; give it the data that a model was trained on.
    Exit code 2 if cases cannot be read, or something is shared.
    """
    if data is None:
        if against is not None:
            raise ConfigError("--against compares with DATA: name that too")
        _list_benchmarks(as_json)
        return
    from ibisagent.datasets import read_cases
    from ibisagent.datasets.catalogue import BENCHMARKS, check_copy
    from ibisagent.datasets.leaks import find_leaks

    with status("reading the data", quiet=as_json):
        copy = check_copy(data, limit=limit or None)
    leaks = None
    if against is not None:
        mine, theirs = read_cases(data), read_cases(against)
        total = len({row.image for row in mine.rows}) + len({row.image for row in theirs.rows})
        with progress(total, "pictures", quiet=as_json) as advance:
            leaks = find_leaks(mine, theirs, bits=bits, on_picture=advance)
    if as_json:
        print_json({"copy": asdict(copy), "leaks": None if leaks is None else asdict(leaks)})
    else:
        known = BENCHMARKS.get(copy.layout)
        stdout.print(f"{data}: {known.title if known else 'a manifest'}")
        stdout.print(
            f"  {copy.pairs} pairs, {copy.pictures} pictures, {copy.objects} objects, {copy.patients} patients named"
        )
        for title, counts in (("splits", copy.splits), ("modalities", copy.modalities)):
            stdout.print(f"  {title}: {', '.join(f'{one_line(name, 40)} {count}' for name, count in counts.items())}")
        if known:
            stdout.print(f"  rules: {known.rules}")
        stdout.print(f"  decoded {copy.checked} cases, {len(copy.problems)} could not be read")
        for problem in copy.problems:
            stderr.print(f"  {one_line(problem, 300)}")
        if leaks is not None:
            stdout.print(f"  compared {leaks.compared[0]} pictures with {leaks.compared[1]} of {against}")
            stdout.print(f"  pictures that look alike: {len(leaks.pictures)}, patients in both: {len(leaks.patients)}")
            if not all(leaks.patients_known):
                stdout.print("  patients cannot be compared: not both name them")
            for name, other, distance in leaks.pictures:
                stdout.print(f"  {one_line(name, 200)} = {one_line(other, 200)} ({distance} of 256 bits differ)")
            for patient in leaks.patients:
                stdout.print(f"  patient {one_line(patient)}")
            for problem in leaks.unread:
                stderr.print(f"  {one_line(problem, 300)}")
    shared = leaks is not None and (leaks.pictures or leaks.patients or leaks.unread)
    if copy.problems or shared:
        raise typer.Exit(EXIT_ERROR)


def _list_benchmarks(as_json: bool) -> None:
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
