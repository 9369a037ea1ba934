"""What the server does, without HTTP: sessions with limits and expiry, one shared model, batch jobs.

Everything that is written lies below one data folder: `sessions/<id>/`, `jobs/<id>/`, `uploads/` (for a moment); these
folders are for the server's user alone. Names that come from outside never become paths. The folder has one owner at a
time, and what is deleted by itself follows one rule, see `Service.expire`.
"""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from ibisagent.domain import Case, Image, Mask, Masks, check_query
from ibisagent.environment import MAX_TURNS, package_version, turn_limit
from ibisagent.errors import ConfigError, DataError, PolicyError, TooLargeError
from ibisagent.files import file_names, make_folder, write_whole
from ibisagent.imaging import limits
from ibisagent.imaging.images import read_image, read_masks
from ibisagent.inference.models import Model, models
from ibisagent.inference.rounds import SESSION_FILE
from ibisagent.inference.session import Session
from ibisagent.policies.base import Policy
from ibisagent.query import target_of
from ibisagent.segmenters import Segmenter
from ibisagent.server.batching import SharedPolicy
from ibisagent.server.jobs import Job, Jobs
from ibisagent.server.offers import OfferedImage, OfferedScan
from ibisagent.server.storage import Ownership, clock, note_use, remove, trouble, used
from ibisagent.server.zips import zipped

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".dcm", ".mha", ".mhd", ".nrrd")
_ID = re.compile(r"[0-9a-f]{32}")
OWNER_FILE = "owner"  # in the folder of a session that a visitor of the page opened: which
PASSING_FILE = "passing"  # in that of another program, which does not come back to it: it goes when it is idle
READERS = 2  # uploads that are decoded at once: each may take some hundred megabytes for a moment
LARGE_RUNS = 4  # one-shot runs at once on images as large as the limit; of smaller ones, accordingly more
LOADED_IMAGES = 3  # as large as the limit, or accordingly more smaller ones: those of sessions that stay in memory
IMAGES_PER_VISITOR = 50  # of a visitor of the page, for each session that the server takes
IN_HAND_SECONDS = 20.0  # after its last use, in which a session is not put away to make room


class MissingError(ConfigError):
    """What was asked for is not there (any more)."""


class FullError(ConfigError):
    """The server has as much as it may have; later it may have room."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server takes. Sizes in bytes, pixels and voxels (see `limits`), times in seconds.

    sessions: in use at a time; all of a visitor of the page count as one, slices of scans and what is offered as none.
    idle_seconds: without a use, after which something is idle, see `Service.expire`.
    delete_seconds: without a use, after which everything goes, whoever made it; None: never.
    """

    sessions: int = 100
    upload_bytes: int = 64 * 2**20
    pixels: int = 2**24
    voxels: int = 2**27
    idle_seconds: float = 3600.0
    turns: int = MAX_TURNS
    jobs: int = 20
    job_images: int = 200
    delete_seconds: float | None = None

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"limit {name} is {getattr(self, name)}: give more than 0")


class VolumeLike(Protocol):
    """A stack of slices, as far as the server needs to know."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Slices along each axis: sagittal, coronal, axial."""
        ...

    def slice(self, axis: int, index: int, window: str) -> Image:
        """One slice as it is shown, at a window by name."""
        ...


@dataclass(frozen=True, slots=True)
class VoxelClick:
    """A user's click on voxel [i, j, k] of a volume: it belongs to `target`, or does not."""

    voxel: tuple[int, int, int]
    positive: bool
    target: str


class VolumeFormats(Protocol):
    """What reads, segments and writes volumes."""

    windows: Sequence[str]
    """Names of the windows that slices can be shown at."""

    def read(self, path: Path) -> VolumeLike:
        """The volume in a file. DataError where it cannot be used."""
        ...

    def segment(
        self, volume: VolumeLike, query: str, policy: Policy, segmenter: Segmenter, on_slice: Callable[[int], None]
    ) -> dict[str, Mask]:
        """The masks of a volume on its own grid, by target. on_slice: called with slices that are done; may raise."""
        ...

    def click(
        self,
        volume: VolumeLike,
        clicks: Sequence[VoxelClick],
        segmenter: Segmenter,
        on_slice: Callable[[int], None],
        *,
        through: bool,
    ) -> dict[str, Mask]:
        """The masks that a user's clicks ask for, by target. through: also beyond the slices that were clicked on."""
        ...

    def write_masks(
        self, masks: Masks, volume: VolumeLike, path: Path, *, dtype: str = "uint8", compressed: bool = True
    ) -> None:
        """All masks on the grid of `volume`: one label map (1, 2, ... in their order) where `path` ends in .nii.gz or
        .nrrd, a DICOM segmentation where it ends in .dcm. dtype, compressed: of NRRD."""
        ...


class Teaching(Protocol):
    """What `Service.teaching` has to be able to do, so that a client can have the models taught."""

    def start(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Begin, in the background; what there is to say of it. ConfigError where it cannot be."""
        ...

    def status(self) -> dict[str, Any] | None:
        """How far it is, with "status": "RUNNING" while it is under way; None where nothing was begun."""
        ...

    def stop(self) -> dict[str, Any]:
        """End it; what there is to say of it."""
        ...

    def labelled(self) -> None:
        """Somebody accepted a mask."""
        ...

    def close(self) -> None:
        """The server ends; what is under way goes on when it is back."""
        ...


class _Room:
    """Room for so many pixels; who finds none waits."""

    def __init__(self, pixels: int) -> None:
        self._free = self._all = pixels
        self._changed = threading.Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Take room for the block; for more than there is at all, all of it."""
        taken = min(pixels, self._all)
        with self._changed:
            self._changed.wait_for(lambda: taken <= self._free)
            self._free -= taken
        try:
            yield
        finally:
            with self._changed:
                self._free += taken
                self._changed.notify_all()


class Service:
    """The sessions and jobs of one server. Safe to use from multiple threads."""

    def __init__(
        self,
        policy: Policy,
        segmenter: Segmenter,
        folder: str | Path,
        *,
        limits: Limits | None = None,
        volumes: VolumeFormats | None = None,
        address: str = "",
        offers: Mapping[str, OfferedImage | OfferedScan] | None = None,
    ) -> None:
        """folder: where everything is kept; sessions and jobs of an earlier run that are in it come back.

        volumes: None where this server reads images alone. address: where it will be found, for whoever wants the
        folder as well. offers: what is there to be labelled, see `offers_of`. Raises DataError where the folder cannot
        be written, ConfigError where another server has it.
        """
        self.limits = limits or Limits()
        self.segmenter, self.volumes = segmenter, volumes
        self.offers = dict(offers or {})
        self.batches: list[int] = [0, 0]  # how many, and turns in them
        self.folder = Path(folder)
        if not self.folder.exists():
            make_folder(self.folder)
            self.folder.chmod(0o700)
        self._ownership = Ownership(self.folder, address)  # before anything in it is touched
        self.policy = SharedPolicy(policy, max_turns=self.limits.turns, on_batch=self._note_batch)
        for part in ("sessions", "jobs", "uploads"):
            self.private_folder(part)
        for leftover in (self.folder / "uploads").iterdir():
            remove(leftover)
        self._sessions: dict[str, Session | None] = {}
        self._touched: dict[str, float] = {}
        self._owners: dict[str, str] = {}  # of sessions that visitors of the page opened
        self._unasked: set[str] = set()  # sessions that were opened, and that nobody has asked for since
        self._worked: set[str] = set()  # sessions that are known to hold somebody's work
        for kept in (self.folder / "sessions").iterdir():
            if not _ID.fullmatch(kept.name):
                continue  # not ours
            if (kept / SESSION_FILE).is_file():
                self._sessions[kept.name] = None  # read when it is asked for
                self._touched[kept.name] = used(kept)
                if (owner := kept / OWNER_FILE).is_file():
                    self._owners[kept.name] = owner.read_text(errors="replace")
            else:
                remove(kept)  # killed while it was opened
        self._lock, self._taking_up = threading.RLock(), threading.Lock()
        self._readers = threading.BoundedSemaphore(READERS)
        self._stopping = threading.Event()
        self._room = _Room(LARGE_RUNS * self.limits.pixels)
        self._jobs = Jobs(self.folder / "jobs", self._segment_for_job)
        self.teaching: Teaching | None = None
        """What teaches the models, where they can be taught here."""
        self.held: list[Callable[[], Collection[str]]] = []
        """Sessions that are parts of something else, with which they stay and go."""
        self.also_expire: list[Callable[[float, float], int]] = []
        """Called by `expire` with two times, what was not used since goes: by the rule, and as was asked for."""

    def stop(self) -> None:
        """Take over wherever the agent is at work, and begin no image of a job, and no slice, any more: what is done so
        far stays."""
        self._stopping.set()
        self._jobs.stop()
        if self.teaching is not None:
            self.teaching.close()
        with self._lock:
            loaded = [session for session in self._sessions.values() if session is not None]
        for session in loaded:
            session.interrupt()

    def go_on(self, _slice: int = 0) -> None:
        """PolicyError where the server stops: asked between the slices of a volume."""
        if self._stopping.is_set():
            raise PolicyError("the server stops: the scan is as it was before")

    def close(self) -> None:
        """Stop the runs, the jobs and the model's thread, and let another server have the folder."""
        self.stop()
        self.policy.close()
        self._jobs.close()
        self._ownership.release()

    # Images from outside.

    def read_upload(self, content: bytes, name: str) -> Image:
        """The image in an upload. `name` is for people: its last part becomes the image's source.

        TooLargeError beyond the limits, DataError for what is no image.
        """
        image: Image = self._read(content, name, read_image)
        self._check_size(image.size, name)
        return replace(image, source=plain_name(name))

    def read_mask(self, content: bytes, name: str, size: tuple[int, int]) -> Mask:
        """The binary mask in an upload, of `size` (H, W). Errors as `read_upload`."""
        mask: Mask = self._read(content, name, lambda path: read_masks(path)["mask"])
        if mask.shape != size:
            raise DataError(f"{plain_name(name)}: is {mask.shape[::-1]}, the image is {size[::-1]} pixels (W, H)")
        if not mask.any():
            raise DataError(f"{plain_name(name)}: is an empty mask, there is nothing to refine; leave it out")
        return mask

    def read_volume(self, content: bytes, name: str) -> VolumeLike:
        """The volume in an upload, by the ending of its name. Errors as `read_upload`."""
        if self.volumes is None:
            raise DataError(f"{plain_name(name)}: this server reads images, not volumes; send a slice as PNG")
        volume: VolumeLike = self._read(content, name, self.volumes.read)
        return volume

    def private_folder(self, name: str) -> Path:
        """A folder below the data folder that nobody but this user can look into, made if need be."""
        folder = self.folder / name
        make_folder(folder)
        try:
            folder.chmod(0o700)  # also one that an earlier version left open
        except OSError as error:
            raise DataError(f"{folder}: belongs to another user; give --data a folder of your own") from error
        return folder

    def scratch(self, ending: str = "") -> Path:
        """A path of its own for something that does not stay; the caller removes it."""
        return self.folder / "uploads" / f"{uuid.uuid4().hex}{ending}"

    def _read(self, content: bytes, name: str, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of an upload, which lies in the data folder meanwhile; errors speak of its own name."""
        shown = plain_name(name)
        self.check_bytes(content, shown)
        path = self.scratch(next((ending for ending in VOLUME_SUFFIXES if shown.lower().endswith(ending)), ""))
        write_whole(content, path)
        try:
            with self.reading():
                return read(path)
        except DataError as error:
            raise type(error)(str(error).replace(str(path), shown)) from error
        finally:
            remove(path)

    def within_limits(self) -> AbstractContextManager[None]:
        """What is read in the block may have as many pixels and voxels as this server takes."""
        return limits.at_most(pixels=self.limits.pixels, voxels=self.limits.voxels)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Room to decode one upload, and the limits for it."""
        with self._readers, self.within_limits():
            yield

    def check_bytes(self, content: bytes, shown: str) -> None:
        """DataError for an empty upload, TooLargeError for one beyond the limit. shown: what it is called."""
        if not content:
            raise DataError(f"{shown}: is empty (0 bytes); send the file itself")
        most = self.limits.upload_bytes
        if len(content) > most:
            raise TooLargeError(
                f"{shown}: {len(content)} bytes, at most {most} are taken (--max-upload); make it smaller"
            )

    def _check_size(self, size: tuple[int, int], name: str) -> None:
        if size[0] * size[1] > self.limits.pixels:
            raise TooLargeError(
                f"{plain_name(name)}: {size[1]} x {size[0]} pixels, at most {self.limits.pixels} are taken; shrink it"
            )

    # Sessions.

    def open(
        self,
        image: Image,
        query: str,
        start: Mask | Masks | None = None,
        *,
        owner: str | None = None,
        passing: bool = False,
    ) -> Session:
        """A new session. start: the mask to refine of what the query names, or such masks by target. owner: the
        visitor of the page whose it is; None: of all who have the token.

        passing: of a program that does not come back to it once it is idle. FullError where as many are in use as may.
        """
        query = check_query(query)
        if start is None:
            start = {}
        masks: Masks = start if isinstance(start, Mapping) else {target_of(query): start}
        return self._add(lambda id_, folder: self._new(id_, image, query, masks, folder), owner, passing)

    def fork(self, id_: str, turn: int) -> Session:
        """A new session from the first `turn` turns of another, of the same owner."""
        session = self.session(id_)
        owner, passing = self._owners.get(id_), (self._folder_of(id_) / PASSING_FILE).exists()
        return self._add(lambda fresh, folder: session.fork(turn, id=fresh, folder=folder), owner, passing)

    def check_visitor(self, id_: str, visitor: str | None) -> None:
        """MissingError where a session belongs to a visitor of the page who is not `visitor`, as if it were not there.

        Every way in from outside asks this before it asks for the session.
        """
        if self._owners.get(id_, visitor) != visitor:
            raise _missing(id_)

    def session(self, id_: str) -> Session:
        """An open session, or one of `offers`, which is opened by that. MissingError where there is none (any more)."""
        if id_ not in self._sessions:
            self._take_up(id_)
        with self._lock:
            if id_ not in self._sessions:
                raise _missing(id_)
            self._touched[id_] = clock()
            self._unasked.discard(id_)
            session = self._sessions[id_]
            if session is None:
                session = Session.load(self._folder_of(id_), self.segmenter, self.policy)
                self._sessions[id_] = session
                self._make_room()
            note_use(self._folder_of(id_))
            return session

    def _take_up(self, id_: str) -> None:
        """Open what is offered under an id, once, whoever asks first."""
        offer = self.offers.get(id_)
        if not isinstance(offer, OfferedImage):
            return
        with self._taking_up:
            if id_ in self._sessions:
                return
            with self.reading():
                image, masks = offer.image()
            folder = self._folder_of(id_)
            try:
                session = self._new(id_, image, offer.query, masks, folder)
            except BaseException:
                remove(folder)
                raise
            with self._lock:
                self._sessions[id_], self._touched[id_] = session, clock()
                self._make_room()

    def loaded(self, id_: str) -> Session | None:
        """A session if it is in memory; this does not count as a use of it."""
        with self._lock:
            return self._sessions.get(id_)

    def session_folder(self, id_: str) -> Path:
        """Where a session keeps itself; there as long as it is open."""
        return self._folder_of(id_)

    def close_session(self, id_: str) -> None:
        """Take over where it runs, forget it, and delete its files; what it was offered from stays, and is offered no
        more. MissingError where there is none."""
        self._delete_session(id_)
        self.offers.pop(id_, None)

    def _delete_session(self, id_: str) -> None:
        with self._lock:
            if id_ not in self._sessions:
                raise MissingError(f"no session '{id_[:40]}' here")
            session = self._sessions.pop(id_)
            del self._touched[id_]
            self._owners.pop(id_, None)
            self._unasked.discard(id_)
            self._worked.discard(id_)
        if session is not None:
            session.discard()
        remove(self._folder_of(id_))

    @property
    def session_ids(self) -> list[str]:
        """The open sessions, oldest use first."""
        with self._lock:
            return sorted(self._sessions, key=self._touched.__getitem__)

    def ids_for(self, visitor: str | None) -> list[str]:
        """As `session_ids`, without those of other visitors of the page."""
        return [id_ for id_ in self.session_ids if self._owners.get(id_, visitor) == visitor]

    def expire(self, now: float | None = None) -> int:
        """Put away or delete what has been idle for too long; how much was deleted.

        One rule: what somebody made, or has not fetched, is never deleted unless `Limits.delete_seconds` asks for it.
        So an idle session leaves the memory and stays on the disk. What goes is what is idle and can be had again:
        sessions of programs that nobody has acted in, or that are `passing`; jobs whose results were fetched; uploads
        that were never opened.
        """
        now = clock() if now is None else now
        self._make_room()
        idle = now - self.limits.idle_seconds
        asked = float("-inf") if self.limits.delete_seconds is None else now - self.limits.delete_seconds
        deleted = 0
        with self._lock:
            left = [
                id_
                for id_, session in self._sessions.items()
                if self._touched[id_] < max(idle, asked) and not (session is not None and session.running)
            ]
        parts = {id_ for held in self.held for id_ in held()}
        for id_ in left:
            if id_ not in parts and (self._touched.get(id_, now) < asked or self._goes_when_idle(id_)):
                with suppress(MissingError):  # somebody closed it meanwhile
                    self._delete_session(id_)
                    deleted += 1
            else:
                self._put_away(id_, idle)
        for job in self._jobs.all:
            last = self._jobs.last_use(job)
            if job.over and (last < asked or (job.fetched and last < idle)):
                self._jobs.remove(job)
                deleted += 1
        deleted += sum(expire(idle, asked) for expire in self.also_expire)
        for path in (self.folder / "uploads").rglob("*"):  # what was sent to the page and never opened
            with suppress(OSError):
                if path.stat().st_mtime < idle:
                    path.rmdir() if path.is_dir() else path.unlink()
        return deleted

    def _goes_when_idle(self, id_: str) -> bool:
        folder = self._folder_of(id_)
        if (folder / PASSING_FILE).exists():
            return True
        if id_ in self._owners or id_ in self._worked:
            return False
        if _holds_work(folder / SESSION_FILE):
            self._worked.add(id_)
            return False
        return True

    def _put_away(self, id_: str, unused_since: float) -> None:
        """Forget what is in memory of a session that was not used since; it is read again when it is asked for."""
        with self._lock:
            session = self._sessions.get(id_)
            if session is not None and not session.in_use and self._touched[id_] < unused_since:
                self._sessions[id_] = None

    def _make_room(self) -> None:
        """Put away the sessions used longest ago where their images take too much memory."""
        room, in_hand = LOADED_IMAGES * self.limits.pixels, clock() - IN_HAND_SECONDS
        with self._lock:
            for id_ in sorted(self._sessions, key=self._touched.__getitem__, reverse=True):
                session = self._sessions[id_]
                if session is not None:
                    room -= session.image.size[0] * session.image.size[1]
                    unused = id_ in self._unasked or self._touched[id_] < in_hand
                    if room < 0 and unused and not session.in_use:
                        self._sessions[id_] = None

    def segment(self, image: Image, query: str, max_turns: int | None = None, start: Mask | None = None) -> Session:
        """One run on one image, kept by nobody; it may have to wait until others leave room for it.

        max_turns: default the policy's own limit.
        """
        max_turns = self._turns(max_turns, query)
        with self._room.of(image.size[0] * image.size[1]):
            session = self.open_unkept(image, query, start)
            session.run(max_turns=max_turns)
        return session

    def open_unkept(self, image: Image, query: str, start: Mask | None = None) -> Session:
        """A session for the moment, without an address or files."""
        query = check_query(query)
        return self._new(uuid.uuid4().hex, image, query, {} if start is None else {target_of(query): start}, None)

    def _turns(self, asked: int | None, query: str) -> int:
        if asked is None:
            return turn_limit(self.policy, query)
        if not 1 <= asked <= self.limits.turns:
            raise ConfigError(f"max_turns is {asked}: give 1 to {self.limits.turns}")
        return asked

    def _new(self, id_: str, image: Image, query: str, start: Masks, folder: Path | None) -> Session:
        return Session(Case(id_, image, query, start=start), self.segmenter, self.policy, folder=folder)

    def _add(self, make: Callable[[str, Path], Session], owner: str | None, passing: bool) -> Session:
        id_ = uuid.uuid4().hex
        marks = {OWNER_FILE: owner, PASSING_FILE: "" if passing else None}
        free = self.offers.keys() | {part for held in self.held for part in held()}
        with self._lock:
            idle = clock() - self.limits.idle_seconds
            recent = (one for one, last in self._touched.items() if last >= idle and one not in free)
            in_use = len({self._owners.get(one, one) for one in recent} - {owner})
            if in_use >= self.limits.sessions:
                raise FullError(f"there are {in_use} sessions in use, more are not taken: close one, or wait")
            most = IMAGES_PER_VISITOR * self.limits.sessions
            if owner is not None and sum(one == owner for one in self._owners.values()) >= most:
                raise FullError(f"this browser has {most} images here, more are not taken: delete one")
            self._sessions[id_] = None  # its place
            self._touched[id_] = clock()
            if owner is not None:
                self._owners[id_] = owner
        try:
            for name, mark in marks.items():  # before the session, so that it is never there without
                if mark is not None:
                    make_folder(self._folder_of(id_))
                    write_whole(mark.encode(), self._folder_of(id_) / name)
            session = make(id_, self._folder_of(id_))
        except BaseException:
            with self._lock:
                self._sessions.pop(id_, None)
                self._touched.pop(id_, None)
                self._owners.pop(id_, None)
            remove(self._folder_of(id_))
            raise
        with self._lock:
            self._sessions[id_] = session
            self._unasked.add(id_)
            self._make_room()
        return session

    def _folder_of(self, id_: str) -> Path:
        return self.folder / "sessions" / id_

    # Jobs.

    def submit(self, images: Sequence[tuple[str, bytes]], query: str, max_turns: int | None = None) -> Job:
        """Segment many uploads (name, content) with one query, in the background. FullError, TooLargeError as above."""
        query, max_turns = check_query(query), self._turns(max_turns, query)
        if not 1 <= len(images) <= self.limits.job_images:
            raise TooLargeError(f"a job of {len(images)} images: give 1 to {self.limits.job_images}")
        kept = len(self._jobs.kept)
        if kept >= self.limits.jobs:
            raise FullError(f"there are {kept} jobs under way or not fetched, more are not taken: fetch or delete one")
        shown = [plain_name(name) for name, _ in images]
        return self._jobs.submit([content for _, content in images], file_names(shown), shown, query, max_turns)

    def job(self, id_: str) -> Job:
        """A job that was submitted. MissingError where there is none."""
        job = self._jobs.get(id_)
        if job is None:
            raise MissingError(f"no job '{id_[:40]}' here")
        return job

    @property
    def jobs(self) -> list[Job]:
        """All jobs, oldest first."""
        return self._jobs.all

    def cancel(self, id_: str) -> Job:
        """End a job after the images under way; what is done stays."""
        job = self.job(id_)
        self._jobs.cancel(job)
        return job

    def remove_job(self, id_: str) -> None:
        """Forget a job that is over, and delete its files. ConfigError while it runs."""
        self._jobs.remove(self.job(id_))

    def results(self, id_: str) -> bytes:
        """A zip of what a job has made so far: masks, overlays, records."""
        return zipped(self._jobs.results(self.job(id_)))

    def note_fetched(self, id_: str) -> None:
        """Somebody has taken all results of a job that is over: from now on they go when they are idle."""
        self._jobs.note_fetched(self.job(id_))

    def _segment_for_job(self, content: bytes, shown: str, job: Job, folder: Path, name: str) -> None:
        image = self.read_upload(content, shown)
        self.segment(image, job.query, job.max_turns).export(folder, name)

    # What there is to know.

    def describe(self) -> dict[str, Any]:
        """Models with their licences and hashes, limits, version."""
        used = {self.policy.name, self.segmenter.name}
        listed = [
            {"spec": one.spec, "kind": one.kind, "what": one.what, "licence": one.licence, "sha256": one.sha256}
            for one in _models()
            if one.spec in used
        ]
        return {
            "version": package_version(),
            "policy": {"name": self.policy.name, "dialect": self.policy.dialect, **self.policy.describe()},
            "segmenter": {"name": self.segmenter.name, **self.segmenter.describe()},
            "models": listed,
            "limits": asdict(self.limits),
            "notice": "Research software: not a medical device, not for clinical use.",
        }

    def trouble(self) -> str | None:
        """Why no work can be taken; None where it can."""
        return trouble(self.folder, self.scratch())

    def note_label(self) -> None:
        """Somebody accepted a mask, which the models may be taught."""
        if self.teaching is not None:
            self.teaching.labelled()

    def _note_batch(self, size: int) -> None:
        self.batches[0] += 1
        self.batches[1] += size


def _missing(id_: str) -> MissingError:
    return MissingError(f"no session '{id_[:40]}' here: it may have expired; open a new one")


@cache
def _models() -> list[Model]:
    return models()


def _holds_work(file: Path) -> bool:
    """Whether anybody acted in the session that a file keeps, or gave it a mask; also where it cannot be read."""
    try:
        rounds = json.loads(file.read_bytes())["rounds"]
        return not all(set(filter(one.get, one)) <= {"query"} for one in rounds)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def plain_name(name: str) -> str:
    """A client's file name, fit to be shown and recorded: its last part, one line of its last 100 characters."""
    last = name.replace("\\", "/").rpartition("/")[2]
    return "".join(letter if letter.isprintable() else "_" for letter in last)[-100:].strip() or "image"
