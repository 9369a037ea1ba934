"""`ibis-nano` on a CPU without torch: OpenVINO sees, numpy reads and writes.

Loading torch and transformers costs more seconds and memory than all that this model computes on an image. Its
convolutions are converted once (`segmenters.runtime`); its language model, a Llama of four layers (Touvron et al.,
2023), is a few products of small matrices, for which numpy is quick enough. Conversations are read one after another:
a batch gains nothing on a CPU, and no reply depends on its neighbours. The numbers are those of `nano`, where all of
it is explained, up to rounding.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from tokenizers import Tokenizer

from ibisagent.errors import ConfigError, PolicyError
from ibisagent.files import one_line
from ibisagent.policies.base import Generation
from ibisagent.policies.grammar import Grammar
from ibisagent.policies.nano_input import LOCATIONS, NEAR, TOKENS_PER_IMAGE, image_planes, snap_locations
from ibisagent.protocol import Message
from ibisagent.segmenters import backbone_sizes
from ibisagent.segmenters.backbone_sizes import GRID, SIDE, WIDTH
from ibisagent.segmenters.cache import EmbeddingCache
from ibisagent.segmenters.runtime import Network, choose_runtime, load_network

_KEPT_READINGS = 8
_KEPT_FEATURES = 2**25  # bytes: of 64 images
_OF_LAYERS = (
    *("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
_NEEDED = (
    *("language_model.embed_tokens.weight", "lm_head.weight", "pointer.query.weight", "pointer.query.bias"),
    *("pointer.evidence.weight", "pointer.evidence.bias"),
)
_OF_TWO_PASSES = ("vision.comparison.reply.weight",)
_PARTS = ("backbone", "stem", "maps")  # what `nano.vision_networks` gives
_CELLS = LOCATIONS**2
_BLANK = np.finfo(np.float32).min
_ROLES = {"system": "<|system|>", "assistant": "<|assistant|>"}  # all others speak as the user

Weights = Mapping[str, np.ndarray]
Past = list[tuple[np.ndarray, np.ndarray]]
"""Keys and values (heads, T, width) of every layer."""


@dataclass(frozen=True, eq=False)
class _Prompt:
    """A conversation as the model sees it. ids (T,); planes (N, 4, SIDE, SIDE), one for each image."""

    ids: np.ndarray
    planes: np.ndarray

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.ids.tobytes() + self.planes.tobytes()).digest()


@dataclass(frozen=True, eq=False)
class _Reading:
    """What reading a prompt left. hidden: (D,) of its last token. keys (_CELLS, K), region (LOCATIONS, LOCATIONS)
    logits, features (WIDTH, GRID, GRID): of its last image, None where it has none."""

    hidden: np.ndarray
    past: Past
    keys: np.ndarray | None
    region: np.ndarray | None
    features: np.ndarray | None


class NanoModel:
    """The model of a folder; see `base.LanguageModel`. name: for messages."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        try:
            said = json.loads((folder / "config.json").read_bytes())
            self.config: Mapping[str, Any] = said
            self._tokens = _read_tokenizer(folder / "tokenizer.json")
            content = (folder / "model.safetensors").read_bytes()
            weights = _read_weights(content)
            known = self._tokens.get_vocab()
            self._ids = {token: known[token] for token in ("<|user|>", "<image>", "<|end|>", *_ROLES.values())}
            self._words = int(said["text_config"]["vocab_size"]) - _CELLS
            self._language = _Llama(weights, said["text_config"])
            self._two_pass = bool(said["two_pass"])
            self._weights = {name: weights[name] for name in _NEEDED + _OF_TWO_PASSES * self._two_pass}
            self._pointer_scale = float(said["pointer_width"]) ** -0.25
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise PolicyError(
                f"{name} cannot be loaded ({one_line(error, 400)}): download or copy the folder again"
            ) from error
        self._tokens.encode_special_tokens = True  # those in a message are plain text
        self._grammar: Grammar | None = None
        self._features = EmbeddingCache(_KEPT_FEATURES)
        self._readings: OrderedDict[bytes, _Reading] = OrderedDict()
        reach = np.arange(LOCATIONS)[:, None] - np.arange(LOCATIONS)
        self._closeness = np.exp(-(reach**2) / (2 * NEAR**2)).astype(np.float32)
        self._see, self._stem, self._maps = _networks(folder, content, said)

    @property
    def parts(self) -> tuple[Any, Any]:
        """See `LanguageModel`."""
        raise ConfigError(f"{self._name} runs without torch here: load it with a dtype, such as float32")

    @property
    def at_once(self) -> int:
        """See `LanguageModel`."""
        return 1

    def bound_images(self, least: int | None, most: int | None, usual: int | None) -> None:
        """See `LanguageModel`."""
        if least is not None or most is not None:
            raise ConfigError(f"{self._name} takes images of one size: leave min_pixels and max_pixels out")

    def keep_readable(self) -> None:
        """See `LanguageModel`."""
        words = [self._tokens.decode([number], skip_special_tokens=False) for number in range(self._words)]
        self._grammar = Grammar(words, LOCATIONS, int(self.config["reply_tokens"]))

    def describe(self) -> dict[str, str]:
        """See `LanguageModel`."""
        return {"policy_dtype": "float32", "policy_device": "cpu", "policy_runtime": f"{self._see.runtime}, numpy"}

    def see(self, conversation: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """See `LanguageModel`."""
        read = self._read(self._prompt(conversation))
        if read.region is None or read.features is None:
            raise PolicyError(f"{self._name}: a conversation without an image shows nothing")
        return read.region, read.features.mean(axis=(1, 2))

    def write(
        self, conversations: Sequence[Sequence[Message]], limit: int, temperature: float, seed: int, draws: int
    ) -> list[Generation]:
        """See `LanguageModel`. What is drawn depends on the seed and the conversation."""
        written = []
        for conversation in conversations:
            prompt = self._prompt(conversation)
            read = self._read(prompt)
            for draw in range(draws):
                random = np.random.default_rng([seed, draw, *prompt.digest]) if temperature else None
                written.append(self._reply(prompt, read, limit, temperature, random, likely=draws > 1 or not random))
        return written

    # ------------------------------------------------------------------------------------------------------- reading

    def _prompt(self, conversation: Sequence[Message]) -> _Prompt:
        ids: list[int] = []
        images: list[np.ndarray] = []
        for message in conversation:
            ids.append(self._ids[_ROLES.get(message["role"], "<|user|>")])
            for part in message["content"]:
                if part["type"] == "image":
                    ids += [self._ids["<image>"]] * TOKENS_PER_IMAGE
                    images.append(image_planes(part["image"]))
                else:
                    ids += self._tokens.encode(snap_locations(part["text"]), add_special_tokens=False).ids
            if message["role"] == "assistant":
                ids.append(self._ids["<|end|>"])
        ids.append(self._ids["<|assistant|>"])
        planes = np.stack(images) if images else np.zeros((0, 4, SIDE, SIDE), dtype=np.float32)
        return _Prompt(np.array(ids), planes)

    def _read(self, prompt: _Prompt) -> _Reading:
        """The reading of a prompt; the latest are kept, as what is looked at is then written about."""
        digest = prompt.digest
        read = self._readings.get(digest)
        if read is None:
            read = self._readings[digest] = self._read_anew(prompt)
            if len(self._readings) > _KEPT_READINGS:
                self._readings.popitem(last=False)
        return read

    def _read_anew(self, prompt: _Prompt) -> _Reading:
        ids, planes = prompt.ids, prompt.planes
        is_image = ids == self._ids["<image>"]
        blocks = np.where(is_image, (np.cumsum(is_image) - 1) // TOKENS_PER_IMAGE, -1)
        features = [self._embed(one[:3]) for one in planes]
        embeds = self._weights["language_model.embed_tokens.weight"][ids]
        compared = np.zeros((len(planes), 4, LOCATIONS, LOCATIONS), dtype=np.float32)
        if self._two_pass and planes[:, 3].any():
            end = int(np.flatnonzero(is_image)[-1]) + 1
            bare = planes * np.array([1, 1, 1, 0], dtype=np.float32)[:, None, None]
            fine, tokens = self._look(features, bare, compared)
            hidden, _ = self._language(_with(embeds, is_image, tokens)[:end], blocks[:end])
            for number, seen in enumerate(features):
                believed = _sigmoid(self._maps(hidden[blocks[:end] == number][None], fine[number][None], seen[None])[1])
                compared[number] = _compare(planes[number, 3], believed[0])
            embeds = self._with_doubts(embeds, ids, blocks, compared)
        fine, tokens = self._look(features, planes, compared)
        hidden, past = self._language(_with(embeds, is_image, tokens), blocks)
        if not len(planes):
            return _Reading(hidden[-1], past, None, None, None)
        last = hidden[blocks == len(planes) - 1]
        keys, region = self._maps(last[None], fine[-1][None], features[-1][None])
        shown = np.concatenate([keys[0], np.clip(region[0], -8, 8)[..., None], _corner_densities(region[0])], axis=-1)
        return _Reading(hidden[-1], past, shown.reshape(_CELLS, -1), region[0], features[-1])

    def _embed(self, colour: np.ndarray) -> np.ndarray:
        """Backbone features (WIDTH, GRID, GRID) of (3, SIDE, SIDE), kept by content."""
        key = hashlib.sha256(colour.tobytes()).hexdigest()
        seen: tuple[np.ndarray] = self._features.fetch(self._see.runtime, key, lambda: (self._see(colour[None])[0][0],))
        return seen[0]

    def _look(
        self, features: Sequence[np.ndarray], planes: np.ndarray, compared: np.ndarray
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Fine features and tokens of every image."""
        seen = [
            self._stem(known[None], one[None], *([other[None]] if self._two_pass else []))
            for known, one, other in zip(features, planes, compared, strict=True)
        ]
        return [fine[0] for fine, _ in seen], [tokens[0] for _, tokens in seen]

    def _with_doubts(self, embeds: np.ndarray, ids: np.ndarray, blocks: np.ndarray, compared: np.ndarray) -> np.ndarray:
        """See `IbisNanoForConditionalGeneration._with_doubts`, of which this is the numpy twin."""
        embeds = embeds.copy()
        for number, planes in enumerate(compared):
            after = int(np.flatnonzero(blocks == number)[-1]) + 1
            there = np.zeros(4, dtype=np.float32)
            places = ids[:after][ids[:after] >= self._words]
            if len(places):
                row, column = divmod(int(places[-1]) - self._words, LOCATIONS)
                there = planes[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].mean(axis=(1, 2))
            mask, believed, leaked, missed = planes.sum(axis=(1, 2))
            doubts = np.array([*there, leaked / (mask + 1), missed / (believed + 1)], dtype=np.float32)
            if after < len(ids):
                embeds[after] += self._weights["vision.comparison.reply.weight"] @ doubts
        return embeds

    # ------------------------------------------------------------------------------------------------------- writing

    def _reply(
        self,
        prompt: _Prompt,
        read: _Reading,
        limit: int,
        temperature: float,
        random: np.random.Generator | None,
        likely: bool,
    ) -> Generation:
        """likely: places are chosen from the smoothed map."""
        evidence = 0 if read.keys is None else self._evidence(read.keys)
        hidden, past = read.hidden, read.past
        ids: list[int] = []
        conversation = prompt.ids.tolist()
        while True:
            logits = self._logits(hidden + evidence, read.keys, [*conversation, *ids])
            if likely:
                logits = self._likely_places(logits)
            if random is None:
                token = int(logits.argmax())
            else:
                shares = np.exp((logits - logits.max()).astype(np.float64) / temperature)
                token = int(random.choice(len(shares), p=shares / shares.sum()))
            ids.append(token)
            ended = token == self._ids["<|end|>"]
            if ended or len(ids) == limit:
                return Generation(self._tokens.decode(ids), len(ids), len(conversation), ended)
            embeds = self._weights["language_model.embed_tokens.weight"][token][None]
            states, past = self._language(embeds, np.array([-1]), past)
            hidden = states[0]

    def _logits(self, hidden: np.ndarray, keys: np.ndarray | None, ids: list[int]) -> np.ndarray:
        words = self._weights["lm_head.weight"] @ hidden
        words[self._ids["<image>"]] = _BLANK  # it stands for an image that is not there
        places = np.full(_CELLS, _BLANK, dtype=np.float32)
        if keys is not None:
            query = self._weights["pointer.query.weight"] @ hidden + self._weights["pointer.query.bias"]
            places = keys @ query * self._pointer_scale
        logits = np.concatenate([words, places]).astype(np.float32)
        if self._grammar is not None:
            logits[~self._grammar.allowed(self._grammar.end_of(ids))] = _BLANK
        return logits

    def _evidence(self, keys: np.ndarray) -> np.ndarray:
        """See `nano._Pointer.seen`."""
        region = keys[:, -1 - _CORNERS]
        highest = np.partition(region, -16)[-16:]
        share = _sigmoid(region).mean()
        evidence = np.array([highest.max(), highest.mean(), np.log(share + 1e-4)], dtype=np.float32) / 8
        weight, bias = self._weights["pointer.evidence.weight"], self._weights["pointer.evidence.bias"]
        added: np.ndarray = weight @ evidence + bias
        return added

    def _likely_places(self, logits: np.ndarray) -> np.ndarray:
        """See `nano.LikelyPlaces`."""
        words, places = logits[: self._words], logits[self._words :]
        chosen = np.full_like(logits, _BLANK)
        if _log_sum(words) >= _log_sum(places):
            chosen[: self._words] = words
            return chosen
        shares = np.exp(places - places.max()).reshape(LOCATIONS, LOCATIONS)
        near = self._closeness @ (shares / shares.sum()) @ self._closeness
        chosen[self._words :] = np.where(places <= _BLANK, _BLANK, np.log(np.maximum(near.ravel(), 1e-38)))
        return chosen


_CORNERS = 4


class _Llama:
    """The language model: float32, one conversation."""

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self._layers = [
            {name: weights[f"language_model.layers.{number}.{name}.weight"] for name in _OF_LAYERS}
            for number in range(int(config["num_hidden_layers"]))
        ]
        self._norm = weights["language_model.norm.weight"]
        self._heads, self._width = int(config["num_attention_heads"]), int(config["head_dim"])
        self._epsilon = float(config["rms_norm_eps"])
        half = np.arange(0, self._width, 2) / self._width
        self._frequencies = float(config["rope_parameters"]["rope_theta"]) ** -half
        if int(config["num_key_value_heads"]) != self._heads:
            raise ValueError("its layers share keys among heads, which is not known here")

    def __call__(self, embeds: np.ndarray, blocks: np.ndarray, past: Past | None = None) -> tuple[np.ndarray, Past]:
        """Hidden states (T, D) of embeds (T, D), which follow what `past` was made of, and the past with them.

        blocks (T,): the number of the image that a token is part of, -1 for text; tokens of one image see each other.
        """
        before = 0 if past is None else past[0][0].shape[1]
        count = len(embeds)
        places = np.arange(before, before + count)
        angles = np.tile(places[:, None] * self._frequencies, 2)
        turn = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        hidden_from = np.arange(before + count) > places[:, None]
        if count > 1:
            hidden_from[:, before:] &= ~((blocks[:, None] == blocks) & (blocks[:, None] >= 0))
        states, kept = embeds, []
        for number, layer in enumerate(self._layers):
            normed = self._normed(states, layer["input_layernorm"])
            query, key, value = (self._split(normed @ layer[f"self_attn.{name}_proj"].T) for name in "qkv")
            query, key = _rotated(query, turn), _rotated(key, turn)
            if past is not None:
                key = np.concatenate([past[number][0], key], axis=1)
                value = np.concatenate([past[number][1], value], axis=1)
            kept.append((key, value))
            scores = query @ key.transpose(0, 2, 1) * np.float32(self._width**-0.5)
            scores = np.where(hidden_from, _BLANK, scores)
            shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
            read = shares @ value / shares.sum(axis=-1, keepdims=True)
            states = states + read.transpose(1, 0, 2).reshape(count, -1) @ layer["self_attn.o_proj"].T
            normed = self._normed(states, layer["post_attention_layernorm"])
            opened = normed @ layer["mlp.gate_proj"].T
            states = states + (opened * _sigmoid(opened) * (normed @ layer["mlp.up_proj"].T)) @ layer["mlp.down_proj"].T
        return self._normed(states, self._norm), kept

    def _normed(self, states: np.ndarray, weight: np.ndarray) -> np.ndarray:
        normed: np.ndarray = states / np.sqrt((states**2).mean(axis=-1, keepdims=True) + self._epsilon) * weight
        return normed

    def _split(self, states: np.ndarray) -> np.ndarray:
        """(T, D) -> (heads, T, width)."""
        return states.reshape(len(states), self._heads, self._width).transpose(1, 0, 2)


def _rotated(states: np.ndarray, turn: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Rotary position embedding (Su et al., 2021) of (heads, T, width)."""
    half = states.shape[-1] // 2
    turned = np.concatenate([-states[..., half:], states[..., :half]], axis=-1)
    rotated: np.ndarray = states * turn[0] + turned * turn[1]
    return rotated


def _with(embeds: np.ndarray, is_image: np.ndarray, tokens: Sequence[np.ndarray]) -> np.ndarray:
    """A copy of embeds (T, D) with the tokens of all images in their places."""
    filled = embeds.copy()
    if tokens:
        filled[is_image] = np.concatenate(tokens)
    return filled


def _compare(mask: np.ndarray, believed: np.ndarray) -> np.ndarray:
    """See `nano._Comparison.of`; (4, LOCATIONS, LOCATIONS) of mask (SIDE, SIDE) and believed (LOCATIONS, LOCATIONS)."""
    cell = SIDE // LOCATIONS
    small = mask.reshape(LOCATIONS, cell, LOCATIONS, cell).mean(axis=(1, 3))
    planes = np.stack([small, believed, small * (1 - believed), believed * (1 - small)])
    compared: np.ndarray = planes * (mask.max() > 0)
    return compared


def _corner_densities(region: np.ndarray) -> np.ndarray:
    """See `nano.corner_densities`; (LOCATIONS, LOCATIONS, _CORNERS) of logits (LOCATIONS, LOCATIONS)."""
    inside = _sigmoid(region)
    parts = []
    for across in (0, 1):
        profile = inside.max(axis=across)
        for turned in (False, True):
            begun = np.maximum.accumulate(profile[::-1] if turned else profile)
            rise = np.diff(begun, prepend=0)
            log = np.log(np.maximum(rise, 0) + 1e-4) / 9.3
            log = log[::-1] if turned else log
            parts.append(np.broadcast_to(log[None] if across == 0 else log[:, None], region.shape))
    return np.stack(parts, axis=-1).astype(np.float32)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    share: np.ndarray = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
    return share


def _log_sum(logits: np.ndarray) -> float:
    top = float(logits.max())
    return top + float(np.log(np.exp((logits - top).astype(np.float64)).sum()))


def _read_tokenizer(path: Path) -> Tokenizer:
    content = path.read_bytes()
    try:
        return Tokenizer.from_buffer(content)
    except Exception as error:
        raise ValueError(f"{path.name}: {error}") from error


def _read_weights(content: bytes) -> dict[str, np.ndarray]:
    """The tensors of a .safetensors file in float32, without those of the networks that OpenVINO runs."""
    weights = {}
    stored_all: Any = safetensors.deserialize  # untyped
    for name, stored in stored_all(content):
        if name.startswith("backbone."):
            continue
        if stored["dtype"] == "BF16":  # the upper half of a float32
            flat = (np.frombuffer(stored["data"], dtype=np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            flat = np.frombuffer(stored["data"], dtype={"F16": np.float16, "F32": np.float32}[stored["dtype"]])
        weights[name] = flat.astype(np.float32).reshape(stored["shape"])
    return weights


def load_backbone(folder: Path) -> Network:
    """The backbone of a saved model as the policy runs it on a CPU: colour (1, 3, SIDE, SIDE) -> features (1, WIDTH,
    GRID, GRID). OSError where the model cannot be read."""
    return _loader(folder, (folder / "model.safetensors").read_bytes())("backbone", _zeros(3, SIDE, SIDE))


def _networks(folder: Path, content: bytes, config: Mapping[str, Any]) -> tuple[Network, Network, Network]:
    """Backbone, stem and maps: the convolutions of the model, see `nano.vision_networks`."""
    width, hidden = int(config["vision_width"]), int(config["text_config"]["hidden_size"])
    features, fine = _zeros(WIDTH, GRID, GRID), _zeros(width, GRID, GRID)
    compared = [_zeros(4, LOCATIONS, LOCATIONS)] if config.get("two_pass") else []
    load = _loader(folder, content)
    return (
        load("backbone", _zeros(3, SIDE, SIDE)),
        load("stem", features, _zeros(4, SIDE, SIDE), *compared),
        load("maps", _zeros(TOKENS_PER_IMAGE, hidden), fine, features),
    )


def _loader(folder: Path, content: bytes) -> Callable[..., Network]:
    """What loads one of `_PARTS`, given an example of each of its inputs. content: of the file of weights."""

    @cache
    def whole() -> tuple[Any, ...]:
        from ibisagent.policies.nano import vision_networks

        return vision_networks(folder)

    code = hashlib.sha256()
    for path in (Path(__file__).with_name("nano.py"), Path(backbone_sizes.__file__).with_name("backbone.py")):
        code.update(path.read_bytes())
    key = f"ibis-nano-{hashlib.sha256(content).hexdigest()[:16]}-{code.hexdigest()[:8]}"

    def load(part: str, *example: np.ndarray) -> Network:
        runtime = choose_runtime("auto", "cpu")
        return load_network(
            lambda: whole()[_PARTS.index(part)], example, key=f"{key}-{part}", runtime=runtime, device="cpu"
        )

    return load


def _zeros(*shape: int) -> np.ndarray:
    """A batch of one."""
    return np.zeros((1, *shape), dtype=np.float32)
