"""`ibisagent train`: the packaged weights' own recipes, fine-tuning of any policy, and a check of the rewards."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ibisagent.cli.options import ChangesOption, JsonOption
from ibisagent.cli.output import EXIT_ERROR, new_table, print_failures, print_json, progress, status, stderr, stdout

if TYPE_CHECKING:
    from ibisagent.training.reward_check import RewardReport

app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Train the packaged networks, or fine-tune any policy."
)

EXIT_CONSTANT = 1  # of 'check-rewards': nothing failed, but what was looked for is there


@app.command()
def click(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/ibis-click.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a click network on image-mask pairs; use it as --segmenter ibis-click:OUT/ibis-click.safetensors.

    Writes checkpoint, weights and TensorBoard logs to the recipe's folder; a run that was stopped resumes from there.
    """
    with status("reading the data", quiet=as_json):
        from ibisagent.training.click.trainer import ClickRecipe, train

        plan = ClickRecipe.read(recipe, changes or ())
    with _training(plan.states, "states", quiet=as_json) as report:
        weights = train(plan, report)
    if as_json:
        print_json({"weights": str(weights), "states": plan.states})
    else:
        stdout.print(f"weights: {weights}\nuse them with --segmenter ibis-click:{weights}")


@app.command()
def nano(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/ibis-nano.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train the small policy on image-mask pairs from scratch; use it as --policy OUT/ibis-nano.

    Writes checkpoint and model to the recipe's folder; a run that was stopped resumes from there.
    """
    with status("reading the data", quiet=as_json):
        from ibisagent.training.nano.trainer import NanoRecipe, train

        plan = NanoRecipe.read(recipe, changes or ())
    with _training(plan.total_examples, "examples", quiet=as_json) as report:
        model = train(plan, report)
    if as_json:
        print_json({"model": str(model), "examples": plan.examples})
    else:
        stdout.print(f"model: {model}\nuse it with --policy {model}")


def _named_metrics(named: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in named.items())


@contextmanager
def _training(total: int, what: str, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A progress bar for a training run, as its report (number done, losses, metrics of a validation, or None)."""
    with progress(total, what, quiet=quiet) as advance:

        def report(done: int, losses: Mapping[str, float], metrics: Mapping[str, float] | None) -> None:
            advance(done=done)
            if metrics is not None and not quiet:
                stderr.print(f"{done} {what}, {_named_metrics(losses)}; held-out patients: {_named_metrics(metrics)}")

        yield report


@app.command()
def sft(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/sft-nano.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a policy on episodes with thoughts (the cold start); use it as --policy mllm:OUT/policy.

    Multiple GPUs: accelerate launch --config_file recipes/accelerate/8-gpu-fsdp.yaml -m ibisagent train sft RECIPE. A
    stopped run resumes from its last checkpoint.
    """
    with status("reading recipe, model and data", quiet=as_json):
        from ibisagent.training.finetune.recipes import require_libraries

        require_libraries()
        from ibisagent.training.finetune.sft import SftRecipe, train

        plan = SftRecipe.read(recipe, changes or ())
    _print_policy(train(plan, _told(quiet=as_json)), as_json)


@app.command()
def rl(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="TOML file, such as recipes/rl-nano.toml.")],
    changes: ChangesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a policy by playing whole episodes with a segmenter (GRPO); use it as --policy mllm:OUT/policy.

    Start from a policy that `sft` made: one that never hits learns not to click. More GPUs and stopped runs: as for
    `sft`.
    """
    with status("reading recipe, model and data", quiet=as_json):
        from ibisagent.training.finetune.recipes import require_libraries

        require_libraries()
        from ibisagent.training.finetune.recipes import RlRecipe
        from ibisagent.training.finetune.rl import train

        plan = RlRecipe.read(recipe, changes or ())
    _print_policy(train(plan, _told(quiet=as_json)), as_json)


@app.command()
def check_rewards(
    episodes: Annotated[
        list[Path], typer.Argument(metavar="EPISODES...", help="Folders of episodes, or records of single ones.")
    ],
    data: Annotated[
        Path, typer.Option(help="The ground truth: data set folder, manifest, or what 'data build' made of them.")
    ],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="RL recipe, or a part of one, whose table [rewards] holds them."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Check that every reward term varies over recorded EPISODES, and which one decides.

    Exit code 1 if a term is the same in all of them: training would not feel it. Episodes of the same case make a
    group, as in GRPO; give more than one folder to bring them together. Episodes without ground truth in DATA are
    listed and left out; the exit code is then 2.
    """
    with status("reading the data", quiet=as_json):
        from ibisagent.rewards import PAPER
        from ibisagent.training import reward_check as checking
        from ibisagent.training.finetune.recipes import RlRecipe

        weights = PAPER if config is None else RlRecipe.read_one(config, "rewards")
        cases = checking.read_ground_truth(data)
    replayed = (episode for path in episodes for episode in checking.read_episodes(path))
    report = checking.check_rewards(replayed, cases, weights)
    if as_json:
        print_json(report.to_json())
    else:
        _print_rewards(report)
    print_failures(report.failures)
    if constant := [term for term in report.terms if term.constant]:
        listed = ", ".join(f"{term.name} ({term.mean:.3g})" for term in constant)
        stderr.print(f"constant over all {report.episodes} episodes, so nothing can be learned from it: {listed}")
        raise typer.Exit(EXIT_CONSTANT)
    if report.failures:
        raise typer.Exit(EXIT_ERROR)


def _told(*, quiet: bool) -> Callable[[int, int, Mapping[str, float]], None]:
    """Prints what a trainer logs on one line of stderr."""
    shown = ("loss", "eval_loss", "mean_token_accuracy", "reward", "rollout/iou", "rollout/turns", "rollout/failed")

    def report(step: int, steps: int, logs: Mapping[str, float]) -> None:
        told = ", ".join(f"{name} {logs[name]:.3g}" for name in shown if name in logs)
        if told and not quiet:
            stderr.print(f"update {step} of {steps}: {told}")

    return report


def _print_policy(folder: Path, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # one process says it for all
        return
    if as_json:
        print_json({"policy": str(folder)})
    else:
        stdout.print(f"policy: {folder}\nuse it with --policy mllm:{folder}")


def _print_rewards(report: RewardReport) -> None:
    groups = f", {report.groups} of them with more than one episode" if report.groups else ""
    title = f"{report.episodes} episodes of {report.cases} cases{groups}"
    table = new_table(title, "", "weight", "min", "mean", "max", "std", "varies", "corr.", "share")
    for term in (*report.terms, report.total):
        values = [f"{value + 0.0:.3f}" for value in (term.minimum, term.mean, term.maximum, term.std)]
        varies = "" if term.varies is None else f"{term.varies:.0%}"
        if term is report.total:
            table.add_row(term.name, "", *values, varies, "", "")
        else:
            correlation = "" if term.correlation is None else f"{term.correlation:+.2f}"
            share = "" if term.constant or term.share is None else f"{term.share:.0%}"
            table.add_row(term.name, f"{term.weight:g}", *values, varies, correlation, share)
    stdout.print(table)
    where = "within groups" if report.groups else "over the batch"
    if report.groups:
        stdout.print("varies: in this share of the groups")
    stdout.print(f"corr.: with the total; share: of its variance {where}")
    if (dominant := report.dominant) is not None and dominant.share is not None:
        stdout.print(f"{dominant.name} decides: {dominant.share:.0%} of that variance comes from it")
