"""What the recipes of the fine-tuning stages may say, apart from what runs them: whoever checks one needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ibisagent.config import Recipe
from ibisagent.errors import ConfigError
from ibisagent.rewards import PAPER, RewardWeights


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
    """Area that pictures are shrunk to, for models that take any size."""
    prompts: Path | None = None
    """TOML file with what the policy is told in place of its dialect's own words (`ibisagent data prompts`)."""
    chat_template: Path | None = None
    """Jinja file for models whose own template does not mark replies ({% generation %}) and show role "tool"."""

    train: Literal["full", "lora"] = "full"
    lora: LoraSettings = LoraSettings()
    freeze_vision: bool = True
    epochs: float = Field(1.0, gt=0)
    steps: int = Field(0, ge=0)
    """Updates; 0 makes as many as `epochs` gives."""
    batch: int = Field(8, ge=1)
    accumulate: int = Field(1, ge=1)
    """Batches an update."""
    rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warm_up: int = Field(0, ge=0)
    """Updates until the rate is reached."""
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights; auto is bfloat16 on a GPU, else float32."""
    autocast: Literal["", "bfloat16"] = ""
    """Numbers that are computed with; empty: as the weights."""
    checkpointing: bool = False
    """Compute activations twice instead of keeping them."""
    workers: int = Field(0, ge=0)
    """Processes that prepare batches."""
    device: Literal["auto", "cpu"] = "auto"
    seed: int = 0

    log_every: int = Field(1, ge=1)
    save_every: int = Field(100, ge=1)
    keep_checkpoints: int = Field(2, ge=1)
    report_to: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    run_name: str = ""


class RlRecipe(StageRecipe):
    """How to train a policy by playing.

    data: a folder of `ibisagent data build` (its questions), or image-mask pairs as `ibisagent eval run` reads them.
    batch: paths a process learns from at once; batch * accumulate * processes paths make an update.
    """

    split: str = "train"
    licence_class: str = ""
    """Use only rows of this licence class; empty for all."""
    segmenter: str = "ibis-click"
    paths: int = Field(4, ge=2)
    """Of each case: what a path earns is compared with the other paths of its case."""
    max_turns: int | None = Field(None, ge=1)
    """Of a path; left out, the policy's own limit."""
    reply_tokens: int = Field(128, ge=8)
    """Longest reply; a longer one is cut, and most likely unreadable."""
    path_tokens: int = Field(0, ge=0)
    """Longest path, without the first picture; 0 leaves room for `max_turns`. A longer one ends as max_turns does."""
    rollouts_at_once: int = Field(0, ge=0)
    """Most rollouts that a process writes at once, the others after them, for a smaller key-value cache; 0: all."""
    temperature: float = Field(1.0, gt=0)
    top_p: float = Field(1.0, gt=0, le=1)
    clip: float = Field(0.2, gt=0)
    """How far the ratio of new to old probabilities counts: 1 - clip to 1 + clip."""
    clip_high: float | None = Field(None, gt=0)
    """The upper side, where it differs."""
    loss: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = "grpo"
    """How tokens are averaged; grpo, as in the paper: within each path, then over paths."""
    iterations: int = Field(1, ge=1)
    """Updates from the same paths."""
    steps_per_generation: int | None = Field(None, ge=1)
    """Batches from the same rollouts: `accumulate` times the updates that they are learnt from in; none: one update."""
    resample: int = Field(0, ge=0)
    """Dynamic sampling: so often, cases whose paths all earned the same are replaced by other cases."""
    rewards: RewardWeights = PAPER
    vllm: str = ""
    """Address of a vLLM server that then writes the replies (docs/training.md); empty: the trainer does."""
    episodes_every: int = Field(0, ge=0)
    """Write the episodes of every so manieth update to OUT/episodes, as `ibisagent train check-rewards` reads them."""

    @model_validator(mode="after")
    def _no_dead_term(self) -> Self:
        if self.max_turns is not None:
            self.check_turns(self.max_turns)
        return self

    def check_turns(self, max_turns: int) -> None:
        """ConfigError where S_len would be 1 for every path: it must be possible to be longer than T_opt."""
        if self.rewards.length and max_turns <= self.rewards.optimal_turns:
            raise ConfigError(
                f"max_turns {max_turns} leaves the reward of length the same for every path, as optimal_turns is"
                f" {self.rewards.optimal_turns}: lower rewards.optimal_turns, or set rewards.length = 0"
            )
