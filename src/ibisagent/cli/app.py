"""The command tree: `ibisagent`, its nine first words, and errors in one line. The commands parse, call and print.

Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ibisagent.cli import data, evaluate, segment, serve, teach, train
from ibisagent.cli.options import JsonOption
from ibisagent.cli.output import EXIT_ERROR, print_error, print_json, stdout
from ibisagent.errors import IbisError


class _OneLineErrors(TyperGroup):
    """Every error raised on purpose, and every failing file system, becomes one line on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        # Read by OpenMP when torch is loaded: threads that spin while they wait for each other cost a batch up to 30
        # times its time where another process, or another thread of a server, has a core (docs/experiments).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        try:
            return super().invoke(ctx)
        except (IbisError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            print_error(error)
            raise typer.Exit(EXIT_ERROR) from error


app = typer.Typer(
    cls=_OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Name an object in a biomedical image, get its mask. Research software: not for clinical use.",
)

app.command()(segment.segment)
app.command()(teach.teach)
app.command()(segment.replay)
app.add_typer(evaluate.app, name="eval")
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")
app.add_typer(serve.app, name="serve")
app.command()(serve.ui)


@app.command()
def models(as_json: JsonOption = False) -> None:
    """List the policies and segmenters: what each is, which weights are on this machine, and which objects it knows."""
    from ibisagent.inference import models as installed

    found = installed.models()
    if as_json:
        print_json([asdict(model) for model in found])
        return
    for model in found:
        facts = [model.state]
        if model.size_bytes:
            facts.append(f"{model.size_bytes / 1e6:.1f} MB")
        facts += [fact for fact in (model.licence, model.sha256 and f"sha256 {model.sha256[:16]}", model.path) if fact]
        stdout.print(f"{model.kind:9}  {model.spec}\n{'':11}{model.what}\n{'':11}weights: {', '.join(facts)}")
        if model.names:
            stdout.print(f"{'':11}knows {len(model.names)} objects: {', '.join(model.names)}")


@app.command()
def doctor(
    policy: Annotated[str, typer.Option(help="Folder of a large policy: also tell what it needs, unloaded.")] = "",
    gpu: Annotated[str, typer.Option(help="Of another GPU than this machine's, by name: 'A100 80GB'.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Check this machine: versions, devices, weights, folders, and one tiny episode. Exit code 2 if something fails."""
    from ibisagent.inference import models as installed

    checks = installed.check_machine(policy, gpu)
    if as_json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            stdout.print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name}: {check.finding}")
    if not all(check.passed for check in checks):
        raise typer.Exit(EXIT_ERROR)
