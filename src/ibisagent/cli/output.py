"""What the commands print with: text, JSON, errors in one line, progress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ibisagent.errors import IbisError
from ibisagent.files import one_line

if TYPE_CHECKING:
    from ibisagent.inference.cases import Failure

EXIT_ERROR = 2
stdout = Console(highlight=False, markup=False, soft_wrap=True)
stderr = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def print_error(error: BaseException) -> None:
    """One line on stderr."""
    if isinstance(error, OSError) and not isinstance(error, IbisError):
        message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    else:
        message = str(error)
    stderr.print(f"error: {one_line(message, 600)}")


def print_failures(failures: Iterable[Failure]) -> None:
    """Say on stderr which cases are left out, and why."""
    for failure in failures:
        stderr.print(f"failed, left out: {failure.case_id}: {one_line(failure.error, 300)}")


def print_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


@contextmanager
def status(what: str, *, quiet: bool) -> Iterator[None]:
    """Say `what` on stderr, if that is a terminal, while the block runs."""
    if quiet or not stderr.is_terminal:
        yield
        return
    with stderr.status(f"{what} ..."):
        yield


@contextmanager
def progress(total: int | None, what: str, *, quiet: bool) -> Iterator[Callable[..., None]]:
    """A bar on stderr while the block runs; call what it gives with the number of items finished since (default 1), or
    with `done`, the number of all, and with `total` once it is known."""
    if quiet or not stderr.is_terminal:
        yield lambda _count=1, done=None, total=None: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda count=1, done=None, total=total: bar.update(
            task, advance=None if done is not None else count, completed=done, total=total
        )


def new_table(title: str, *columns: str) -> Table:
    """An empty table that fits into 80 columns."""
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


class JsonStream:
    """A JSON object whose last member is a list that grows: each item is printed on a line of its own when it is there.

    So a reader can take line by line what a long run has done, and the whole is one JSON value.
    """

    def __init__(self, name: str, before: Mapping[str, Any]) -> None:
        """name: of the list. before: the members in front of it."""
        self._opening = json.dumps({**before, name: []}).removesuffix("]}")
        self._count = 0
        self.after: dict[str, Any] = {}
        """Members behind the list, known by the end."""

    def __enter__(self) -> JsonStream:
        self._write(self._opening)
        return self

    def __exit__(self, *_: object) -> None:
        members = json.dumps(self.after, default=str)
        self._write("]" + (", " + members.removeprefix("{") if self.after else "}"))

    def add(self, value: Any) -> None:
        """Print one more item."""
        if self._count:
            self._write(",")
        self._count += 1
        self._write(json.dumps(value, default=str))

    @staticmethod
    def _write(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
