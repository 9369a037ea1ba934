"""How large a language model is, and what it needs on a GPU, from its configuration alone: no weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

import ibisagent.policies.nano  # noqa: F401 - the Auto classes then know its model type
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.files import one_line

QWEN_7B: dict[str, Any] = {
    "text_config": {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0},
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    },
}
"""The shape of Qwen2.5-VL-7B, which the paper's policy has too."""

_VISION = ("visual", "vision_tower", "vision_model", "vision_encoder", "vision")
PROMPT_TOKENS = 350  # system prompt and request of one turn, without the image
REPLY_TOKENS = 150  # of a thought, an action and the marks around them


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a data sheet says: bytes of memory, bytes a second, and bfloat16 operations a second (dense)."""

    memory: float
    bandwidth: float
    operations: float


GPUS = {  # the most particular names first: a name counts where it is part of what the driver says
    "H200": Gpu(141e9, 4.8e12, 989e12),
    "H100 PCIe": Gpu(80e9, 2.0e12, 756e12),
    "H100": Gpu(80e9, 3.35e12, 989e12),
    "A100-SXM4-80GB": Gpu(80e9, 2.04e12, 312e12),
    "A100 80GB": Gpu(80e9, 1.94e12, 312e12),
    "A100": Gpu(40e9, 1.55e12, 312e12),
    "L40S": Gpu(48e9, 0.864e12, 362e12),
    "A6000": Gpu(48e9, 0.768e12, 155e12),
    "RTX 4090": Gpu(24e9, 1.008e12, 165e12),
    "RTX 3090": Gpu(24e9, 0.936e12, 71e12),
    "L4": Gpu(24e9, 0.3e12, 121e12),
}


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Counts of a model. vision: parameters of the part that sees. values_a_token: of its key-value cache.

    linear_sides: inputs and outputs of all linear layers but those of the vision part and the output layer, added up:
    so many numbers has an adapter for each of its ranks. vision_linear_sides: those of the vision part.
    """

    parameters: int
    vision: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    values_a_token: int
    linear_sides: int
    vision_linear_sides: int
    image_side: int
    """Pixels of an image, along one side, that become one token."""

    def cache_bytes(self, tokens: int, *, bytes_each: int = 2) -> int:
        """Bytes of the key-value cache of so many tokens."""
        return tokens * self.values_a_token * bytes_each

    def image_tokens(self, pixels: int) -> int:
        """Most tokens of an image of this area."""
        return -(-pixels // self.image_side**2)


def size_of(config: Any) -> ModelSize:
    """The size of the model of a transformers configuration; it is built without memory."""
    loader: Any = AutoModelForImageTextToText  # untyped
    with torch.device("meta"):
        model: Any = loader.from_config(config)
    text = config.get_text_config()
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    towers = [part for name, part in model.named_modules() if name.rpartition(".")[2] in _VISION]
    vision = getattr(config, "vision_config", None)
    side = getattr(vision, "patch_size", 14) * getattr(vision, "spatial_merge_size", 1)
    return ModelSize(
        parameters=sum(one.numel() for one in model.parameters()),
        vision=sum(one.numel() for one in towers[0].parameters()) if towers else 0,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        linear_sides=_sides(model) - _sides(model.get_output_embeddings()) - sum(map(_sides, towers[:1])),
        vision_linear_sides=sum(map(_sides, towers[:1])),
        values_a_token=2 * text.num_hidden_layers * text.num_key_value_heads * head,
        image_side=side,
    )


def _sides(module: nn.Module) -> int:
    linear = [part for part in module.modules() if isinstance(part, nn.Linear)]
    return sum(part.in_features + part.out_features for part in linear)


def size_of_folder(folder: str | Path) -> ModelSize:
    """The size of the model in a folder, of which only config.json is read. PolicyError where there is none."""
    try:
        return size_of(AutoConfig.from_pretrained(folder, local_files_only=True))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise PolicyError(
            f"{folder}: its config.json tells no size of an image-text-to-text model ({one_line(error, 200)}): give the"
            " folder of one"
        ) from error


def find_gpu(name: str) -> Gpu:
    """The data sheet of a GPU. ConfigError for one that is not known."""
    if gpu := known_gpu(name):
        return gpu
    raise ConfigError(f"GPU '{name}': not among those whose data sheet is known: {', '.join(GPUS)}")


def known_gpu(name: str) -> Gpu | None:
    """The data sheet of a GPU, None where it is not known here."""
    return next((gpu for known, gpu in GPUS.items() if known.lower() in name.lower()), None)


@dataclass(frozen=True, slots=True)
class Need:
    """What a model needs in use: bytes of GPU memory, and at least so many seconds for a case on a GPU."""

    weights: int
    cache: int
    work: int
    seconds: float | None

    @property
    def memory(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.work


def need(
    size: ModelSize,
    *,
    gpu: Gpu | None = None,
    pixels: int = 512 * 512,
    turns: int = 5,
    batch: int = 1,
    bytes_each: int = 2,
) -> Need:
    """What a policy of this size needs to answer `batch` cases together, one turn at a time without history.

    seconds: by the roofline, so the true time is longer: a prompt is bound by operations (two for each parameter and
    token), a written token by reading all weights and the cache once. `turns` of REPLY_TOKENS each.
    """
    image = size.image_tokens(pixels)
    prompt = PROMPT_TOKENS + image
    longest = prompt + 512
    weights = size.parameters * bytes_each
    cache = batch * size.cache_bytes(longest, bytes_each=bytes_each)
    work = batch * prompt * (4 * size.hidden + 3 * size.intermediate) * bytes_each + batch * size.vocabulary * 4
    if gpu is None:
        return Need(weights, cache, work, None)
    reading = size.vision * image * 4 + (size.parameters - size.vision) * prompt  # 4 patches make a token
    first = batch * 2 * reading / gpu.operations
    token = ((size.parameters - size.vision) * bytes_each + cache) / gpu.bandwidth
    return Need(weights, cache, work, turns * (first / batch + REPLY_TOKENS * token / batch))
