"""How an expert learns a few objects from a few images: from the weights of a policy that knows others.

An expert is asked for maps of its own objects alone (`policies.following`), so that is all it learns: where an object
is, for every cell of an image, of which few images tell much, rather than what to say about it. It learns to see as
well: all of the policy but the backbone's first stages. docs/experiments says what else was tried.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn import functional as F

from ibisagent.datasets import CaseSource
from ibisagent.errors import DataError
from ibisagent.files import make_folder, one_line, write_whole
from ibisagent.policies.nano import IbisNanoForConditionalGeneration
from ibisagent.policies.nano_input import image_planes
from ibisagent.policies.nano_model import load_backbone
from ibisagent.policies.one_by_one import sentence_for
from ibisagent.policies.vocabulary import FILE as VOCABULARY_FILE
from ibisagent.policies.vocabulary import Vocabulary
from ibisagent.query import Request
from ibisagent.training.backbone import unfrozen
from ibisagent.training.images import TrainingImages
from ibisagent.training.loop import TrainingRun
from ibisagent.training.nano.curriculum import QUESTIONS, VIEW, Curriculum, Example, Pair, pairs_of
from ibisagent.training.nano.trainer import BETAS, FEATURE_DROPOUT, collate, load, region_losses, save, seen_features
from ibisagent.training.teach.recipe import PartRecipe

AVERAGE_DECAY = 0.98
STAGES_RATE = 0.3  # of the learning rate: of the backbone's stages, which have seen most images


class _MapCurriculum(Curriculum):
    """A curriculum for named objects alone: views, and where the object is in them."""

    words, absent, first = 0.0, 0.0, 1.0

    def __init__(self, images: TrainingImages, seed: int) -> None:
        super().__init__(images, pairs_of(images), None, np.empty(0), seed)
        self.questions = min(QUESTIONS, max(map(len, images.present.values())))

    def state_dict(self) -> dict[str, Any]:
        """Where its draws are, and those of torch."""
        return {"draws": json.dumps(self._random.bit_generator.state), "torch": torch.get_rng_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._random.bit_generator.state = json.loads(state["draws"])
        torch.set_rng_state(state["torch"])

    def _first_turn(self, example: Example, pair: Pair) -> None:
        example.query = _sentence(pair.name)

    def _ask_for_words(self, example: Example, pair: Pair) -> None:
        self._ask_for_absent(example, pair.name)  # the view no longer shows the object

    def _ask_for_absent(self, example: Example, name: str) -> None:
        example.query, example.ground_truth = _sentence(name), np.zeros(VIEW, bool)


def _sentence(name: str) -> str:
    return sentence_for(Request(name, name, known=True))


class _Run(TrainingRun):
    """One expert that learns. Stopped and resumed it ends with the weights that it would have ended with."""

    parts = (*TrainingRun.parts, "curriculum")
    recipe: PartRecipe
    network: IbisNanoForConditionalGeneration
    average: IbisNanoForConditionalGeneration
    average_decay = AVERAGE_DECAY
    betas = BETAS
    free = frozenset({"out", "workers", "folds", "adapter"})

    def __init__(self, recipe: PartRecipe, source: CaseSource, start: Path) -> None:
        images = TrainingImages.of(source, absent=True)
        self.recipe, self.goal, self.learned_from = recipe, recipe.examples, images.sha256
        torch.manual_seed(recipe.seed)
        self.processor, self.network = load(start)
        stages, pyramid = unfrozen(self.network.backbone)
        rest = [one for name, one in self.network.named_parameters() if not name.startswith("backbone.")]
        self.average = deepcopy(self.network).eval()
        self.network.train()
        self.curriculum = _MapCurriculum(images, recipe.seed)
        self.start([{"params": stages, "factor": STAGES_RATE}, {"params": [*pyramid, *rest], "factor": 1.0}])

    def go(self, report: Callable[[int], None]) -> None:
        """Learn to the end."""
        while self.examples < self.goal:
            self.descend(self._loss(self.curriculum.draw(self.recipe.batch_size)))
            report(self.examples)
            if self.due:
                self.save_checkpoint()

    def _loss(self, examples: Sequence[Example]) -> torch.Tensor:
        batch, _ = collate(examples, self.processor)
        del batch["labels"]
        batch["image_features"] = F.dropout2d(seen_features(self.network, batch, examples), FEATURE_DROPOUT)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            region = self.network(**batch, logits_to_keep=1, use_cache=False).region_logits
        assert region is not None
        cells, overlap = region_losses(region, examples)
        return cells + overlap


def learn(recipe: PartRecipe, source: CaseSource, start: Path, report: Callable[[int], None]) -> Path:
    """Teach an expert the objects of `source`, resuming; its folder, which appears whole.

    start: folder of the ibis-nano whose weights it begins with. report: told how many examples it has learned from.
    """
    folder = recipe.out / "expert"
    make_folder(recipe.out)
    if not folder.is_dir():
        run = _Run(recipe, source, start)
        run.go(report)
        part = recipe.out / "expert.part"
        shutil.rmtree(part, ignore_errors=True)
        try:
            save(run.average, run.processor, part)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{part}: cannot be written ({one_line(error)}); free space, then start again") from error
        _write_vocabulary(part, start, source)
        part.rename(folder)
    (recipe.out / "checkpoint.pt").unlink(missing_ok=True)
    return folder


def _write_vocabulary(folder: Path, start: Path, source: CaseSource) -> None:
    """The expert's names: images of every kind can show them, and those that look like the taught ones are expected to.

    Nothing is called absent before it is looked for: what a few images teach of absence, the expert says itself.
    """
    see = load_backbone(start)
    vocabulary = Vocabulary.read(start)
    assert vocabulary is not None
    said = json.loads((start / VOCABULARY_FILE).read_bytes())
    kinds: dict[str, set[int]] = defaultdict(set)
    for row in source.rows:
        if row.mask is not None:
            [features] = see(image_planes(source.decode(row).image.pixels)[None, :3])
            kinds[row.object].add(int(vocabulary.kinds_of(features[0].mean(axis=(1, 2))).argmax()))
    everywhere = list(range(len(said["kinds"])))
    said["objects"] = {
        name: {"learned": sorted(taught), "possible": everywhere} for name, taught in sorted(kinds.items())
    }
    said["presence"]["absent_below"] = 0.0
    write_whole(json.dumps(said).encode("ascii"), folder / VOCABULARY_FILE)
