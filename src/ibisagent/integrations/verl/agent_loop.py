"""verl's agent loop around our environment: multiple turns, each with a new image, in one stream of tokens (verl 0.9).

verl makes one `SegmentationLoop` for each rollout, in a process of many that share the policy's servers. The reward is
computed here, from the turns. A segmenter that fails raises: verl logs that and leaves the rollout out of its group.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import PIL.Image
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.tokenizer import get_processor_token_id

from ibisagent.domain import Completion, Image, Masks
from ibisagent.environment import MAX_TURNS, SegmentationEnv
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.generation.exports import prompt_case
from ibisagent.integrations.verl.reward import episode_reward
from ibisagent.protocol import Message, OverlayStyle, overlay, render
from ibisagent.rewards import weights_of
from ibisagent.segmenters import Segmenter, load_segmenter

_SEGMENTING = ThreadPoolExecutor(1, "segmenter")  # one at a time: segmenters need not be safe for threads
_VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>")
_NEVER = -100.0  # as a logit bias

_load_segmenter = cache(load_segmenter)
Result = TypeVar("Result")


class SegmentationLoop(AgentLoopBase):  # type: ignore[misc]  # verl is not typed
    """One rollout: `prompt_case` -> `SegmentationEnv`, until it ends or the next image would not fit any more."""

    def __init__(
        self,
        *args: Any,
        segmenter: str = "ibis-click",
        device: str = "cpu",
        dialect: str = "ibis",
        max_turns: int = MAX_TURNS,
        max_turn_tokens: int = 256,
        max_pixels: int = 512 * 512,
        folder: str = "",
        rewards: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """segmenter, device: as for `load_segmenter`; "remote:URL" shares one machine's. dialect, max_turns: of the
        environment. max_turn_tokens: of one reply. max_pixels: larger images are shown to the policy shrunk to this
        area. folder: where relative paths of images begin. rewards: the fields of `RewardWeights`.
        """
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ConfigError("the policy has no image processor: train a vision-language model, such as Qwen2.5-VL")
        if not 0 < max_turn_tokens <= self.rollout_config.response_length:
            raise ConfigError(
                f"max_turn_tokens is {max_turn_tokens}: give 1 to {self.rollout_config.response_length}, the response "
                "length, which has to hold all replies and images of a rollout"
            )
        self._segmenter: Segmenter = _load_segmenter(segmenter, device=device)
        self._dialect, self._max_turns, self._max_turn_tokens = dialect, max_turns, max_turn_tokens
        self._max_pixels, self._folder = max_pixels, Path(folder)
        plain = OmegaConf.to_container(rewards, resolve=True) if OmegaConf.is_config(rewards) else rewards or {}
        self._weights = weights_of(plain, "agent loop ibisagent")

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        """Play one rollout. kwargs: a record of `generation.exports.VERL_SCHEMA`, as verl's dataset passes it on.

        DataError for a record that is none of ours, SegmenterError and PolicyError when machinery fails.
        """
        told, ground_truth = kwargs["extra_info"], json.loads(kwargs["reward_model"]["ground_truth"])
        case = await self._aside(prompt_case, told["id"], told["query"], ground_truth, self._folder)
        env = SegmentationEnv(case, self._segmenter, dialect=self._dialect, max_turns=self._max_turns)
        path = _Rollout(self, env, sampling_params)
        await path.play()
        reward, facts = episode_reward(env.episode(), case, self._weights)
        return path.output(reward, facts)

    async def _aside(self, work: Callable[..., Result], *args: Any, on: ThreadPoolExecutor | None = None) -> Result:
        """Run `work` in a thread, so that other rollouts go on."""
        return await asyncio.get_running_loop().run_in_executor(on, partial(work, *args))

    def _paint(self, image: Image, masks: Masks, style: OverlayStyle) -> PIL.Image.Image:
        rendered = overlay(image, masks, style)
        scale = (self._max_pixels / (rendered.width * rendered.height)) ** 0.5
        if scale >= 1:
            return rendered
        return rendered.resize((max(1, int(rendered.width * scale)), max(1, int(rendered.height * scale))))

    def _ask(self, env: SegmentationEnv) -> list[Message]:
        return render(env.observation, dialect=self._dialect, history="full", style="colour", paint=self._paint)

    @property
    def _vision_tokens(self) -> frozenset[int]:
        """Tokens that stand for images. If the policy wrote one, images and places would no longer match."""
        found = {get_processor_token_id(self.processor, kind) for kind in ("image", "video")}
        found |= {self.tokenizer.convert_tokens_to_ids(token) for token in _VISION_TOKENS}
        return frozenset(found - {None, self.tokenizer.unk_token_id})


class _Rollout:
    """What has been said so far, and the same as tokens: `ids`, of which the last `len(mask)` are the response."""

    def __init__(self, loop: SegmentationLoop, env: SegmentationEnv, sampling: Mapping[str, Any]) -> None:
        self._loop, self._env = loop, env
        self._forbidden = loop._vision_tokens
        bias = dict.fromkeys(self._forbidden, _NEVER)
        self._sampling = {**sampling, "logit_bias": bias, "max_tokens": loop._max_turn_tokens}
        self._room = loop.rollout_config.response_length
        self._request = uuid4().hex
        self._messages: list[Message] = []
        self._images: list[PIL.Image.Image] = []
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._logprobs: list[float] | None = None
        self._seconds = {"generate_sequences": 0.0, "tool_calls": 0.0}
        self._preempted = -1
        self._extra: dict[str, Any] = {}

    async def play(self) -> None:
        loop, env = self._loop, self._env
        loop._assert_mm_supported(True)
        self._messages = await loop._aside(loop._ask, env)
        self._images = _images(self._messages)
        self._ids = await loop.ct_build_initial_tokens(self._messages, images=self._images)
        while not env.done:
            text, tokens = await self._write()
            started = time.perf_counter()
            await loop._aside(env.step, Completion(text, tokens), on=_SEGMENTING)
            self._seconds["tool_calls"] += time.perf_counter() - started
            if not env.done and not await self._show(text):
                env.truncate()

    async def _write(self) -> tuple[str, int]:
        """The policy's next reply, and its number of tokens."""
        loop, started = self._loop, time.perf_counter()
        written = await loop.server_manager.generate(
            request_id=self._request,
            prompt_ids=self._ids,
            sampling_params=dict(self._sampling),
            image_data=self._images,
            mm_processor_kwargs=loop._get_mm_processor_kwargs(),
        )
        self._seconds["generate_sequences"] += time.perf_counter() - started
        if self._forbidden.intersection(written.token_ids):
            raise PolicyError("the policy's server wrote a token that stands for an image: it must obey logit_bias")
        self._note(written)
        known = self._logprobs if self._logprobs is not None or not written.log_probs else []
        merged, self._mask, self._logprobs = await loop.ct_merge_assistant_token(
            self._ids, written.token_ids, self._mask, known, assistant_logprobs=written.log_probs or None
        )
        self._ids = merged.token_ids
        return loop.tokenizer.decode(written.token_ids, skip_special_tokens=True), len(written.token_ids)

    async def _show(self, text: str) -> bool:
        """Add the reply `text` and the image it led to; False, and nothing added, without room for another reply."""
        loop = self._loop
        said = [*self._messages, {"role": "assistant", "content": text}]
        asked = [*said, (await loop._aside(loop._ask, self._env))[-1]]
        merged, mask, logprobs = await loop.ct_merge_context_msg(said, asked, self._ids, self._mask, self._logprobs)
        if len(mask) + loop._max_turn_tokens > self._room:
            return False
        self._messages, self._ids, self._mask, self._logprobs = asked, merged.token_ids, mask, logprobs
        self._images += _images(asked[-1:])
        return True

    def _note(self, written: Any) -> None:
        """Keep what verl wants to know of a generation: which weights wrote it, and whether it was interrupted."""
        first = self._extra.get("min_global_steps")
        self._extra |= written.extra_fields
        if first is not None:
            self._extra["min_global_steps"] = first
        if written.num_preempted is not None:
            self._preempted = max(0, self._preempted) + written.num_preempted

    def output(self, reward: float, facts: dict[str, float]) -> AgentLoopOutput:
        """The rollout as verl trains on it."""
        start = len(self._ids) - len(self._mask)
        return AgentLoopOutput(
            prompt_ids=self._ids[:start],
            response_ids=self._ids[start:],
            response_mask=self._mask,
            response_logprobs=self._logprobs,
            multi_modal_data={"images": self._images},
            mm_processor_kwargs=self._loop._get_mm_processor_kwargs(),
            reward_score=reward,
            num_turns=len(self._images) + len(self._env.observation.turns),
            metrics=AgentLoopMetrics(**self._seconds, num_preempted=self._preempted),
            extra_fields={**self._extra, "reward_extra_info": facts, "turn_scores": [], "tool_rewards": []},
        )


def _images(messages: list[Message]) -> list[PIL.Image.Image]:
    return [part["image"] for message in messages for part in message["content"] if part["type"] == "image"]
