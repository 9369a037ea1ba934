"""Batch jobs: many images, one request, in the background. They outlive the server, which resumes.

A job lies in `<folder>/<id>/`: `job.json`, `in/` until its images are done, `out/` with what was made of them.
"""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.files import make_folder, write_whole
from ibisagent.server.storage import note_use, used

LANES = 4  # images of one job under way at once: enough to fill batches, few enough not to crowd people out
JOB_FILE = "job.json"

JobState = Literal["waiting", "running", "done", "cancelled"]


@dataclass(eq=False)
class Job:
    """Many images, one request. names: what result files begin with; shown: what the client called the images.

    finished: numbers of the images that are over; failures: what went wrong, by shown name. fetched: whether somebody
    took all results.
    """

    id: str
    query: str
    names: list[str]
    shown: list[str]
    max_turns: int
    state: JobState = "waiting"
    finished: list[int] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    fetched: bool = False

    @property
    def done(self) -> int:
        """How many images are over."""
        return len(self.finished)

    @property
    def over(self) -> bool:
        """Whether nothing more will be made."""
        return self.state in ("done", "cancelled")


class Jobs:
    """The jobs in one folder. Safe to use from multiple threads.

    segment: makes of (content, shown name, job, folder, name) the files of one image, and raises IbisError.
    """

    def __init__(self, folder: Path, segment: Callable[[bytes, str, Job, Path, str], object]) -> None:
        self._folder, self._segment = folder, segment
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._cancelled: set[str] = set()
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="job")
        found = [job for job in map(_read, sorted(folder.iterdir(), key=used)) if job is not None]
        self._jobs = {job.id: job for job in found}
        for job in found:
            if not job.over:
                job.state = "waiting"
                self._threads.submit(self._run, job)

    def stop(self) -> None:
        """Begin no further image; the next start goes on."""
        self._stopping.set()

    def close(self) -> None:
        """Stop, and wait for the images under way."""
        self.stop()
        self._threads.shutdown(cancel_futures=True)

    @property
    def all(self) -> list[Job]:
        """Oldest first."""
        with self._lock:
            return list(self._jobs.values())

    @property
    def kept(self) -> list[Job]:
        """Those that are under way or hold what nobody fetched."""
        return [job for job in self.all if not (job.over and job.fetched)]

    def get(self, id_: str) -> Job | None:
        """A job by its id; this is a use of it."""
        with self._lock:
            job = self._jobs.get(id_)
        if job is not None:
            note_use(self._folder / job.id)
        return job

    def submit(self, images: Sequence[bytes], names: list[str], shown: list[str], query: str, max_turns: int) -> Job:
        """A new job. It is there once all of it is on the disk; DataError where it cannot be written, and none is."""
        job = Job(uuid.uuid4().hex, query, names, shown, max_turns)
        folder = self._folder / job.id
        try:
            make_folder(folder / "in")
            for number, content in enumerate(images):
                write_whole(content, folder / "in" / str(number))
            self._keep(job)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        with self._lock:
            self._jobs[job.id] = job
        self._threads.submit(self._run, job)
        return job

    def cancel(self, job: Job) -> None:
        """End a job after the images under way; what is done stays."""
        with self._lock:
            self._cancelled.add(job.id)
            if job.state == "waiting":
                job.state = "cancelled"
                self._keep(job)

    def remove(self, job: Job) -> None:
        """Forget a job that is over, and delete its files. ConfigError while it is not."""
        if not job.over:
            raise ConfigError(f"job {job.id} is {job.state}: cancel it first")
        with self._lock:
            self._jobs.pop(job.id, None)
            self._cancelled.discard(job.id)
        shutil.rmtree(self._folder / job.id, ignore_errors=True)

    def results(self, job: Job) -> Path:
        """The folder of what a job has made so far."""
        return self._folder / job.id / "out"

    def note_fetched(self, job: Job) -> None:
        """Somebody has the results of a job that is over."""
        with self._lock:
            if not job.fetched:
                job.fetched = True
                self._keep(job)

    def last_use(self, job: Job) -> float:
        """In seconds since 1970."""
        return used(self._folder / job.id)

    def _keep(self, job: Job) -> None:
        write_whole(json.dumps(asdict(job)).encode(), self._folder / job.id / JOB_FILE)

    def _run(self, job: Job) -> None:
        with self._lock:
            if job.over:
                return
            job.state = "running"
        left = [number for number in range(len(job.names)) if number not in job.finished]
        with ThreadPoolExecutor(LANES, thread_name_prefix="job-image") as lanes:
            list(lanes.map(lambda number: self._run_image(job, number), left))
        with self._lock:
            if job.id in self._cancelled:
                job.state = "cancelled"
            elif job.done == len(job.names):
                job.state = "done"
            if job.over:
                self._note(job)
                shutil.rmtree(self._folder / job.id / "in", ignore_errors=True)

    def _run_image(self, job: Job, number: int) -> None:
        if self._stopping.is_set() or job.id in self._cancelled:
            return
        folder, failure = self._folder / job.id, None
        try:
            content = (folder / "in" / str(number)).read_bytes()
            self._segment(content, job.shown[number], job, folder / "out", job.names[number])
        except (IbisError, OSError) as error:
            if self._stopping.is_set():  # because the models are gone: the next start does it again
                return
            failure = str(error)
        with self._lock:
            job.finished.append(number)
            if failure is not None:
                job.failures[job.shown[number]] = failure
            self._note(job)

    def _note(self, job: Job) -> None:
        """Keep how far a job is; where the disk is full, the next note or start finds out the rest."""
        try:
            self._keep(job)
        except DataError as error:
            job.failures["the server"] = str(error)


def _read(folder: Path) -> Job | None:
    """The job in a folder; one that was not there yet when the server was killed goes, anything unknown stays."""
    try:
        uuid.UUID(hex=folder.name)
    except ValueError:
        return None
    try:
        plain = json.loads((folder / JOB_FILE).read_bytes())
        return Job(**{one.name: plain[one.name] for one in fields(Job)})
    except FileNotFoundError:
        if not (folder / "out").exists():
            shutil.rmtree(folder, ignore_errors=True)
        return None
    except (OSError, ValueError, KeyError, TypeError):  # damaged: not shown, and not deleted either
        return None
