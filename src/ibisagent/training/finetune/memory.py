"""What a recipe needs of each GPU's memory, from the model's size alone. Recipes for large models state the bytes.

Weights, gradients, AdamW's two moments and the key-value cache are counted; what a pass keeps for its way back is an
estimate. Buffers of communication and fragments, a few GB, come on top, and so does the segmenter.
"""

from __future__ import annotations

from dataclasses import dataclass

from ibisagent.policies.sizes import ModelSize
from ibisagent.training.finetune.recipes import RlRecipe, StageRecipe

TURN_TOKENS = 96  # of a turn's request and the marks around it, beside image and reply
DEFAULT_PIXELS = 512 * 512
_BYTES = {"auto": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes on each GPU. shards: GPUs that share weights, gradients and moments; 1 without FSDP or ZeRO-3."""

    weights: int
    gradients: int
    moments: int
    activations: int
    cache: int
    shards: int

    @property
    def learning(self) -> int:
        """While gradients are made."""
        return (self.weights + self.gradients + self.moments) // self.shards + self.activations

    @property
    def generating(self) -> int:
        """While replies are written, for which every GPU gathers all weights."""
        held = (self.weights + self.moments) // self.shards if self.shards > 1 else self.moments
        return self.weights + held + self.cache

    @property
    def peak(self) -> int:
        """The larger one."""
        return max(self.learning, self.generating if self.cache else 0)


def training_memory(recipe: StageRecipe, size: ModelSize, *, shards: int = 1) -> TrainingMemory:
    """What `recipe` needs on each GPU, `shards` of which share the weights, with a model of this size."""
    number = _BYTES[recipe.dtype]
    trained, trained_number = trained_parameters(recipe, size), 4 if recipe.train == "lora" else number
    tokens = rollout_tokens(recipe, size) if isinstance(recipe, RlRecipe) else int(getattr(recipe, "max_length", 0))
    layer = 8 * size.hidden + 4 * size.intermediate
    kept = size.layers * size.hidden + layer if recipe.activation_checkpointing else size.layers * layer
    computed = 2 if recipe.autocast else number
    return TrainingMemory(
        weights=size.parameters * number,
        gradients=trained * trained_number,
        moments=2 * trained * trained_number,
        activations=recipe.batch_size * tokens * kept * computed,
        cache=rollouts_at_once(recipe) * size.cache_bytes(tokens, bytes_each=computed)
        if isinstance(recipe, RlRecipe)
        else 0,
        shards=shards,
    )


def trained_parameters(recipe: StageRecipe, size: ModelSize) -> int:
    """How many numbers are learned."""
    if recipe.train == "lora":
        return recipe.lora.rank * (size.linear_sides + (0 if recipe.freeze_vision else size.vision_linear_sides))
    return size.parameters - (size.vision if recipe.freeze_vision else 0)


def rollout_tokens(recipe: RlRecipe, size: ModelSize) -> int:
    """Longest rollout, its first turn included."""
    shown = size.image_tokens(recipe.max_pixels or DEFAULT_PIXELS) + TURN_TOKENS
    return recipe.max_completion_length or (recipe.max_turns or 20) * (recipe.reply_tokens + shown)


def rollouts_at_once(recipe: RlRecipe) -> int:
    """Rollouts in a process's key-value cache; none where a vLLM server writes."""
    if recipe.vllm:
        return 0
    every = recipe.batch_size * (recipe.steps_per_generation or recipe.gradient_accumulation_steps)
    return min(recipe.rollouts_at_once or every, every)
