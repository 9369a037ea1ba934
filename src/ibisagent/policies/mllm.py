"""Any image-text-to-text model as a policy: our nano, Qwen2.5-VL, the public IBISAgent weights.

What the models are asked and what is made of what they write is here; what runs them, in `torch_model` and, for
ibis-nano on a CPU, without torch in `nano_model`.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.domain import Completion, Image, Observation, Wording
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.files import one_line, weights_sha256
from ibisagent.policies.base import MAX_NEW_TOKENS, Generation, LanguageModel, Proposal, is_public
from ibisagent.policies.one_by_one import OneByOne
from ibisagent.policies.vocabulary import Look, Vocabulary
from ibisagent.policies.wording import read_wording, wording_facts
from ibisagent.protocol import History, Message, OverlayStyle, dialect_of, render
from ibisagent.segmenters.runtime import choose_device, choose_runtime

PROPOSAL_TEMPERATURE = 0.5
KEPT_LOOKS = 64

_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")


class MllmPolicy(OneByOne):
    """A multimodal language model from a folder or the Hugging Face hub, batched and left-padded.

    source: a folder that `save_pretrained` wrote, or a hub id ("owner/name", "owner/name/sub/folder"). adapter: a PEFT
    folder that is merged into the weights. dialect, history, style: None takes what `config.dialect`,
    `config.history`, `config.mask_style` say, else the dialect "released" for the public weights and "ibis" for any
    other model, with that dialect's own history and style. max_new_tokens: None takes `config.reply_tokens`, else
    MAX_NEW_TOKENS. `max_turns` is what `config.max_turns` says, else None. device "auto" is cuda where there is one,
    else cpu; dtype "auto" is bfloat16 on cuda, else float32.
    temperature 0 is greedy; otherwise what is drawn depends on `seed` and the batch alone, not on earlier calls.
    batch_size: most conversations per forward pass. min_pixels, max_pixels: bounds of the area an image is resized to,
    for models with a free image size (Qwen); None takes the dialect's own where it has any. prompts: a TOML file with
    what the model is told (`policies.wording`); None takes `config.wording`, else the dialect's own words.
    candidates: replies that `propose` gives at most; None takes `config.candidates` where it has a vocabulary, else 1.
    name: how `load_policy` was asked for it.

    With a vocabulary (`objects.json` beside the weights) the model is asked for one object after another, see
    `one_by_one`. Safe to call from multiple threads; calls queue. Raises ConfigError for options that do not exist or
    fit and PolicyError for missing or damaged weights and for lack of memory.
    """

    def __init__(
        self,
        source: str | Path,
        *,
        name: str | None = None,
        adapter: str | Path | None = None,
        dialect: str | None = None,
        history: History | None = None,
        style: OverlayStyle | None = None,
        device: str = "auto",
        dtype: str = "auto",
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 16,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        candidates: int | None = None,
        prompts: str | Path | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch size {batch_size}: give 1 or more")
        if candidates is not None and candidates < 1:
            raise ConfigError(f"candidates {candidates}: give 1 or more")
        _check_sampling(max_new_tokens, temperature)
        self.name = name or f"mllm:{source}"
        self.temperature, self.seed = temperature, seed
        self._adapter = Path(adapter) if adapter else None
        self._folder = _resolve_folder(str(source))
        self._lock = threading.Lock()
        self._model = self._load(device, dtype)
        self.batch_size = min(batch_size, self._model.at_once or batch_size)

        config = self._model.config
        own = "released" if is_public(str(source)) else "ibis"
        self.dialect: str = dialect or config.get("dialect") or own
        default = dialect_of(self.dialect)
        if self.dialect == "ibis":
            self._model.keep_readable()
        self._model.bound_images(min_pixels, max_pixels, default.rules.max_pixels)
        self.history: History = history or config.get("history") or default.history
        self.max_new_tokens = max_new_tokens or int(config.get("reply_tokens", MAX_NEW_TOKENS))
        self.max_turns: int | None = config.get("max_turns")
        self.style: OverlayStyle = style or config.get("mask_style") or default.style
        kept = config.get("wording")
        self.wording = read_wording(prompts) if prompts is not None else Wording(**kept) if kept else None
        self.vocabulary = Vocabulary.read(self._folder)
        usual = 1 if self.vocabulary is None else int(config.get("candidates", 1))
        self.candidates: int = candidates or usual
        self._looks: OrderedDict[tuple[str, str], Look] = OrderedDict()

    def see(self, image: Image, query: str) -> tuple[np.ndarray, np.ndarray]:
        """What an ibis-nano sees in an image before any turn: the map of the object that `query` asks for, as logits
        (L, L), and the image's mean features (F,). PolicyError when the model fails."""
        messages = render(Observation("", image, query), dialect=self.dialect, history="none", style=self.style)
        with self._lock:
            return self._model.see([self._adapt(message) for message in messages])

    def features(self, image: Image) -> np.ndarray | None:
        """The second of what `see` gives, which no query changes; None for other models than an ibis-nano."""
        return self.see(image, "Segment the object.")[1] if _is_nano(self._folder) else None

    def look(self, image: Image, query: str) -> Look:
        """What the model sees of one object, without any mask; kept for a while."""
        assert self.vocabulary is not None  # noqa: S101 - who looks has one
        key = (image.sha256, query)
        look = self._looks.get(key)
        if look is None:
            region, features = self.see(image, query)
            self._looks[key] = look = Look(self.vocabulary.kinds_of(features), region)
            if len(self._looks) > KEPT_LOOKS:
                self._looks.popitem(last=False)
        return look

    def write(self, observations: Sequence[Observation]) -> list[Completion]:
        """What the model itself writes, one completion per observation, in order; `seconds` is the time of the batch
        divided by its size."""
        conversations = [self._ask(observation) for observation in observations]
        completions = []
        for batch in _batches(conversations, self.batch_size):
            started = time.perf_counter()
            generations = self.generate(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            completions += [Completion(written.text, written.tokens, seconds) for written in generations]
        return completions

    def propose(self, observations: Sequence[Observation]) -> list[Proposal]:
        """What `respond` gives for each observation, and where an object is begun `candidates` replies at most.

        With a vocabulary there is one more, from the model's own map of the object (`one_by_one.proposed`). Without one
        they are drawn at PROPOSAL_TEMPERATURE: at 1, a small model explores far worse replies than its likeliest.
        """
        if self.vocabulary is not None:
            return super().propose(observations)
        said = self.respond(observations)
        begun = [bool(one.turns) or any(mask.any() for mask in one.masks.values()) for one in observations]
        drawn = self._draw([one for one, has_begun in zip(observations, begun, strict=True) if not has_begun])
        return [
            Proposal([completion] if has_begun else [completion, *next(drawn)])
            for completion, has_begun in zip(said, begun, strict=True)
        ]

    def _draw(self, observations: Sequence[Observation]) -> Iterator[list[Completion]]:
        """One less than `candidates` replies to each of `observations`, drawn at PROPOSAL_TEMPERATURE."""
        draws = self.candidates - 1
        conversations = [self._ask(observation) for observation in observations]
        for batch in _batches(conversations, max(1, self.batch_size // self.candidates)):
            started = time.perf_counter()
            written = self.generate(batch, temperature=PROPOSAL_TEMPERATURE, draws=draws)
            seconds = (time.perf_counter() - started) / len(written)
            replies = [Completion(one.text, one.tokens, seconds) for one in written]
            for start in range(0, len(replies), draws):
                yield replies[start : start + draws]

    def _ask(self, observation: Observation) -> list[Message]:
        return render(observation, dialect=self.dialect, history=self.history, style=self.style, wording=self.wording)

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        draws: int = 1,
    ) -> list[Generation]:
        """What the model writes after each of `conversations` (messages as `protocol.render` makes them), in order;
        `draws` times after each, where the temperature is above 0. A model may have processors for its proposals.

        None takes the policy's own setting. A control token in the text of a message ("<|im_end|>") is read as plain
        text. Raises PolicyError when the model fails, ConfigError for impossible settings.
        """
        max_new_tokens = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        temperature = self.temperature if temperature is None else temperature
        _check_sampling(max_new_tokens, temperature)
        seed = self.seed if seed is None else seed
        written: list[Generation] = []
        with self._lock:
            for batch in _batches(conversations, self.batch_size):
                adapted = [[self._adapt(message) for message in conversation] for conversation in batch]
                written += self._model.write(adapted, max_new_tokens, temperature, seed, draws if temperature else 1)
        return written

    @property
    def folder(self) -> Path:
        """Where the weights are."""
        return self._folder

    @property
    def parts(self) -> tuple[Any, Any]:
        """The model, in evaluation mode, and its processor: what training starts from. ConfigError without torch."""
        return self._model.parts

    def describe(self) -> dict[str, str]:
        """What a record needs to name this policy exactly: weights, adapter, numerics, sampling, versions."""
        facts = {
            "policy": self.name,
            "policy_weights_sha256": self._weights_sha256,
            "dialect": self.dialect,
            "history": self.history,
            **wording_facts(self.dialect, self.wording),
            "max_new_tokens": str(self.max_new_tokens),
            "temperature": str(self.temperature),
            "seed": str(self.seed),
            "candidates": str(self.candidates),
            **self._model.describe(),
        }
        if self._adapter:
            facts |= {"policy_adapter": str(self._adapter), "policy_adapter_sha256": weights_sha256(self._adapter)}
        return facts

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self._folder)

    def _load(self, device: str, dtype: str) -> LanguageModel:
        """What runs the model."""
        if self._adapter is None and dtype == "auto" and device in ("auto", "cpu") and _is_nano(self._folder):
            device = choose_device(device)
            if choose_runtime("auto", device) == "openvino":
                from ibisagent.policies.nano_model import NanoModel

                return NanoModel(self._folder, self.name)
        from ibisagent.policies.torch_model import TorchModel

        return TorchModel(self._folder, self.name, device, dtype, self._adapter)

    def _adapt(self, message: Message) -> Message:
        """A copy of `message` with images in the mode that the model reads (alpha is a mask only to our own)."""
        if isinstance(message["content"], str):
            return {**message, "content": [{"type": "text", "text": message["content"]}]}
        mode = "RGBA" if self.style == "alpha" else "RGB"
        parts = [
            {**part, "image": part["image"].convert(mode)} if part["type"] == "image" else part
            for part in message["content"]
        ]
        return {**message, "content": parts}


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _check_sampling(max_new_tokens: int | None, temperature: float) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens}: give 1 or more")
    if not 0 <= temperature <= 100:
        raise ConfigError(f"temperature {temperature}: give 0 (greedy) to 100")


def _is_nano(folder: Path) -> bool:
    try:
        said = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False  # `torch_model` says what is wrong with it
    return isinstance(said, dict) and said.get("model_type") == "ibis_nano"


def _resolve_folder(source: str) -> Path:
    """The local folder of `source`, downloaded where it is a hub id."""
    if not source:
        raise ConfigError("mllm: give a folder or a hub id, for example mllm:Qwen/Qwen2.5-VL-7B-Instruct")
    folder = Path(source).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(f"{source} is a PEFT adapter: give its base model as policy and this folder as adapter")
    if folder.is_dir():
        raise PolicyError(f"{source} holds no config.json: give a folder that save_pretrained wrote")
    owner, _, rest = source.partition("/")
    name, _, subfolder = rest.partition("/")
    if not owner or not name or owner in (".", "..", "~"):
        raise ConfigError(f"no such folder: {source} (nor is it a hub id, owner/name)")
    prefix = f"{subfolder}/" if subfolder else ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        snapshot = snapshot_download(
            f"{owner}/{name}",
            allow_patterns=[prefix + files for files in _MODEL_FILES],
            ignore_patterns=[f"{prefix}*/*"],
        )
    except (OSError, ValueError, HfHubHTTPError) as error:
        include = f"--include '{prefix}*' " if subfolder else ""
        download = f"hf download {owner}/{name} {include}--local-dir weights"
        raise PolicyError(
            f"{source} is no folder here and cannot be downloaded ({one_line(error)}): run `{download}` on a "
            f"machine with internet, copy the folder, and give mllm:weights/{subfolder}"
        ) from error
    folder = Path(snapshot) / subfolder
    if not (folder / "config.json").is_file():
        raise PolicyError(f"{source} on the hub holds no config.json: check the name and the subfolder")
    return folder
