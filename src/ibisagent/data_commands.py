"""Commands about labelled data: which benchmarks there are, what is wrong with a copy, with masks, with scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer

from ibisagent.domain import MASK_SELECTION, Case, check_mask_selection
from ibisagent.errors import ConfigError
from ibisagent.files import one_line
from ibisagent.terminal import EXIT_ERROR, print_json, progress, status, stderr, stdout

app = typer.Typer()

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of text.")]


@app.command()
def datasets(
    data: Annotated[Path | None, typer.Argument(help="A local copy to check. Default: list the benchmarks.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="Look for pictures and patients that DATA shares with this.")
    ] = None,
    limit: Annotated[int, typer.Option(help="Decode this many cases of DATA, spread over it; 0: all.", min=0)] = 50,
    bits: Annotated[
        int | None, typer.Option(help="Pictures whose 256-bit fingerprints differ so little are the same (default 6).")
    ] = None,
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
    from ibisagent.datasets.leaks import NEAR_BITS, find_leaks

    with status("reading the data", quiet=as_json):
        copy = check_copy(data, limit=limit or None)
    leaks = None
    if against is not None:
        mine, theirs = read_cases(data), read_cases(against)
        total = len({row.image for row in mine.rows}) + len({row.image for row in theirs.rows})
        with progress(total, "pictures", quiet=as_json) as advance:
            leaks = find_leaks(mine, theirs, bits=NEAR_BITS if bits is None else bits, on_picture=advance)
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


@app.command()
def audit(
    data: Annotated[Path, typer.Argument(help="Data set folder, a manifest, or a public benchmark's files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page, the table and the pictures.")],
    split: Annotated[str | None, typer.Option(help="Only these masks; they are held against all of DATA.")] = None,
    segmenter: Annotated[str, typer.Option("--segmenter", "-s", help="Draws what leaks and is missed.")] = "ibis-click",
    policy: Annotated[
        str, typer.Option("--policy", "-p", help="Ask this agent, too: a signal beside the others, without weight yet.")
    ] = "none",
    limit: Annotated[int | None, typer.Option(help="Only this many masks, spread over the data.", min=1)] = None,
    pictures: Annotated[int, typer.Option(help="Pictures of so many of the worst.", min=0)] = 50,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """List the masks of DATA that disagree with their name or their picture, worst first.

    Writes index.html with pictures of the worst, findings.csv and findings.json with all. Masks that cannot be read are
    listed and make the exit code 2.
    """
    with status("reading the data and loading the segmenter", quiet=as_json):
        from ibisagent import audit as auditing
        from ibisagent.datasets import read_cases
        from ibisagent.files import make_folder
        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter

        everything = read_cases(data)
        cases = everything if split is None else read_cases(data, split=split)
        cases = cases.filter(lambda row: row.mask is not None).spread(limit)
        make_folder(output)
        engine = load_segmenter(segmenter, device=device)
        agent = None if policy == "none" else load_policy(policy, device=device)
    with progress(len(cases), "masks", quiet=as_json) as advance:
        found = auditing.audit(cases, engine, agent, among=everything, on_mask=advance)
    page = auditing.write_report(found, cases, output, pictures=pictures)
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
def calibrate(
    data: Annotated[Path, typer.Argument(help="20, better 40 labelled cases like those to be scored, in any layout.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
    split: Annotated[str | None, typer.Option(help="Only the rows of this split.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)] = None,
    policy: Annotated[str, typer.Option("--policy", "-p", help="Who clicks.")] = "ibis-nano",
    segmenter: Annotated[str, typer.Option("--segmenter", "-s", help="What turns clicks into masks.")] = "ibis-click",
    mask_selection: Annotated[
        str, typer.Option(help="Which mask of an episode counts: best, or last.")
    ] = MASK_SELECTION,
    samples: Annotated[int, typer.Option(help="Further episodes a case, for their agreement; slower.", min=0)] = 0,
    max_turns: Annotated[
        int | None, typer.Option(help="Most turns of one episode (default: the policy's own limit).", min=1)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of whatever is drawn.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Learn on labelled DATA how good a mask is, for 'segment --review-queue --calibration OUTPUT'.

    Use the policy, segmenter, --mask-selection and --samples that will make the masks. Cases that fail are left out
    and told.
    """
    selection = check_mask_selection(mask_selection)
    with status("reading the data and loading the models", quiet=as_json):
        from ibisagent import evaluation, reliability, session
        from ibisagent.datasets import read_cases
        from ibisagent.policies import load_policy
        from ibisagent.segmenters import load_segmenter

        cases = read_cases(data, split=split).filter(lambda row: row.mask is not None).spread(limit)
        writer = load_policy(policy, device=device, seed=seed, cases=cases.by_id)
        engine = load_segmenter(segmenter, device=device)
        reviewer = reliability.Reviewer(writer, engine, selection, samples, max_turns, seed)

    def judge(batch: Sequence[Case]) -> list[tuple[dict[str, float], float]]:
        judged = []
        for case in batch:
            episode = session.segment(case, writer, engine, max_turns=max_turns, mask_selection=selection)
            judged.append((reviewer.signals(episode, case), evaluation.agreement(episode.answer_masks, case)[0]))
        return judged

    with progress(len(cases), "cases", quiet=as_json) as advance:
        results, failures = evaluation.judge_cases(cases, judge, on_case=lambda _: advance())
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
        for failure in failures:
            stderr.print(f"failed, left out: {failure.case_id}: {one_line(failure.error, 300)}")
    if failures:
        raise typer.Exit(EXIT_ERROR)
