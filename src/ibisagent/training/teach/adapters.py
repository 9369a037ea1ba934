"""How a large model is taught: a LoRA adapter, by supervised fine-tuning on what an expert does on the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ibisagent.datasets import CaseSource
from ibisagent.generation.trajectories import TrajectoryConfig, generate
from ibisagent.policies.base import is_public
from ibisagent.segmenters import load_segmenter
from ibisagent.training.finetune.sft import SftRecipe, train
from ibisagent.training.teach.recipe import PartRecipe

SETTINGS: dict[str, Any] = {
    "history": "full",
    "max_pixels": 262_144,
    "train": "lora",
    "merge": False,
    "num_train_epochs": 10,
    "batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "activation_checkpointing": True,
    "save_steps": 10,
    "report_to": (),
}
"""As recipes/sft-qwen2.5-vl-7b.toml, for a few images. Not measured with weights of that size."""


def learn_adapter(
    recipe: PartRecipe, source: CaseSource, policy: str, segmenter: str, report: Callable[[int], None]
) -> Path:
    """Teach an adapter the objects of `source`, resuming; its folder.

    policy: the model that it is for. segmenter: who turns the expert's clicks into masks. report: told how far it is,
    as a share of `recipe.examples`.
    """
    dialect = "released" if is_public(policy) else "ibis"
    episodes = recipe.out / "episodes"
    config = TrajectoryConfig(seed=recipe.seed, dialect=dialect, box_first=0.5, jitter=0.05)
    generate(source, load_segmenter(segmenter), episodes, config)
    settings = {**SETTINGS, "data": episodes, "out": recipe.out / "sft", "policy": policy, "seed": recipe.seed}
    made = SftRecipe.model_validate({**settings, **recipe.adapter})

    def told(step: int, steps: int, _logs: Any) -> None:
        report(recipe.examples * step // max(steps, 1))

    return train(made, told)
