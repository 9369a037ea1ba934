"""Supervised fine-tuning on episodes with thoughts: `ibisagent train sft recipes/sft-nano.toml` (paper, section 3.2).

An episode becomes one conversation (history "full") or one for each turn ("none", "actions"), rendered as the policy
will see it. Loss falls on the words and the end of replies; what the user and the segmenter show, and turns that were
taken back later, carry none. Conversations are not packed: TRL packs none that hold pictures, and the masks of models
with pictures do not keep packed neighbours apart; batches of like length waste as little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PillowImage
from pydantic import Field
from torch.nn import functional as F
from transformers.utils.chat_template_utils import render_jinja_template
from trl import SFTConfig, SFTTrainer

from ibisagent.domain import Episode, Image, Mask, Observation, union
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import try_folder
from ibisagent.generation.exports import Conversation, read_trl
from ibisagent.imaging.images import read_image
from ibisagent.policies.nano import LOCATIONS
from ibisagent.protocol import History, Message
from ibisagent.store import EpisodeStore, StoredEpisodes
from ibisagent.training.finetune.common import (
    Report,
    Student,
    Told,
    find_image,
    load_student,
    lora_config,
    run,
    score_by_own_logits,
    trainer_settings,
    without_library_warnings,
)
from ibisagent.training.finetune.recipes import StageRecipe
from ibisagent.training.nano.curriculum import plainly

UNLEARNT = -100  # label of a token without loss
_PICTURES_KEPT = 64  # decoded, for the episodes of one picture


class SftRecipe(StageRecipe):
    """How to fine-tune a policy on episodes.

    data: a folder of `ibisagent data build`, its `export` folder, or a folder of episodes (`ibisagent data
    trajectories`, a user's corrections).
    """

    split: str = "train"
    """Of a folder of `build-data`."""
    leave_out: tuple[str, ...] = ()
    """Families of questions that are not learnt from, of a folder of `build-data`: "correction" and "inconsistency"
    are the paper's self-reflection."""
    look_split: str = ""
    """Measure the loss on this split as well, at every checkpoint; empty for none."""
    history: History | None = None
    """What the policy sees of earlier turns; none takes its own. RL needs "full"."""
    max_tokens: int = Field(8192, ge=16)
    """A longer conversation is cut after the last reply that fits."""
    group_by_length: bool = True
    plain: bool = False
    """Say it in the few sentences that ibis-nano is pretrained on, `lessons.plainly`, instead of the data's own words:
    a model of its size learns what to do from a few thousand episodes, but not to write English besides."""
    side_tasks: dict[str, float] = Field(default_factory=dict)
    """Further losses of models that have an output for them, with their weights; see `SIDE_TASKS`."""


# ------------------------------------------------------------------------------------------------------- lessons


@dataclass(frozen=True, eq=False)
class Lesson:
    """A conversation to learn from. messages: as `protocol.render` makes them; replies may say "loss": False.

    objects: for each picture the pixels of what is asked for, by the end of the episode; None where nobody knows.
    """

    messages: list[Message]
    objects: list[Mask | None]


class Lessons(Sequence[Lesson]):
    """Lessons that are made when asked for; `lengths` are rough, to group them by."""

    def __init__(self, makers: Sequence[Callable[[], Lesson]], lengths: Sequence[int]) -> None:
        self._makers, self.lengths = makers, list(lengths)

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        """One lesson by its number."""
        return self._makers[index]()


def read_lessons(
    data: Path, split: str, student: Student, leave_out: Sequence[str] = (), *, plain: bool = False
) -> Lessons:
    """The lessons in `data` (see `SftRecipe` for all options), told in the words of `student`.

    DataError where there are none, or pictures are missing; ConfigError where they are in another dialect, or exported
    for a policy that sees other pictures.
    """
    if (data / "filter").is_dir():
        wanted = {one.id for one in read_trl(data / "export", split) if one.family not in leave_out}
        return _from_episodes(EpisodeStore(data / "filter").open(), student, data, wanted, plain)
    if (data / "trl").is_dir():
        if (student.history, student.style) != ("full", "colour"):
            raise ConfigError(
                f"{data}: exported conversations show whole histories in colour, {student.name} sees history"
                f" '{student.history}' in style '{student.style}': give the folder of build-data itself"
            )
        told = [one for one in read_trl(data, split) if one.family not in leave_out]
        if not told:
            raise DataError(f"{data}: leave_out leaves nothing to learn from")
        return Lessons([_of_conversation(one) for one in told], [len(one.pictures) for one in told])
    if split not in ("", "train"):
        raise ConfigError(f"{data}: has no split '{split}', nor any other; only folders of build-data do")
    if leave_out:
        raise ConfigError(f"{data}: has no families of questions to leave out; only folders of build-data do")
    return _from_episodes(EpisodeStore(data).open(), student, data, None, plain)


def _of_conversation(conversation: Conversation) -> Callable[[], Lesson]:
    def make() -> Lesson:
        pictures = iter(conversation.pictures)
        messages = []
        for message in conversation.messages:
            parts = [
                {"type": "image", "image": _open(next(pictures))} if part["type"] == "image" else part
                for part in message["content"]
            ]
            messages.append({**message, "content": parts})
        return Lesson(messages, [None] * len(conversation.pictures))

    return make


def _open(path: Path) -> PillowImage.Image:
    return PillowImage.fromarray(read_image(path).pixels)


def _from_episodes(
    episodes: StoredEpisodes, student: Student, folder: Path, wanted: set[str] | None, plain: bool
) -> Lessons:
    names = episodes.column("case_id")
    texts = episodes.reply_lengths()
    spoken = {dict(made_by or ()).get("dialect", "ibis") for made_by in episodes.column("made_by")}
    if foreign := sorted(spoken - {student.dialect}):
        raise ConfigError(
            f"{folder}: holds episodes in dialect {foreign[0]}, {student.name} writes {student.dialect}: build the data"
            " in that dialect, or set dialect"
        )
    image_of = lru_cache(maxsize=_PICTURES_KEPT)(lambda source, sha256: find_image(source, folder, sha256))

    def make(number: int, turn: int | None) -> Lesson:
        episode = episodes[number]
        return _lesson(plainly(episode) if plain else episode, image_of, student, turn)

    makers: list[Callable[[], Lesson]] = []
    lengths: list[int] = []
    for number, (name, written) in enumerate(zip(names, texts, strict=True)):
        if wanted is not None and name not in wanted:
            continue
        if student.history == "full":
            makers.append(partial(make, number, None))
            lengths.append(sum(length + 300 for length in written))
        else:
            for turn in _learnt(episodes[number]):
                makers.append(partial(make, number, turn))
                lengths.append(written[turn])
    if not makers:
        raise DataError(f"{folder}: holds no episode to learn from; run `ibisagent data build` first")
    return Lessons(makers, lengths)


def _learnt(episode: Episode) -> list[int]:
    """Turns that carry loss: read without a problem, and not taken back later."""
    undone = episode.undone_turns
    return [k for k, turn in enumerate(episode.turns) if k not in undone and turn.reply.problem is None]


def _lesson(episode: Episode, image_of: Callable[[str, str], Image], student: Student, turn: int | None) -> Lesson:
    """All turns of `episode`, or number `turn` alone."""
    last = len(episode.turns) - 1 if turn is None else turn
    turns = episode.turns[: last + 1]
    image = image_of(episode.image_source, episode.image_sha256)
    seen = Observation(episode.case_id, image, episode.query, turns[-1].before, turns[:-1])
    messages = student.told(seen)
    text = {"type": "text", "text": turns[-1].completion.text}
    messages.append({"role": "assistant", "content": [text]})
    if turn is None:
        learnt = _learnt(episode)
        replies = [message for message in messages if message["role"] == "assistant"]
        for number, message in enumerate(replies):
            message["loss"] = number in learnt
    wanted: Mask | None = None
    if episode.masks or episode.answer.absent:
        wanted = union(episode.masks, list(episode.masks), episode.size)
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    return Lesson(messages, [wanted] * pictures)


# ------------------------------------------------------------------------------------------------------- batches


class SideTask(Protocol):
    """A further loss on what the model puts out beside its words."""

    def targets(self, lesson: Lesson) -> torch.Tensor:
        """One row for each picture of `lesson`."""
        ...

    def loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """Of a batch: the model's output, the rows of its lessons joined."""
        ...


class RegionMap:
    """The map of the object asked for: cross-entropy of each cell, and overlap (1 - soft Dice), as in pretraining."""

    def targets(self, lesson: Lesson) -> torch.Tensor:
        """(pictures, LOCATIONS, LOCATIONS): share of each cell that is object; -1 where the object is unknown."""
        unknown = np.full((LOCATIONS, LOCATIONS), -1, np.float32)
        maps = [
            unknown
            if wanted is None
            else cv2.resize(wanted.astype(np.float32), (LOCATIONS, LOCATIONS), interpolation=cv2.INTER_AREA)
            for wanted in lesson.objects
        ]
        return torch.from_numpy(np.stack(maps))

    def loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """Mean over the pictures whose object is known; 0 if there is none."""
        if getattr(output, "region_logits", None) is None:
            raise ConfigError("side task 'region': the model has no map of the object; leave it out of side_tasks")
        known = targets[:, 0, 0] >= 0
        logits, wanted = output.region_logits.float()[known], targets[known]
        if not len(wanted):
            return output.region_logits.sum() * 0
        inside = logits.sigmoid()
        shared = 2 * (inside * wanted).sum((1, 2)) + 1
        overlap = shared / (inside.sum((1, 2)) + wanted.sum((1, 2)) + 1)
        return F.binary_cross_entropy_with_logits(logits, wanted) + (1 - overlap).mean()


SIDE_TASKS: Mapping[str, Callable[[], SideTask]] = {"region": RegionMap}


@dataclass(frozen=True)
class _Piece:
    """A stretch of a conversation: per-token rows ("input_ids" and what else the processor gives), and the tensors of
    the pictures that it `shows`."""

    tokens: dict[str, list[int]]
    pictures: dict[str, torch.Tensor]
    shows: int
    learnt: bool


class Collator:
    """Lessons -> a batch for the model, with labels.

    A conversation is tokenised in the stretches that it will be generated in: what is shown, then each reply, so that
    the tokens of a reply are those that the policy would write and no token holds the end of one and the start of the
    other.
    """

    def __init__(self, student: Student, max_tokens: int, side_tasks: Mapping[str, SideTask] | None = None) -> None:
        self._student, self._max_tokens, self._side_tasks = student, max_tokens, side_tasks or {}

    def __call__(self, lessons: Sequence[Lesson]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels (B, L), right-padded; pictures and side targets one after the other."""
        pieces = [self._pieces(lesson) for lesson in lessons]
        lessons = [
            replace(lesson, objects=lesson.objects[: sum(part.shows for part in parts)])
            for lesson, parts in zip(lessons, pieces, strict=True)
        ]
        rows: list[dict[str, list[int]]] = []
        for parts in pieces:
            row = {key: [token for part in parts for token in part.tokens[key]] for key in parts[0].tokens}
            row["labels"] = [token if part.learnt else UNLEARNT for part in parts for token in part.tokens["input_ids"]]
            row["attention_mask"] = [1] * len(row["input_ids"])
            rows.append(row)
        longest = max(len(row["input_ids"]) for row in rows)
        filling = {"input_ids": self._student.processor.tokenizer.pad_token_id, "labels": UNLEARNT}
        batch = {
            key: torch.tensor([row[key] + [filling.get(key, 0)] * (longest - len(row[key])) for row in rows])
            for key in rows[0]
        }
        shown = [part.pictures for parts in pieces for part in parts if part.pictures]
        batch |= {key: torch.cat([one[key] for one in shown]) for key in (shown[0] if shown else ())}
        for name, task in self._side_tasks.items():
            batch[_side_key(name)] = torch.cat([task.targets(lesson) for lesson in lessons])
        return batch

    def _pieces(self, lesson: Lesson) -> list[_Piece]:
        """The stretches of a conversation, cut after the last learnt reply that fits."""
        processor = self._student.processor
        rendered: Any = render_jinja_template(
            conversations=[lesson.messages],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        [text], [spans] = rendered
        pictures = [
            part["image"] for message in lesson.messages for part in message["content"] if part["type"] == "image"
        ]
        pieces: list[_Piece] = []
        kept, length, start, used = 0, 0, 0, 0
        for begin, end in spans:
            for stretch, learnt in ((text[start:begin], False), (text[begin:end], True)):
                count = stretch.count(processor.image_token)
                pieces.append(self._piece(stretch, pictures[used : used + count], learnt))
                used += count
                length += len(pieces[-1].tokens["input_ids"])
            start = end
            if length > self._max_tokens:
                break
            kept = len(pieces)
        if not kept:
            raise DataError(
                f"a conversation of {length} tokens up to its first reply does not fit max_tokens {self._max_tokens}:"
                " raise it, or lower max_pixels"
            )
        return pieces[:kept]

    def _piece(self, text: str, pictures: list[Any], learnt: bool) -> _Piece:
        read = self._student.processor(
            text=[text], images=[pictures] if pictures else None, add_special_tokens=False, return_tensors="pt"
        )
        length = read["input_ids"].shape[1]
        tokens = {
            key: value[0].tolist()
            for key, value in read.items()
            if key != "attention_mask" and value.shape[:2] == (1, length) and value.ndim == 2
        }
        shown = {key: value for key, value in read.items() if key not in (*tokens, "attention_mask")}
        return _Piece(tokens, shown, len(pictures), learnt)


def _side_key(name: str) -> str:
    return f"side_{name}"


# ------------------------------------------------------------------------------------------------------ training


class _Trainer(SFTTrainer):
    """TRL's, with side tasks."""

    def __init__(self, side_tasks: Mapping[str, tuple[float, SideTask]], **options: Any) -> None:
        self._side_tasks = side_tasks
        super().__init__(**options)

    def _send_telemetry(self) -> None:
        """Nobody is told that somebody trains."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss and the weighted side tasks, averaged over the batches of an update."""
        targets = {name: inputs.pop(_side_key(name)) for name in self._side_tasks}
        with _last_output(model) as seen:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        for name, (weight, task) in self._side_tasks.items():
            value = task.loss(seen[-1], targets[name])
            self._metrics["train" if self.model.training else "eval"][f"side/{name}"].append(value.item())
            loss = loss + weight * value / (self.current_gradient_accumulation_steps if self.model.training else 1)
        return loss


@contextmanager
def _last_output(model: Any) -> Iterator[list[Any]]:
    """What the model gave out while the block ran."""
    seen: list[Any] = []
    hook = model.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    try:
        yield seen
    finally:
        hook.remove()


def train(recipe: SftRecipe, report: Report = lambda step, steps, logs: None) -> Path:
    """Fine-tune as `recipe` says, going on from its last checkpoint if there is one; returns the policy's folder.

    Raises ConfigError for settings that do not fit, DataError where there is nothing to learn from, PolicyError for
    missing weights.
    """
    if unknown := sorted(recipe.side_tasks.keys() - SIDE_TASKS.keys()):
        raise ConfigError(f"unknown side task '{unknown[0]}'; there are: {', '.join(SIDE_TASKS)}")
    try_folder(recipe.out)
    trainer, student = make_trainer(recipe, report)
    return run(trainer, student, recipe, "sft")


@without_library_warnings()
def make_trainer(recipe: SftRecipe, report: Report = lambda step, steps, logs: None) -> tuple[SFTTrainer, Student]:
    """TRL's trainer for `recipe`, ready to train, and the model in it."""
    arguments = SFTConfig(  # first: it sets up distributed loading
        **trainer_settings(recipe),
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        eval_strategy="steps" if recipe.look_split else "no",
        eval_steps=recipe.save_every,
        prediction_loss_only=True,
    )
    student = load_student(recipe, recipe.history)
    read = partial(read_lessons, student=student, leave_out=recipe.leave_out, plain=recipe.plain)
    lessons = read(recipe.data, recipe.split)
    looked = read(recipe.data, recipe.look_split) if recipe.look_split else None
    tasks = {name: (weight, SIDE_TASKS[name]()) for name, weight in recipe.side_tasks.items()}
    collate = Collator(student, recipe.max_tokens, {name: task for name, (_, task) in tasks.items()})
    sources: dict[str, Any] = {"train": lessons, "look": looked}
    trainer = _Trainer(
        tasks,
        model=student.model,
        args=arguments,
        data_collator=lambda rows: collate([sources[row["source"]][row["lesson"]] for row in rows]),
        train_dataset=_rows("train", lessons),
        eval_dataset=_rows("look", looked) if looked else None,
        processing_class=student.processor,
        peft_config=lora_config(student, recipe),
        callbacks=[Told(report)],
    )
    score_by_own_logits(student)
    return trainer, student


def _rows(source: str, lessons: Lessons) -> Dataset:
    """What TRL shuffles and groups: numbers of lessons."""
    count = len(lessons)
    return Dataset.from_dict({"source": [source] * count, "lesson": list(range(count)), "length": lessons.lengths})
