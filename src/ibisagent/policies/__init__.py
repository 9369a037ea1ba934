"""Policies behind one protocol: `load_policy(spec)` gives one, `respond(observations)` one completion for each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ibisagent.domain import Case
from ibisagent.errors import ConfigError
from ibisagent.policies.agents import AGENT_FILE
from ibisagent.policies.base import Policy

if TYPE_CHECKING:
    from ibisagent.protocol import History

__all__ = ["POLICIES", "Policy", "load_policy"]

POLICIES: Mapping[str, str] = MappingProxyType(
    {
        "ibis-nano": "our small model; its weights come with the package",
        "mllm:<folder or hub id>": "any Hugging Face image-text-to-text model: mllm:Qwen/Qwen2.5-VL-7B-Instruct, "
        "mllm:manglu3935/IBIS/qwen2_5vl-7b-RL; a bare folder or hub id means the same",
        "<folder of an agent>": "what `ibisagent teach` made: experts for taught objects, the old policy for all else",
        "endpoint:<base url>#<model>": "any OpenAI-compatible chat server; its key is read from IBIS_API_KEY",
        "oracle": "clicks where an expert who sees the ground truth would (the ceiling)",
        "oracle-box": "the true bounding box, nothing else; with the segmenter ellipse: what a box alone is worth",
        "one-shot:<policy>": "another policy's first action, then stop (a baseline)",
        "scripted:<file.json>": "replays recorded replies (a fake, for tests)",
        "location-prior": "clicks where objects of that name usually lie, blind to the image (a baseline of evaluate)",
        "centre-click": "clicks the centre of the image (a baseline)",
        "random-clicks": "clicks three times anywhere (a baseline)",
    }
)
"""What `load_policy` understands: spec -> description, for people."""

NANO_FOLDER = Path(__file__).parent.parent / "weights" / "ibis-nano"
_WITHOUT_PROPOSALS = ("centre-click", "random-clicks", "oracle", "oracle-box", "location-prior")
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*")


def load_policy(
    spec: str,
    *,
    dialect: str | None = None,
    history: History | None = None,
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    max_pixels: int | None = None,
    candidates: int | None = None,
    prompts: str | Path | None = None,
    cases: Mapping[str, Case] | Iterable[Case] | None = None,
) -> Policy:
    """The policy that `spec` names (see `POLICIES`).

    dialect, history: None takes what the model was made for. device: "auto", "cpu", "cuda", "cuda:1", "mps". dtype:
    "auto", "float32", "bfloat16", "float16". adapter: a PEFT folder, for mllm. max_new_tokens: None takes what the
    model's configuration says as `reply_tokens`, else 512. temperature: 0 is greedy. batch_size: observations answered
    together (mllm), or requests under way at once (endpoint). max_pixels: the size that images are shrunk to, for
    models that take any size (mllm). candidates: first turns to try, of which the best is kept (mllm); None takes what
    the model's configuration says, else 1. prompts: a file of other words for it (`policies.wording`; mllm, endpoint).
    cases: the ground truth, for the oracles alone.
    Raises ConfigError for a spec or option that does not exist and PolicyError where weights or a server are missing.
    """
    kind, _, rest = spec.partition(":")
    sampling: dict[str, Any] = {"dialect": dialect, "history": history, "max_new_tokens": max_new_tokens}
    sampling |= {"temperature": temperature, "seed": seed}
    loading: dict[str, Any] = {"device": device, "dtype": dtype, "adapter": adapter, "batch_size": batch_size}
    loading |= {"max_pixels": max_pixels, "prompts": prompts, **sampling}
    if (candidates or 1) > 1 and (kind in ("endpoint", "scripted", "one-shot") or spec in _WITHOUT_PROPOSALS):
        raise ConfigError(f"policy '{spec}' proposes no first turns to choose from: leave candidates out")
    if kind == "endpoint":
        from ibisagent.policies.endpoint import EndpointPolicy

        url, _, model = rest.partition("#")
        return EndpointPolicy(url, model, concurrency=batch_size, prompts=prompts, **sampling)
    if kind == "scripted" and rest:
        from ibisagent.policies.scripted import ScriptedPolicy

        return ScriptedPolicy.from_file(rest, dialect=dialect or "ibis")
    if spec in ("centre-click", "random-clicks"):
        from ibisagent.policies.baselines import CentreClickPolicy, RandomClicksPolicy

        if spec == "centre-click":
            return CentreClickPolicy(dialect=dialect or "ibis")
        return RandomClicksPolicy(dialect=dialect or "ibis", seed=seed)
    if kind == "one-shot" and rest:
        from ibisagent.policies.baselines import OneShotPolicy

        return OneShotPolicy(load_policy(rest, cases=cases, **loading))
    if spec in ("oracle", "oracle-box"):
        from ibisagent.policies.oracle import OraclePolicy

        if cases is None:
            raise ConfigError(
                "the oracle needs the ground truth: use it where there are cases (evaluate, trajectories)"
            )
        boxed: dict[str, Any] = {"box_first": 1.0, "max_clicks": 1} if spec == "oracle-box" else {}
        return OraclePolicy(cases, dialect=dialect or "ibis", seed=seed, name=spec, **boxed)
    if spec == "location-prior":
        raise ConfigError("location-prior learns from training masks: `ibisagent eval run` prints it beside any policy")
    is_model = spec == "ibis-nano" or kind == "mllm" or is_hub_id(spec) or Path(spec).is_dir()
    if not spec or not is_model:
        raise ConfigError(f"unknown policy '{spec}': give one of {', '.join(POLICIES)}")
    source = source_of(spec)
    if (Path(source) / AGENT_FILE).is_file():
        from ibisagent.policies.taught import load_agent

        return load_agent(Path(source), spec, candidates=candidates, **loading)
    from ibisagent.policies.mllm import MllmPolicy

    return MllmPolicy(source, name=spec, candidates=candidates, **loading)


def is_hub_id(source: str) -> bool:
    """Whether a source is written as a hub id is; a relative folder may be as well."""
    return _HUB_ID.fullmatch(source) is not None


def source_of(spec: str) -> str:
    """The folder or hub id of the model that `spec` names: "ibis-nano", "mllm:FOLDER", or FOLDER."""
    return str(NANO_FOLDER) if spec == "ibis-nano" else spec.removeprefix("mllm:")
