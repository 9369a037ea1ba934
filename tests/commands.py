"""The command line: run here, run in a process that is killed, what it says and what it leaves behind."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from typer.testing import CliRunner, Result

from ibisagent.cli import app


def ibisagent(*arguments: object) -> Result:
    """`ibisagent ARGUMENTS` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result: Result, *parts: str) -> None:
    """Exit code 2 and one line on stderr that holds all of `parts`."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("images are sent to ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def killed(command: Sequence[str], *, after_lines: int, pause: float = 0.0) -> bool:
    """Start `command`, send SIGKILL `pause` seconds after it has written so many lines; False if it ended by itself."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(after_lines):
            process.stdout.readline()
        time.sleep(pause)
        process.kill()
    return process.returncode == -signal.SIGKILL


def contents(folder: Path) -> dict[str, bytes]:
    """{path below the folder: bytes} of all its files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
