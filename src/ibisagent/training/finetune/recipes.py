"""What the recipes of the fine-tuning stages may say, apart from what runs them: whoever checks one needs no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ibisagent.config import Recipe
from ibisagent.errors import ConfigError
from ibisagent.rewards import PAPER, RewardWeights


def require_libraries() -> None:
    """ConfigError where what fine-tuning needs is not installed."""
    if missing := [name for name in ("trl", "peft", "accelerate", "datasets") if not find_spec(name)]:
        raise ConfigError(f"fine-tuning needs {', '.join(missing)}: pip install 'ibisagent[train]'")


class LoraSettings(BaseModel):
    """Size of the low-rank adapters that train = "lora" learns, in every linear layer but the output's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(default=8, ge=1)
    alpha: int = Field(default=16, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class StageRecipe(Recipe):
    """What a recipe of either stage may say; rates and sizes are those of one process."""

    data: Path
    out: Path
    """Folder for everything that comes of the run (see the module)."""
    policy: str = "ibis-nano"
    """What to start from: ibis-nano, a folder that `save_pretrained` wrote, or a hub id."""
    adapter: Path | None = None
    """A PEFT folder that is merged into the start."""
    dialect: str | None = None
    """Language of the turns; none takes what the policy speaks."""
    max_pixels: int | None = Field(None, ge=1)
    """Area that images are shrunk to, for models that take any size."""
    prompts: Path | None = None
    """TOML file with what the policy is told in place of its dialect's own words (`ibisagent data prompts`)."""
    chat_template: Path | None = None
    """Jinja file for models whose own template does not mark replies ({% generation %}) and show role "tool"."""

    train: Literal["full", "lora"] = "full"
    lora: LoraSettings = LoraSettings()
    merge: bool = True
    """Also write the policy with its adapter merged, as large as the start; only with train = "lora"."""
    freeze_vision: bool = True
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: int = Field(0, ge=0)
    """Updates; 0 makes as many as `num_train_epochs` gives."""
    batch_size: int = Field(8, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Batches an update."""
    learning_rate: float = Field(1e-5, gt=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    """Updates until the learning rate is reached."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is bfloat16 on a GPU, else float32."""
    autocast: Literal["", "bfloat16"] = ""
    """Numbers that are computed with; empty: as the weights."""
    activation_checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    dataloader_num_workers: int = Field(0, ge=0)
    """Processes that prepare batches."""
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0

    logging_steps: int = Field(1, ge=1)
    save_steps: int = Field(100, ge=1)
    save_total_limit: int = Field(2, ge=1)
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    run_name: str = ""
    trainer: dict[str, Any] = Field(default_factory=dict)
    """Further settings of TRL's `SFTConfig` or `GRPOConfig`, by their own names; handed over as they stand."""


class RlRecipe(StageRecipe):
    """How to train a policy by playing.

    data: a folder of `ibisagent data build` (its questions), or image-mask pairs as `ibisagent eval run` reads them.
    batch_size: rollouts a process learns from at once; batch_size * gradient_accumulation_steps * processes rollouts
    make an update.
    """

    split: str = "train"
    licence_class: str = ""
    """Use only rows of this licence class; empty for all."""
    segmenter: str = "ibis-click"
    num_generations: int = Field(4, ge=2)
    """Of each case: what a rollout earns is compared with the other rollouts of its case."""
    max_turns: int | None = Field(None, ge=1)
    """Of a rollout; left out, the policy's own limit."""
    reply_tokens: int = Field(128, ge=8)
    """Longest reply; a longer one is cut, and most likely unreadable."""
    max_completion_length: int = Field(0, ge=0)
    """Longest rollout, without the first image; 0 leaves room for `max_turns`. A longer one ends as max_turns does."""
    rollouts_at_once: int = Field(0, ge=0)
    """Most rollouts that a process writes at once, the others after them, for a smaller key-value cache; 0: all."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    epsilon: float = Field(0.2, gt=0)
    """How far the ratio of new to old probabilities counts: 1 - epsilon to 1 + epsilon."""
    epsilon_high: float | None = Field(None, gt=0)
    """The upper side, where it differs."""
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    """How tokens are averaged; grpo, as in the paper: within each rollout, then over rollouts."""
    num_iterations: int = Field(1, ge=1)
    """Updates from the same rollouts."""
    steps_per_generation: int | None = Field(None, ge=1)
    """Batches from the same rollouts: `gradient_accumulation_steps` times the updates; none: one update."""
    dynamic_sampling: int = Field(0, ge=0)
    """Dynamic sampling: so often, cases whose rollouts all earned the same are replaced by other cases."""
    rewards: RewardWeights = PAPER
    vllm: str = ""
    """Address of a vLLM server that then writes the replies (docs/guide/training.md); empty: the trainer does."""
    episodes_every: int = Field(0, ge=0)
    """Write the episodes of every so manieth update to OUT/episodes, as `ibisagent train check-rewards` reads them."""

    @model_validator(mode="after")
    def _no_dead_term(self) -> Self:
        if self.max_turns is not None:
            self.check_turns(self.max_turns)
        return self

    def check_turns(self, max_turns: int) -> None:
        """ConfigError where S_len would be 1 for every rollout: it must be possible to be longer than T_opt."""
        if self.rewards.length and max_turns <= self.rewards.optimal_turns:
            raise ConfigError(
                f"max_turns {max_turns} leaves the reward of length the same for every rollout, as optimal_turns is"
                f" {self.rewards.optimal_turns}: lower rewards.optimal_turns, or set rewards.length = 0"
            )
