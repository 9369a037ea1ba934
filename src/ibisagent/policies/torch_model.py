"""A Hugging Face image-text-to-text model on torch: the general case of what `mllm` speaks to.

Weights are read from safetensors only (no pickle). Nothing hidden steers the generation: the sampling defaults that a
checkpoint carries (a repetition penalty, top-k) are dropped, its end and padding tokens kept.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, ProcessorMixin
from transformers.utils import logging as transformers_logging

import ibisagent.policies.nano  # noqa: F401 - the Auto classes then know its model type
from ibisagent.errors import ConfigError, IbisError, PolicyError
from ibisagent.files import one_line
from ibisagent.policies.base import Generation
from ibisagent.protocol import Message

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A vision token that is *written* stands for an image that is not there: Qwen's position index then raises, or drops
# every image of the batch.
_VISION_TOKEN = re.compile(r"(image|video|vision|audio|boi|eoi)_(\w+_)?token_(id|index)")


class TorchModel:
    """The model and processor of a folder; see `base.LanguageModel`.

    device "auto" is cuda where there is one, else cpu; dtype "auto" is bfloat16 on cuda, else float32. adapter: a PEFT
    folder that is merged into the weights. name: for messages. Raises as `mllm.MllmPolicy`.
    """

    def __init__(self, folder: Path, name: str, device: str, dtype: str, adapter: Path | None) -> None:
        self._name, self._adapter = name, adapter
        self._device, self._dtype = _resolve_device(device, dtype)
        self._processor = _load_processor(folder, name)
        self._model = _load_model(folder, self._dtype, name)
        if adapter:
            self._model = _merge_adapter(self._model, adapter)
        self._model = self._model.to(self._device).eval()
        self._model.generation_config = _plain_generation(self._model, self._processor.tokenizer)
        self._image_options: dict[str, Any] = {}

    @property
    def config(self) -> Mapping[str, Any]:
        """See `LanguageModel`."""
        said: Mapping[str, Any] = vars(self._model.config)
        return said

    @property
    def parts(self) -> tuple[Any, Any]:
        """The model, in evaluation mode, and its processor."""
        return self._model, self._processor

    @property
    def at_once(self) -> None:
        """See `LanguageModel`."""
        return None

    def bound_images(self, least: int | None, most: int | None, usual: int | None) -> None:
        """Bound the area, in pixels, that an image is resized to. usual: the bound where neither is given, for models
        that take any size. ConfigError for models that take one size."""
        if most is None and usual and _takes_any_size(self._processor):
            most = min(usual, self._processor.image_processor.size["longest_edge"])
        self._image_options = _image_options(self._processor, least, most, self._name)

    def keep_readable(self) -> None:
        """See `LanguageModel`."""
        if hasattr(self._model, "keep_readable"):
            self._model.keep_readable(self._processor.tokenizer)

    def write(
        self, conversations: Sequence[Sequence[Message]], limit: int, temperature: float, seed: int, draws: int
    ) -> list[Generation]:
        """See `LanguageModel`."""
        with _memory_remedy(self._name):
            inputs = self._tokenize(conversations)
            with _seeded(seed, inputs, self._device):
                sampling: dict[str, Any] = {}
                if temperature:
                    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
                    sampling["num_return_sequences"] = draws
                    if draws > 1 and hasattr(self._model, "proposal_processors"):
                        sampling["logits_processor"] = self._model.proposal_processors()
                sequences = self._model.generate(
                    **inputs.to(self._device, dtype=self._dtype), max_new_tokens=limit, **sampling
                )
            repeats = len(sequences) // len(conversations)
            prompts = inputs["attention_mask"].sum(dim=1).repeat_interleave(repeats).tolist()
            starts = inputs["input_ids"].shape[1]
            rows = zip(sequences, prompts, strict=True)
            return [self._read(row[starts:].tolist(), prompt) for row, prompt in rows]

    def see(self, conversation: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """See `LanguageModel`."""
        with _memory_remedy(self._name):
            inputs = self._tokenize([conversation])
            seen: tuple[np.ndarray, np.ndarray] = self._model.see(**inputs.to(self._device, dtype=self._dtype))
        return seen

    def describe(self) -> dict[str, str]:
        """See `LanguageModel`."""
        return {
            "policy_dtype": str(self._dtype).removeprefix("torch."),
            "policy_device": str(self._device),
            "transformers": version("transformers"),
            "torch": version("torch"),
        }

    def _tokenize(self, conversations: Sequence[Sequence[Message]]) -> Any:
        """Left-padded model inputs of one batch, on the CPU."""
        try:
            return self._processor.apply_chat_template(
                [list(conversation) for conversation in conversations],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,
                processor_kwargs={"padding": True, "padding_side": "left", **self._image_options},
            )
        except (ValueError, TypeError) as error:
            raise PolicyError(
                f"{self._name}: its processor cannot read the conversation: {one_line(error, 400)}"
            ) from error

    def _read(self, tokens: list[int], prompt_tokens: int) -> Generation:
        ends = set(self._model.generation_config.eos_token_id)
        length = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:length]
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(text, len(tokens), prompt_tokens, finished=length is not None)


def _resolve_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device '{device}': give auto, cpu, cuda, cuda:<number> or mps") from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device '{device}': torch sees {torch.cuda.device_count()} CUDA devices; use cpu or auto")
    if dtype == "auto":
        dtype = "bfloat16" if chosen.type == "cuda" else "float32"
    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype '{dtype}': give auto, {', '.join(_DTYPES)}")
    return chosen, _DTYPES[dtype]


@contextmanager
def _load_remedy(what: str) -> Iterator[None]:
    """Turn what libraries raise on missing, truncated or unrelated files into one PolicyError."""
    try:
        yield
    except IbisError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise PolicyError(
            f"{what} cannot be loaded ({one_line(error, 400)}): download or copy the folder again"
        ) from error


@contextmanager
def _memory_remedy(name: str) -> Iterator[None]:
    """Turn what torch raises while generating into one PolicyError."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, PolicyError):
            raise
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            remedy = "lower the batch size or max_pixels, use dtype bfloat16, or a larger device"
            raise PolicyError(f"{name}: out of memory ({one_line(error)}): {remedy}") from error
        raise PolicyError(f"{name}: generation failed: {one_line(error, 400)}") from error


def _load_processor(folder: Path, name: str) -> Any:
    loader: Any = AutoProcessor
    with _load_remedy(f"{name}: its processor"):
        processor = loader.from_pretrained(folder, local_files_only=True)
        if isinstance(processor, ProcessorMixin) and not processor.chat_template:
            processor.chat_template = processor.tokenizer.chat_template  # older folders have it there alone
        if not isinstance(processor, ProcessorMixin) or not processor.chat_template:
            raise PolicyError(f"{name} has no image processor with a chat template: give an image-text-to-text model")
    tokenizer = processor.tokenizer
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    _remember_added_tokens(tokenizer)
    return processor


def _remember_added_tokens(tokenizer: Any) -> None:
    """Keep the tables of added tokens, which are otherwise made anew for every conversation.

    A vocabulary with a token for each place has thousands: most of the time of reading a prompt
    (docs/experiments). A policy never adds any.
    """
    tables = {name: getattr(tokenizer, name) for name in ("added_tokens_decoder", "added_tokens_encoder")}
    kind = type(tokenizer)
    tokenizer.__class__ = type(kind.__name__, (kind,), tables)


def _takes_any_size(processor: Any) -> bool:
    return "max_pixels" in getattr(processor.image_processor.valid_kwargs, "__annotations__", {})


def _image_options(processor: Any, min_pixels: int | None, max_pixels: int | None, name: str) -> dict[str, Any]:
    """Arguments of the processor call that bound the area of an image (Qwen calls these areas "edges")."""
    if min_pixels is None and max_pixels is None:
        return {}
    if not _takes_any_size(processor):
        raise ConfigError(f"{name} takes images of one size: leave min_pixels and max_pixels out")
    size = processor.image_processor.size
    low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
    if not 0 < low <= high:
        raise ConfigError(f"min_pixels {low}, max_pixels {high}: give areas in pixels, the smaller one first")
    return {"images_kwargs": {"size": {"shortest_edge": low, "longest_edge": high}}}


def _load_model(folder: Path, dtype: torch.dtype, name: str) -> Any:
    loader: Any = AutoModelForImageTextToText  # its annotations leave output_loading_info out
    with _load_remedy(f"{name}: its weights"), _no_progress_bar():
        model, info = loader.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise PolicyError(f"{name}: its weights lack {len(missing)} of the model's tensors, first {missing[0]}")
    return model


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The command line has its own."""
    bars: Any = transformers_logging  # untyped
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _merge_adapter(model: Any, adapter: Path) -> Any:
    if not (adapter / "adapter_config.json").is_file() or not (adapter / "adapter_model.safetensors").is_file():
        raise ConfigError(f"adapter {adapter}: holds no adapter_config.json with an adapter_model.safetensors")
    if not find_spec("peft"):
        raise ConfigError("an adapter needs the package peft: pip install 'ibisagent[train]'")
    from peft import PeftModel

    # An adapter whose layer names do not fit is only warned about, and would change nothing.
    with _load_remedy(f"adapter {adapter}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        except UserWarning as error:
            raise PolicyError(f"adapter {adapter} was made for another model: {one_line(error)}") from error


def _plain_generation(model: Any, tokenizer: Any) -> Any:
    """Greedy generation with the model's own end tokens, in which no vision token can be written."""
    stated = model.generation_config.eos_token_id
    ends = {*(stated if isinstance(stated, list) else [stated]), tokenizer.eos_token_id} - {None}
    vision = {
        token
        for part in (model.config, model.config.get_text_config())
        for key, token in part.to_dict().items()
        if _VISION_TOKEN.fullmatch(key) and isinstance(token, int)
    }
    config: Any = GenerationConfig  # untyped
    return config(
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=sorted(vision) or None,
    )


@contextmanager
def _seeded(seed: int, inputs: Any, device: torch.device) -> Iterator[None]:
    """Draw from a stream of `seed` and the batch's own content; torch's global stream is left as it was."""
    digest = hashlib.sha256(str(seed).encode())
    for key in ("input_ids", "pixel_values"):
        if key in inputs:
            digest.update(inputs[key].contiguous().numpy().data)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest.digest()[:7], "big"))
        yield
