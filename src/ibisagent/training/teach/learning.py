"""How an expert learns a few objects from a few images: from the weights of a policy that knows others.

An expert is only ever asked "Segment the NAME." for its own names (`policies.taught`), so it learns no other sentence,
and no words. Most of the turns are first ones, which are worth most; the others go on from its own states
(`training.nano.on_policy`), from which it learns when to correct and when to stop. docs/experiments says what else was
tried.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch

from ibisagent.datasets import CaseSource
from ibisagent.domain import Stop
from ibisagent.files import write_whole
from ibisagent.policies.mllm import MllmPolicy
from ibisagent.policies.nano import IbisNanoForConditionalGeneration
from ibisagent.policies.one_by_one import ABSENT_HERE, NOT_THERE, sentence_for
from ibisagent.policies.vocabulary import FILE as VOCABULARY_FILE
from ibisagent.protocol import START_LINE
from ibisagent.query import Request
from ibisagent.segmenters.ibis_click import PACKAGED_WEIGHTS, read_click_network
from ibisagent.training.images import TrainingImages, context_features
from ibisagent.training.loop import TrainingRun
from ibisagent.training.nano.curriculum import VIEW, Example, Pair, pairs_of
from ibisagent.training.nano.on_policy import OnPolicyStates
from ibisagent.training.nano.trainer import believed, load, losses, save
from ibisagent.training.teach.recipe import PartRecipe

VIEWS_TRIED = 5  # for one that still shows the object
AVERAGE_DECAY = 0.98
GAIN = 0.05  # IoU that a correction must gain to be taught: few images teach to see small mistakes that are none


class _Lessons(OnPolicyStates):
    """A curriculum for named objects alone."""

    words, absent, gain = 0.0, 0.0, GAIN
    first = 1.0

    def _view(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        mask = self._images.mask(pair.number).astype(np.uint8)
        for _ in range(VIEWS_TRIED):
            pixels, turn = super()._view(pair)
            if pair.absent or cv2.warpAffine(mask, turn, VIEW, flags=cv2.INTER_NEAREST).any():
                break
        return pixels, turn

    def _question(self, pair: Pair) -> tuple[str, str, str]:
        return "referring", _sentence(pair.name), pair.name

    def _show_as_brought(self, example: Example, kind: str, name: str, pair: Pair) -> None:
        example.query += "\n" + START_LINE

    def _ask_for_words(self, example: Example, pair: Pair) -> None:
        self._ask_for_absent(example, pair.name)  # the view no longer shows the object

    def _ask_for_absent(self, example: Example, name: str) -> None:
        example.query, example.ground_truth = _sentence(name), np.zeros(VIEW, bool)
        example.answer(NOT_THERE.format(name), Stop(ABSENT_HERE.format(name), (name,)))


def _sentence(name: str) -> str:
    return sentence_for(Request(name, name, known=True))


class _Run(TrainingRun):
    """One expert that learns."""

    recipe: PartRecipe
    network: IbisNanoForConditionalGeneration
    average: IbisNanoForConditionalGeneration
    average_decay = AVERAGE_DECAY
    free = frozenset({"out", "workers", "folds"})

    def __init__(self, recipe: PartRecipe, source: CaseSource, start: Path) -> None:
        self.recipe, self.goal = recipe, recipe.examples
        torch.manual_seed(recipe.seed)
        self.processor, self.network = load(start)
        self.average = deepcopy(self.network).eval()
        self.network.train()
        learned = [one for one in self.network.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(
            learned, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.98)
        )
        self.resume()
        images = TrainingImages.of(source, absent=True)
        segmenter = read_click_network(PACKAGED_WEIGHTS).eval()
        context = context_features(images, recipe.out)
        seed = recipe.seed + self.step
        self.lessons = _Lessons(images, pairs_of(images), segmenter, context, seed, believe=self._believe)
        self.lessons.first = 1 - recipe.later

    def _believe(self, examples: Sequence[Example]) -> np.ndarray:
        return believed(self.average, self.processor, examples)

    def go(self, report: Callable[[int], None]) -> None:
        """Learn to the end."""
        while self.examples < self.goal:
            loss, _ = losses(self.network, self.lessons.draw(self.recipe.batch_size), self.processor)
            self.descend(loss)
            report(self.examples)
            if self.due:
                self.save_checkpoint()


def learn(recipe: PartRecipe, source: CaseSource, start: Path, report: Callable[[int], None]) -> Path:
    """Teach an expert the objects of `source`, resuming; its folder, which appears whole.

    start: folder of the ibis-nano whose weights it begins with. report: told how many examples it has learned from.
    """
    folder = recipe.out / "expert"
    if not folder.is_dir():
        run = _Run(recipe, source, start)
        run.go(report)
        part = recipe.out / "expert.part"
        shutil.rmtree(part, ignore_errors=True)
        save(run.average, run.processor, part)
        _write_vocabulary(part, start, source)
        part.rename(folder)
    for left in (recipe.out / "checkpoint.pt", *recipe.out.glob("context-*")):
        left.unlink(missing_ok=True)
    return folder


def _write_vocabulary(folder: Path, start: Path, source: CaseSource) -> None:
    """The expert's names: images of every kind can show them, and those that look like the taught ones are expected to.

    Nothing is called absent before it is looked for: what a few images teach of absence, the expert says itself.
    """
    policy = MllmPolicy(start)
    said = json.loads((start / VOCABULARY_FILE).read_bytes())
    kinds: dict[str, set[int]] = defaultdict(set)
    for row in source.rows:
        if row.mask is not None:
            kinds[row.object].add(int(policy.look(source.decode(row).image, _sentence(row.object)).kinds.argmax()))
    everywhere = list(range(len(said["kinds"])))
    said["objects"] = {
        name: {"learned": sorted(taught), "possible": everywhere} for name, taught in sorted(kinds.items())
    }
    said["presence"]["absent_below"] = 0.0
    write_whole(json.dumps(said).encode("ascii"), folder / VOCABULARY_FILE)
