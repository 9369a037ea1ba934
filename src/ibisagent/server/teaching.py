"""A server's teacher: what users accepted teaches its policy in the background, and the new one answers from then on.

The teaching is a process of its own (`teacher_process`), as it needs a core for minutes and may be killed. In the data
folder lie

    teaching/state.json       how far it is; of the last one, how it ended
    teaching/data/            the images and masks of the teaching under way, deleted when it is over
    teaching/progress.json    what the process says meanwhile, and in result.json at its end
    agents/<number>/          taught agents, for --policy; that in use and the one before it are kept
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import make_folder, one_line, write_whole
from ibisagent.inference.corrections import MANIFEST_NAME
from ibisagent.inference.session import BusyError
from ibisagent.policies import Policy, load_policy
from ibisagent.server.labelled import Labelled
from ibisagent.server.service import Service
from ibisagent.server.storage import no_room, remove

LEAST = 3  # images that can teach something
POLL_SECONDS = 0.5
END_SECONDS = 10.0  # in which a process that is asked to end has to
PROCESS = (sys.executable, "-P", "-m", "ibisagent.server.teacher_process")
STATE_FILE, PROGRESS_FILE, RESULT_FILE = "state.json", "progress.json", "result.json"

TeachingState = Literal["none", "running", "done", "failed", "stopped"]
_log = logging.getLogger("ibisagent.server")


@dataclass(frozen=True, slots=True)
class Status:
    """How far the teaching is, or how the last one ended. It is kept on the disk as it stands.

    number: of this teaching, from 1. images: that teach; counted as they are written. examples: keys of what teaches.
    began, ended: seconds since 1970. said: for users, in sentences. base: the policy that is taught. agent: number of
    the agent that answers; 0 is the base itself.
    """

    state: TeachingState = "none"
    number: int = 0
    images: int = 0
    examples: tuple[str, ...] = ()
    began: float = 0.0
    ended: float = 0.0
    said: str = ""
    base: str = ""
    agent: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """What a teaching under way says. stage, done, total, seconds_left: see `training.teach.TeachProgress`."""

    stage: str = "collecting"
    done: int = 0
    total: int = 0
    seconds_left: float | None = None


class Teacher:
    """Teaches the policy of a service, one teaching at a time. Safe to use from multiple threads.

    Nothing is lost by an end that nobody planned: the policy stays as it was, and the same labels go on where that was.
    """

    def __init__(
        self,
        service: Service,
        examples: Iterable[Labelled],
        *,
        learn_every: int | None = None,
        process: Sequence[str] = PROCESS,
        load: Callable[[str], Policy] = load_policy,
    ) -> None:
        """examples: what there is to learn from, each time they are gone through. learn_every: start by itself after so
        many newly accepted images; None: when asked. process: command that teaches, see `teacher_process`. load: makes
        a policy of an agent's folder."""
        self._service, self._sources, self.learn_every = service, examples, learn_every
        self._command, self._load = tuple(process), load
        self._base = service.policy.inner
        self._folder, self._agents = service.private_folder("teaching"), service.private_folder("agents")
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._ending: Literal["", "stopped", "closed"] = ""
        self._status = _read(Status, self._folder / STATE_FILE)

    def take_up(self) -> None:
        """Go on as an earlier run of the server ended: with the agent that was taught, and what was not finished."""
        with self._lock:
            last = self._status
            if last.base not in ("", self._base.name):  # the server was started with another policy
                state = "stopped" if last.state == "running" else last.state
                self._set(replace(last, state=state, agent=0, said=f"What was taught was {last.base}."))
                return
            if last.agent:
                try:
                    self._use(last.agent)
                    _log.info("the taught agent %s answers", self._agent(last.agent))
                except IbisError as error:
                    said = f"The taught agent cannot be loaded, the policy answers as it came: {one_line(error)}"
                    self._set(replace(last, agent=0, said=said))
            if self._status.state == "running":
                _log.info("the teaching that was under way goes on")
                self._begin([] if (self._folder / "data").is_dir() else list(self._sources))

    # What there is to see.

    def status(self) -> dict[str, Any] | None:
        """As clients of MONAI Label know it; None where nothing was begun."""
        now = self._status
        if now.state == "none":
            return None
        names = {"running": "RUNNING", "done": "DONE", "failed": "ERROR", "stopped": "STOPPED"}
        began, ended = (time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) for at in (now.began, now.ended))
        told = {"id": str(now.number), "status": names[now.state], "start_ts": began, "details": [self.said]}
        return told if now.state == "running" else {**told, "end_ts": ended}

    @property
    def now(self) -> Status:
        """How far it is."""
        return self._status

    @property
    def progress(self) -> Progress | None:
        """Of the teaching under way; None where there is none."""
        return _read(Progress, self._folder / PROGRESS_FILE) if self._status.state == "running" else None

    @property
    def said(self) -> str:
        """What to tell users, in sentences; "" where there is nothing."""
        step = self.progress
        if step is None:
            return self._status.said
        left = "" if step.seconds_left is None else f", about {_in_words(step.seconds_left)} left"
        images = self._status.images
        return f"Learning from {images} image{'s' * (images != 1)}: {step.stage}{left}."

    @property
    def labelled_count(self) -> tuple[int, int]:
        """How many images and scans can teach, and how many of these were accepted since the last teaching."""
        examples, known = list(self._sources), set(self._status.examples)
        return len(examples), sum(one.accepted and one.key not in known for one in examples)

    @property
    def folder(self) -> Path | None:
        """Of the agent that answers; None where it is the policy that the server was started with."""
        return self._agent(self._status.agent) if self._status.agent else None

    # Acting.

    def start(self, _settings: dict[str, Any] | None = None) -> dict[str, Any]:
        """Begin to teach; its status. BusyError while it is under way, ConfigError for too few labels."""
        with self._lock:
            last = self._status
            if last.state == "running":
                raise BusyError(f"it is learning already, from {last.images} images: wait, or stop it")
            self._wait()
            examples = list(self._sources)
            if len(examples) < LEAST:
                raise ConfigError(f"{len(examples)} images are accepted or corrected, it takes {LEAST}: do more first")
            keys = tuple(example.key for example in examples)
            same = last.state in ("failed", "stopped") and (keys, self._base.name) == (last.examples, last.base)
            number = last.number if same else last.number + 1
            if not same and last.number != last.agent:
                remove(self._agent(last.number))  # what is not finished
            now = Status("running", number, len(examples), keys, began=time.time(), base=self._base.name)
            self._set(replace(now, agent=last.agent))
            self._begin(examples)
        return self.status() or {}

    def stop(self) -> dict[str, Any]:
        """End the teaching under way; its status. What it learned so far is there when the same is begun again."""
        with self._lock:
            if self._status.state != "running":
                raise ConfigError("nothing is being learned: there is nothing to stop")
            self._ending = "stopped"
        self._wait()
        return self.status() or {}

    def forget(self) -> None:
        """Let the policy answer as the server was started with it. ConfigError where it does already."""
        with self._lock:
            if not self._status.agent:
                raise ConfigError("no taught agent answers here: there is nothing to go back from")
            self._set(replace(self._status, agent=0, said="The agent answers as it came; nothing is deleted."))
            self._service.policy.switch(self._base)

    def labelled(self) -> None:
        """Somebody accepted a mask: this may be enough to start."""
        if self.learn_every is None or self._status.state == "running":
            return
        count, new = self.labelled_count
        if count >= LEAST and new >= self.learn_every:
            try:
                self.start()
            except IbisError as error:  # whoever accepted has done so; the page shows this
                self._status = replace(self._status, said=f"It could not begin to learn: {one_line(error)}")

    def close(self) -> None:
        """End the process; the next start of the server goes on with it."""
        self._ending = self._ending or "closed"
        self._wait()

    # Inside.

    def _agent(self, number: int) -> Path:
        return self._agents / str(number)

    def _use(self, number: int) -> None:
        """Let an agent answer; records call it by its place in the data folder, as they name no folder of a machine."""
        self._service.policy.switch(self._load(str(self._agent(number))), f"agents/{number}")

    def _begin(self, examples: Sequence[Labelled]) -> None:
        self._ending = ""
        for name in (PROGRESS_FILE, RESULT_FILE):
            (self._folder / name).unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._work, args=(examples,), name="teacher", daemon=True)
        self._thread.start()

    def _wait(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _work(self, examples: Sequence[Labelled]) -> None:
        """From the labels to the new agent; without any examples from the data that an earlier run wrote."""
        try:
            if examples:
                self._collect(examples)
            said = self._taught()
        except (IbisError, OSError) as error:
            self._over("failed", f"It could not learn, and nothing has changed: {no_room(error) or one_line(error)}")
            return
        if self._ending == "closed":
            return  # the state stays "running"
        if self._ending == "stopped":
            self._over("stopped", "Stopped; nothing has changed. Start again to go on.")
        else:
            self._over("done", said)

    def _collect(self, examples: Sequence[Labelled]) -> None:
        """Write what teaches; it is there whole or not at all."""
        folder, part = self._folder / "data", self._folder / "data.part"
        for old in (folder, part):
            remove(old)
        make_folder(part)
        images = 0
        for example in examples:
            if self._ending:
                return
            try:
                images += example.write(part)
            except DataError as error:
                if no_room(error) is not None:
                    raise
                _log.error("an image could not be learned from: %s", type(error).__name__)  # it names nobody's image
        if images < LEAST:
            raise ConfigError(f"{images} images have masks of objects with names, it takes {LEAST}: name the objects")
        part.rename(folder)
        with self._lock:
            self._set(replace(self._status, images=images))

    def _taught(self) -> str:
        """Run the process to its end; what to tell users of the outcome, which is in use then."""
        number = self._status.number
        if not self._ending:
            self._run(self._agent(number))
        if self._ending:
            return ""
        result = self._result()
        if "error" in result:
            raise DataError(result["error"])
        said = verdict(result["objects"])
        if any(one["kept"] for one in result["objects"]):
            self._use(number)
            with self._lock:
                self._tidy(keep=(number, self._status.agent))
                self._status = replace(self._status, agent=number)
            return f"{said} It is agents/{number} in the data folder, for --policy."
        remove(self._agent(number))
        return said

    def _run(self, out: Path) -> None:
        names = {"policy": self._base.name, "segmenter": self._service.segmenter.name}
        asked = {"data": str(self._folder / "data" / MANIFEST_NAME), "out": str(out), "say": str(self._folder), **names}
        log = self._folder / "log.txt"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._command, json.dumps(asked)], stdin=subprocess.PIPE, stdout=output, stderr=output
            )
        try:
            while process.poll() is None and not self._ending:
                time.sleep(POLL_SECONDS)
        finally:
            process.terminate()
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdin is not None:
                process.stdin.close()
        if self._ending or (self._folder / RESULT_FILE).is_file():
            return
        why = f"signal {-process.returncode}" if process.returncode < 0 else f"code {process.returncode}"
        last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
        last = one_line(last) or "memory may have run out"
        raise DataError(f"the teacher was ended from outside ({why}; {last}); start again to resume")

    def _result(self) -> dict[str, Any]:
        try:
            result: dict[str, Any] = json.loads((self._folder / RESULT_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{self._folder / RESULT_FILE}: cannot be read ({error}); start again") from error
        return result

    def _over(self, state: TeachingState, said: str) -> None:
        _log.info("the teaching is over: %s", state)
        with self._lock:
            remove(self._folder / "data")
            remove(self._folder / "data.part")
            self._set(replace(self._status, state=state, ended=time.time(), said=said), must=False)

    def _tidy(self, keep: Sequence[int]) -> None:
        """Delete agents that are neither in use nor the one before."""
        for folder in self._agents.iterdir():
            if folder.name.isdecimal() and int(folder.name) not in keep:
                remove(folder)

    def _set(self, status: Status, *, must: bool = True) -> None:
        """Keep a status. must: DataError where it cannot be kept, and it is not so then."""
        with nullcontext() if must else suppress(DataError):
            write_whole(json.dumps(asdict(status)).encode(), self._folder / STATE_FILE)
        self._status = status


def verdict(objects: Sequence[dict[str, Any]]) -> str:
    """What came of a teaching, for users. objects: as `training.teach.TaughtObject` has them."""
    return " ".join(map(_verdict_on, objects))


def _verdict_on(one: dict[str, Any]) -> str:
    name, before, after = one["name"], one["before"], one["after"]
    if before is None or after is None:
        images = f"{one['images']} image{'s' * (one['images'] != 1)}"
        if one["kept"]:
            return f"{name}: learned from {images}, not checked; the new agent is used."
        return f"{name}: {images}, too little to tell; the old agent is kept."
    if one["kept"]:
        return f"{name}: {before:.2f} -> {after:.2f} on your images; the new agent is used."
    return f"{name}: not surely better on your images ({before:.2f} -> {after:.2f}); the old agent is kept."


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(10, round(seconds, -1)):.0f} seconds"
    return f"{round(seconds / 60)} minutes"


_Kept = TypeVar("_Kept", Status, Progress)


def _read(kind: type[_Kept], file: Path) -> _Kept:
    """What a file holds; as at the beginning where it is not there yet or cut off."""
    try:
        plain = json.loads(file.read_bytes())
        read = kind(**{one.name: plain[one.name] for one in fields(kind)})
    except (OSError, ValueError, KeyError, TypeError):
        return kind()
    return replace(read, examples=tuple(read.examples)) if isinstance(read, Status) else read
