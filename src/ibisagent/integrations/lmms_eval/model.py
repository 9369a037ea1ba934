"""Our agent as a model of lmms-eval. Imported by the harness alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms

from ibisagent.domain import Case, Image, check_mask_selection, union
from ibisagent.environment import run_episodes, turn_limit
from ibisagent.errors import ConfigError
from ibisagent.imaging.masks import encode_rle
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter


class IbisAgent(lmms):  # type: ignore[misc]
    """A policy with a segmenter; the harness sees the question go in and a run-length mask come out."""

    is_simple = True

    def __init__(
        self,
        policy: str = "ibis-nano",
        segmenter: str = "ibis-click",
        max_turns: int | None = None,
        mask_selection: str | None = None,
        device: str = "auto",
        batch_size: int = 1,
        **_of_the_harness: Any,
    ) -> None:
        """All as in `ibisagent segment`; batch_size: episodes run together. ConfigError for what does not exist."""
        super().__init__()
        self.mask_selection = None if mask_selection is None else check_mask_selection(mask_selection)
        self.batch_size = max(1, int(batch_size))
        self.policy = load_policy(policy, device=device, batch_size=self.batch_size)
        self.max_turns = turn_limit(self.policy) if max_turns is None else int(max_turns)
        self.segmenter = load_segmenter(segmenter, device=device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in their order."""
        answers: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            cases = [self._case(request) for request in requests[start : start + self.batch_size]]
            episodes = run_episodes(
                self.policy, self.segmenter, cases, max_turns=self.max_turns, mask_selection=self.mask_selection
            )
            for case, episode in zip(cases, episodes, strict=True):
                masks = episode.answer_masks
                answers.append(json.dumps(encode_rle(union(masks, list(masks), case.image.size))))
        return answers

    def _case(self, request: Any) -> Case:
        """What the agent is asked: the image and the first line of the text, never the ground truth."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        image = doc_to_visual(self.task_dict[task][split][doc_id])[0].convert("RGB")
        return Case(f"{task}/{doc_id}", Image(np.asarray(image)), text.partition("\n")[0])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not for an agent. Raises ConfigError."""
        raise ConfigError("the agent has no likelihood of an answer: choose a generation task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not for an agent, which has turns of its own. Raises ConfigError."""
        raise ConfigError("the agent takes its turns by itself: choose a single-round task")
