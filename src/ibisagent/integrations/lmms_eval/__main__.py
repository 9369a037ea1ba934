"""Writes the task for lmms-eval: python -m ibisagent.integrations.lmms_eval DATA -o FOLDER."""

from pathlib import Path
from typing import Annotated

import typer

from ibisagent.datasets import read_cases
from ibisagent.files import make_folder
from ibisagent.integrations.lmms_eval import TASK, write_task


def main(
    data: Annotated[Path, typer.Argument(help="Labelled data in any layout.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the task.")],
    split: Annotated[str | None, typer.Option(help="Only the rows of this split.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only this many cases, spread over the data.", min=1)] = None,
) -> None:
    """Write the task, and say how to run it."""
    cases = read_cases(data, split=split).spread(limit)
    make_folder(output)
    write_task(cases, output)
    typer.echo(f"python -m lmms_eval --model ibisagent --tasks {TASK} --include_path {output} --batch_size 16")


if __name__ == "__main__":
    typer.run(main)
