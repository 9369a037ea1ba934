"""The reward of an episode as verl wants it. It needs no verl."""

from __future__ import annotations

from typing import Any, NoReturn

from ibisagent.domain import Case, Episode
from ibisagent.errors import ConfigError
from ibisagent.rewards import PAPER, RewardWeights, score


def episode_reward(episode: Episode, case: Case, weights: RewardWeights = PAPER) -> tuple[float, dict[str, float]]:
    """(the reward, what verl logs with it: the same as "score", every term, the final mean IoU and the turns)."""
    result = score(episode, case, weights)
    turns = float(len(episode.turns))
    return result.total, {"score": result.total, "iou": result.iou, "episode_turns": turns, **result.terms}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> NoReturn:
    """What verl calls for text that brings no reward: it was not made by our agent loop, and text alone has no masks.

    Set as `reward.custom_reward_function`, it makes that mistake one clear line. Always raises ConfigError.
    """
    raise ConfigError(
        f"{data_source}: a reply without its turns cannot be rewarded; set "
        "actor_rollout_ref.rollout.agent.default_agent_loop=ibisagent, as recipes/verl/grpo.yaml does"
    )
