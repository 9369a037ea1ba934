"""An evaluation on disk: resumable after any end, in multiple processes, the same metrics for the same settings.

The folder of a run holds run.json (what makes it), cases.jsonl (a line per case: result, episode, ground truth),
contents.json (the files that it was judged on, see `files.FileHashes`) and, when it has ended, evaluation.json and the
tables of `evaluation.tables`. Cases are judged in fixed blocks of `batch_size`, and a block's lines are appended in one
write once all of it is judged; a block that is not whole is judged again, and so is one with a case whose files have
changed since. So what is judged together never depends on how often the run was killed, or on the number of workers. Of
two lines of a case the later one holds; one without a result says that it is to be judged again. One start of a run at
a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ibisagent.datasets import CaseSource, cases_to_judge
from ibisagent.domain import Episode, Masks, MaskSelection
from ibisagent.environment import mask_choice, package_version, turn_limit
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.evaluation import Judge, location_prior, prior_cases
from ibisagent.evaluation.metrics import EMPTY_RULE, EmptyRule
from ibisagent.evaluation.results import CaseResult, Evaluation
from ibisagent.files import FileHashes, claim, reading, try_folder, write_json, write_whole
from ibisagent.inference.cases import Failure, Streak, judge_cases
from ibisagent.inference.image import provenance_of
from ibisagent.policies import load_policy
from ibisagent.policies.base import Policy
from ibisagent.protocol import History
from ibisagent.segmenters import load_segmenter
from ibisagent.store import plain_masks, plain_record, read_plain_masks, read_plain_record

log = logging.getLogger(__name__)

RUN_NAME, CASES_NAME, CONTENTS_NAME, RESULT_NAME = "run.json", "cases.jsonl", "contents.json", "evaluation.json"

_LOADING = (
    *("dialect", "history", "device", "dtype", "adapter", "max_pixels", "prompts", "candidates", "temperature", "seed"),
    "batch_size",
)
"""Options of `load_policy` among those of a `Setup`."""


@dataclass(frozen=True, slots=True)
class Setup:
    """All that makes an evaluation, as names and numbers, so that every process can open it for itself.

    baselines: also run the oracle's clicks and the blind clicks. The other options are those of `load_policy`,
    `load_segmenter`, `cases_to_judge` and `evaluate`.
    """

    data: Path
    split: str | None = None
    limit: int | None = None
    policy: str = "ibis-nano"
    segmenter: str = "ibis-click"
    dialect: str | None = None
    history: History | None = None
    max_turns: int | None = None
    mask_selection: MaskSelection | None = None
    baselines: bool = True
    batch_size: int = 16
    device: str = "auto"
    dtype: str = "auto"
    adapter: Path | None = None
    max_pixels: int | None = None
    prompts: Path | None = None
    candidates: int | None = None
    temperature: float = 0.0
    seed: int = 0

    def open(self) -> Bench:
        """Read the data and load the models; errors as they raise them."""
        everything, cases = cases_to_judge(self.data, self.split, self.limit)
        segmenter = load_segmenter(self.segmenter, device=self.device)
        needs_prior = self.baselines or self.policy == "location-prior"
        prior = location_prior(everything, cases) if needs_prior else None
        policy: Policy
        if self.policy != "location-prior":
            loading: dict[str, Any] = {name: getattr(self, name) for name in _LOADING}
            policy = load_policy(self.policy, cases=cases.by_id, **loading)
        elif prior is not None:
            policy = prior
        else:
            raise ConfigError(f"{self.data}: has no rows for training, from which location-prior learns")
        blind: dict[str, Policy] = {}
        if self.baselines:
            blind = ({} if prior is None else {"prior": prior}) | {"centre": load_policy("centre-click")}
        max_turns = turn_limit(policy) if self.max_turns is None else self.max_turns
        chosen = mask_choice(policy, self.mask_selection)
        provenance = provenance_of(policy, segmenter)
        facts = {
            "ibisagent": package_version(),
            "data": str(self.data),
            "split": ", ".join(sorted({row.split for row in cases.rows} - {""})),
            "cases": str(len(cases)),
            "cases_sha256": cases.sha256,
            "policy": policy.name,
            "segmenter": segmenter.name,
            "max_turns": str(max_turns),
            "mask_selection": chosen,
            "baselines": ", ".join([*blind, "oracle"]) if self.baselines else "",
            "batch_size": str(self.batch_size),
            "seed": str(self.seed),
            **provenance,
        }
        judge = Judge(policy, segmenter, blind, self.baselines, max_turns, chosen, provenance)
        learned = prior_cases(everything) if needs_prior else None
        return Bench(cases, learned, judge, facts, self.batch_size)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """An opened Setup. learned: what the location prior has learned from, if there is one."""

    cases: CaseSource
    learned: CaseSource | None
    judge: Judge
    facts: Mapping[str, str]
    batch_size: int

    def contents(self, path: Path) -> list[str]:
        """What each case is judged on, as one hash a case: its files, and those that the location prior learned from.

        path: where the hashes of the files are kept.
        """
        hashes = FileHashes(path)
        learned = "" if self.learned is None else " ".join([self.learned.sha256, *self.learned.contents(hashes)])
        found = [hashlib.sha256(f"{own} {learned}".encode()).hexdigest() for own in self.cases.contents(hashes)]
        hashes.write()
        return found

    def block(self, number: int) -> list[dict[str, Any]]:
        """Judge one block of cases: a plain line for each, in order."""
        start = number * self.batch_size
        cases = self.cases[start : start + self.batch_size]
        index = {row.id: start + place for place, row in enumerate(cases.rows)}
        judged, failures = judge_cases(cases, self.judge, batch_size=self.batch_size)
        lines: list[dict[str, Any]] = [
            {
                "index": index[one.case.id],
                "result": asdict(one.result),
                "episode": plain_record(one.episode),
                "targets": plain_masks(one.case.targets or {}),
            }
            for one in judged
        ]
        lines += [{"index": index[one.case_id], "failure": asdict(one)} for one in failures]
        return sorted(lines, key=lambda line: int(line["index"]))


def run(
    setup: Setup,
    folder: Path | None = None,
    *,
    workers: int = 1,
    empty: EmptyRule = EMPTY_RULE,
    on_start: Callable[[int, int], None] | None = None,
    on_case: Callable[[], None] | None = None,
) -> Evaluation:
    """Evaluate `setup`, in `folder` if one is given: an unfinished run there is finished, its failures are tried again.

    Cases whose files have changed since they were judged are judged again; a warning says how many.

    workers: processes; each loads the models. on_start: called with (cases in all, cases that an earlier start judged).
    on_case: called after each further case. Cases that fail are listed, not scored; broken machinery ends the run with
    an IbisError (`inference.cases.Streak`). ConfigError if `folder` holds another run.
    """
    if workers < 1:
        raise ConfigError(f"{workers} workers: give 1 or more")
    if folder is not None:
        try_folder(folder)
    with _worker_pool(setup, workers) as (facts, contents_of, judge_blocks):
        total, size = int(facts["cases"]), setup.batch_size
        kept, contents = _Log(None if folder is None else folder / CASES_NAME), [""] * total
        if folder is not None:
            claim(folder / RUN_NAME, facts)
            contents = contents_of(folder / CONTENTS_NAME)
            kept.open()
            if changed := kept.forget_changed(contents):
                log.warning(
                    "%s: the files of %d of %d cases have changed, they are judged again", folder, changed, total
                )
        done = {index for index, line in kept.lines.items() if "result" in line}
        blocks = [
            block
            for block, start in enumerate(range(0, total, size))
            if not done.issuperset(range(start, min(start + size, total)))
        ]
        left = sum(min(size, total - block * size) for block in blocks)
        if on_start is not None:
            on_start(total, total - left)
        streak = Streak()
        for lines in judge_blocks(blocks):
            kept.append([{**line, "content": contents[line["index"]]} for line in lines])
            for line in lines:
                streak.add(Failure(**line["failure"]) if "failure" in line else None)
                if on_case is not None:
                    on_case()
    evaluation = kept.evaluation(facts)
    if folder is not None:
        write_results(evaluation, folder, empty)
    return evaluation


def write_results(evaluation: Evaluation, folder: Path, empty: EmptyRule = EMPTY_RULE) -> None:
    """Write evaluation.json and the tables into the folder of a run."""
    from ibisagent.evaluation import tables

    write_json(evaluation.to_json(empty), folder / RESULT_NAME)
    for name, content in tables.files(evaluation, empty).items():
        write_whole(content.encode(), folder / name)


class Run:
    """A run on disk, finished or not. DataError if the folder holds none or it is damaged."""

    def __init__(self, folder: Path) -> None:
        """folder: what 'ibisagent eval run -o' or 'ibisagent eval score -o' wrote."""
        with reading(folder / RUN_NAME, "give a folder of 'ibisagent eval run -o'"):
            facts = json.loads((folder / RUN_NAME).read_bytes())
            self.cases = int(facts["cases"])
        self.folder = folder
        self._log = _Log(folder / CASES_NAME)
        self._log.read()
        self.evaluation = self._log.evaluation(facts)
        self._index = {line["result"]["case_id"]: index for index, line in self._log.lines.items() if "result" in line}

    def masks(self, case_id: str) -> tuple[Episode | None, Masks, Masks]:
        """(episode or None, masks handed out without one, ground truth) of a judged case. DataError if they are
        damaged."""
        line, where = self._line(case_id), f"{self.folder / CASES_NAME}, case {case_id}"
        episode = read_plain_record(line["episode"], where) if line.get("episode") else None
        plain = [line.get("masks") or [], line.get("targets") or []]
        sizes = [tuple(one["rle"]["size"]) for masks in plain for one in masks]
        size = episode.size if episode else sizes[0] if sizes else (1, 1)
        masks, targets = (read_plain_masks(part, size, where) for part in plain)
        return episode, masks, targets

    def check_same_masks(self, other: Run) -> None:
        """Raise DataError if a case was judged on other masks of the ground truth there than here.

        Masks of another size, as `eval score --resize-targets` makes them, are taken for the same.
        """
        differing = [
            case_id
            for case_id in self._index.keys() & other._index.keys()
            if _contradict(self._masks_judged_on(case_id), other._masks_judged_on(case_id))
        ]
        if differing:
            common = len(self._index.keys() & other._index.keys())
            raise DataError(
                f"{self.folder} and {other.folder}: {len(differing)} of {common} cases were judged on other masks of"
                f" the ground truth, such as {min(differing)}; the data has changed between them: judge both again"
            )

    def _masks_judged_on(self, case_id: str) -> dict[str, str]:
        found: dict[str, str] = self._log.lines[self._index[case_id]].get("ground_truth", {})
        return found

    def image(self, case_id: str) -> str:
        """Where the image of a judged case was; "" if that is not known."""
        line = self._line(case_id)
        return str(line.get("image") or (line.get("episode") or {}).get("image_source", ""))

    def _line(self, case_id: str) -> dict[str, Any]:
        return self._log.whole(self._index[case_id])


class _Log:
    """The lines of cases.jsonl by index of the case, without their masks; in memory alone if there is no path."""

    def __init__(self, path: Path | None) -> None:
        self.lines: dict[int, dict[str, Any]] = {}
        self._path = path
        self._places: dict[int, tuple[int, int]] = {}

    def read(self) -> int:
        """Read what is there: the number of its whole bytes. A last line that was cut off is passed over."""
        if self._path is None or not self._path.exists():
            return 0
        start = 0
        with self._path.open("rb") as file:
            for number, text in enumerate(file, start=1):
                if not text.endswith(b"\n"):
                    break
                try:
                    line = json.loads(text)
                    self.lines[int(line["index"])] = _light(line)
                    self._places[int(line["index"])] = start, len(text)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise DataError(f"{self._path}, line {number}: is damaged ({error}); delete the line") from error
                start += len(text)
        return start

    def whole(self, index: int) -> dict[str, Any]:
        """The line of a case with its masks, from the disk. It must have been `read`."""
        start, length = self._places[index]
        with (self._path or Path()).open("rb") as file:
            file.seek(start)
            line: dict[str, Any] = json.loads(file.read(length))
        return line

    def open(self) -> None:
        """Read what is there and cut off an unfinished last line."""
        whole = self.read()
        if self._path is not None and self._path.exists() and self._path.stat().st_size > whole:
            os.truncate(self._path, whole)

    def forget_changed(self, contents: Sequence[str]) -> int:
        """Let the cases whose content is not that of `contents`, by index, be judged again; how many these are."""
        changed = [
            {"index": index, "content": contents[index]}
            for index, line in self.lines.items()
            if "result" in line and line.get("content") != contents[index]
        ]
        self.append(changed)
        return len(changed)

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add the lines of one block, on disk in one write. DataError if that fails; then none is there."""
        self.lines |= {int(line["index"]): _light(line) for line in lines}
        if self._path is None or not lines:
            return
        content = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()
        try:
            with self._path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                if file.write(content) != len(content):
                    file.truncate(before)
                    raise DataError(f"{self._path}: the disk is full; free space and start again")
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(f"{self._path}: cannot be written ({error.strerror}); free space") from error

    def evaluation(self, facts: Mapping[str, str]) -> Evaluation:
        """What the lines say, in the order of the cases."""
        ordered = [self.lines[index] for index in sorted(self.lines)]
        try:
            results = tuple(CaseResult.read(line["result"]) for line in ordered if "result" in line)
            failures = tuple(Failure(**line["failure"]) for line in ordered if "failure" in line)
        except (KeyError, TypeError) as error:
            raise DataError(f"{self._path}: was written by another version ({error}); evaluate again") from error
        return Evaluation(facts, results, failures)


def _light(line: dict[str, Any]) -> dict[str, Any]:
    """A line without its masks; of those of the ground truth, by name, the size and a hash remain."""
    light: dict[str, Any] = {name: line[name] for name in ("index", "content", "result", "failure") if name in line}
    if targets := line.get("targets"):
        light["ground_truth"] = {
            one["name"]: f"{one['rle']['size']} {hashlib.sha256(one['rle']['counts'].encode()).hexdigest()}"
            for one in targets
        }
    return light


def _contradict(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether masks of the same names and sizes differ, where both are known."""
    sizes, others = ({name: mask.rpartition(" ")[0] for name, mask in masks.items()} for masks in (one, other))
    return bool(one and other and one != other and (sizes == others or sizes.keys() != others.keys()))


@contextmanager
def _worker_pool(
    setup: Setup, workers: int
) -> Iterator[
    tuple[dict[str, str], Callable[[Path], list[str]], Callable[[Sequence[int]], Iterator[list[dict[str, Any]]]]]
]:
    """(facts of the run, its `Bench.contents`, what judges blocks by number and gives their lines as they are done)."""
    if workers == 1:
        bench = setup.open()
        yield dict(bench.facts), bench.contents, lambda blocks: map(bench.block, blocks)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_limit_threads, initargs=(threads,)
    )

    def judge_blocks(blocks: Sequence[int]) -> Iterator[list[dict[str, Any]]]:
        waiting = iter(blocks)
        pending = {pool.submit(_block, setup, block) for block in islice(waiting, 2 * workers)}
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= {pool.submit(_block, setup, block) for block in islice(waiting, len(done))}
            for future in done:
                yield future.result()

    try:
        facts = pool.submit(_facts, setup).result()
        yield facts, lambda path: pool.submit(_contents, setup, path).result(), judge_blocks
    except BrokenProcessPool as error:
        raise PolicyError("a worker died, most likely for want of memory: give fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _limit_threads(threads: int) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@lru_cache(maxsize=1)
def _opened(setup: Setup) -> Bench:
    return setup.open()


def _facts(setup: Setup) -> dict[str, str]:
    return dict(_opened(setup).facts)


def _contents(setup: Setup, path: Path) -> list[str]:
    return _opened(setup).contents(path)


def _block(setup: Setup, number: int) -> list[dict[str, Any]]:
    return _opened(setup).block(number)
