"""Writes `objects.json` beside the weights of an ibis-nano: what it learned, for `policies.vocabulary`.

    python -m ibisagent.training.nano.vocabulary FOLDER DATA...

Kinds of images are the pairs of modality and site among the training rows. The linear map to them is fitted on the mean
backbone features of some images of each data set, and the two numbers of presence on rows that were held out for
choosing settings: objects that an image shows, and other ones that its kind could show. Rows of other splits than
"train" have no part in it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ibisagent.datasets import CaseRow, CaseSource
from ibisagent.files import write_whole
from ibisagent.generation.teacher.phrasings import Absences, body_parts
from ibisagent.policies.mllm import MllmPolicy
from ibisagent.policies.vocabulary import FILE
from ibisagent.training.click.states import is_development
from ibisagent.training.images import read_training_cases

PER_DATA_SET, HELD_OUT_PER_DATA_SET = 25, 6  # images
WEIGHT_DECAY = 1e-3
REFUSED = 0.01  # share of the objects that are there that may be called absent
_FAMILIES: Mapping[str, str] = {
    **dict.fromkeys(("CT", "MRI", "X-Ray", "ultrasound"), "through the body"),
    **dict.fromkeys(("fundus", "OCT"), "eye"),
    **dict.fromkeys(("microscopy", "pathology", "electron microscopy"), "cells"),
}
"""Modalities that show the same objects; each other one is a family of its own."""

Kind = tuple[str, str]
Seeing = Callable[[CaseRow, str], tuple[np.ndarray, np.ndarray]]
"""Region logits and mean features of a row's image, asked for an object."""


def write_vocabulary(folder: Path, cases: CaseSource) -> Path:
    """Fit and write the vocabulary of the ibis-nano in `folder`, which learned from `cases`; its file."""
    policy = MllmPolicy(folder, dtype="float32")  # torch is loaded, so nothing need be converted

    def see(row: CaseRow, name: str) -> tuple[np.ndarray, np.ndarray]:
        return policy.see(cases.decode(row).image, f"Segment the {name}.")

    learned, held_out = list[CaseRow](), list[CaseRow]()
    for row in cases.rows:
        (held_out if is_development(row.patient) else learned).append(row)
    kinds = sorted({(row.modality, row.site) for row in learned})
    objects: dict[str, set[Kind]] = defaultdict(set)
    for row in learned:
        objects[row.object].add((row.modality, row.site))
    images = list(_spread(learned, PER_DATA_SET))
    features = np.stack([see(row, row.object)[1] for row in images])
    weights, biases = fit_kinds(features, [kinds.index((row.modality, row.site)) for row in images], len(kinds))
    possible = {name: [number for number, kind in enumerate(kinds) if can_show(taught, kind)]
                for name, taught in objects.items()}  # fmt: skip
    peaks, there = _peaks(cases.rows, list(_spread(held_out or learned, HELD_OUT_PER_DATA_SET)), objects, see)
    slope, shift, absent_below = 0.0, 0.0, 0.0  # where the data shows all that was ever asked for, nothing is learned
    if there.any() and not there.all():
        slope, shift = fit_presence(peaks, there)
        absent_below = float(np.quantile(1 / (1 + np.exp(-(slope * peaks[there] + shift))), REFUSED))
    said = {
        "kinds": kinds,
        "objects": {
            name: {"learned": [kinds.index(kind) for kind in sorted(objects[name])], "possible": possible[name]}
            for name in sorted(objects)
        },
        "presence": {"slope": round(slope, 4), "shift": round(shift, 4), "absent_below": round(absent_below, 4)},
        "weights": [[float(f"{value:.4g}") for value in row] for row in weights.tolist()],
        "biases": [float(f"{value:.4g}") for value in biases.tolist()],
    }
    write_whole(json.dumps(said).encode("ascii"), folder / FILE)
    return folder / FILE


def can_show(taught: set[Kind], kind: Kind) -> bool:
    """Whether images of `kind` can show an object that images of the kinds `taught` showed."""
    parts, family = body_parts(*kind), _FAMILIES.get(kind[0], kind[0])
    return any(
        _FAMILIES.get(modality, modality) == family
        and (not parts or not (others := body_parts(modality, site)) or bool(parts & others))
        for modality, site in taught
    )


def fit_kinds(features: np.ndarray, kinds: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights (count, F) and biases (count,) of a softmax regression from features (N, F) to kinds."""
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    seen, wanted = torch.from_numpy((features - mean) / spread), torch.tensor(kinds)
    layer = torch.nn.Linear(features.shape[1], count)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(seen), wanted) + WEIGHT_DECAY * layer.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    weights = layer.weight.detach().numpy() / spread
    return weights, layer.bias.detach().numpy() - weights @ mean


def fit_presence(peaks: np.ndarray, there: np.ndarray) -> tuple[float, float]:
    """Slope and shift of the logistic function from peaks (N,) to presence; both outcomes weigh the same."""
    line = torch.zeros(2, requires_grad=True)
    values, wanted = torch.from_numpy(peaks), torch.from_numpy(there).float()
    weight = torch.where(wanted > 0, 0.5 / wanted.sum().clamp(min=1), 0.5 / (1 - wanted).sum().clamp(min=1))
    optimizer = torch.optim.LBFGS([line], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = line[0] * values + line[1]
        value = F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum")
        value = value + 1e-4 * line[0] ** 2
        value.backward()
        return value

    optimizer.step(loss)
    return float(line[0].detach()), float(line[1].detach())


def _spread(rows: Sequence[CaseRow], most: int) -> Iterator[CaseRow]:
    """One row each of at most `most` images of every data set, drawn at random."""
    counts: Counter[str] = Counter()
    seen: set[Path] = set()
    for number in np.random.default_rng(0).permutation(len(rows)):
        row = rows[number]
        if row.image not in seen and counts[row.dataset] < most:
            seen.add(row.image)
            counts[row.dataset] += 1
            yield row


def _peaks(
    rows: Sequence[CaseRow], asked: Sequence[CaseRow], objects: Mapping[str, set[Kind]], see: Seeing
) -> tuple[np.ndarray, np.ndarray]:
    """Highest region logits (N,) float32 where objects of images were asked for, and whether they are there (N,)."""
    absences = Absences(rows)
    shown: dict[Path, list[str]] = defaultdict(list)
    for row in rows:
        shown[row.image].append(row.object)
    peaks, there = list[float](), list[bool]()
    for row in asked:
        here = shown[row.image]
        absent = [
            name for name in absences.near(row, here)
            if name in objects and can_show(objects[name], (row.modality, row.site))
        ]  # fmt: skip
        for name, present in [(row.object, True), *((name, False) for name in absent[:3])]:
            peaks.append(float(see(row, name)[0].max()))
            there.append(present)
    return np.array(peaks, np.float32), np.array(there)


def main(folder: str, *data: str) -> None:
    """As the module says; rows of licence class "ok", which the packaged weights learned from."""
    write_vocabulary(Path(folder), read_training_cases([Path(one) for one in data], "ok"))


if __name__ == "__main__":
    main(*sys.argv[1:])
