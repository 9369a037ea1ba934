"""`ibis-nano`: a vision-language model small enough to ship, a normal transformers model and processor.

The image is RGBA: colour is the image, alpha the current mask. A frozen backbone (`segmenters.backbone`) sees only the
colour, so an image is embedded once however often its mask changes; a light convolution on all four planes adds the
mask. The query comes before the image, so the image's tokens already know what is asked. A place is one token,
`(0.508, 0.242)`, and its logit is read from the image: a pointer (Vinyals et al. 2015) over LOCATIONS x LOCATIONS
cells, computed from the hidden states of the image's tokens. What the model says about places is a heat map.

With `two_pass` an image that has a mask is read without it first. A map of the object that was made in sight
of a mask follows the mask, mistakes included; one that was not shows them, so the second pass sees both, and the reply
begins with how they agree, on the whole and at the place that was said last.

Saved weights hold all of it, the backbone in float16.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    GenerationMixin,
    LlamaConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.image_processing_utils import BaseImageProcessor
from transformers.masking_utils import create_causal_mask
from transformers.utils.generic import ModelOutput

from ibisagent.errors import PolicyError
from ibisagent.policies.grammar import Grammar, Position
from ibisagent.policies.nano_input import LOCATIONS, NEAR, TOKENS_PER_IMAGE, image_planes, snap_locations
from ibisagent.segmenters.backbone import Backbone, Residual
from ibisagent.segmenters.backbone_sizes import GRID, WIDTH


class IbisNanoConfig(PretrainedConfig):
    """Sizes of the model, and how `MllmPolicy` is to talk to it (dialect, history, mask_style, reply_tokens).

    two_pass: read an image that has a mask without the mask first, and then both with the map of that pass.
    reply_tokens: longest reply. It writes 20 to 30; a sampled one that never ends must not hold up its whole batch.
    max_turns: most turns of an episode; more do not help it. candidates: ways to begin an object that are tried where
    there is a vocabulary, see `one_by_one.proposed`.
    Location tokens are the last LOCATIONS ** 2 ids of the vocabulary, row by row.
    """

    model_type = "ibis_nano"
    sub_configs = {"text_config": LlamaConfig}

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        vision_width: int = 128,
        pointer_width: int = 64,
        image_token_id: int = 4,
        two_pass: bool = False,
        dialect: str = "ibis",
        history: str = "none",
        mask_style: str = "alpha",
        reply_tokens: int = 192,
        max_turns: int = 5,
        candidates: int = 2,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = LlamaConfig(**{k: v for k, v in text_config.items() if k != "model_type"})
        self.text_config = text_config or LlamaConfig()
        self.vision_width = vision_width
        self.pointer_width = pointer_width
        self.image_token_id = image_token_id
        self.two_pass = two_pass
        self.dialect, self.history, self.mask_style = dialect, history, mask_style
        self.reply_tokens, self.max_turns, self.candidates = reply_tokens, max_turns, candidates
        super().__init__(**kwargs)


class IbisNanoImageProcessor(BaseImageProcessor):
    """Images (RGB or RGBA, any size) -> pixel_values (N, 4, SIDE, SIDE) float32 in [0, 1]; alpha of RGB is 0."""

    model_input_names = ["pixel_values"]

    def __call__(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """The same as `preprocess`."""
        return self.preprocess(images, return_tensors)

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **_: Any) -> BatchFeature:
        """As the class says. images: one image, or any nesting of lists of them, in reading order."""
        planes = np.stack([image_planes(image) for image in _flatten(images)])
        return BatchFeature({"pixel_values": planes}, tensor_type=return_tensors)


def _flatten(images: Any) -> list[Any]:
    if isinstance(images, list | tuple):
        return [one for part in images for one in _flatten(part)]
    return [images]


class IbisNanoProcessor(ProcessorMixin):
    """Text and images -> input_ids, attention_mask, pixel_values; one `<image>` in the text per image, in order."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        self.image_token = "<image>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """images: as for the image processor; text: one or many; further options go to the tokenizer."""
        tensors = kwargs.pop("return_tensors", None)
        for unused in ("images_kwargs", "videos_kwargs", "audio_kwargs", "common_kwargs"):
            kwargs.pop(unused, None)
        kwargs.update(kwargs.pop("text_kwargs", {}))
        texts = [text] if isinstance(text, str) else list(text)
        texts = [snap_locations(one).replace(self.image_token, self.image_token * TOKENS_PER_IMAGE) for one in texts]
        data = dict(self.tokenizer(texts, **kwargs))
        if images is not None and (flat := _flatten(images)):
            data |= self.image_processor(flat, return_tensors=None)
        return BatchFeature(data, tensor_type=tensors)


@dataclass
class IbisNanoOutput(ModelOutput):
    """loss: mean cross-entropy where labels are given. logits: (B, L, V).

    location_keys: what `forward` wants back while decoding. region_logits: (N, LOCATIONS, LOCATIONS), where the object
    that is asked for lies; trained as an auxiliary task.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Any = None
    hidden_states: Any = None
    attentions: Any = None
    location_keys: torch.Tensor | None = None
    region_logits: torch.Tensor | None = None


class _FeatureCache:
    """Backbone features of colour planes, kept by content."""

    def __init__(self, capacity: int = 64) -> None:
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._capacity = capacity

    def fetch(self, colour: torch.Tensor, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Features (N, WIDTH, GRID, GRID) of colour (N, 3, SIDE, SIDE) in [0, 1]; `compute` makes those not kept."""
        pixels = (colour.detach().float() * 255).round().to("cpu", torch.uint8).numpy()
        keys = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in pixels]
        missing = {key: number for number, key in enumerate(keys) if key not in self._cache}
        found = {key: self._cache[key] for key in keys if key in self._cache}
        if missing:
            made = compute(colour[list(missing.values())])
            found |= dict(zip(missing, made, strict=True))
        for key in keys:
            self._cache[key] = found[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)
        return torch.stack([found[key] for key in keys])


class _Comparison(nn.Module):
    """Compares masks with maps of their objects that were made without seeing them.

    compared (N, 4, LOCATIONS, LOCATIONS): mask, map, what only the mask has, what only the map has; 0 where there is no
    mask.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.planes = nn.Sequential(
            nn.Conv2d(4, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()
        )
        self.fine = nn.Conv2d(64, width, 1)
        self.reply = nn.Linear(6, hidden, bias=False)

    @staticmethod
    def of(mask: torch.Tensor, believed: torch.Tensor) -> torch.Tensor:
        """mask (N, SIDE, SIDE), believed (N, LOCATIONS, LOCATIONS), in [0, 1] -> compared."""
        small = F.adaptive_avg_pool2d(mask, LOCATIONS)
        planes = torch.stack([small, believed, small * (1 - believed), believed * (1 - small)], dim=1)
        return planes * (mask.amax(dim=(1, 2)) > 0)[:, None, None, None]

    def forward(self, compared: torch.Tensor) -> torch.Tensor:
        """What to add to the fine features, (N, W, GRID, GRID)."""
        return self.fine(self.planes(compared)) * (compared[:, :1].amax(dim=(2, 3), keepdim=True) > 0)

    def of_last_places(self, compared: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """What to add to the embeddings that begin replies, (N, hidden): what the whole comparisons say, and what they
        say of the places `cells` (N,) that were said last; -1: none."""
        near = F.avg_pool2d(compared, 3, stride=1, padding=1, count_include_pad=False).flatten(2)
        there = near[torch.arange(len(cells), device=cells.device), :, cells] * (cells >= 0)[:, None]
        mask, believed, leaked, missed = compared.sum(dim=(2, 3)).unbind(dim=1)
        shares = torch.stack([leaked / (mask + 1), missed / (believed + 1)], dim=1)
        return self.reply(torch.cat([there, shares], dim=1))


class _VisionStem(nn.Module):
    """Backbone features and the four planes -> fine features (N, W, 32, 32) and image tokens (N, 64, hidden)."""

    def __init__(self, width: int, hidden: int, two_pass: bool) -> None:
        super().__init__()
        self.known = nn.Conv2d(WIDTH, width, 1)
        self.planes = nn.Sequential(
            nn.Conv2d(4, 32, 4, stride=4), nn.GELU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.GELU()
        )
        self.planes_out = nn.Conv2d(64, width, 1)
        self.fine = Residual(width)
        self.down = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.Conv2d(width, 192, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(192, hidden, 3, stride=2, padding=1),
        )
        self.position = nn.Parameter(torch.randn(TOKENS_PER_IMAGE, hidden) * 0.02)
        self.comparison = _Comparison(width, hidden) if two_pass else None

    def forward(
        self, features: torch.Tensor, planes: torch.Tensor, compared: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = self.known(features) + self.planes_out(self.planes(planes * 2 - 1))
        if self.comparison is not None and compared is not None:
            seen = seen + self.comparison(compared)
        fine = self.fine(seen)
        tokens = self.down(fine).flatten(2).transpose(1, 2)
        return fine, tokens + self.position


class _Pointer(nn.Module):
    """Image tokens' hidden states and features -> a key for each location, and a map of the asked-for object.

    The map is a product of what is asked, read from the hidden states, with the backbone's features, in which objects
    are linear (as in MaskFormer, Cheng et al. 2021), plus what hidden states and mask add to it.
    """

    def __init__(self, width: int, hidden: int, pointer: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(hidden, width, 1)
        self.asked = nn.Linear(hidden, 4 * (WIDTH + 1))
        self.shown = nn.Conv2d(4, width, 1)
        self.blend = Residual(width)
        self.region = nn.Conv2d(width, 4, 1)
        self.key = nn.Conv2d(width, 4 * pointer, 1)
        self.row = nn.Parameter(torch.randn(LOCATIONS, pointer) * 0.02)
        self.column = nn.Parameter(torch.randn(LOCATIONS, pointer) * 0.02)
        self.query = nn.Linear(hidden, pointer + 1 + CORNERS)
        self.evidence = nn.Linear(3, hidden)

    def keys(
        self, hidden: torch.Tensor, fine: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (N, 64, hidden) -> keys (N, LOCATIONS ** 2, K), region logits (N, LOCATIONS, LOCATIONS)."""
        keys, region = self.maps(hidden, fine, features)
        corners = corner_densities(region.float()).to(keys)
        keys = torch.cat([keys, region[..., None].clamp(-8, 8), corners], dim=-1)
        return keys.flatten(1, 2), region

    def maps(
        self, hidden: torch.Tensor, fine: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys (N, LOCATIONS, LOCATIONS, pointer) that convolutions make, and the region logits."""
        asked = self.asked(hidden.mean(dim=1)).unflatten(1, (4, WIDTH + 1))
        direct = torch.einsum("nkw,nwhv->nkhv", asked[..., :-1], features.to(asked)) * WIDTH**-0.5
        direct = direct + asked[..., -1][..., None, None]
        coarse = self.reduce(hidden.transpose(1, 2).unflatten(2, (8, 8)))
        coarse = F.interpolate(coarse, size=(GRID, GRID), mode="bilinear", align_corners=False)
        grid = F.gelu(self.blend(fine + coarse + self.shown(direct.clamp(-8, 8))))
        region = F.pixel_shuffle(self.region(grid) + direct, 2)
        keys = F.pixel_shuffle(self.key(grid), 2)
        place = self.row[:, None] + self.column[None]
        return keys.movedim(1, -1) + place, region[:, 0]

    def seen(self, keys: torch.Tensor) -> torch.Tensor:
        """What the maps in keys (N, LOCATIONS ** 2, K) say of whether the objects are there at all, (N, hidden)."""
        region = keys[..., -1 - CORNERS].float()
        highest = region.topk(16, dim=1).values
        share = region.sigmoid().mean(dim=1)
        evidence = torch.stack([highest[:, 0] / 8, highest.mean(dim=1) / 8, (share + 1e-4).log() / 8], dim=1)
        added: torch.Tensor = self.evidence(evidence.to(keys))
        return added


CORNERS = 4
"""Channels of `corner_densities`."""


def corner_densities(region: torch.Tensor) -> torch.Tensor:
    """How likely the box of a map begins and ends at each cell: logs, scaled to about [-1, 0], of the shares of columns
    where it begins, of columns where it ends, of rows where it begins, and where it ends.

    region: logits (N, L, L) -> (N, L, L, CORNERS). The object has begun at a column with the probability that any cell
    up to it belongs to the object, taken as the largest of them; it begins where that probability rises.
    """
    inside = region.sigmoid()
    parts = []
    for across in (1, 2):
        profile = inside.amax(dim=across)
        for turned in (False, True):
            begun = (profile.flip(1) if turned else profile).cummax(dim=1).values
            rise = begun - F.pad(begun, (1, 0))[:, :-1]
            log = (rise.clamp(min=0) + 1e-4).log() / 9.3
            log = log.flip(1) if turned else log
            parts.append((log[:, None, :] if across == 1 else log[:, :, None]).expand_as(region))
    return torch.stack(parts, dim=-1)


def _image_ends(is_image: torch.Tensor) -> torch.Tensor:
    """(B, L) bool: the last tokens of the images."""
    return is_image & ~F.pad(is_image, (0, 1))[:, 1:]


def _images_before(is_image: torch.Tensor) -> torch.Tensor:
    """(B, L) long: the number of the last image that ends at or before each position, in reading order; -1: none."""
    ends = _image_ends(is_image)
    seen, of_rows = ends.cumsum(dim=1), ends.sum(dim=1)
    return torch.where(seen > 0, seen + (of_rows.cumsum(dim=0) - of_rows)[:, None], 0) - 1


class Readable(LogitsProcessor):
    """Rules out the tokens that would make a reply unreadable; see `grammar`."""

    def __init__(self, grammar: Grammar) -> None:
        self._grammar = grammar

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (B, V) logits of what follows input_ids (B, L) -> the same, the least there is for what must not."""
        return self._ruled_out(scores, [self._grammar.end_of(row) for row in input_ids.tolist()])

    def along(self, input_ids: torch.Tensor, scored: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits (K, V) of what follows each of the positions `scored` (B, L) bool of input_ids (B, L) -> the same."""
        pairs = zip(input_ids.tolist(), scored.tolist(), strict=True)
        walks = (zip(self._grammar.walk(ids), kept, strict=True) for ids, kept in pairs)
        return self._ruled_out(logits, [here for walk in walks for here, wanted in walk if wanted])

    def _ruled_out(self, scores: Any, positions: Sequence[Position]) -> Any:
        if not positions:
            return scores
        allowed = torch.from_numpy(np.stack([self._grammar.allowed(here) for here in positions]))
        return scores.masked_fill(~allowed.to(scores.device), torch.finfo(scores.dtype).min)


class LikelyPlaces(LogitsProcessor):
    """Greedy choice among words and places: the place with the greatest expected closeness to the right one.

    Closeness of two cells is exp(-d^2 / 2 NEAR^2). A place that is not known well spreads over hundreds of cells, of
    which the likeliest says little, and each has less than the likeliest word: so all places compete with all words.
    """

    def __init__(self, word_count: int) -> None:
        """word_count: how many ids of the vocabulary come before the places."""
        self.word_count = word_count
        reach = torch.arange(LOCATIONS)[:, None] - torch.arange(LOCATIONS)
        self._closeness = torch.exp(-(reach**2) / (2 * NEAR**2))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """scores (B, V) logits -> the same of words, or of places, where these are likelier."""
        words, places = scores[:, : self.word_count], scores[:, self.word_count :].float()
        is_word = words.float().logsumexp(dim=1) >= places.logsumexp(dim=1)
        closeness = self._closeness.to(places.device)
        maps = places.softmax(dim=1).view(-1, LOCATIONS, LOCATIONS)
        blank = torch.finfo(scores.dtype).min
        near = (closeness @ maps @ closeness).flatten(1).log().masked_fill(places <= blank, blank)  # ruled out stays so
        chosen = [words.masked_fill(~is_word[:, None], blank), near.to(scores).masked_fill(is_word[:, None], blank)]
        return cast("torch.FloatTensor", torch.cat(chosen, dim=1))


class IbisNanoForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The model. forward takes one image plane set per `<image>` block of the batch, in reading order."""

    config_class = IbisNanoConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = False
    _tied_weights_keys: dict[str, str] = {}

    def __init__(self, config: IbisNanoConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.language_model = AutoModel.from_config(text)
        self.vision = _VisionStem(config.vision_width, text.hidden_size, config.two_pass)
        self.pointer = _Pointer(config.vision_width, text.hidden_size, config.pointer_width)
        self.word_count = text.vocab_size - LOCATIONS**2
        self.lm_head = nn.Linear(text.hidden_size, self.word_count, bias=False)
        self.backbone = Backbone().requires_grad_(False)
        self._features = _FeatureCache()
        self.readable: Readable | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if any(module is part for part in self.backbone.modules()):
            return  # pretrained: `training.nano` loads it
        super()._init_weights(module)
        comparison = self.vision.comparison
        if comparison is None or not isinstance(module, nn.Conv2d | nn.Linear):
            return
        if module is comparison.fine or module is comparison.reply:  # act as before until they have learned to compare
            init.zeros_(module.weight)
        elif any(module is layer for layer in comparison.planes):
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def keep_readable(self, tokenizer: Any) -> None:
        """Write from now on only what dialect "ibis" can read. tokenizer: the model's own."""
        words = [tokenizer.decode([number]) for number in range(self.word_count)]
        self.readable = Readable(Grammar(words, LOCATIONS, self.config.reply_tokens))

    def get_input_embeddings(self) -> nn.Module:
        """The language model's."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's."""
        self.language_model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Any = None,
        labels: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        location_keys: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        scored: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> IbisNanoOutput:
        """input_ids (B, L); pixel_values (N, 4, SIDE, SIDE) in [0, 1], one per image of the batch.

        image_features: the backbone's features (N, WIDTH, GRID, GRID) of the images where the caller has them.
        location_keys (B, LOCATIONS ** 2, K): the keys of each row's last image, from the call that read it, while
        decoding. logits_to_keep: only those of the last positions; 0 for all. scored (B, L) bool: those of these
        positions alone, as (K, V).
        """
        embeds = self.get_input_embeddings()(input_ids)
        region = None
        mask: torch.Tensor | None = attention_mask
        is_image = input_ids == self.config.image_token_id
        if pixel_values is not None:
            if int(is_image.sum()) != TOKENS_PER_IMAGE * len(pixel_values):
                raise ValueError(
                    f"{int(is_image.sum())} image tokens for {len(pixel_values)} images of {TOKENS_PER_IMAGE} tokens"
                )
            pixel_values = pixel_values.to(embeds.dtype)
            if image_features is None:
                image_features = self.image_features(pixel_values)
            image_features = image_features.to(embeds.dtype)
            compared, comparison = None, self.vision.comparison
            if comparison is not None and pixel_values[:, 3].any():
                believed = self._first_pass(
                    input_ids, is_image, pixel_values, attention_mask, position_ids, cache, image_features
                )
                compared = comparison.of(pixel_values[:, 3], believed.to(embeds.dtype))
                embeds = self._with_doubts(embeds, comparison, compared, input_ids, is_image)
            fine, tokens = self.vision(image_features, pixel_values, compared)
            embeds = embeds.masked_scatter(is_image[..., None], tokens.to(embeds.dtype))
            mask = self._image_blocks_see_themselves(embeds, attention_mask, cache, position_ids, is_image)
        outputs = self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position_ids, cache=cache, use_cache=use_cache
        )

        def wanted(of_positions: torch.Tensor) -> torch.Tensor:
            return of_positions[scored] if scored is not None else of_positions[:, -logits_to_keep:]

        hidden = outputs.last_hidden_state
        kept = wanted(hidden)
        if pixel_values is not None:
            image_hidden = hidden[is_image].view(len(pixel_values), TOKENS_PER_IMAGE, -1)
            keys, region = self.pointer.keys(image_hidden, fine, cast("torch.Tensor", image_features))
            before = _images_before(is_image)
            location_keys = keys[before[:, -1]] * (before[:, -1, None, None] >= 0)
            before = wanted(before)
            kept = kept + self.pointer.seen(keys)[before] * (before >= 0)[..., None]
            places = self._places_after_images(kept.flatten(0, -2), keys, before.flatten())
            places = places.view(*kept.shape[:-1], -1)
        elif location_keys is not None:
            kept = kept + self.pointer.seen(location_keys)[:, None]
            places = self._score(kept, location_keys)
        else:
            places = kept.new_full((*kept.shape[:-1], LOCATIONS**2), torch.finfo(kept.dtype).min)
        words = self.lm_head(kept)
        logits = torch.cat([words, places.to(words.dtype)], dim=-1)
        loss = None
        if labels is not None:
            shifted = logits[:, :-1].flatten(0, 1).float()
            loss = F.cross_entropy(shifted, labels[:, 1:].flatten(), ignore_index=-100)
        return IbisNanoOutput(
            loss=loss, logits=logits, cache=outputs.cache, location_keys=location_keys, region_logits=region
        )

    @torch.inference_mode()
    def see(self, **inputs: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of one prompt with one image: the map of the object, (LOCATIONS, LOCATIONS) logits, and the image's mean
        features (WIDTH,), both float32."""
        region = self(**inputs, logits_to_keep=1, use_cache=False).region_logits
        features = self.image_features(inputs["pixel_values"])
        return region[0].float().cpu().numpy(), features[0].float().mean(dim=(1, 2)).cpu().numpy()

    def image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Backbone features (N, WIDTH, GRID, GRID) of pixel_values (N, 4, SIDE, SIDE), kept for the next turn."""
        return self._features.fetch(pixel_values[:, :3], self._compute_features)

    @torch.no_grad()
    def _compute_features(self, colour: torch.Tensor) -> torch.Tensor:
        """In one dtype throughout: depthwise convolutions are slow in mixed precision."""
        weights = self.backbone.position
        with torch.autocast(colour.device.type, enabled=False):
            seen: torch.Tensor = self.backbone(colour.to(weights.dtype))
        return seen

    @torch.no_grad()
    def _first_pass(
        self,
        input_ids: torch.Tensor,
        is_image: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
        image_features: torch.Tensor,
    ) -> torch.Tensor:
        """Where the objects that are asked for are, (N, LOCATIONS, LOCATIONS) in [0, 1]."""
        images_end = int(is_image.any(dim=0).nonzero().max()) + 1
        rest = input_ids.shape[1] - images_end
        seen = self(
            input_ids=input_ids[:, :images_end],
            pixel_values=F.pad(pixel_values[:, :3], (0, 0, 0, 0, 0, 1)),
            attention_mask=None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - rest],
            position_ids=None if position_ids is None else position_ids[..., :images_end],
            cache=deepcopy(cache),  # of what came before, where it is not empty; the second pass fills the real one
            image_features=image_features,
            use_cache=cache is not None,
            logits_to_keep=1,
        )
        return cast("torch.Tensor", seen.region_logits.sigmoid())

    def _with_doubts(
        self,
        embeds: torch.Tensor,
        comparison: _Comparison,
        compared: torch.Tensor,
        input_ids: torch.Tensor,
        is_image: torch.Tensor,
    ) -> torch.Tensor:
        """`embeds` (B, L, hidden) with what the comparison says of an image and of the last place said before it, at
        the token after the image: there a reply begins."""
        rows, ends = _image_ends(is_image).nonzero(as_tuple=True)
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = torch.where(input_ids >= self.word_count, numbers, -1).cummax(dim=1).values[rows, ends]
        cells = torch.where(last >= 0, input_ids[rows, last] - self.word_count, -1)
        doubts = comparison.of_last_places(compared, cells).to(embeds.dtype)
        followed = ends + 1 < input_ids.shape[1]
        return embeds.index_put((rows[followed], ends[followed] + 1), doubts[followed], accumulate=True)

    def _image_blocks_see_themselves(
        self,
        embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Any,
        position_ids: torch.Tensor | None,
        is_image: torch.Tensor,
    ) -> torch.Tensor | None:
        """The causal mask, but with full attention among the tokens of one image."""
        starts = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
        blocks = torch.where(is_image, starts.cumsum(dim=1) - 1, -1)
        mask: Any = create_causal_mask(
            config=self.language_model.config,
            inputs_embeds=embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
            block_sequence_ids=blocks,
        )
        return cast("torch.Tensor | None", mask)

    def _score(self, hidden: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, L, hidden) against (B, LOCATIONS ** 2, K) -> location logits (B, L, LOCATIONS ** 2)."""
        query = self.pointer.query(hidden)
        return query @ keys.transpose(1, 2).to(query.dtype) * self.config.pointer_width**-0.25

    def _places_after_images(self, hidden: torch.Tensor, keys: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Location logits (K, LOCATIONS ** 2) of positions (K, hidden), each from the image whose number is in
        `before` (K,); -1: none to point into. Neighbours with the same image are scored together."""
        images, counts = before.unique_consecutive(return_counts=True)
        blank = hidden.new_full((1, LOCATIONS**2), torch.finfo(hidden.dtype).min)
        each = keys.split(1)  # slices would each take a gradient of all keys
        parts = [
            blank.expand(len(part), -1) if image < 0 else self._score(part[None], each[image])[0]
            for image, part in zip(images.tolist(), hidden.split(counts.tolist()), strict=True)
        ]
        return torch.cat([part.to(hidden.dtype) for part in parts])

    def prepare_inputs_for_generation(self, input_ids: Any, **kwargs: Any) -> dict[str, Any]:
        """Images go in with the first call; later ones get the location keys that it made."""
        pixel_values, image_features = kwargs.pop("pixel_values", None), kwargs.pop("image_features", None)
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if inputs.get("location_keys") is None or not kwargs.get("use_cache", True):
            inputs |= {"pixel_values": pixel_values, "image_features": image_features, "location_keys": None}
        return dict(inputs)

    def _get_logits_processor(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        processors: Any = super()._get_logits_processor(generation_config, *args, **kwargs)
        if self.readable is not None:
            processors.insert(0, self.readable)  # what others choose among
        if generation_config.get_generation_mode() == GenerationMode.GREEDY_SEARCH:
            processors.append(LikelyPlaces(self.word_count))
        return processors

    def proposal_processors(self) -> LogitsProcessorList:
        """What makes drawn replies good proposals: places from the smoothed map, not from its speckles."""
        return LogitsProcessorList([LikelyPlaces(self.word_count)])

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], *a: Any, **k: Any) -> Any:
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *a, **k)
        model_kwargs["location_keys"] = outputs.location_keys
        return model_kwargs


class _Maps(nn.Module):
    """`_Pointer.maps` as a network of its own."""

    def __init__(self, pointer: _Pointer) -> None:
        super().__init__()
        self.pointer = pointer

    def forward(
        self, hidden: torch.Tensor, fine: torch.Tensor, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.pointer.maps(hidden, fine, features)


def vision_networks(folder: Path) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The convolutions of a saved model, in float32: its backbone (colour -> features), its stem (features, planes,
    compared -> fine, tokens), its maps (see `_Pointer.maps`). For `nano_model`, which runs them without torch."""
    loader: Any = IbisNanoForConditionalGeneration  # its annotations leave output_loading_info out
    model, info = loader.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise PolicyError(f"{folder}: its weights lack {len(missing)} of the model's tensors, first {missing[0]}")
    return model.backbone, model.vision, _Maps(model.pointer)


# From here on the Auto classes of transformers know the model type.
AutoConfig.register("ibis_nano", IbisNanoConfig, exist_ok=True)
AutoImageProcessor.register(
    IbisNanoConfig,
    image_processor_classes={"pil": IbisNanoImageProcessor, "torchvision": IbisNanoImageProcessor},
    exist_ok=True,
)
AutoModelForImageTextToText.register(IbisNanoConfig, IbisNanoForConditionalGeneration, exist_ok=True)
AutoProcessor.register(IbisNanoConfig, IbisNanoProcessor, exist_ok=True)
