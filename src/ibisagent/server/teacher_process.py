"""The process in which a server's teacher teaches: `python -m ibisagent.server.teacher_process '{"data": ...}'`.

Its one argument is JSON: data, out, policy and segmenter as `training.teach.teach` takes them, and say, the folder that
it writes progress.json and at its end result.json to: {"objects": [...]}, or {"error": "..."}. It runs as long as its
standard input is open, so that it never outlives the server, and gives way to everything else on the machine.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from ibisagent.errors import DataError, IbisError
from ibisagent.files import one_line, write_whole
from ibisagent.server.teaching import PROGRESS_FILE, RESULT_FILE
from ibisagent.training.teach import TeachProgress, TeachRecipe, teach

NICENESS = 10
SAID_EVERY = 0.5  # seconds


def main(argument: str, recipe: TeachRecipe | None = None) -> None:
    """Teach, and write what came of it. recipe: see `teach`."""
    asked = json.loads(argument)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the server, which ends this as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the processes that teaching began are ended with it
    threading.Thread(target=_end_with_the_server, daemon=True).start()
    say, said = Path(asked["say"]), 0.0

    def report(progress: TeachProgress) -> None:
        nonlocal said
        if time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            with suppress(DataError):  # on a full disk the teaching itself says so, where it writes
                write_whole(json.dumps(asdict(progress)).encode(), say / PROGRESS_FILE)

    names = {name: asked[name] for name in ("policy", "segmenter")}
    result: dict[str, object]
    try:
        taught = teach([Path(asked["data"])], Path(asked["out"]), recipe=recipe, report=report, **names)
        result = {"objects": [asdict(one) for one in taught.objects]}
    except IbisError as error:
        result = {"error": one_line(error, 600)}
    write_whole(json.dumps(result).encode(), say / RESULT_FILE)


def _end_with_the_server() -> None:
    os.read(sys.stdin.fileno(), 1)  # its end; not through the buffer, whose lock an ending interpreter wants
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1])
