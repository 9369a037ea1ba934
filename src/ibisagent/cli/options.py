"""Options that multiple commands share, each written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ibisagent.cli.output import stderr

if TYPE_CHECKING:
    from ibisagent.policies.base import Policy


PolicyOption = Annotated[str, typer.Option("--policy", "-p", help="Who clicks; see 'ibisagent models'.")]
SegmenterOption = Annotated[str, typer.Option("--segmenter", "-s", help="What turns clicks into masks.")]
DialectOption = Annotated[
    str | None, typer.Option(help="Language of the turns: ibis, paper, released. Default: the policy's own.")
]
HistoryOption = Annotated[
    str | None, typer.Option(help="What the policy sees of past turns: none, actions, full. Default: the policy's own.")
]
TurnsOption = Annotated[
    int | None, typer.Option(help="Most turns of one episode (default: the policy's own limit; the paper: 20).", min=1)
]
SelectionOption = Annotated[
    str | None,
    typer.Option(
        help="Which mask of an episode counts: last, or best by the segmenter's own estimate. Default: best, but last "
        "for the dialect released."
    ),
]
SplitOption = Annotated[str | None, typer.Option(help="Only the rows of this split.")]
JudgedSplitOption = Annotated[
    str | None, typer.Option(help="Rows to measure. Default: val, else test, else all but train.")
]
LimitOption = Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)]
GroupOption = Annotated[str, typer.Option(help="Group the table by modality, object, size or dataset.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[str, typer.Option(help="Numbers of the policy: auto, float32, bfloat16, float16.")]
AdapterOption = Annotated[Path | None, typer.Option(help="Folder of a PEFT adapter for the policy.")]
PixelsOption = Annotated[
    int | None, typer.Option(help="Shrink images to this area for the policy, if it takes any size.", min=1)
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="TOML file with what the policy is told; 'data prompts' writes one.")
]
CandidatesOption = Annotated[
    int | None,
    typer.Option(
        help="Ways to begin an object that are tried at most, of which the best is kept. Default: the policy's own.",
        min=1,
    ),
]
TemperatureOption = Annotated[float, typer.Option(help="0 takes the likeliest text; above, it is drawn.", min=0)]
SeedOption = Annotated[int, typer.Option(help="Seed of whatever is drawn.", min=0)]
ChangesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Another value for a setting of the recipe; may be repeated."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value for machines instead of text.")]


@dataclass(frozen=True)
class PolicyChoice:
    """The options of every command that loads a policy (see `spread_options`)."""

    policy: PolicyOption = "ibis-nano"
    dialect: DialectOption = None
    history: HistoryOption = None
    device: DeviceOption = "auto"
    dtype: DtypeOption = "auto"
    adapter: AdapterOption = None
    max_pixels: PixelsOption = None
    prompts: PromptsOption = None

    def load(self, **more: Any) -> Policy:
        """The policy. more: arguments of `load_policy` beyond these."""
        from ibisagent.policies import load_policy
        from ibisagent.policies.wording import PARAPHRASED

        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "policy"}
        policy = load_policy(self.policy, **given, **more)
        if policy.dialect == "released" and getattr(policy, "wording", policy) is None:
            stderr.print(f"note: {PARAPHRASED}")
        return policy


@dataclass(frozen=True)
class Drawing:
    """The options of every command that can draw replies by chance."""

    temperature: TemperatureOption = 0.0
    seed: SeedOption = 0
    candidates: CandidatesOption = None


def spread_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command in which each parameter that is a dataclass stands for that class's fields, as options of their own."""
    parameters = inspect.signature(command, eval_str=True).parameters
    bundles: dict[str, Any] = {
        name: each.annotation for name, each in parameters.items() if is_dataclass(each.annotation)
    }
    shown: dict[str, inspect.Parameter] = {}
    for name, each in parameters.items():
        spread = inspect.signature(bundles[name], eval_str=True).parameters if name in bundles else {name: each}
        shown |= {name: one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for name, one in spread.items()}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, bundle in bundles.items():
            parts = {field.name: given.pop(field.name) for field in fields(bundle) if field.name in given}
            given[name] = bundle(**parts)
        command(**given)

    vars(run)["__signature__"] = inspect.Signature(list(shown.values()))
    run.__annotations__ = {name: one.annotation for name, one in shown.items()}
    return run


EmptyOption = Annotated[
    str, typer.Option(help="What two empty masks count as: one, zero, or skip. Positives only are always shown too.")
]
RunFolder = Annotated[Path, typer.Argument(help="Folder that 'eval run -o' or 'eval score -o' wrote.")]
DataFolderOption = Annotated[
    Path | None, typer.Option("--data", help="Folder for sessions and jobs. Default: this user's data folder.")
]
HostOption = Annotated[str, typer.Option(help="Address to listen on; beyond this machine set IBIS_TOKEN.")]
PortOption = Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)]
SessionsOption = Annotated[int, typer.Option(help="Most sessions at a time.", min=1)]
IdleOption = Annotated[float, typer.Option(help="Minutes without use after which what nobody worked on goes.", min=0.1)]
DeleteOption = Annotated[
    float | None, typer.Option(help="Days without use after which everything goes, also somebody's work.", min=0.01)
]
LearnOption = Annotated[
    int | None,
    typer.Option(
        help="Teach the agent in the background after so many newly accepted images. Default: when asked.", min=1
    ),
]
UploadOption = Annotated[int, typer.Option(help="Largest upload in megabytes.", min=1)]
AreaOption = Annotated[int, typer.Option(help="Largest image in megapixels.", min=1)]
VoxelsOption = Annotated[int, typer.Option(help="Largest volume in megavoxels of 4 bytes.", min=1)]
