"""A process that is killed in the middle of its work."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Sequence


def killed(command: Sequence[str], *, after_lines: int, pause: float = 0.0) -> bool:
    """Start `command`, send SIGKILL `pause` seconds after it has written so many lines; False if it ended by itself."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(after_lines):
            process.stdout.readline()
        time.sleep(pause)
        process.kill()
    return process.returncode == -signal.SIGKILL
