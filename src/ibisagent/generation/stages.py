"""The stages, shard by shard: every (stage, shard) is one file that appears whole or not at all.

OUT holds run.json (data and settings), contents.json (the files of the data, see `files.FileHashes`), a folder for each
stage with a file for each shard, and at the end card.json and card.md. A shard is `shard_images` images in the
order of the data. What a file holds depends on the data, the settings and the files of the stages before it, so a run
that was killed and started again ends with the same bytes, and it does not matter who works on which shard. Shards with
pairs whose files have changed since are removed, from the last stage to the first, and made again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.datasets.leaks import fingerprint
from ibisagent.domain import Case, Episode
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import FileHashes, claim, try_folder, write_json, write_whole
from ibisagent.generation import filters
from ibisagent.generation.config import STAGES, FactoryConfig, Question, Stage, read_questions, write_questions
from ibisagent.generation.expert_episodes import RecallingSegmenter, expert_episodes
from ibisagent.generation.narration import Narrator, Rejected
from ibisagent.generation.questions import QuestionGenerator
from ibisagent.generation.teacher.base import Teacher
from ibisagent.segmenters import load_segmenter
from ibisagent.segmenters.runtime import one_thread
from ibisagent.store import EpisodeStore

log = logging.getLogger(__name__)

RUN_NAME, CONTENTS_NAME = "run.json", "contents.json"
OVERLAPS_NAME = "overlaps.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker needs to know: plain values, so that it travels to other processes.

    contents: of each pair by its id, what its files hold, as `build` finds them (`CaseSource.contents`).
    """

    cases: CaseSource
    out: Path
    config: FactoryConfig
    device: str = "auto"
    contents: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """Runs stages on shards. Segmenter and teacher are loaded when first needed."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.config = plan.config

    @cached_property
    def groups(self) -> list[list[CaseRow]]:
        """The rows of each image, images in the order of their first row."""
        by_image: dict[Path, list[CaseRow]] = {}
        for row in self.plan.cases.rows:
            by_image.setdefault(row.image, []).append(row)
        return list(by_image.values())

    @property
    def shards(self) -> int:
        """How many there are."""
        return -(-len(self.groups) // self.config.shard_images)

    def groups_of(self, shard: int) -> list[list[CaseRow]]:
        """The rows of the images of a shard."""
        first = shard * self.config.shard_images
        return self.groups[first : first + self.config.shard_images]

    @cached_property
    def segmenter(self) -> RecallingSegmenter:
        """The segmenter of the settings, with the same masks on any number of cores."""
        with one_thread():
            return RecallingSegmenter(load_segmenter(self.config.segmenter, device=self.plan.device))

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of the settings. ConfigError if it cannot be had."""
        if self.config.teacher == "endpoint" and self.config.endpoint is not None:
            from ibisagent.generation.teacher.endpoint import EndpointTeacher

            return EndpointTeacher(self.config.endpoint, self.plan.out / "replies", seed=self.config.seed)
        from ibisagent.generation.teacher.rules import RulesTeacher

        return RulesTeacher(self.config.seed)

    @cached_property
    def _question_generator(self) -> QuestionGenerator:
        return QuestionGenerator(self.config, self.plan.cases.rows)

    def path(self, stage: Stage, shard: int) -> Path:
        """The file of a stage that says that a shard is done."""
        name = "questions" if stage == "questions" else "done" if stage == "export" else "episodes"
        suffix = "json" if stage == "export" else "parquet"
        return self.plan.out / stage / f"{name}-{shard:06d}.{suffix}"

    def run(self, stage: Stage, shard: int) -> int:
        """Do one shard of one stage; the number of pairs in it. Raises what the machinery raises."""
        groups = self.groups_of(shard)
        {
            "trajectories": self._trajectories,
            "questions": self._questions,
            "thoughts": self._thoughts,
            "reflection": self._reflection,
            "filter": self._filter,
            "export": self._export,
        }[stage](shard, groups)
        return sum(len(rows) for rows in groups)

    # ---- the stages

    def _trajectories(self, shard: int, groups: Sequence[Sequence[CaseRow]]) -> None:
        segmenter = self.segmenter
        provenance = {**segmenter.describe(), "segmenter": segmenter.name, "seed": str(self.config.seed)}
        episodes: list[Episode] = []
        facts: dict[str, Any] = {}
        images: dict[str, Any] = {}
        failures: list[dict[str, str]] = []
        for rows in groups:
            cases, failed = self._decoded(rows)
            failures += failed
            try:
                made, known = expert_episodes(cases, segmenter, self.config, provenance) if cases else ([], {})
            except IbisError as error:
                failures += [{"case_id": case.id, "error": f"{type(error).__name__}: {error}"} for case in cases]
                continue
            episodes += made
            facts |= known
            if cases:
                images[str(rows[0].image)] = {
                    "sha256": cases[0].image.sha256,
                    "hash": fingerprint(cases[0].image.pixels),
                }
        if groups and failures and not facts and all("DataError" not in failure["error"] for failure in failures):
            raise DataError(f"shard {shard}: every pair failed, the last one: {failures[-1]['error']}")
        contents = {row.id: self.plan.contents[row.id] for rows in groups for row in rows}
        notes = {"facts": facts, "images": images, "failures": failures, "contents": contents}
        EpisodeStore(self.plan.out / "trajectories").append(episodes, shard=shard, notes=notes)

    def _questions(self, shard: int, groups: Sequence[Sequence[CaseRow]]) -> None:
        facts = EpisodeStore(self.plan.out / "trajectories").notes(shard)["facts"]
        questions = [question for rows in groups for question in self._question_generator.ask(rows, facts)]
        counts = dict(Counter(question.family for question in questions))
        write_questions(questions, self.path("questions", shard), {"counts": counts})

    def _thoughts(self, shard: int, groups: Sequence[Sequence[CaseRow]]) -> None:
        self._tell("thoughts", shard, groups, read_questions(self.path("questions", shard)))

    def _reflection(self, shard: int, groups: Sequence[Sequence[CaseRow]]) -> None:
        facts = EpisodeStore(self.plan.out / "trajectories").notes(shard)["facts"]
        self._tell(
            "reflection", shard, groups, [q for rows in groups for q in self._question_generator.ask_again(rows, facts)]
        )

    def _tell(
        self, stage: Stage, shard: int, groups: Sequence[Sequence[CaseRow]], questions: Sequence[Question]
    ) -> None:
        experts = {episode.case_id: episode for episode in self._experts(shard)}
        narrated: list[Episode] = []
        rejected: list[Rejected] = []
        for rows in groups:
            cases, _ = self._decoded(rows)
            mine = [question for question in questions if question.image == str(rows[0].image)]
            known = {case.id: case for case in cases}
            narrator = Narrator(self.teacher, self.config.dialect, known, experts)
            mine = [question for question in mine if set(question.rows) <= known.keys()]
            for found in narrator.narrate(mine, {"ibisagent": package_version()}):
                if isinstance(found, Rejected):
                    rejected.append(found)
                else:
                    narrated.append(found)
        notes = {
            "rejected": [asdict(lost) for lost in rejected],
            "questions": [asdict(question) for question in questions] if stage == "reflection" else [],
        }
        EpisodeStore(self.plan.out / stage).append(narrated, shard=shard, notes=notes)

    def _filter(self, shard: int, groups: Sequence[Sequence[CaseRow]]) -> None:
        questions = {question.id: question for question in self.questions(shard)}
        overlaps = json.loads((self.plan.out / OVERLAPS_NAME).read_bytes())
        episodes = {
            episode.case_id: episode for stage in ("thoughts", "reflection") for episode in self._read(stage, shard)
        }
        kept: list[Episode] = []
        results: list[dict[str, Any]] = []
        rejected = [
            {"id": lost["question"], "reason": lost["reason"], "detail": lost["detail"]}
            for stage in ("thoughts", "reflection")
            for lost in EpisodeStore(self.plan.out / stage).notes(shard)["rejected"]
        ]
        for rows in groups:
            cases, _ = self._decoded(rows)
            ground_truths = {case.id: dict(case.targets or {}) for case in cases}
            for question in (q for q in questions.values() if q.image == str(rows[0].image) and q.id in episodes):
                episode = episodes[question.id]
                verdict = filters.judge(question, episode, ground_truths, overlaps, self.config)
                if isinstance(verdict, str):
                    reason, _, detail = verdict.partition("|")
                    rejected.append({"id": question.id, "reason": reason, "detail": detail})
                else:
                    kept.append(episode)
                    results.append(verdict)
        notes = {"rejected": rejected, "results": results, "overlaps": _among(overlaps, groups)}
        EpisodeStore(self.plan.out / "filter").append(kept, shard=shard, notes=notes)

    def _export(self, shard: int, groups: Sequence[Sequence[CaseRow]]) -> None:
        from ibisagent.generation.exports import export_shard

        overlaps = json.loads((self.plan.out / OVERLAPS_NAME).read_bytes())
        questions = {question.id: question for question in self.questions(shard)}
        rows = {row.id: row for group in groups for row in group}
        cases = {case.id: case for group in groups for case in self._decoded(group)[0]}
        starts = {episode.case_id: episode.start for episode in self._experts(shard) if episode.start}
        counts = export_shard(
            self.plan.out / "export",
            shard,
            list(self._read("filter", shard)),
            [q for q in questions.values() if filters.overlapping(q, overlaps) is None],
            questions,
            rows,
            cases,
            starts,
            self.config,
        )
        write_whole((json.dumps(counts, sort_keys=True) + "\n").encode(), self.path("export", shard))

    # ---- what they read

    def questions(self, shard: int) -> list[Question]:
        """All questions of a shard, those of self-reflection last."""
        again = EpisodeStore(self.plan.out / "reflection").notes(shard)["questions"]
        return [*read_questions(self.path("questions", shard)), *(Question(**plain) for plain in again)]

    def _read(self, stage: str, shard: int) -> Iterator[Episode]:
        return EpisodeStore(self.plan.out / stage).read_shard(shard)

    def _experts(self, shard: int) -> Iterator[Episode]:
        return self._read("trajectories", shard)

    def _decoded(self, rows: Sequence[CaseRow]) -> tuple[list[Case], list[dict[str, str]]]:
        """The cases of `rows` that can be read, and why the others cannot."""
        cases, failed = [], []
        for row in rows:
            try:
                cases.append(self.plan.cases.decode(row))
            except DataError as error:
                failed.append({"case_id": row.id, "error": f"DataError: {error}"})
        return cases, failed


def build(
    plan: Plan,
    stages: Sequence[Stage] = STAGES,
    *,
    progress: Callable[[Stage, int, int], None] | None = None,
    run_shards: Callable[[Plan, Stage, Sequence[int], Callable[[int], None]], None] | None = None,
) -> dict[str, Any]:
    """Run `stages` in order, resuming an earlier run; the data card as far as it is known.

    progress: called with (stage, shards done, shards in all). run_shards: who works on the shards; None: this process.
    Shards whose files have changed are made again; a warning says how many pairs. One run at a time in a folder. Raises
    ConfigError when the folder holds a run with other data or settings, when a stage is asked for whose predecessors
    are not there, and what segmenters and teachers raise.
    """
    from ibisagent.generation.card import write_card

    try_folder(plan.out)
    _claim(plan)
    hashes = FileHashes(plan.out / CONTENTS_NAME)
    contents = zip((row.id for row in plan.cases.rows), plan.cases.contents(hashes), strict=True)
    plan = replace(plan, contents=dict(contents))
    hashes.write()
    worker = Worker(plan)
    _remove_changed(worker)
    for stage in sorted(stages, key=STAGES.index):
        _sweep(plan.out, stage)
        total = worker.shards
        earlier = STAGES[: STAGES.index(stage)]
        if lacking := next((s for s in earlier if any(not worker.path(s, k).exists() for k in range(total))), None):
            raise ConfigError(f"{plan.out}: stage {stage} needs stage {lacking}, which is not finished; run it first")
        if stage == "filter":
            _find_overlaps(worker)
        pending = [shard for shard in range(total) if not worker.path(stage, shard).exists()]
        done = total - len(pending)
        if progress is not None:
            progress(stage, done, total)

        def finished(_shard: int, stage: Stage = stage, total: int = total) -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(stage, done, total)

        if pending:
            (run_shards or _run_here(worker))(plan, stage, pending, finished)
    return write_card(worker)


def estimate(plan: Plan) -> dict[str, Any]:
    """What the teacher's thoughts would cost: exact where the stages before are finished, else by the settings' counts.

    Asks nobody anything. Prices are those of the settings; the rule teacher costs nothing.
    """
    worker = Worker(plan)
    config, endpoint = plan.config, plan.config.endpoint
    thoughts = 0.0
    if (plan.out / RUN_NAME).exists() and all(worker.path("questions", k).exists() for k in range(worker.shards)):
        for shard in range(worker.shards):
            turns = {episode.case_id: len(episode.turns) for episode in worker._experts(shard)}
            asked = read_questions(worker.path("questions", shard))
            thoughts += sum(turns.get(question.expert, 1) for question in asked)
        basis = "finished trajectories and questions"
    else:
        drawn = config.referring + config.reasoning + config.existence + config.refinement
        drawn_again = config.self_correction + config.inconsistency
        thoughts = len(plan.cases) * (
            (drawn + drawn_again) * (config.max_clicks * 0.8 + 1) + config.absent + config.vqa
        )
        basis = "settings alone: clicks are guessed as 80% of max_clicks"
    report: dict[str, Any] = {"thoughts": round(thoughts), "basis": basis, "price": 0.0}
    if config.teacher == "endpoint" and endpoint is not None:
        from ibisagent.generation.teacher.endpoint import PROMPT_TOKENS

        tokens_in = thoughts * (PROMPT_TOKENS + (endpoint.tokens_per_image if endpoint.images else 0))
        tokens_out = thoughts * endpoint.max_tokens
        price = (tokens_in * endpoint.price_in + tokens_out * endpoint.price_out) / 1e6
        report |= {"tokens_in": round(tokens_in), "tokens_out_at_most": round(tokens_out), "price": round(price, 2)}
        report["budget"] = endpoint.budget
    return report


def _run_here(worker: Worker) -> Callable[[Plan, Stage, Sequence[int], Callable[[int], None]], None]:
    def run(_plan: Plan, stage: Stage, shards: Sequence[int], finished: Callable[[int], None]) -> None:
        for shard in shards:
            worker.run(stage, shard)
            finished(shard)

    return run


def _claim(plan: Plan) -> None:
    """Write run.json, or check that the one there says the same."""
    # how fast and how dear the teacher may be asked can change between starts
    may_change = {"endpoint": {"concurrency", "requests_per_minute", "retries", "pause_seconds", "timeout_seconds",
                         "price_in", "price_out", "budget", "tokens_per_image"}}  # fmt: skip
    facts = {
        **plan.config.model_dump(mode="json", exclude=may_change if plan.config.endpoint else None),
        "cases": len(plan.cases),
        "cases_sha256": plan.cases.sha256,
    }
    facts["ibisagent"] = package_version()
    claim(plan.out / RUN_NAME, facts, leftovers=[plan.out / stage for stage in STAGES])


def _remove_changed(worker: Worker) -> None:
    """Remove what was made of pairs whose files have changed since, stage by stage from the last."""
    changed = 0
    for shard in range(worker.shards):
        if not worker.path("trajectories", shard).exists():
            continue
        earlier = EpisodeStore(worker.plan.out / "trajectories").notes(shard)["contents"]
        different = sum(worker.plan.contents[name] != content for name, content in earlier.items())
        if different:
            (worker.plan.out / OVERLAPS_NAME).unlink(missing_ok=True)  # with all images
            _remove(worker, reversed(STAGES), shard)
        changed += different
    if changed:
        total = len(worker.plan.cases)
        log.warning(
            "%s: the files of %d of %d pairs have changed, they are made again", worker.plan.out, changed, total
        )


def _remove(worker: Worker, stages: Iterable[Stage], shard: int) -> None:
    """Remove what `stages`, in their order, made of a shard. The file that says that it is done goes first."""
    from ibisagent.generation.exports import remove_shard

    for stage in stages:
        worker.path(stage, shard).unlink(missing_ok=True)
        if stage == "export":
            remove_shard(worker.plan.out / "export", shard)


def _sweep(out: Path, stage: Stage) -> None:
    """Remove what a run that was killed left half-written."""
    for leftover in (out / stage).rglob(".*.part"):
        leftover.unlink()


def _among(overlaps: Mapping[str, str], groups: Sequence[Sequence[CaseRow]]) -> dict[str, str]:
    """Those of the images of `groups`."""
    return {image: overlaps[image] for rows in groups if (image := str(rows[0].image)) in overlaps}


def _find_overlaps(worker: Worker) -> None:
    """Write overlaps.json: the images that must not be trained on, as they or their patient are in another split.

    Shards that were filtered by others are removed: images of other shards have changed since.
    """
    path = worker.plan.out / OVERLAPS_NAME
    if path.exists():
        return
    store = EpisodeStore(worker.plan.out / "trajectories")
    hashes: dict[str, str] = {}
    for shard in range(worker.shards):
        hashes |= {image: known["hash"] for image, known in store.notes(shard)["images"].items()}
    found = filters.find_overlaps(worker.groups, hashes, worker.config.near_duplicate_bits)
    for shard in range(worker.shards):
        if worker.path("filter", shard).exists():
            used = EpisodeStore(worker.plan.out / "filter").notes(shard)["overlaps"]
            if used != _among(found, worker.groups_of(shard)):
                _remove(worker, ("export", "filter"), shard)
    write_json(found, path, sort_keys=True)
