"""Supervised fine-tuning on episodes with thoughts: `ibisagent train sft recipes/sft-nano.toml` (paper, section 3.2).

An episode becomes one conversation (history "full") or one for each turn ("none", "actions"), rendered as the policy
will see it. Loss falls on the words and the end of replies; what the user and the segmenter show, and turns that were
taken back later, carry none. Conversations are not packed: TRL packs none that hold images, and the masks of models
with images do not keep packed neighbours apart; batches of like length waste as little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PillowImage
from pydantic import Field
from transformers.utils.chat_template_utils import render_jinja_template
from trl import SFTConfig, SFTTrainer

from ibisagent.domain import Episode, Image, Mask, Observation, union
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import try_folder
from ibisagent.generation.exports import Conversation, find_image, read_trl
from ibisagent.imaging.images import read_image
from ibisagent.protocol import History, Message
from ibisagent.store import EpisodeStore, StoredEpisodes
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
from ibisagent.training.finetune.recipes import StageRecipe
from ibisagent.training.loop import map_losses
from ibisagent.training.nano.curriculum import plainly, region_target

UNLEARNED = -100  # label of a token without loss
_IMAGES_KEPT = 64  # decoded, for the episodes of one image


class SftRecipe(StageRecipe):
    """How to fine-tune a policy on episodes.

    data: a folder of `ibisagent data build`, its `export` folder, or a folder of episodes (`ibisagent data
    trajectories`, a user's corrections).
    """

    split: str = "train"
    """Of a folder of `ibisagent data build`."""
    leave_out: tuple[str, ...] = ()
    """Families of questions that are not learned from, of a folder of `ibisagent data build`: "correction" and
    "inconsistency" are the paper's self-reflection."""
    eval_split: str = ""
    """Measure the loss on this split as well, at every checkpoint; empty for none."""
    history: History | None = None
    """What the policy sees of earlier turns; none takes its own. RL needs "full"."""
    max_length: int = Field(8192, ge=16)
    """A longer conversation is cut after the last reply that fits."""
    group_by_length: bool = True
    plain: bool = False
    """Say it in the few sentences that ibis-nano is pretrained on, `curriculum.plainly`, instead of the data's own
    words: a model of its size learns what to do from a few thousand episodes, but not to write English besides."""
    side_tasks: dict[str, float] = Field(default_factory=dict)
    """Further losses of models that have an output for them, with their weights; see `SIDE_TASKS`."""


# ------------------------------------------------------------------------------------------------------- examples


@dataclass(frozen=True, eq=False)
class Example:
    """A conversation to learn from. messages: as `protocol.render` makes them; replies may say "loss": False.

    objects: for each image the pixels of what is asked for, by the end of the episode; None where nobody knows.
    """

    messages: list[Message]
    objects: list[Mask | None]


class Examples(Sequence[Example]):
    """Examples that are made when asked for; `lengths` are rough, to group them by."""

    def __init__(self, makers: Sequence[Callable[[], Example]], lengths: Sequence[int]) -> None:
        self._makers, self.lengths = makers, list(lengths)

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        """One example by its number."""
        return self._makers[index]()


def read_examples(
    data: Path, split: str, student: Student, leave_out: Sequence[str] = (), *, plain: bool = False
) -> Examples:
    """The examples in `data` (see `SftRecipe` for all options), told in the words of `student`.

    DataError where there are none, or images are missing; ConfigError where they are in another dialect, or exported
    for a policy that sees other images.
    """
    if (data / "filter").is_dir():
        wanted = {one.id for one in read_trl(data / "export", split) if one.family not in leave_out}
        return _from_episodes(EpisodeStore(data / "filter").open(), student, data, wanted, plain)
    if (data / "trl").is_dir():
        if (student.history, student.style) != ("full", "colour"):
            raise ConfigError(
                f"{data}: exported conversations show whole histories in colour, {student.name} sees history"
                f" '{student.history}' in style '{student.style}': give the folder of 'ibisagent data build' itself"
            )
        told = [one for one in read_trl(data, split) if one.family not in leave_out]
        if not told:
            raise DataError(f"{data}: leave_out leaves nothing to learn from")
        return Examples([_of_conversation(one) for one in told], [len(one.images) for one in told])
    if split not in ("", "train"):
        raise ConfigError(f"{data}: has no split '{split}', nor any other; only folders of 'ibisagent data build' do")
    if leave_out:
        raise ConfigError(f"{data}: has no families of questions to leave out; only folders of 'data build' do")
    return _from_episodes(EpisodeStore(data).open(), student, data, None, plain)


def _of_conversation(conversation: Conversation) -> Callable[[], Example]:
    def make() -> Example:
        images = iter(conversation.images)
        messages = []
        for message in conversation.messages:
            parts = [
                {"type": "image", "image": _open(next(images))} if part["type"] == "image" else part
                for part in message["content"]
            ]
            messages.append({**message, "content": parts})
        return Example(messages, [None] * len(conversation.images))

    return make


def _open(path: Path) -> PillowImage.Image:
    return PillowImage.fromarray(read_image(path).pixels)


def _from_episodes(
    episodes: StoredEpisodes, student: Student, folder: Path, wanted: set[str] | None, plain: bool
) -> Examples:
    names = episodes.column("case_id")
    texts = episodes.reply_lengths()
    spoken = {dict(provenance or ()).get("dialect", "ibis") for provenance in episodes.column("made_by")}
    if others := sorted(spoken - {student.dialect}):
        raise ConfigError(
            f"{folder}: holds episodes in dialect {others[0]}, {student.name} writes {student.dialect}: build the data"
            " in that dialect, or set dialect"
        )
    image_of = lru_cache(maxsize=_IMAGES_KEPT)(lambda source, sha256: find_image(source, folder, sha256))

    def make(number: int, turn: int | None) -> Example:
        episode = episodes[number]
        return _example(plainly(episode) if plain else episode, image_of, student, turn)

    makers: list[Callable[[], Example]] = []
    lengths: list[int] = []
    for number, (name, written) in enumerate(zip(names, texts, strict=True)):
        if wanted is not None and name not in wanted:
            continue
        if student.history == "full":
            makers.append(partial(make, number, None))
            lengths.append(sum(length + 300 for length in written))
        else:
            for turn in _learned(episodes[number]):
                makers.append(partial(make, number, turn))
                lengths.append(written[turn])
    if not makers:
        raise DataError(f"{folder}: holds no episode to learn from; run `ibisagent data build` first")
    return Examples(makers, lengths)


def _learned(episode: Episode) -> list[int]:
    """Turns that carry loss: read without a problem, and not taken back later."""
    undone = episode.undone_turns
    return [k for k, turn in enumerate(episode.turns) if k not in undone and turn.reply.problem is None]


def _example(episode: Episode, image_of: Callable[[str, str], Image], student: Student, turn: int | None) -> Example:
    """All turns of `episode`, or number `turn` alone."""
    last = len(episode.turns) - 1 if turn is None else turn
    turns = episode.turns[: last + 1]
    image = image_of(episode.image_source, episode.image_sha256)
    seen = Observation(episode.case_id, image, episode.query, turns[-1].before, turns[:-1])
    messages = student.told(seen)
    text = {"type": "text", "text": turns[-1].completion.text}
    messages.append({"role": "assistant", "content": [text]})
    if turn is None:
        learned = _learned(episode)
        replies = [message for message in messages if message["role"] == "assistant"]
        for number, message in enumerate(replies):
            message["loss"] = number in learned
    wanted: Mask | None = None
    if episode.masks or episode.answer.absent:
        wanted = union(episode.masks, list(episode.masks), episode.size)
    images = sum(part["type"] == "image" for message in messages for part in message["content"])
    return Example(messages, [wanted] * images)


# ------------------------------------------------------------------------------------------------------- batches


class SideTask(Protocol):
    """A further loss on what the model puts out beside its words."""

    def targets(self, example: Example) -> torch.Tensor:
        """One row for each image of `example`."""
        ...

    def loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """Of a batch: the model's output, the rows of its examples joined."""
        ...


class RegionMap:
    """The map of the object asked for: cross-entropy of each cell, and overlap (1 - soft Dice), as in pretraining."""

    def targets(self, example: Example) -> torch.Tensor:
        """(images, LOCATIONS, LOCATIONS): share of each cell that is object; -1 where the object is unknown."""
        return torch.from_numpy(np.stack([region_target(wanted) for wanted in example.objects]))

    def loss(self, output: Any, targets: torch.Tensor) -> torch.Tensor:
        """Mean over the images whose object is known; 0 if there is none."""
        if getattr(output, "region_logits", None) is None:
            raise ConfigError("side task 'region': the model has no map of the object; leave it out of side_tasks")
        known = targets[:, 0, 0] >= 0
        logits, wanted = output.region_logits.float()[known], targets[known]
        if not len(wanted):
            return output.region_logits.sum() * 0
        return sum(map_losses(logits, wanted), logits.new_zeros(()))


SIDE_TASKS: Mapping[str, Callable[[], SideTask]] = {"region": RegionMap}


@dataclass(frozen=True)
class _Piece:
    """A stretch of a conversation: per-token rows ("input_ids" and what else the processor gives), and the tensors of
    the images that it `shows`."""

    tokens: dict[str, list[int]]
    images: dict[str, torch.Tensor]
    shows: int
    learned: bool


class Collator:
    """Examples -> a batch for the model, with labels.

    A conversation is tokenised in the stretches that it will be generated in: what is shown, then each reply, so that
    the tokens of a reply are those that the policy would write and no token holds the end of one and the start of the
    other.
    """

    def __init__(self, student: Student, max_length: int, side_tasks: Mapping[str, SideTask] | None = None) -> None:
        self._student, self._max_length, self._side_tasks = student, max_length, side_tasks or {}

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, labels (B, L), right-padded; images and side targets one after the other."""
        pieces = [self._pieces(example) for example in examples]
        examples = [
            replace(example, objects=example.objects[: sum(part.shows for part in parts)])
            for example, parts in zip(examples, pieces, strict=True)
        ]
        rows: list[dict[str, list[int]]] = []
        for parts in pieces:
            row = {key: [token for part in parts for token in part.tokens[key]] for key in parts[0].tokens}
            row["labels"] = [
                token if part.learned else UNLEARNED for part in parts for token in part.tokens["input_ids"]
            ]
            row["attention_mask"] = [1] * len(row["input_ids"])
            rows.append(row)
        longest = max(len(row["input_ids"]) for row in rows)
        filling = {"input_ids": self._student.processor.tokenizer.pad_token_id, "labels": UNLEARNED}
        batch = {
            key: torch.tensor([row[key] + [filling.get(key, 0)] * (longest - len(row[key])) for row in rows])
            for key in rows[0]
        }
        shown = [part.images for parts in pieces for part in parts if part.images]
        batch |= {key: torch.cat([one[key] for one in shown]) for key in (shown[0] if shown else ())}
        for name, task in self._side_tasks.items():
            batch[_side_key(name)] = torch.cat([task.targets(example) for example in examples])
        return batch

    def _pieces(self, example: Example) -> list[_Piece]:
        """The stretches of a conversation, cut after the last learned reply that fits."""
        processor = self._student.processor
        rendered: Any = render_jinja_template(
            conversations=[example.messages],
            chat_template=processor.chat_template,
            return_assistant_tokens_mask=True,
            **processor.tokenizer.special_tokens_map,
        )
        [text], [spans] = rendered
        images = [
            part["image"] for message in example.messages for part in message["content"] if part["type"] == "image"
        ]
        pieces: list[_Piece] = []
        kept, length, start, used = 0, 0, 0, 0
        for begin, end in spans:
            for stretch, learned in ((text[start:begin], False), (text[begin:end], True)):
                count = stretch.count(processor.image_token)
                pieces.append(self._piece(stretch, images[used : used + count], learned))
                used += count
                length += len(pieces[-1].tokens["input_ids"])
            start = end
            if length > self._max_length:
                break
            kept = len(pieces)
        if not kept:
            raise DataError(
                f"a conversation of {length} tokens up to its first reply does not fit max_length {self._max_length}:"
                " raise it, or lower max_pixels"
            )
        return pieces[:kept]

    def _piece(self, text: str, images: list[Any], learned: bool) -> _Piece:
        read = self._student.processor(
            text=[text], images=[images] if images else None, add_special_tokens=False, return_tensors="pt"
        )
        length = read["input_ids"].shape[1]
        tokens = {
            key: value[0].tolist()
            for key, value in read.items()
            if key != "attention_mask" and value.shape[:2] == (1, length) and value.ndim == 2
        }
        shown = {key: value for key, value in read.items() if key not in (*tokens, "attention_mask")}
        return _Piece(tokens, shown, len(images), learned)


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
    """Fine-tune as `recipe` says, resuming from its last checkpoint if there is one; returns the policy's folder.

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
    arguments = trainer_config(  # first: it sets up distributed loading
        SFTConfig,
        recipe,
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="group_by_length" if recipe.group_by_length else "random",
        eval_strategy="steps" if recipe.eval_split else "no",
        eval_steps=recipe.save_steps,
        prediction_loss_only=True,
    )
    student = load_student(recipe, recipe.history)
    read = partial(read_examples, student=student, leave_out=recipe.leave_out, plain=recipe.plain)
    examples = read(recipe.data, recipe.split)
    evaluated = read(recipe.data, recipe.eval_split) if recipe.eval_split else None
    tasks = {name: (weight, SIDE_TASKS[name]()) for name, weight in recipe.side_tasks.items()}
    collate = Collator(student, recipe.max_length, {name: task for name, (_, task) in tasks.items()})
    sources: dict[str, Any] = {"train": examples, "eval": evaluated}
    trainer = _Trainer(
        tasks,
        model=student.model,
        args=arguments,
        data_collator=lambda rows: collate([sources[row["source"]][row["example"]] for row in rows]),
        train_dataset=_rows("train", examples),
        eval_dataset=_rows("eval", evaluated) if evaluated else None,
        processing_class=student.processor,
        peft_config=lora_config(student, recipe),
        callbacks=[LogCallback(report)],
    )
    score_by_own_logits(student)
    return trainer, student


def _rows(source: str, examples: Examples) -> Dataset:
    """What TRL shuffles and groups: numbers of examples."""
    count = len(examples)
    return Dataset.from_dict({"source": [source] * count, "example": list(range(count)), "length": examples.lengths})
