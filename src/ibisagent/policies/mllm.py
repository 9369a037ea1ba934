"""Any Hugging Face image-text-to-text model as a policy: our nano, Qwen2.5-VL, the public IBISAgent weights.

Weights are read from safetensors only (no pickle). Nothing hidden steers the generation: the sampling defaults that a
checkpoint carries (a repetition penalty, top-k) are dropped, its end and padding tokens kept.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, ProcessorMixin
from transformers.utils import logging as transformers_logging

from ibisagent.domain import Completion, Image, Observation, Wording
from ibisagent.errors import ConfigError, IbisError, PolicyError
from ibisagent.files import one_line
from ibisagent.policies.base import MAX_NEW_TOKENS, is_public
from ibisagent.policies.one_by_one import Answering, answering, refinements, sentence_for, understood
from ibisagent.policies.vocabulary import Asked, Look, Vocabulary
from ibisagent.policies.wording import read_wording, wording_facts
from ibisagent.protocol import History, Message, OverlayStyle, dialect_of, render

PROPOSAL_TEMPERATURE = 0.5
KEPT_LOOKS = 64
MAX_TURNS_OF_ONE = 5  # for each of several objects, where the model states no limit

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
# A vision token that is *written* stands for an image that is not there: Qwen's position index then raises, or drops
# every image of the batch.
_VISION_TOKEN = re.compile(r"(image|video|vision|audio|boi|eoi)_(\w+_)?token_(id|index)")


@dataclass(frozen=True, slots=True)
class Generation:
    """What the model wrote after one conversation.

    tokens: new tokens, the end token included. prompt_tokens: those of the conversation, image tokens included.
    finished: the model ended by itself, rather than at the limit of new tokens.
    """

    text: str
    tokens: int
    prompt_tokens: int
    finished: bool


class MllmPolicy:
    """A multimodal language model from a folder or the Hugging Face hub, batched and left-padded.

    source: a folder that `save_pretrained` wrote, or a hub id ("owner/name", "owner/name/sub/folder"). adapter: a PEFT
    folder that is merged into the weights. dialect, history, style: None takes what `config.dialect`,
    `config.history`, `config.mask_style` say, else the dialect "released" for the public weights and "ibis" for any
    other model, with that dialect's own history and style. max_new_tokens: None takes `config.reply_tokens`, else
    MAX_NEW_TOKENS. `max_turns` is what `config.max_turns` says, else None. device "auto" is cuda where there is one,
    else cpu; dtype "auto" is bfloat16 on cuda, else float32.
    temperature 0 is greedy; otherwise what is drawn depends on `seed` and the batch alone, not on earlier calls.
    batch_size: conversations per forward pass. min_pixels, max_pixels: bounds of the area that an image is resized to,
    for models with a free image size (Qwen); None takes the dialect's own where it has any. prompts: a TOML file with
    what the model is told (`policies.wording`); None takes `config.wording`, else the dialect's own words.
    candidates: replies that `propose` gives; None takes `config.candidates`, else 1. name: how `load_policy` was asked
    for it.

    Safe to call from several threads; calls queue. Raises ConfigError for options that do not exist or fit and
    PolicyError for missing or damaged weights and for lack of memory.
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
        self._batch_size, self._adapter = batch_size, Path(adapter) if adapter else None
        self._device, self._dtype = _resolve_device(device, dtype)
        self._folder = _resolve_folder(str(source))
        self._lock = threading.Lock()

        self._processor = _load_processor(self._folder, self.name)
        self._model = _load_model(self._folder, self._dtype, self.name)
        if self._adapter:
            self._model = _merge_adapter(self._model, self._adapter)
        self._model = self._model.to(self._device).eval()
        self._model.generation_config = _plain_generation(self._model, self._processor.tokenizer)

        config = self._model.config
        own = "released" if is_public(str(source)) else "ibis"
        self.dialect: str = dialect or getattr(config, "dialect", None) or own
        default = dialect_of(self.dialect)
        self.history: History = history or getattr(config, "history", None) or default.history
        self.max_new_tokens = max_new_tokens or int(getattr(config, "reply_tokens", MAX_NEW_TOKENS))
        self.max_turns: int | None = getattr(config, "max_turns", None)
        self.candidates: int = candidates or int(getattr(config, "candidates", 1))
        self.style: OverlayStyle = style or getattr(config, "mask_style", None) or default.style
        kept = getattr(config, "wording", None)
        self.wording = read_wording(prompts) if prompts is not None else Wording(**kept) if kept else None
        if max_pixels is None and default.rules.max_pixels and _takes_any_size(self._processor):
            max_pixels = min(default.rules.max_pixels, self._processor.image_processor.size["longest_edge"])
        self._image_options = _image_options(self._processor, min_pixels, max_pixels, self.name)
        self.vocabulary = Vocabulary.read(self._folder)
        self._looks: OrderedDict[tuple[str, str], Look] = OrderedDict()

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        """One completion per observation, in order; `seconds` is the time of the batch divided by its size.

        With a vocabulary (`objects.json` beside the weights) the model is asked for one object after another, see
        `one_by_one`. ConfigError for a query that does not settle what is asked for.
        """
        vocabulary = self.vocabulary
        if vocabulary is None:
            return self._write(observations)
        limit = self.max_turns or MAX_TURNS_OF_ONE
        return self._answer(
            [answering(observation, vocabulary, self._look, self.dialect, limit) for observation in observations]
        )

    def refine(self, observation: Observation) -> list[Completion]:
        """First turns to try where a mask was brought, see `one_by_one.refinements`; none where there is no choice.

        Raises as `respond`.
        """
        if self.vocabulary is None:
            return []
        found = refinements(observation, self.vocabulary, self._look, self.dialect)
        return [] if found is None else [found[0], *self._answer([found[1]])]

    def about(self, image: Image, query: str) -> tuple[Asked, ...]:
        """What is known of the objects that a query asks for, before any turn; none where no object is named, or the
        model declares no names. ConfigError as `respond`."""
        vocabulary = self.vocabulary
        if vocabulary is None:
            return ()
        requests = understood(image, query, vocabulary, self._look)
        return tuple(vocabulary.asked(one, self._look(image, sentence_for(one))) for one in requests)

    def see(self, image: Image, query: str) -> tuple[np.ndarray, np.ndarray]:
        """What an ibis-nano sees in an image before any turn: the map of the object that `query` asks for, as logits
        (L, L), and the image's mean features (F,). PolicyError when the model fails."""
        messages = render(Observation("", image, query), dialect=self.dialect, history="none", style=self.style)
        with self._lock, _memory_remedy(self.name):
            inputs = self._tokenize([messages])
            seen: tuple[np.ndarray, np.ndarray] = self._model.see(**inputs.to(self._device, dtype=self._dtype))
        return seen

    def _answer(self, answers: Sequence[Answering]) -> list[Completion]:
        """Run them to their ends, asking the model for all that wait at once."""
        done: dict[int, Completion] = {}
        waiting: dict[int, Observation] = {}
        said: dict[int, Completion | None] = dict.fromkeys(range(len(answers)))
        while said:
            for number, completion in said.items():
                try:
                    answer = answers[number]
                    waiting[number] = next(answer) if completion is None else answer.send(completion)
                except StopIteration as end:
                    done[number] = end.value
            said = dict(zip(waiting, self._write(list(waiting.values())), strict=True))
            waiting = {}
        return [done[number] for number in range(len(answers))]

    def _look(self, image: Image, query: str) -> Look:
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

    def _write(self, observations: Sequence[Observation]) -> list[Completion]:
        """What the model writes, for `respond`."""
        conversations = [self._ask(observation) for observation in observations]
        completions = []
        for batch in _batches(conversations, self._batch_size):
            started = time.perf_counter()
            generations = self.generate(batch)
            seconds = (time.perf_counter() - started) / len(batch)
            completions += [Completion(written.text, written.tokens, seconds) for written in generations]
        return completions

    def propose(self, observations: Sequence[Observation]) -> list[list[Completion]]:
        """`candidates` completions per observation, in order: what `respond` gives, then drawn ones.

        They are drawn at PROPOSAL_TEMPERATURE: at 1, a small model explores far worse replies than its likeliest.
        """
        conversations = [self._ask(observation) for observation in observations]
        proposals: list[list[Completion]] = []
        draws = self.candidates - 1
        for batch in _batches(conversations, max(1, self._batch_size // self.candidates)):
            started = time.perf_counter()
            likeliest = self.generate(batch, temperature=0.0)
            drawn = self.generate(batch, temperature=PROPOSAL_TEMPERATURE, draws=draws) if draws else []
            seconds = (time.perf_counter() - started) / len(batch) / self.candidates
            for number, first in enumerate(likeliest):
                written = [first, *drawn[number * draws : (number + 1) * draws]]
                proposals.append([Completion(one.text, one.tokens, seconds) for one in written])
        return proposals

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
        written: list[Generation] = []
        with self._lock, _memory_remedy(self.name):
            for batch in _batches(conversations, self._batch_size):
                inputs = self._tokenize(batch)
                with _seeded(self.seed if seed is None else seed, inputs, self._device):
                    sampling: dict[str, Any] = {}
                    if temperature:
                        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
                        sampling["num_return_sequences"] = draws
                        if draws > 1 and hasattr(self._model, "proposal_processors"):
                            sampling["logits_processor"] = self._model.proposal_processors()
                    sequences = self._model.generate(
                        **inputs.to(self._device, dtype=self._dtype), max_new_tokens=max_new_tokens, **sampling
                    )
                prompts = inputs["attention_mask"].sum(dim=1).repeat_interleave(len(sequences) // len(batch)).tolist()
                starts = inputs["input_ids"].shape[1]
                rows = zip(sequences, prompts, strict=True)
                written += [self._read(row[starts:].tolist(), prompt) for row, prompt in rows]
        return written

    @property
    def parts(self) -> tuple[Any, Any]:
        """The model, in evaluation mode, and its processor: what training starts from."""
        return self._model, self._processor

    def describe(self) -> dict[str, str]:
        """What a record needs to name this policy exactly: weights, adapter, numerics, sampling, versions."""
        facts = {
            "policy": self.name,
            "policy_weights_sha256": self._weights_sha256,
            "policy_dtype": str(self._dtype).removeprefix("torch."),
            "policy_device": str(self._device),
            "dialect": self.dialect,
            "history": self.history,
            **wording_facts(self.dialect, self.wording),
            "max_new_tokens": str(self.max_new_tokens),
            "temperature": str(self.temperature),
            "seed": str(self.seed),
            "candidates": str(self.candidates),
            "transformers": version("transformers"),
            "torch": version("torch"),
        }
        if self._adapter:
            facts |= {"policy_adapter": str(self._adapter), "policy_adapter_sha256": _sha256(self._adapter)}
        return facts

    @cached_property
    def _weights_sha256(self) -> str:
        return _sha256(self._folder)

    def _tokenize(self, conversations: Sequence[Sequence[Message]]) -> Any:
        """Left-padded model inputs of one batch, on the CPU."""
        try:
            return self._processor.apply_chat_template(
                [[self._adapt(message) for message in conversation] for conversation in conversations],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                sanitize_control_tokens=True,
                processor_kwargs={"padding": True, "padding_side": "left", **self._image_options},
            )
        except (ValueError, TypeError) as error:
            raise PolicyError(
                f"{self.name}: its processor cannot read the conversation: {one_line(error, 400)}"
            ) from error

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

    def _read(self, tokens: list[int], prompt_tokens: int) -> Generation:
        ends = set(self._model.generation_config.eos_token_id)
        length = next((place + 1 for place, token in enumerate(tokens) if token in ends), None)
        tokens = tokens[:length]
        text = self._processor.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generation(text, len(tokens), prompt_tokens, finished=length is not None)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _check_sampling(max_new_tokens: int | None, temperature: float) -> None:
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens {max_new_tokens}: give 1 or more")
    if not 0 <= temperature <= 100:
        raise ConfigError(f"temperature {temperature}: give 0 (greedy) to 100")


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


def _sha256(folder: Path) -> str:
    """Hash of the safetensors in `folder`: of the file itself where it is one, else of their "hash  name" lines."""
    hashes = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{sha}  {name}\n" for name, sha in hashes.items()).encode()).hexdigest()
