"""Our agent as a model of lmms-eval. Imported by the harness alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lmms_eval.api.model import lmms

from ibisagent import session
from ibisagent.domain import Case, Image, Keep, union
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.errors import ConfigError
from ibisagent.masks import encode_rle
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter


class IbisAgent(lmms):  # type: ignore[misc]
    """A policy with a segmenter; the harness sees the question go in and a run-length mask come out."""

    is_simple = True

    def __init__(
        self,
        policy: str = "ibis-nano",
        segmenter: str = "ibis-click",
        max_turns: int = session.DEFAULT_TURNS,
        keep: str = "best",
        device: str = "auto",
        batch_size: int = 1,
        **_of_the_harness: Any,
    ) -> None:
        """All as in `ibisagent segment`; batch_size: episodes run together. ConfigError for what does not exist."""
        super().__init__()
        if keep not in ("last", "best"):
            raise ConfigError(f"cannot keep '{keep}': give last or best")
        self.keep: Keep = "best" if keep == "best" else "last"
        self.max_turns, self.batch_size = int(max_turns), max(1, int(batch_size))
        self.policy = load_policy(policy, device=device, batch_size=self.batch_size)
        self.segmenter = load_segmenter(segmenter, device=device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """One answer for each request, in their order."""
        answers: list[str] = []
        for start in range(0, len(requests), self.batch_size):
            cases = [self._case(request) for request in requests[start : start + self.batch_size]]
            envs = [
                SegmentationEnv(case, self.segmenter, dialect=self.policy.dialect, max_turns=self.max_turns)
                for case in cases
            ]
            for case, episode in zip(cases, rollout(self.policy, envs), strict=True):
                masks = episode.kept(self.keep)
                answers.append(json.dumps(encode_rle(union(masks, list(masks), case.image.size))))
        return answers

    def _case(self, request: Any) -> Case:
        """What the agent is asked: the picture and the first line of the text, never the truth."""
        text, _, doc_to_visual, doc_id, task, split = request.args
        picture = doc_to_visual(self.task_dict[task][split][doc_id])[0].convert("RGB")
        return Case(f"{task}/{doc_id}", Image(np.asarray(picture)), text.partition("\n")[0])

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not for an agent. Raises ConfigError."""
        raise ConfigError("the agent has no likelihood of an answer: choose a generation task")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not for an agent, which has turns of its own. Raises ConfigError."""
        raise ConfigError("the agent takes its turns by itself: choose a single-round task")
