"""Agentic reinforcement learning: `ibisagent train rl recipes/rl-nano.toml` (paper, section 3.3).

The policy plays whole episodes with a segmenter, multiple rollouts for each case, and its replies are weighted by what
their rollout earned above the others of the case (GRPO, without a KL term). TRL plays: an episode is one conversation,
and what TRL calls a tool is the one environment of this package. Each reply, whatever it says, goes to
`SegmentationEnv`, which alone decides what it means, what is shown next and when the episode is over; `rewards.score`
judges the episode.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn import functional as F
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from ibisagent.datasets import read_cases
from ibisagent.domain import Case, Completion, Episode, Observation
from ibisagent.environment import SegmentationEnv, turn_limit
from ibisagent.errors import ConfigError, DataError, PolicyError, SegmenterError
from ibisagent.files import try_folder
from ibisagent.generation.exports import prompt_case, read_grpo
from ibisagent.imaging.masks import iou
from ibisagent.query import target_of
from ibisagent.rewards import RewardWeights, Score, match_names, score
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.store import EpisodeStore
from ibisagent.training.finetune.common import (
    LogCallback,
    Report,
    Student,
    load_student,
    lora_config,
    run,
    score_by_own_logits,
    trainer_config,
    without_library_warnings,
)
from ibisagent.training.finetune.recipes import RlRecipe

log = logging.getLogger(__name__)

MAX_FAILED_BATCHES = 3
INFORMATIVE = 0.01
"""Least deviation of a group's advantages for it to teach: that of rewards which deviate by 1e-6."""
_CASES_KEPT = 16  # decoded
_PROBED_CASES = 8  # to see how many tokens a turn shows
_SPARE_TOKENS = 64  # a turn may show more than on the probed cases: longer queries, a line about an unreadable reply
_OVER = [{"type": "text", "text": "(the episode is over)"}]  # shown to nobody


# --------------------------------------------------------------------------------------------------------- cases


class _Questions(Sequence[Case]):
    """The questions that `ibisagent data build` exported for RL, as cases; images are read when asked for."""

    def __init__(self, folder: Path, split: str, licence_class: str) -> None:
        self._folder = folder
        self._records = [
            record for record in read_grpo(folder, split) if licence_class in ("", record["licence_class"])
        ]

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """The case of one question."""
        record = self._records[index]
        return prompt_case(record["id"], record["query"], record, self._folder)


def read_training_cases(recipe: RlRecipe) -> Sequence[Case]:
    """The cases that `recipe` plays, decoded when asked for. DataError where there are none."""
    for folder in (recipe.data / "export", recipe.data):
        if (folder / "grpo").is_dir():
            cases = _Questions(folder, recipe.split, recipe.licence_class)
            if not len(cases):
                raise ConfigError(f"{folder}: no question has licence class '{recipe.licence_class}'")
            return cases
    return read_cases(
        recipe.data,
        split=recipe.split or None,
        licence_classes={recipe.licence_class} if recipe.licence_class else None,
    )


class PlayableCases(Sequence[Case]):
    """Cases of which one that cannot be read, or no longer, is left out and the next that can is played in its place.

    Each is reported once. DataError where none is left. The latest are kept, for the rollouts of one case.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases
        self._lost: set[int] = set()
        self._read = lru_cache(maxsize=_CASES_KEPT)(self._read_anew)

    def __len__(self) -> int:
        return len(self._cases)

    def __getitem__(self, index: Any) -> Any:
        """The case of one number."""
        return self._read(index)

    def _read_anew(self, index: int) -> Case:
        for number in [*range(index, len(self)), *range(index)]:
            if number in self._lost:
                continue
            try:
                return self._cases[number]
            except DataError as error:
                self._lost.add(number)
                log.warning("%s: left out of the training", error)
        raise DataError(f"none of {len(self)} cases to play can be read any more; put their images back")


# --------------------------------------------------------------------------------------------------- environment


class SegmentationTool:
    """One rollout at a time, as TRL wants its environments. Its public methods are what TRL shows the model as tools.

    rollout: the episode under way; case: what it is about; failure: of the segmenter, which ends the rollout unjudged.
    """

    rollout: SegmentationEnv
    case: Case

    def __init__(self, cases: Callable[[int], Case], segmenter: Segmenter, student: Student, max_turns: int) -> None:
        self._cases, self._segmenter, self._student, self._max_turns = cases, segmenter, student, max_turns
        specials = student.processor.tokenizer.all_special_tokens
        self._specials = re.compile("|".join(re.escape(token) for token in specials))
        self.failure: SegmenterError | None = None

    def reset(self, case: int, **_: Any) -> list[dict[str, Any]]:
        """Begin a rollout of case number `case`; what the policy sees first."""
        self.case, self.failure = self._cases(case), None
        provenance = {"policy": self._student.name, "stage": "rl"}
        self.rollout = SegmentationEnv(
            self.case, self._segmenter, dialect=self._student.dialect, max_turns=self._max_turns, provenance=provenance
        )
        return self._shown()

    def act(self, reply: str) -> list[dict[str, Any]]:
        """Do what a reply says and look at the image again.

        Args:
            reply: Everything that was written, thought and action.

        Returns:
            The image with the masks as they stand.
        """
        try:
            self.rollout.step(Completion(self._specials.sub("", reply)))
        except SegmenterError as error:
            self.failure = error
            return _OVER
        return _OVER if self.rollout.done else self._shown()

    def _shown(self) -> list[dict[str, Any]]:
        return list(self._student.told(self.rollout.observation)[-1]["content"])


def judge(weights: RewardWeights, keep: Callable[[Sequence[Episode]], None]) -> Callable[..., list[float | None]]:
    """A reward function for TRL: the score of each rollout's episode, None where the segmenter failed.

    Logs the mean of every term. keep: given the episodes. SegmenterError if every rollout of so many batches in a row
    failed that it cannot be the images: MAX_FAILED_BATCHES.
    """
    failed_batches = 0

    def rollout_reward(
        completions: Sequence[Sequence[Mapping[str, Any]]],
        environments: Sequence[SegmentationTool],
        log_metric: Callable[[str, float], None],
        **_: Any,
    ) -> list[float | None]:
        nonlocal failed_batches
        for message in (message for messages in completions for message in messages):
            if message["role"] == "tool" and isinstance(message["content"], str):  # TRL makes text of exceptions
                raise PolicyError(f"the environment failed: {message['content']}")
        judged: list[tuple[SegmentationTool, Episode, Score] | None] = []
        for tool in environments:
            truncated = not tool.rollout.done
            tool.rollout.truncate()
            episode = tool.rollout.episode()
            log_metric("rollout/truncated", float(truncated and tool.failure is None))
            log_metric("rollout/failed", float(tool.failure is not None))
            judged.append(None if tool.failure else (tool, episode, score(episode, tool.case, weights)))
        scored = [one for one in judged if one is not None]
        failed_batches = 0 if scored else failed_batches + 1
        if failed_batches == MAX_FAILED_BATCHES:
            raise SegmenterError(f"every rollout fails, the last one: {environments[-1].failure}")
        for tool, episode, result in scored:
            for name, value in _named_metrics(tool.case, episode, result):
                log_metric(name, value)
        keep([episode for _, episode, _ in scored])
        return [one and one[2].total for one in judged]

    return rollout_reward


def _named_metrics(case: Case, episode: Episode, result: Score) -> Iterator[tuple[str, float]]:
    """What is logged of a rollout: every term of its score, and how it went."""
    for term in fields(result):
        if isinstance(value := getattr(result, term.name), float):
            yield f"score/{term.name}", value
    yield "rollout/turns", float(len(episode.turns))
    yield "rollout/clicks", float(episode.clicks)
    yield "rollout/stopped", float(episode.stop == "stopped")
    ground_truths = {name: ground_truth for name, ground_truth in (case.targets or {}).items() if ground_truth.any()}
    masks = episode.answer_masks
    shown = [name for name, mask in masks.items() if mask.any()]
    meant = {ground_truth: said for said, ground_truth in match_names(shown, case.targets or {}).items()}
    for name, ground_truth in ground_truths.items():
        yield "rollout/iou", iou(masks[meant[name]], ground_truth) if name in meant else 0.0


# ------------------------------------------------------------------------------------------------------ training


class _Shown(list[Any]):
    """The images that a rollout was shown after its first.

    Also true where there are none: TRL marks the image tokens of the batch by their ids where a rollout was shown
    images, else by its prompt, which lacks what the environment showed first; where every rollout of a batch ends with
    its first turn, those marks would not fit.
    """

    def __bool__(self) -> bool:
        return True


class _Trainer(GRPOTrainer):
    """TRL's, which ends a rollout when its episode is over, and can replace cases that teach nothing."""

    def __init__(self, dynamic_sampling: int, at_once: int, **options: Any) -> None:
        self._dynamic_sampling = dynamic_sampling
        self._at_once = at_once  # rollouts that are written together; 0: all
        self._turn: tuple[Any, ...] = ()  # the latest that this process wrote
        self._in_step = False  # whether its turns wait for those of the other processes
        super().__init__(**options)

    def _send_telemetry(self) -> None:
        """Nobody is told that somebody trains."""

    def _tool_call_loop(self, *paths: Any) -> Any:
        """TRL's turns after the first. Of multiple processes all write as many turns as the longest rollout has.

        TRL generates once a turn on each process, and rollouts end after different numbers of turns; but generating is
        collective wherever weights are gathered for it (ZeRO-3, FSDP) or one vLLM server writes for all. So a process
        whose rollouts are over repeats its last turn, to no effect, until all are done.
        """
        self._in_step = self.accelerator.num_processes > 1
        *played, shown = super()._tool_call_loop(*paths)
        while self._in_step and (most := self._most_unfinished(0)):
            self._write_turn(*self._turn, most=most)
        self._in_step = False
        return *played, [_Shown(images) for images in shown]

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, num_generations: int, has_tool_images: bool = False
    ) -> Any:
        self._turn = (prompt_ids, images, multimodal_fields, has_tool_images)
        if self._in_step:
            return self._write_turn(*self._turn, most=self._most_unfinished(len(prompt_ids)))
        if self.use_vllm:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
            )
        return self._write_turn(*self._turn, most=len(prompt_ids))

    def _write_turn(self, prompt_ids: Any, images: Any, fields: Any, has_tool_images: bool, most: int) -> Any:
        """One turn of each of these rollouts, while every other process writes one of its own.

        most: rollouts of any process. A vLLM server hands out its replies by equal shares, so there each asks for as
        many. Elsewhere so many are written at a time as the recipe says, as often as on the process with most.
        """
        count, most = len(prompt_ids), max(most, len(prompt_ids))
        if self.use_vllm:
            prompt_ids = [*prompt_ids, *prompt_ids[:1] * (most - count)]
            images = images and [*images, *images[:1] * (most - count)]
            written, logprobs = super()._generate_single_turn(
                prompt_ids, images, fields, 1, has_tool_images=has_tool_images
            )
            return written[:count], logprobs and logprobs[:count]
        size = self._at_once or most
        chunks = [range(start, min(start + size, count)) for start in range(0, count, size)]
        chunks += chunks[-1:] * (math.ceil(most / size) - len(chunks))  # to no effect
        replies: list[Any] = []
        for rows in chunks:
            ids = [prompt_ids[row] for row in rows]
            shown = images and [images[row] for row in rows]
            written, _ = super()._generate_single_turn(
                ids, shown, _fields_of(fields, images, rows), 1, has_tool_images=has_tool_images
            )
            replies += written
        return replies[:count], None

    def _most_unfinished(self, own: int) -> int:
        """The largest number of rollouts that a process is about to go on with; waits until all have said theirs."""
        told = torch.tensor([own], device=self.accelerator.device)
        return int(self.accelerator.gather(told).max())

    def _get_tool_suffix_ids(self, tool_messages: Any) -> list[int]:
        """Tokens of what is shown next. After the end: more than a rollout may hold, whereupon TRL leaves the rollout
        as it is, without what would be shown."""
        if tool_messages[-1]["content"] == _OVER:
            return [0] * (self.max_completion_length + 1)
        return list(super()._get_tool_suffix_ids(tool_messages))

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's batch of rollouts; groups without variance are replaced by those of other cases, as far as these go."""
        batch = super()._generate_and_score_completions(inputs)
        if not self._dynamic_sampling or not self.model.training:
            return batch
        batches, kept = [split_pixel_values_by_grid(batch)], [self._groups_that_teach(batch)]
        wanted = len(inputs) // self.num_generations
        for attempt in range(self._dynamic_sampling):
            missing = wanted - sum(map(len, kept))
            if not self.accelerator.gather(torch.tensor([max(missing, 0)], device=self.accelerator.device)).any():
                break
            draw = np.random.default_rng([self.args.seed, self._step, attempt, self.accelerator.process_index])
            rows = draw.choice(len(self.train_dataset), wanted, replace=len(self.train_dataset) < wanted)
            fresh = [self.train_dataset[int(row)] for row in rows for _ in range(self.num_generations)]
            batches.append(split_pixel_values_by_grid(super()._generate_and_score_completions(fresh)))
            kept.append(self._groups_that_teach(batches[-1]))
        chosen = [(number, group) for number, groups in enumerate(kept) for group in groups][:wanted]
        spare = [(0, group) for group in range(wanted) if group not in kept[0]]
        chosen += spare[: wanted - len(chosen)]
        self._log_now("sampling/batches", float(len(batches)))
        return join_groups(batches, chosen, self.num_generations, self._tokenizer.pad_token_id)

    def _groups_that_teach(self, batch: Mapping[str, Any]) -> list[int]:
        return groups_that_teach(batch["advantages"], self.num_generations)

    def _log_now(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)


def _fields_of(fields: Mapping[str, Any], images: Any, rows: Sequence[int]) -> dict[str, Any]:
    """What a processor made of the `images` of some paths, for a few of them."""
    if len(rows) == len(images or ()):
        return dict(fields)
    if "pixel_values" not in fields:
        return {name: [values[row] for row in rows] for name, values in fields.items()}
    if isinstance(fields["pixel_values"], list):
        fields = {**fields, "pixel_values": torch.tensor(np.array(fields["pixel_values"]))}
    split = split_pixel_values_by_grid({**fields, "num_images": [len(shown or ()) for shown in images]})
    chosen: dict[str, Any] = {name: [values[row] for row in rows] for name, values in split.items()}
    stacked = {name: torch.stack(chosen[name]) for name, values in split.items() if isinstance(values, torch.Tensor)}
    few: dict[str, Any] = unsplit_pixel_values_by_grid({**chosen, **stacked})
    few.pop("num_images")
    return few if few["pixel_values"].numel() else {}


def groups_that_teach(advantages: torch.Tensor, rollouts: int) -> list[int]:
    """The groups, of so many rollouts each, in whose `advantages` (N,) there is anything to learn from.

    TRL divides what a reward is above its group's mean by the deviation s of the group plus 1e-4. Where all rewards are
    the same, rounding leaves about 1e-7 for s, so advantages deviate by up to 1e-3, not by 0; by s / (s + 1e-4) else.
    """
    deviations = advantages.view(-1, rollouts).std(dim=1, correction=0)
    return [int(group) for group in (deviations > INFORMATIVE).nonzero()[:, 0]]


def join_groups(
    batches: Sequence[Mapping[str, Any]], chosen: Sequence[tuple[int, int]], paths: int, pad_token_id: int
) -> dict[str, Any]:
    """One batch of GRPO from the `chosen` groups, (batch, group) each, of batches that are padded differently.

    Prompts are padded on the left, completions on the right; what spans both is padded on either side.
    """
    prompt = max(one["prompt_ids"].shape[1] for one in batches)
    completion = max(one["completion_ids"].shape[1] for one in batches)
    joined: dict[str, Any] = {}
    for key, value in batches[0].items():
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            continue
        rows: list[Any] = []
        for number, group in chosen:
            one = batches[number]
            part = one[key][group * paths : (group + 1) * paths]
            if isinstance(part, torch.Tensor) and part.ndim == 2:
                missing = (prompt - one["prompt_ids"].shape[1], completion - one["completion_ids"].shape[1])
                before = missing[0] if key.startswith("prompt") or key.endswith("token_type_ids") else 0
                after = missing[1] if not key.startswith("prompt") else 0
                part = F.pad(
                    part, (before, after), value=pad_token_id if key in ("prompt_ids", "completion_ids") else 0
                )
            rows.append(part)
        joined[key] = torch.cat(rows) if isinstance(rows[0], torch.Tensor) else [one for part in rows for one in part]
    learned = joined["completion_mask"] * joined.get("tool_mask", 1)
    joined["num_items_in_batch"] = learned.sum()
    return unsplit_pixel_values_by_grid(joined)


def train(recipe: RlRecipe, report: Report = lambda step, steps, logs: None) -> Path:
    """Train as `recipe` says, resuming from its last checkpoint if there is one; returns the policy's folder.

    Raises ConfigError for settings that do not fit, DataError for missing data, PolicyError for missing weights,
    SegmenterError where the segmenter fails on every rollout of a batch.
    """
    try_folder(recipe.out)
    trainer, student = make_trainer(recipe, report)
    return run(trainer, student, recipe, "rl")


@without_library_warnings()
def make_trainer(recipe: RlRecipe, report: Report = lambda step, steps, logs: None) -> tuple[GRPOTrainer, Student]:
    """TRL's trainer for `recipe`, ready to train, and the model in it."""
    arguments = _grpo_config(recipe)  # first: it sets up distributed loading
    student = load_student(recipe, "full")
    max_turns = recipe.max_turns or turn_limit(student)
    recipe.check_turns(max_turns)
    cases = PlayableCases(read_training_cases(recipe))
    segmenter = load_segmenter(recipe.segmenter, device=recipe.device)
    tokenizer = student.processor.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.response_template = _everything_is_an_action(student.reply_start)
    arguments.max_completion_length = recipe.max_completion_length or max_turns * (
        recipe.reply_tokens + _shown_tokens(student, cases)
    )
    arguments.generation_kwargs = _writing(recipe, student)
    store, first = EpisodeStore(recipe.out / "episodes"), arguments.process_index == 0

    def keep(episodes: Sequence[Episode]) -> None:
        if recipe.episodes_every and first and trainer.state.global_step % recipe.episodes_every == 0:
            store.append(episodes, notes={"step": trainer.state.global_step})

    trainer = _Trainer(
        recipe.dynamic_sampling,
        recipe.rollouts_at_once,
        model=student.model,
        reward_funcs=judge(recipe.rewards, keep),
        args=arguments,
        train_dataset=_rows(student, cases),
        processing_class=student.processor,
        peft_config=lora_config(student, recipe),
        callbacks=[LogCallback(report)],
        environment_factory=lambda: SegmentationTool(cases.__getitem__, segmenter, student, max_turns),
    )
    score_by_own_logits(student, recipe.temperature, as_written=True)
    return trainer, student


def _everything_is_an_action(reply_start: str) -> dict[str, Any]:
    """How TRL reads a reply: all of it is a call of `SegmentationTool.act`."""
    call = {"type": "function", "function": {"name": "act", "arguments": {"reply": "{content}"}}}
    field = {"content": "text", "content_args": {"strip": False}, "transform": [call]}
    return {"start_anchor": reply_start, "defaults": {"role": "assistant"}, "fields": {"tool_calls": field}}


def _grpo_config(recipe: RlRecipe) -> GRPOConfig:
    vllm = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": recipe.vllm} if recipe.vllm else {}
    return trainer_config(
        GRPOConfig,
        recipe,
        num_generations=recipe.num_generations,
        temperature=recipe.temperature,
        top_p=recipe.top_p,
        beta=0.0,
        epsilon=recipe.epsilon,
        epsilon_high=recipe.epsilon_high,
        loss_type=recipe.loss_type,
        num_iterations=recipe.num_iterations,
        steps_per_generation=recipe.steps_per_generation,
        scale_rewards="group",
        log_completions=False,
        **vllm,
    )


def _writing(recipe: RlRecipe, student: Student) -> dict[str, Any]:
    """How replies are written: none too long, none with a vision token, which would stand for an image."""
    vision = student.model.generation_config.suppress_tokens or []
    if not recipe.vllm:
        return {"max_new_tokens": recipe.reply_tokens, "suppress_tokens": vision or None}
    if not find_spec("vllm"):
        raise ConfigError("the recipe names a vLLM server: pip install 'trl[vllm]', or leave vllm out")
    if not student.model.config.model_type.startswith("qwen"):
        raise ConfigError(f"{student.name}: vLLM does not know this model; leave vllm out")
    words = student.processor.tokenizer.convert_ids_to_tokens(vision)
    return {"max_tokens": recipe.reply_tokens, "bad_words": words}


def _shown_tokens(student: Student, cases: Sequence[Case]) -> int:
    """An upper bound, as far as some of the cases tell, of the tokens that a turn shows."""
    longest = 0
    for index in np.linspace(0, len(cases) - 1, min(len(cases), _PROBED_CASES)).astype(int):
        case = cases[int(index)]
        seen = Observation(case.id, case.image, case.query, {target_of(case.query): np.ones(case.image.size, bool)})
        messages = student.told(seen, history="full")[-1:]
        read = student.processor.apply_chat_template(
            [messages], add_generation_prompt=True, tokenize=True, return_dict=True
        )
        longest = max(longest, len(read["input_ids"][0]))
    return longest + _SPARE_TOKENS


def _rows(student: Student, cases: Sequence[Case]) -> Dataset:
    """What TRL draws from: for each case its number and what comes before the first image."""
    case = cases[0]
    told = student.told(Observation("", case.image, "?"), history="full")
    before = [{"role": m["role"], "content": "".join(part["text"] for part in m["content"])} for m in told[:-1]]
    prompt = [*before, {"role": "user", "content": ""}]
    numbers = Dataset.from_dict({"case": list(range(len(cases)))})
    return numbers.with_transform(lambda rows: {**rows, "prompt": [prompt] * len(rows["case"])})
