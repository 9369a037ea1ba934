"""Trains `ibis-nano` from scratch on image-mask pairs and templated questions.

    python -m ibisagent.training.nano DATA -o OUT --segmenter-weights DIR --minutes 90

Losses: cross-entropy on the reply's words; for each place in the reply, cross-entropy against a distribution over all
right places (deep inside the missed or leaked region, near the box corner) instead of one of them; and a map of the
object that is asked for. Masks of later turns come from the segmenter that the policy will work with, after right and
wrong clicks, and from spoilt truths.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ibisagent.clicks import bounding_box, interior_depth, next_click
from ibisagent.domain import Box, Case, Click, Mask, Reply, Stop
from ibisagent.masks import iou
from ibisagent.policies.nano import (
    LOCATIONS,
    SIDE,
    IbisNanoConfig,
    IbisNanoForConditionalGeneration,
    IbisNanoImageProcessor,
    IbisNanoProcessor,
    location_text,
    snap_locations,
)
from ibisagent.protocol import START_LINE, write
from ibisagent.segmenters.click_network import ClickNetwork
from ibisagent.segmenters.frame import prompt_maps
from ibisagent.segmenters.ibis_click import read_click_network
from ibisagent.training.click_states import is_development, spoilt
from ibisagent.training.run import load_checkpoint, rate_factor, save_checkpoint, update_average
from ibisagent.training.views import Bank, random_turn

VIEW = (SIDE, SIDE)
CELL = SIDE // LOCATIONS
GOOD_ENOUGH = 0.8  # IoU at which the right reply is to stop

QUERIES = (
    "Segment the {}.",
    "Segment the {}.",
    "Segment the {}.",
    "Segment {}.",
    "Find the {}.",
    "Where is the {}?",
    "{}",
    "Outline the {}.",
    "Mark the {}.",
    "Show me the {}.",
    "Locate the {}.",
    "Delineate the {}.",
)
MODALITY_QUERIES = ("Which imaging modality is this?", "What kind of image is this?", "Name the imaging modality.")
ANYTHING = ("object", "structure", "target", "lesion", "region of interest", "abnormality", "finding", "area")
SYLLABLES = (
    "ba",
    "co",
    "de",
    "fi",
    "gu",
    "hy",
    "ka",
    "lo",
    "mi",
    "nu",
    "pe",
    "ra",
    "si",
    "to",
    "ve",
    "xo",
    "cyte",
    "oma",
)
LOOK = ("I look for the {}.",)
MISSED = ("A part of the {} is missing.",)
LEAKED = ("The mask goes beyond the {}.",)
DONE = ("The mask fits the {}.",)
ABSENT = ("I see no {} here.",)

SPECIAL = ("<pad>", "<|user|>", "<|assistant|>", "<|end|>", "<image>", "<|system|>")
TAGS = ("<think>", "</think>", "<action>", "</action>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['content'] is string -%}{%- set parts = [{'type': 'text', 'text': message['content']}] -%}"
    "{%- else -%}{%- set parts = message['content'] -%}{%- endif -%}"
    "{%- if message['role'] == 'assistant' -%}<|assistant|>{%- generation -%}"
    "{%- for part in parts -%}{{ part['text'] }}{%- endfor -%}<|end|>{%- endgeneration -%}"
    "{%- else -%}{{ '<|system|>' if message['role'] == 'system' else '<|user|>' }}"
    "{%- for part in parts -%}{{ '<image>' if part['type'] == 'image' else part['text'] }}{%- endfor -%}"
    "{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)


def build_processor(names: Sequence[str], words: int = 1024) -> IbisNanoProcessor:
    """A processor whose tokenizer knows `words` byte-level BPE tokens from our own texts, then the location tokens."""
    corpus = [template.format(name) for name in names for template in QUERIES + LOOK + MISSED + LEAKED + DONE + ABSENT]
    corpus += [START_LINE, *MODALITY_QUERIES, *ANYTHING, *SYLLABLES]
    corpus += [
        "click + (",
        "click - (",
        "; box (",
        ") (",
        "undo",
        "stop; absent ",
        "The image is ",
        "is segmented.",
    ] * 200
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
        intermediate_size=768,
        num_hidden_layers=6,
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


@dataclass(frozen=True, eq=False)
class Pair:
    """One mask of one picture of the bank. mask (SIDE, SIDE) bool, squashed; group: what sampling is balanced over."""

    picture: int
    mask: Mask
    name: str
    modality: str
    body_part: str
    group: str


@dataclass(eq=False)
class Example:
    """One turn to learn. places: for each location token of the reply, its (LOCATIONS, LOCATIONS) distribution.

    turn: (2, 3) affine map of SIDE x SIDE pixels that `features` still need; pixels and truth have had it.
    """

    features: np.ndarray
    pixels: np.ndarray
    truth: Mask | None
    query: str
    turn: np.ndarray = field(default_factory=lambda: np.eye(2, 3, dtype=np.float32))
    reply: str = ""
    current: Mask = field(default_factory=lambda: np.zeros(VIEW, bool))
    places: list[np.ndarray] = field(default_factory=list)


def body_part(modality: str, site: str) -> str:
    """A coarse region such that objects of one never show in pictures of another; '' where that is not certain."""
    if modality in ("pathology", "microscopy"):
        return "cells"
    torso = {"chest", "heart", "lung", "abdomen", "liver", "lumbar spine", "prostate", "neck"}
    return (
        "torso"
        if site in torso
        else {"retinal": "eye", "brain": "brain", "knee": "leg", "limb": "", "skin": ""}.get(site, site)
    )


def squash(plane: np.ndarray) -> np.ndarray:
    """A mask (H, W) on the SIDE x SIDE grid."""
    return cv2.resize(plane.astype(np.uint8), VIEW, interpolation=cv2.INTER_NEAREST) > 0


def depth_distribution(region: Mask, power: float = 1.0) -> np.ndarray:
    """(LOCATIONS, LOCATIONS) float32 that sums to 1: places in `region`, deep ones more."""
    depth = interior_depth(region) ** power
    cells = depth.reshape(LOCATIONS, CELL, LOCATIONS, CELL).mean(axis=(1, 3))
    return (cells / max(float(cells.sum()), 1e-9)).astype(np.float32)


def corner_distribution(x: float, y: float, spread: float = 0.7) -> np.ndarray:
    """(LOCATIONS, LOCATIONS) float32 that sums to 1: a bump of `spread` cells around view pixel (x, y)."""
    row, column = np.mgrid[:LOCATIONS, :LOCATIONS] + 0.5
    bump = np.exp(-((column - x / CELL) ** 2 + (row - y / CELL) ** 2) / (2 * spread**2))
    return (bump / bump.sum()).astype(np.float32)


def _square(turn: np.ndarray) -> np.ndarray:
    """A (2, 3) affine map as a (3, 3) matrix."""
    return np.vstack([turn, [0, 0, 1]])


def turned_features(examples: Sequence[Example]) -> torch.Tensor:
    """Features of a batch (B, C, GRID, GRID) after each example's `turn`: augmentation without the encoder's cost."""
    to_unit = np.array([[2 / SIDE, 0, 1 / SIDE - 1], [0, 2 / SIDE, 1 / SIDE - 1], [0, 0, 1]])
    from_unit = np.linalg.inv(to_unit)
    maps = [(to_unit @ np.linalg.inv(_square(example.turn)) @ from_unit)[:2] for example in examples]
    features = torch.from_numpy(np.stack([example.features for example in examples]))
    grid = F.affine_grid(torch.from_numpy(np.stack(maps)).float(), list(features.shape), align_corners=False)
    return F.grid_sample(features, grid, align_corners=False)


class Teacher:
    """Draws examples: a view of a pair, a question, a state, and the right reply to it."""

    def __init__(self, pairs: Sequence[Pair], bank: Bank, segmenter: ClickNetwork | None, seed: int) -> None:
        self.pairs, self.bank, self.segmenter = pairs, bank, segmenter
        self.random = np.random.default_rng(seed)
        counts = Counter(pair.group for pair in pairs)
        weights = np.array([counts[pair.group] ** -0.5 for pair in pairs])
        self.weights = weights / weights.sum()
        parts: dict[str, set[str]] = {}
        for pair in pairs:
            parts.setdefault(pair.name, set()).add(pair.body_part)
        doubtful = ("vessel", "artery", "nerve", "lesion", "aorta")
        self.parts = {n: p for n, p in parts.items() if "" not in p and not any(word in n for word in doubtful)}

    def draw(self, count: int) -> list[Example]:
        """`count` fresh examples."""
        examples, unseen = [], []
        for pair in (self.pairs[i] for i in self.random.choice(len(self.pairs), count, p=self.weights)):
            example, name = self._view(pair)
            kind = self.random.random()
            if example.truth is None or not example.truth.any():
                kind = 0.0
            if kind < 0.04:
                self._ask_modality(example, pair)
            elif kind < 0.12:
                self._ask_absent(example, pair, name)
            elif kind < 0.68 or self.segmenter is None:
                self._first_turn(example, name)
            else:
                unseen.append((example, name))
            examples.append(example)
        if unseen:
            self._later_turns(unseen)
        return examples

    def _pick(self, texts: Sequence[str]) -> str:
        return texts[int(self.random.integers(len(texts)))]

    def _view(self, pair: Pair) -> tuple[Example, str]:
        round_ = int(self.random.choice(np.flatnonzero(self.bank.done[:, pair.picture])))
        turn, pixels = self.bank.turns[round_, pair.picture], self.bank.pixels[round_, pair.picture]
        further = np.eye(2, 3, dtype=np.float32)
        if self.random.random() < 0.75:
            further = random_turn(pair.modality, self.random)
            pixels = cv2.warpAffine(pixels, further, VIEW, flags=cv2.INTER_LINEAR)
        both = (_square(further) @ _square(turn))[:2]
        truth = cv2.warpAffine(pair.mask.astype(np.uint8), both, VIEW, flags=cv2.INTER_NEAREST) > 0
        name = pair.name
        if self.random.random() < 0.07:  # an unknown word still means the thing that stands out
            made_up = "".join(self._pick(SYLLABLES) for _ in range(self.random.integers(2, 5)))
            name = self._pick(ANYTHING) if self.random.random() < 0.5 else made_up
        features = self.bank.features[round_, pair.picture].astype(np.float32).transpose(2, 0, 1)
        example = Example(features, pixels, truth, self._pick(QUERIES).format(name), further)
        return example, name

    def _ask_modality(self, example: Example, pair: Pair) -> None:
        example.query, example.truth = self._pick(MODALITY_QUERIES), None
        answer = Stop(f"The image is {pair.modality}.")
        example.reply = write(Reply("No pixels are needed.", (answer,)), VIEW, dialect="ibis")

    def _ask_absent(self, example: Example, pair: Pair, name: str) -> None:
        elsewhere = [other for other, parts in self.parts.items() if pair.body_part and pair.body_part not in parts]
        if not elsewhere:
            return self._first_turn(example, name)
        absent = self._pick(elsewhere)
        example.query, example.truth = self._pick(QUERIES).format(absent), np.zeros(VIEW, bool)
        stop = Stop(f"There is no {absent} in this image.", (absent,))
        example.reply = write(Reply(self._pick(ABSENT).format(absent), (stop,)), VIEW, dialect="ibis")
        return None

    def _first_turn(self, example: Example, name: str) -> None:
        assert example.truth is not None
        box = bounding_box(example.truth, "")
        click = next_click(example.truth, np.zeros(VIEW, bool), "")
        assert box is not None  # `draw` skips empty truths
        assert click is not None
        reply = Reply(self._pick(LOOK).format(name), (click, box))
        example.reply = write(reply, VIEW, dialect="ibis")
        corners = [corner_distribution(box.x0, box.y0), corner_distribution(box.x1, box.y1)]
        example.places = [depth_distribution(example.truth), *corners]

    def _later_turns(self, unseen: Sequence[tuple[Example, str]]) -> None:
        prompts = [self._earlier_prompts(example.truth) for example, _ in unseen]
        for (example, name), mask in zip(unseen, self._masks(unseen, prompts), strict=True):
            truth = example.truth
            assert truth is not None
            example.current = mask
            if self.random.random() < 0.2:  # as `render` says it of a mask that the user brought
                example.query += "\n" + START_LINE
            click = next_click(truth, mask, "")
            if click is None or iou(mask, truth) >= GOOD_ENOUGH:
                stop = Stop(f"The {name} is segmented.")
                example.reply = write(Reply(self._pick(DONE).format(name), (stop,)), VIEW, dialect="ibis")
            elif not mask.any():
                self._first_turn(example, name)
            else:
                thought = self._pick(MISSED if click.positive else LEAKED).format(name)
                example.reply = write(Reply(thought, (click,)), VIEW, dialect="ibis")
                wrong = truth & ~mask if click.positive else mask & ~truth
                example.places = [depth_distribution(wrong, power=1.5)]

    def _earlier_prompts(self, truth: Mask | None) -> list[Click | Box]:
        """What an imperfect first turn may have asked for; empty for "a spoilt truth instead"."""
        assert truth is not None
        kind, prompts = self.random.random(), list[Click | Box]()
        if kind < 0.25:
            return prompts
        region = truth if kind < 0.85 else np.ones(VIEW, bool)
        rows, columns = np.nonzero(region)
        index = self.random.integers(rows.size)
        prompts.append(Click(int(columns[index]), int(rows[index]), True, ""))
        box = bounding_box(truth, "")
        if kind < 0.6 and box is not None:
            width, height = box.x1 - box.x0, box.y1 - box.y0
            spread = self.random.choice([0.05, 0.15, 0.3])
            x0, y0, x1, y1 = self.random.normal(0, spread, 4) * [width, height, width, height]
            x0, y0 = int(np.clip(box.x0 + x0, 0, SIDE - 2)), int(np.clip(box.y0 + y0, 0, SIDE - 2))
            x1, y1 = int(np.clip(box.x1 + x1, x0 + 1, SIDE)), int(np.clip(box.y1 + y1, y0 + 1, SIDE))
            prompts.append(Box(x0, y0, x1, y1, ""))
        return prompts

    def _masks(self, unseen: Sequence[tuple[Example, str]], prompts: Sequence[list[Click | Box]]) -> list[Mask]:
        """Masks that the segmenter gives for `prompts`, some after one more click, right or wrong; or spoilt truths."""
        side = 192  # enough for what the policy sees, at half the cost
        planes = np.zeros((len(unseen), 7, side, side), np.float32)
        for index, (example, _) in enumerate(unseen):
            small = cv2.resize(example.pixels, (side, side), interpolation=cv2.INTER_AREA)
            planes[index, :3] = small.transpose(2, 0, 1).astype(np.float32) / 255
        masks = self._predict(planes, prompts)
        for (example, _), given, mask in zip(unseen, prompts, masks, strict=True):
            assert example.truth is not None
            click = next_click(example.truth, mask, "") if given and self.random.random() < 0.5 else None
            if click is not None and self.random.random() < 0.3:
                x, y = (int(number) for number in self.random.integers(SIDE, size=2))
                click = Click(x, y, not mask[y, x], "")
            if click is not None:
                given.append(click)
        masks = self._predict(planes, prompts)
        return [
            mask if given or example.truth is None else spoilt(example.truth, self.random)
            for (example, _), given, mask in zip(unseen, prompts, masks, strict=True)
        ]

    def _predict(self, planes: np.ndarray, prompts: Sequence[Sequence[Click | Box]]) -> list[Mask]:
        """One pass of the segmenter; `planes` keeps the mask probabilities for the next one."""
        assert self.segmenter is not None
        side = planes.shape[-1]
        for plane, given in zip(planes, prompts, strict=True):
            plane[4:] = prompt_maps(given, side, side / SIDE)
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            logits = self.segmenter(torch.from_numpy(planes))[0][:, 0].float()
        planes[:, 3] = logits.sigmoid().numpy()
        return [cv2.resize(one, VIEW, interpolation=cv2.INTER_LINEAR) > 0 for one in logits.numpy()]


def collate(examples: Sequence[Example], processor: IbisNanoProcessor) -> tuple[dict[str, torch.Tensor], int]:
    """Model inputs of a batch, left-padded, and how many last positions predict or hold all replies."""
    prompts = [f"<|user|>{example.query}<image><|assistant|>" for example in examples]
    replies = [snap_locations(example.reply) + "<|end|>" for example in examples]
    texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    batch = processor(text=texts, padding=True, return_tensors="pt")
    lengths = [len(ids) for ids in processor.tokenizer(replies)["input_ids"]]
    labels = batch["input_ids"].clone()
    for row, length in enumerate(lengths):
        labels[row, :-length] = -100
    pixels = np.stack([np.concatenate([e.pixels, e.current[..., None] * np.uint8(255)], axis=2) for e in examples])
    batch["pixel_values"] = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255)
    batch["image_features"] = turned_features(examples)
    batch["labels"] = labels
    return dict(batch), max(lengths) + 1


def losses(
    model: IbisNanoForConditionalGeneration, examples: Sequence[Example], processor: IbisNanoProcessor
) -> tuple[torch.Tensor, dict[str, float]]:
    """The total loss of a batch, and its parts for the log."""
    batch, kept = collate(examples, processor)
    labels = batch.pop("labels")[:, -kept + 1 :]
    kept_channels = (torch.rand(*batch["image_features"].shape[:2], 1, 1) > 0.1).float()
    batch["image_features"] *= kept_channels  # one in ten dropped, against learning pictures by heart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(**batch, logits_to_keep=kept, use_cache=False)
    assert output.logits is not None
    assert output.region_logits is not None
    logprobs = output.logits[:, :-1].float().log_softmax(dim=-1)
    words = model.word_count
    is_place = labels >= words
    is_word = (labels >= 0) & ~is_place
    word_loss = -logprobs[is_word].gather(1, labels[is_word][:, None]).mean()
    place_logprobs = logprobs[is_place][:, words:]
    wanted = torch.from_numpy(np.stack([place.ravel() for example in examples for place in example.places]))
    cross = -(wanted * place_logprobs).sum(dim=1).mean()
    regions = [cv2.resize(e.truth.astype(np.float32), (LOCATIONS,) * 2, interpolation=cv2.INTER_AREA)
               if e.truth is not None else np.full((LOCATIONS,) * 2, -1, np.float32) for e in examples]  # fmt: skip
    target = torch.from_numpy(np.stack(regions))
    known = target[:, 0, 0] >= 0
    region_logits, target = output.region_logits.float()[known], target[known]
    region = F.binary_cross_entropy_with_logits(region_logits, target)
    inside = region_logits.sigmoid()
    overlap = 1 - (2 * (inside * target).sum((1, 2)) + 1) / (inside.sum((1, 2)) + target.sum((1, 2)) + 1)
    total = word_loss + 0.5 * cross + region + overlap.mean()
    parts = {
        "words": word_loss.item(),
        "places": cross.item(),
        "region": region.item(),
        "overlap": overlap.mean().item(),
    }
    return total, parts


@torch.no_grad()
def look(
    model: IbisNanoForConditionalGeneration, processor: IbisNanoProcessor, pairs: Sequence[Pair], bank: Bank
) -> dict[str, float]:
    """First-click hit rate and first-box IoU on untouched pictures, places decoded greedily after the right words."""
    hits, overlaps = [], []
    cells = LOCATIONS**2
    for start in range(0, len(pairs), 32):
        chunk = pairs[start : start + 32]
        examples = []
        for pair in chunk:
            features = bank.features[0, pair.picture].astype(np.float32).transpose(2, 0, 1)
            example = Example(features, bank.pixels[0, pair.picture], pair.mask, f"Segment the {pair.name}.")
            teacher_free = write(
                Reply(LOOK[0].format(pair.name), (Click(0, 0, True, ""), Box(0, 0, 1, 1, ""))), VIEW, dialect="ibis"
            )
            example.reply = teacher_free
            examples.append(example)
        batch, _ = collate(examples, processor)
        labels = batch.pop("labels")
        chosen = np.zeros((len(chunk), 3), int)
        for place in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(**batch, use_cache=False).logits
            for row in range(len(chunk)):
                position = int((labels[row] >= model.word_count).nonzero()[place])
                cell = int(logits[row, position - 1, -cells:].argmax())
                chosen[row, place] = cell
                batch["input_ids"][row, position] = model.word_count + cell
        for pair, (click, first, last) in zip(chunk, chosen, strict=True):
            row, column = divmod(int(click), LOCATIONS)
            hits.append(bool(pair.mask[row * CELL + CELL // 2, column * CELL + CELL // 2]))
            (y0, x0), (y1, x1) = divmod(int(first), LOCATIONS), divmod(int(last), LOCATIONS)
            guess, truth = np.zeros(VIEW, bool), np.zeros(VIEW, bool)
            guess[y0 * CELL + 2 : y1 * CELL + 2, x0 * CELL + 2 : x1 * CELL + 2] = True
            box = bounding_box(pair.mask, "")
            assert box is not None
            truth[box.y0 : box.y1, box.x0 : box.x1] = True
            overlaps.append(iou(guess, truth))
    good = float(np.mean(np.array(overlaps) >= 0.5))
    return {
        "hit": round(float(np.mean(hits)), 3),
        "box_iou": round(float(np.mean(overlaps)), 3),
        "box_50": round(good, 3),
    }


def train(
    pairs: Sequence[Pair],
    development: Sequence[Pair],
    bank: Bank,
    segmenter: ClickNetwork | None,
    out: Path,
    *,
    minutes: float,
    seed: int,
    rate: float = 7e-4,
    batch: int = 16,
) -> None:
    """Train for `minutes` of wall time (resuming from OUT/checkpoint.pt) and save_pretrained to OUT/ibis-nano."""
    torch.manual_seed(seed)
    start = time.monotonic()
    processor = build_processor(sorted({pair.name for pair in pairs}))
    model, average = build_model(processor), build_model(processor)
    average.load_state_dict(model.state_dict())
    average.eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05, betas=(0.9, 0.98))
    step, used = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    saved = load_checkpoint(checkpoint)
    if saved is not None:
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        step, used = saved["step"], saved["used"]
    teacher = Teacher(pairs, bank, segmenter, seed + step)
    last_look, last_save, shown = time.monotonic(), time.monotonic(), Counter[str]()
    model.train()
    while (progress := (used + time.monotonic() - start) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * rate_factor(step, 60, progress)
        loss, parts = losses(model, teacher.draw(batch), processor)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        update_average(average, model, step, 0.998)
        shown.update(parts)
        shown["steps"] += 1
        now = time.monotonic()
        if now - last_look > 240:
            last_look = now
            line = {name: round(total / shown["steps"], 3) for name, total in shown.items() if name != "steps"}
            line |= look(average, processor, development, bank)
            print(f"{(used + now - start) / 60:.1f} min, {step * batch} examples, {json.dumps(line)}", flush=True)
            shown.clear()
        if now - last_save > 240:
            last_save = now
            states = {"model": model.state_dict(), "average": average.state_dict()}
            saved = {**states, "optimizer": optimizer.state_dict(), "step": step, "used": used + now - start}
            save_checkpoint(checkpoint, saved)
            save(average, processor, out / "ibis-nano")
    save(average, processor, out / "ibis-nano")
    print(json.dumps({"examples": step * batch, **look(average, processor, development, bank)}), flush=True)


def save(model: IbisNanoForConditionalGeneration, processor: IbisNanoProcessor, folder: Path) -> None:
    """save_pretrained of a bfloat16 copy of the model, and of the processor."""
    copy: Any = deepcopy(model)
    copy.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)


def pairs_and_pictures(cases: Sequence[Case]) -> tuple[list[Pair], list[np.ndarray], list[str], list[str]]:
    """Pairs of `cases` with their pictures, modalities and data sets, one entry per different picture."""
    pictures: dict[str, int] = {}
    pairs, pixels, modalities, groups = [], list[np.ndarray](), list[str](), list[str]()
    for case in cases:
        index = pictures.setdefault(case.image.sha256, len(pictures))
        modality, dataset = case.meta.get("modality", ""), case.meta.get("dataset", "")
        if index == len(pixels):
            pixels.append(case.image.pixels)
            modalities.append(modality)
            groups.append(dataset)
        part = body_part(modality, case.meta.get("site", ""))
        for name, mask in (case.targets or {}).items():
            pairs.append(Pair(index, squash(mask), name, modality, part, f"{dataset}/{name}"))
    return pairs, pixels, modalities, groups


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of the recipe."""
    from ibisagent.datasets import read_cases

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="BiomedParse-style folder or manifest")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--segmenter-weights", type=Path, required=True, help="ibis-click.safetensors")
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--rounds", type=int, default=4, help="views per picture, the plain one included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--licence-class", default="ok", help="use only rows of this licence class; '' for all")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    wanted = options.licence_class
    cases = [c for c in read_cases(options.data, split="train") if not wanted or c.meta.get("licence_class") == wanted]
    pairs, pixels, modalities, groups = pairs_and_pictures(cases)
    bank = Bank.open(options.out / "bank", options.rounds, len(pixels))
    bank.build(pixels, modalities, groups, options.seed)
    held_out = [is_development(case.patient) for case in cases for _ in case.targets or {}]
    train(
        [pair for pair, out in zip(pairs, held_out, strict=True) if not out],
        [pair for pair, out in zip(pairs, held_out, strict=True) if out],
        bank,
        read_click_network(options.segmenter_weights).eval(),
        options.out,
        minutes=options.minutes,
        seed=options.seed,
    )


if __name__ == "__main__":
    main()
