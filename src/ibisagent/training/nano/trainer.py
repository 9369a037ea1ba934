"""Trains `ibis-nano` from scratch on image-mask pairs: `ibisagent train nano recipes/ibis-nano.toml`.

Losses: cross-entropy on the reply's words; for each place in the reply, cross-entropy against a distribution over all
right places (deep inside the missed or leaked region, near the box corner) instead of one of them; and a map of the
object that is asked for. What it is taught: `curriculum`.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ibisagent.config import NetworkRecipe, Paths
from ibisagent.domain import Box, Click
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import one_line, try_folder
from ibisagent.generation.teacher.phrasings import DESCRIPTIONS, SHARES, phrasings
from ibisagent.imaging.clicks import bounding_box
from ibisagent.imaging.masks import iou
from ibisagent.policies.nano import (
    IbisNanoConfig,
    IbisNanoForConditionalGeneration,
    IbisNanoImageProcessor,
    IbisNanoProcessor,
)
from ibisagent.policies.nano_input import LOCATIONS, location_text, snap_locations
from ibisagent.policies.one_by_one import DONE, FIRST_THOUGHT, LEAKED, MISSED, NOT_THERE
from ibisagent.protocol import START_LINE
from ibisagent.segmenters.ibis_click import PACKAGED_WEIGHTS, read_click_network
from ibisagent.training.backbone import BackboneRecipe
from ibisagent.training.backbone import train as train_backbone
from ibisagent.training.click.states import is_development
from ibisagent.training.images import TrainingImages, context_features, read_training_cases
from ibisagent.training.loop import (
    Report,
    TrainingRun,
    ignore_progress,
    map_losses,
    run_to_the_end,
    warn_without_metrics,
)
from ibisagent.training.nano import curriculum
from ibisagent.training.nano.curriculum import CELL, VIEW, Curriculum, Example, Pair, pairs_of, region_target
from ibisagent.training.nano.on_policy import OnPolicyStates
from ibisagent.training.nano.vocabulary import write_vocabulary

FEATURE_DROPOUT = 0.2  # of the backbone's channels in each example, against learning images by heart
AVERAGE_DECAY = 0.998
BETAS = (0.9, 0.98)  # of AdamW
DECISION = 5  # first tokens of a reply: they decide whether it clicks, corrects, stops or refuses
DECISION_WEIGHT = 4.0  # of their loss, of which there are few among the many that follow from them

ON_POLICY: dict[str, Any] = {"history": "actions", "two_pass": True}
"""The configuration that a policy needs for on-policy states: what it said, and what it would say without the
mask."""
ADDED_RATE = 20.0  # times the rate of what is trained already

SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<|system|>")
TAGS = ("<think>", "</think>", "<action>", "</action>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- else -%}{%- set parts = message['content'] -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}"
    "{%- if message.get('loss', true) is false -%}"
    "{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}{{- '<|end|>' -}}"
    "{%- else -%}"
    "{%- generation -%}{%- for part in parts -%}{{- part['text'] -}}{%- endfor -%}"
    "{%- for call in message.get('tool_calls') or [] -%}"
    "{{- call['function']['name'] + (call['function']['arguments'] | tojson) -}}"
    "{%- endfor -%}{{- '<|end|>' -}}{%- endgeneration -%}"
    "{%- endif -%}"
    "{%- else -%}{{- '<|system|>' if message['role'] == 'system' else '<|user|>' -}}"
    "{%- for part in parts -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
"""Marks what is to be learned, without replies of which a message says "loss": false; role "tool" reads like "user"."""


def build_processor(names: Sequence[str], words: int = 1280) -> IbisNanoProcessor:
    """A processor whose tokenizer knows `words` byte-level BPE tokens from our own texts, then the location tokens."""
    corpus = [START_LINE, *curriculum.ANYTHING, *curriculum.SYLLABLES, *SHARES, *sum(DESCRIPTIONS.values(), ())]
    corpus += [text for kind in curriculum.KINDS for _, text in phrasings(kind, held_out=False)]
    thoughts = (FIRST_THOUGHT, MISSED, LEAKED, DONE, NOT_THERE)
    corpus += [text.format(name) for name in names for text in ("Segment the {}.", "Is there a {}?", *thoughts)]
    corpus += ["click + (", "click - (", "; box (", ") (", "undo", "stop; absent ", "is segmented.", "yes", "no"] * 200
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    missing = words + len(TAGS) - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<unused{index}>", normalized=False) for index in range(missing)])
    cells = [location_text(column, row) for row in range(LOCATIONS) for column in range(LOCATIONS)]
    tokenizer.add_tokens([AddedToken(cell, normalized=False, special=False) for cell in cells])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<image>", "<|system|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    return IbisNanoProcessor(IbisNanoImageProcessor(), wrapped, chat_template=CHAT_TEMPLATE)


def build_model(processor: IbisNanoProcessor) -> IbisNanoForConditionalGeneration:
    """A fresh model of the default size for `processor`'s vocabulary."""
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=576,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=4096,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = IbisNanoConfig(
        text_config=text,
        image_token_id=processor.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = IbisNanoForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def collate(examples: Sequence[Example], processor: IbisNanoProcessor) -> tuple[dict[str, torch.Tensor], int]:
    """Model inputs of a batch, left-padded, and how many last positions predict or hold all replies."""
    prompts = [f"<|user|>{example.prompt}<image><|assistant|>" for example in examples]
    replies = [snap_locations(example.reply) + "<|end|>" for example in examples]
    texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    batch = processor(text=texts, padding=True, return_tensors="pt")
    lengths = [len(ids) for ids in processor.tokenizer(replies)["input_ids"]]
    labels = batch["input_ids"].clone()
    for row, length in enumerate(lengths):
        labels[row, :-length] = -100
    pixels = np.stack([np.concatenate([e.pixels, e.current[..., None] * np.uint8(255)], axis=2) for e in examples])
    batch["pixel_values"] = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    batch["labels"] = labels
    return dict(batch), max(lengths) + 1


def seen_features(
    model: IbisNanoForConditionalGeneration, batch: dict[str, torch.Tensor], examples: Sequence[Example]
) -> torch.Tensor:
    """The backbone's features of a batch, less what the examples hide of them; those of a view that is asked about
    multiple times are made once."""
    views = {id(example.pixels): number for number, example in enumerate(examples)}
    place = {view: number for number, view in enumerate(views)}
    backbone = model.backbone
    with torch.set_grad_enabled(torch.is_grad_enabled() and backbone.position.requires_grad):
        levels = backbone.levels(batch["pixel_values"][list(views.values()), :3])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            features = backbone.merged(levels)
    kept = torch.from_numpy(np.stack([example.kept for example in examples]))
    return features[[place[id(example.pixels)] for example in examples]] * kept[:, :, None, None]


def losses(
    model: IbisNanoForConditionalGeneration, examples: Sequence[Example], processor: IbisNanoProcessor
) -> tuple[torch.Tensor, dict[str, float]]:
    """The total loss of a batch, and its parts for the log."""
    batch, kept = collate(examples, processor)
    labels = batch.pop("labels")[:, -kept + 1 :]
    batch["image_features"] = F.dropout2d(seen_features(model, batch, examples), FEATURE_DROPOUT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, logits_to_keep=kept, use_cache=False)
    assert output.logits is not None
    assert output.region_logits is not None
    logprobs = output.logits[:, :-1].float().log_softmax(dim=-1)
    words = model.word_count
    is_place = labels >= words
    is_word = (labels >= 0) & ~is_place
    order = (labels >= 0).cumsum(dim=1)
    weight = 1 + (DECISION_WEIGHT - 1) * (order <= DECISION)[is_word]
    word_loss = -(weight * logprobs[is_word].gather(1, labels[is_word][:, None])[:, 0]).sum() / weight.sum()
    place_logprobs = logprobs[is_place][:, words:]
    wanted = np.array([place.ravel() for example in examples for place in example.places], np.float32)
    cross = -(torch.from_numpy(wanted).view_as(place_logprobs) * place_logprobs).sum() / max(len(wanted), 1)
    region, overlap = region_losses(output.region_logits, examples)
    total = word_loss + 0.5 * cross + region + overlap
    parts = {"words": word_loss.item(), "places": cross.item(), "region": region.item(), "overlap": overlap.item()}
    return total, parts


def region_losses(region_logits: torch.Tensor, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the maps of the objects asked for, (N, LOCATIONS, LOCATIONS) logits: cross-entropy of each cell, and overlap,
    1 less soft Dice. Examples that ask for no region count nothing."""
    target = torch.from_numpy(np.stack([region_target(example.ground_truth) for example in examples]))
    known = target[:, 0, 0] >= 0
    return map_losses(region_logits.float()[known], target[known])


@torch.no_grad()
def believed(
    model: IbisNanoForConditionalGeneration, processor: IbisNanoProcessor, examples: Sequence[Example]
) -> np.ndarray:
    """Where the model takes the objects of examples to be, (N, LOCATIONS, LOCATIONS) in [0, 1]."""
    batch, _ = collate(examples, processor)
    del batch["labels"]
    batch["image_features"] = seen_features(model, batch, examples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        region = model(**batch, logits_to_keep=1, use_cache=False).region_logits
    assert region is not None
    return region.float().sigmoid().numpy()


@torch.no_grad()
def validate(
    model: IbisNanoForConditionalGeneration, processor: IbisNanoProcessor, pairs: Sequence[Pair], images: TrainingImages
) -> dict[str, float]:
    """First-click hit rate and first-box IoU on untouched images, places decoded greedily after the right words."""
    hits, overlaps = [], []
    cells = LOCATIONS**2
    for start in range(0, len(pairs), 32):
        chunk = pairs[start : start + 32]
        examples = []
        masks = [images.mask(pair.number) for pair in chunk]
        for pair, mask in zip(chunk, masks, strict=True):
            example = Example(pair.image, images.pixels[pair.image], mask)
            example.query = f"Segment the {pair.name}."
            example.answer(FIRST_THOUGHT.format(pair.name), Click(0, 0, True, ""), Box(0, 0, 1, 1, ""))
            examples.append(example)
        batch, _ = collate(examples, processor)
        labels = batch.pop("labels")
        batch["image_features"] = seen_features(model, batch, examples)
        chosen = np.zeros((len(chunk), 3), int)
        for place in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(**batch, use_cache=False).logits
            for row in range(len(chunk)):
                position = int((labels[row] >= model.word_count).nonzero()[place])
                cell = int(logits[row, position - 1, -cells:].argmax())
                chosen[row, place] = cell
                batch["input_ids"][row, position] = model.word_count + cell
        for mask, (click, first, last) in zip(masks, chosen, strict=True):
            row, column = divmod(int(click), LOCATIONS)
            hits.append(bool(mask[row * CELL + CELL // 2, column * CELL + CELL // 2]))
            (y0, x0), (y1, x1) = divmod(int(first), LOCATIONS), divmod(int(last), LOCATIONS)
            guess, ground_truth = np.zeros(VIEW, bool), np.zeros(VIEW, bool)
            guess[y0 * CELL + 2 : y1 * CELL + 2, x0 * CELL + 2 : x1 * CELL + 2] = True
            box = bounding_box(mask, "")
            assert box is not None
            ground_truth[box.y0 : box.y1, box.x0 : box.x1] = True
            overlaps.append(iou(guess, ground_truth))
    good = float(np.mean(np.array(overlaps) >= 0.5))
    return {
        "hit": round(float(np.mean(hits)), 3),
        "box_iou": round(float(np.mean(overlaps)), 3),
        "box_50": round(good, 3),
    }


class NanoRecipe(NetworkRecipe):
    """How to train the nano policy."""

    data: Paths
    """Folder or folders in BiomedParse's layout, or manifests; images are kept in memory (0.2 MB each)."""
    out: Path
    """Folder for the checkpoint and the model, `ibis-nano`; a run that was stopped resumes from there."""
    licence_class: str = ""
    """Use only rows of this licence class; empty for all."""
    start: Path | None = None
    """Folder of an ibis-nano to start from, such as the packaged one; none starts from scratch."""
    backbone: Path | None = None
    """Weights of a backbone that is trained already (`training.backbone`), to share it between runs."""
    backbone_examples: int = Field(64_000, ge=1)
    """Views that the backbone learns from first, where neither `start` nor `backbone` brings one."""
    cache: Path | None = None
    """Folder for the segmenter's context features of the training images (0.4 MB each), to share it between runs; none
    means `out`."""
    segmenter: Path = PACKAGED_WEIGHTS
    """Weights of the `ibis-click` that makes the masks of later turns."""
    examples: int = Field(60_000, ge=1)
    """Turns to learn from: the length of the run."""
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 7e-4
    warmup_steps: PositiveInt = 60
    eval_every: PositiveInt = 4_000
    on_policy: bool = False
    """Go on from what `start` itself would have done (`training.nano.on_policy`): for a second, shorter run."""
    seed: int = 0

    @model_validator(mode="after")
    def _on_policy_needs_a_start(self) -> Self:
        if self.on_policy and self.start is None:
            raise ValueError("on_policy: set start to the trained ibis-nano whose states they are")
        if self.start is not None and self.backbone is not None:
            raise ValueError("set either start, which has a backbone, or backbone")
        return self

    @property
    def total_examples(self) -> int:
        """Of the whole run, the backbone's included."""
        return self.examples + (self.backbone_examples if self.start is None and self.backbone is None else 0)


def train(recipe: NanoRecipe, report: Report = ignore_progress) -> Path:
    """Train as `recipe` says, resuming from its checkpoint if there is one; returns the model's folder.

    A run that was interrupted sees other random examples than one that was not: its weights differ slightly.
    Raises ConfigError for a checkpoint of another recipe, DataError where there is nothing to train on.
    """
    try_folder(recipe.out)
    cases = read_training_cases(recipe.data, recipe.licence_class)
    images = TrainingImages.of(cases)
    pairs = pairs_of(images)
    learned = [pair for pair in pairs if not is_development(pair.row.patient)]
    held_out = [pair for pair in pairs if is_development(pair.row.patient)]
    if not learned:
        raise DataError(f"{recipe.data[0]}: no training pair is left after licence_class and held-out patients")
    warn_without_metrics(recipe.out, held_out)
    before = recipe.total_examples - recipe.examples
    if before:
        recipe = recipe.model_copy(update={"backbone": _train_backbone(recipe, images, report)})
    folder = _Run(recipe, images, learned, held_out).go(lambda done, *rest: report(before + done, *rest))
    write_vocabulary(folder, cases)
    return folder


def _train_backbone(recipe: NanoRecipe, images: TrainingImages, report: Report) -> Path:
    folder = recipe.out / "backbone"
    finished = folder / "backbone.safetensors"
    if not finished.exists():
        plan = BackboneRecipe.model_validate(
            {
                "out": folder,
                "licence_class": recipe.licence_class,
                "examples": recipe.backbone_examples,
                "eval_every": 2 * recipe.eval_every,
                "seed": recipe.seed,
            }
        )
        train_backbone(plan, images, report)
    return finished


class _Run(TrainingRun):
    """One training run."""

    recipe: NanoRecipe
    network: IbisNanoForConditionalGeneration
    average: IbisNanoForConditionalGeneration
    average_decay = AVERAGE_DECAY
    betas = BETAS
    free = frozenset({"data", "out", "start", "backbone", "cache", "segmenter"})

    def __init__(
        self, recipe: NanoRecipe, images: TrainingImages, pairs: Sequence[Pair], held_out: Sequence[Pair]
    ) -> None:
        self.recipe, self.images, self.held_out, self.learned_from = recipe, images, held_out, images.sha256
        self.goal = recipe.examples
        torch.manual_seed(recipe.seed)
        if recipe.start is None:
            self.processor = build_processor(sorted({pair.name for pair in pairs}))
            self.network = build_model(self.processor)
            assert recipe.backbone is not None
            self.network.backbone.load_state_dict(load_file(recipe.backbone))
        else:
            self.processor, self.network = load(recipe.start, **ON_POLICY if recipe.on_policy else {})
        self.average = deepcopy(self.network).eval()
        self.network.train()
        self.start(self._grouped_by_rate())
        segmenter = read_click_network(recipe.segmenter).eval()
        context = context_features(images, recipe.cache or recipe.out)
        seed = recipe.seed + self.step
        if recipe.on_policy:
            self.curriculum: Curriculum = OnPolicyStates(images, pairs, segmenter, context, seed, believe=self._believe)
        else:
            self.curriculum = Curriculum(images, pairs, segmenter, context, seed)

    def _grouped_by_rate(self) -> list[dict[str, Any]]:
        """The parameters: those that are trained already, and those that a second stage adds."""
        comparison = self.network.vision.comparison
        added = [] if comparison is None else list(comparison.parameters())
        known = {id(parameter) for parameter in added}
        trained = [one for one in self.network.parameters() if one.requires_grad and id(one) not in known]
        return [{"params": trained, "factor": 1.0}, {"params": added, "factor": ADDED_RATE}]

    def go(self, report: Report) -> Path:
        """Train to the end and write the model."""
        for _ in run_to_the_end(self, self._learn, self._validate, report):
            self._save()
        return self._save()

    def _validate(self) -> dict[str, float] | None:
        return validate(self.average, self.processor, self.held_out, self.images) if self.held_out else None

    def _believe(self, examples: Sequence[Example]) -> np.ndarray:
        return believed(self.average, self.processor, examples)

    def _learn(self) -> dict[str, float]:
        loss, parts = losses(self.network, self.curriculum.draw(self.recipe.batch_size), self.processor)
        self.descend(loss)
        return parts

    def _save(self) -> Path:
        self.save_checkpoint()
        folder = self.recipe.out / "ibis-nano"
        save(self.average, self.processor, folder)
        return folder


def load(folder: Path, **config: Any) -> tuple[IbisNanoProcessor, IbisNanoForConditionalGeneration]:
    """Processor and float32 model that `save` wrote, with `config` in its configuration. ConfigError for none."""
    try:
        processor = IbisNanoProcessor.from_pretrained(folder)
        model = IbisNanoForConditionalGeneration.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float32, local_files_only=True, **config
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no ibis-nano to start from ({one_line(error)})") from error
    for found in ("is_local", "local_files_only"):  # of the loading, not of the tokenizer
        processor.tokenizer.init_kwargs.pop(found, None)
    return processor, model


def save(model: IbisNanoForConditionalGeneration, processor: IbisNanoProcessor, folder: Path) -> None:
    """save_pretrained of a bfloat16 copy of the model, and of the processor; the backbone in float16, whose batch
    normalisation wants the digits."""
    copy: Any = deepcopy(model)
    copy.to(torch.bfloat16)
    copy.backbone.load_state_dict(model.backbone.state_dict())
    copy.backbone.to(torch.float16)
    copy.save_pretrained(folder)
    processor.save_pretrained(folder)
