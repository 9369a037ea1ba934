"""The runs of a teaching, side by side: each in a process of its own, followed by the files that it writes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ibisagent.errors import DataError, PolicyError
from ibisagent.files import one_line
from ibisagent.training.teach.part import (
    ERROR,
    PROGRESS,
    RESULT,
    Report,
    Task,
    is_learned,
    judge,
    learn,
    raise_error_of,
)

POLL_SECONDS = 0.3
LOG = "log.txt"
MOST_THREADS = 4  # of a run: more do not make so small a network faster
_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    # What training frees is kept for the next step: glibc would give it back and ask for it again.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


@dataclass
class _Running:
    task: Task
    process: subprocess.Popen[bytes]
    log: IO[bytes] = field(repr=False)

    @property
    def done(self) -> int:
        return _done(self.task)

    def close(self) -> None:
        """Wait for the process that is ending, and let go of what leads to it."""
        self.process.wait()
        self.log.close()
        if self.process.stdin is not None:
            self.process.stdin.close()

    def end(self) -> None:
        """Raise as the run did, if it failed."""
        self.close()
        folder = self.task.recipe.out
        if self.process.returncode == 0:
            return
        raise_error_of(folder)
        last = (folder / LOG).read_text(errors="replace").strip().rpartition("\n")[2]
        killed = self.process.returncode < 0
        reason = (
            "it was killed, most likely for want of memory"
            if killed
            else one_line(last, 300) or "it said nothing, so the disk may be full"
        )
        raise PolicyError(f"teaching failed: {reason}; start it again to go on, {folder / LOG} says more")


def run_all(tasks: Sequence[Task], workers: int, report: Report) -> None:
    """Perform all tasks that are not done yet, `workers` at a time; 0: one after another in this process.

    report: told the steps done of all tasks together. Whatever it raises ends them. Raises as `learning.learn`, and
    PolicyError where a process dies.
    """
    report(sum(map(_done, tasks)))
    if workers == 0:
        _run_here(tasks, report)
        return
    waiting = [task for task in tasks if not (task.recipe.out / RESULT).is_file()]
    running: list[_Running] = []
    # the same whatever is done already, as the sums of more threads differ in their last bits
    threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // min(workers, len(tasks))))
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(_start(waiting.pop(0), threads))
            time.sleep(POLL_SECONDS)
            for one in [one for one in running if one.process.poll() is not None]:
                running.remove(one)
                one.end()
                if not (one.task.recipe.out / RESULT).is_file():  # it has learned
                    waiting.insert(0, one.task)
            report(sum(map(_done, tasks)))
    finally:
        for one in running:
            one.process.kill()  # nothing of it is half written
            one.close()


def _run_here(tasks: Sequence[Task], report: Report) -> None:
    before = 0

    def told(start: int) -> Callable[[int], None]:
        return lambda done: report(start + done)

    for task in tasks:
        if not (task.recipe.out / RESULT).is_file():
            if not is_learned(task):
                learn(task, told(before))
            judge(task, told(before))
        before += task.steps
        report(before)


def _start(task: Task, threads: int) -> _Running:
    folder = task.recipe.out
    (folder / ERROR).unlink(missing_ok=True)
    try:
        log = (folder / LOG).open("ab")
    except OSError as error:
        raise DataError(
            f"{folder / LOG}: cannot be written ({error.strerror}); free space, then start again"
        ) from error
    process = subprocess.Popen(  # -P: without the folder that the user is in, whose random.py is not Python's
        [sys.executable, "-P", "-m", "ibisagent.training.teach", str(folder)],
        env={**os.environ, **_ENVIRONMENT, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,  # closed with this process, however that ends
        stdout=log,
        stderr=log,
    )
    return _Running(task, process, log)


def _done(task: Task) -> int:
    folder: Path = task.recipe.out
    if (folder / RESULT).is_file():
        return task.steps
    try:
        return int((folder / PROGRESS).read_text())
    except (FileNotFoundError, ValueError):
        return 0
