"""Scans that users label slice by slice, without HTTP: kept in `scans/<id>/`, with the masks of the whole volume.

The slices of a scan are ordinary sessions, opened when somebody first acts on one. Their masks are written into those
of the volume when these are looked at. What was carried from slice to slice, or found by the agent, lies in the volume
alone, in `masks.npz`.
"""

from __future__ import annotations

import io
import json
import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ibisagent.domain import Image, Mask, check_query
from ibisagent.environment import package_version
from ibisagent.errors import DataError, TooLargeError
from ibisagent.files import make_folder, safe_name, write_whole
from ibisagent.inference.corrections import add_to_data_set
from ibisagent.inference.image import provenance_of
from ibisagent.inference.rounds import SESSION_FILE, State, summary_of
from ibisagent.inference.session import BusyError, Session
from ibisagent.inference.volume import RECHECK, run_volume
from ibisagent.policies.base import Policy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.server.offers import OfferedScan
from ibisagent.server.service import VOLUME_SUFFIXES, FullError, MissingError, Service, plain_name
from ibisagent.server.storage import clock, note_use, remove, used
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes.grid import DicomOrigin, scratch
from ibisagent.volumes.windows import HOUNSFIELD
from ibisagent.volumes.writing import write_nifti

log = logging.getLogger(__name__)

SCAN_FILE, MASKS_FILE = "scan.json", "masks.npz"
_FORMAT, _VERSION = "ibisagent scan", 1
MAX_VOLUMES = 4  # kept in memory
MAX_FILES = 4000  # of one scan
_VIEWS = 16  # of one scan, kept in memory
_AS_IT_IS = ("<action>stop</action>",)  # what is asked on a slice that a user has drawn
CARRIED = "carried from slice to slice"

Place = tuple[str, int]
"""Axis and number of a slice."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A direction to look along: "axial", ..., or "stored". count: slices; height, width: of their images."""

    name: str
    count: int
    height: int
    width: int


@dataclass(eq=False)
class Scan:
    """One scan. Locked where it changes.

    windows: level and width by name, of "auto" what it comes to. slices: sessions by place. found: the agent
    has been through the volume. doubted: places where the segmenter that carried a mask was in doubt. accepted: the
    sessions' stamps when a user accepted it; None where nobody has. saved: those that are in `masks.npz`. progress:
    slices done, and of how many about, while it is worked on.
    """

    id: str
    name: str
    owner: str | None
    query: str
    created: float
    dicom: bool
    axes: tuple[Axis, ...]
    windows: Mapping[str, tuple[float, float]]
    slices: dict[Place, str] = field(default_factory=dict)
    found: bool = False
    carried: bool = False
    doubted: list[Place] = field(default_factory=list)
    accepted: dict[str, int] | None = None
    saved: dict[str, int] = field(default_factory=dict)
    progress: tuple[int, int] | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)


@dataclass(eq=False)
class _Loaded:
    """What of a scan is in memory. written: stamps of the sessions whose masks are in `masks`. before: both as they
    were before the last that was carried or found."""

    volume: Volume
    masks: dict[str, np.ndarray]
    written: dict[str, int]
    before: tuple[dict[str, np.ndarray], dict[str, int]] | None = None
    views: OrderedDict[tuple[str, str], SliceView] = field(default_factory=OrderedDict)


class Scans:
    """The scans of one service. Safe to use from multiple threads."""

    def __init__(self, service: Service) -> None:
        """Scans of an earlier run come back. DataError where the data folder cannot be written."""
        self._service = service
        self._folder = service.private_folder("scans")
        self._lock, self._taking_up = threading.RLock(), threading.Lock()
        self._loaded: OrderedDict[str, _Loaded] = OrderedDict()
        self._scans: dict[str, Scan] = {}
        for folder in self._folder.iterdir():
            if (folder / SCAN_FILE).is_file():
                try:
                    scan = _read(folder / SCAN_FILE)
                except DataError as error:  # damaged: not shown, and not deleted either
                    log.warning("%s", error)
                    continue
                self._scans[scan.id] = scan
            else:
                remove(folder)  # killed while it was opened
        service.also_expire.append(self.expire)
        service.held.append(lambda: self.slice_sessions)

    # Coming and going.

    def open(self, files: Sequence[tuple[str, bytes]], query: str, owner: str | None, id_: str | None = None) -> Scan:
        """A new scan. files: name and content, multiple for the DICOM files of one series. id_: of what is offered.

        Raises FullError, TooLargeError, and DataError for what is no volume.
        """
        service = self._service
        if service.volumes is None:
            raise DataError("this server reads images, not scans; send a slice as PNG")
        if id_ not in service.offers and (in_use := self._in_use()) >= service.limits.sessions:
            raise FullError(f"there are {in_use} scans in use, more are not taken: delete one, or wait")
        if not 1 <= len(files) <= MAX_FILES:
            raise DataError(f"a scan of {len(files)} files: give 1 to {MAX_FILES}, one series at a time")
        id_, name = id_ or uuid.uuid4().hex, plain_name(files[0][0])
        folder = self._folder / id_
        make_folder(folder / "in")
        try:
            for number, (file, content) in enumerate(files):
                if not content:
                    raise DataError(f"{plain_name(file)}: is empty (0 bytes); send the file itself")
                ending = next((end for end in VOLUME_SUFFIXES if file.lower().endswith(end)), "")
                write_whole(content, folder / "in" / f"{number:05d}{'.dcm' if len(files) > 1 else ending}")
            try:
                volume = self._read_volume(folder, name)
            except DataError as error:
                inside = str(error).replace(str(folder / "in"), name)
                raise type(error)(inside.replace("/00000", "")) from error
            scan = self._described(id_, name, owner, check_query(query), volume)
            self._save(scan)
        except BaseException:
            remove(folder)
            raise
        with self._lock:
            self._scans[id_] = scan
            self._keep(id_, _Loaded(volume, {}, {}))
        return scan

    def get(self, id_: str, visitor: str | None) -> Scan:
        """A scan, or one that is offered, which is opened by that. MissingError where there is none, or it is of
        another visitor."""
        if id_ not in self._scans:
            self._take_up(id_)
        with self._lock:
            scan = self._scans.get(id_)
        if scan is None or (scan.owner is not None and scan.owner != visitor):
            raise MissingError(f"no scan '{id_[:40]}' here")
        note_use(self._folder / id_)
        return scan

    def _take_up(self, id_: str) -> None:
        """Open what is offered under an id, once, whoever asks first."""
        offer = self._service.offers.get(id_)
        if not isinstance(offer, OfferedScan):
            return
        with self._taking_up:
            if id_ in self._scans:
                return
            try:
                self.open(offer.contents(), offer.query, None, id_)
            except DataError as error:
                raise offer.without_paths(error) from error

    def of(self, visitor: str | None) -> list[Scan]:
        """The scans that a visitor may see, oldest first."""
        with self._lock:
            own = [scan for scan in self._scans.values() if scan.owner is None or scan.owner == visitor]
        return sorted(own, key=lambda scan: scan.created)

    def _in_use(self) -> int:
        idle = clock() - self._service.limits.idle_seconds
        with self._lock:
            kept = [id_ for id_ in self._scans if id_ not in self._service.offers]
        return sum(used(self._folder / id_) >= idle for id_ in kept)

    @property
    def all(self) -> list[Scan]:
        """Those of everybody."""
        with self._lock:
            return list(self._scans.values())

    def changed(self, scan: Scan) -> int:
        """When a scan or one of its slices was last changed, in nanoseconds since 1970."""
        return max((self.folder(scan) / SCAN_FILE).stat().st_mtime_ns, *self._stamps(scan).values(), 0)

    def close(self, scan: Scan) -> None:
        """Delete a scan with its slices' sessions and files. BusyError while it is worked on."""
        with self._at_work(scan, 0):
            with self._lock:
                self._scans.pop(scan.id, None)
                self._loaded.pop(scan.id, None)
            for session in scan.slices.values():
                if self._stamp(session) is not None:
                    self._service.close_session(session)
            remove(self._folder / scan.id)
            self._service.offers.pop(scan.id, None)

    def expire(self, _idle: float, asked: float) -> int:
        """Delete the scans that were last used before `asked`, in seconds since 1970; how many. For `Service.expire`:
        a scan is what somebody brought, and never goes for being idle alone."""
        with self._lock:
            old = [scan for scan in self._scans.values() if used(self._folder / scan.id) < asked]
        deleted = 0
        for scan in old:
            with suppress(BusyError):
                self.close(scan)
                deleted += 1
        return deleted

    @property
    def slice_sessions(self) -> set[str]:
        """The sessions that are slices of scans."""
        with self._lock:
            return {session for scan in self._scans.values() for session in scan.slices.values()}

    # Looking.

    def folder(self, scan: Scan) -> Path:
        """Where a scan lies."""
        return self._folder / scan.id

    def state(self, scan: Scan) -> State:
        """How far a scan is, as its slices are."""
        stamps = self._stamps(scan)
        if scan.accepted is not None and scan.accepted == stamps:
            return "accepted"
        states = {summary_of(self._service.session_folder(session)).state for session in stamps}
        if scan.carried or states & {"corrected", "accepted"}:
            return "corrected"
        return "agent" if scan.found or "agent" in states else "new"

    def image(self, scan: Scan, axis: str, index: int, window: str) -> Image:
        """A slice as it is shown."""
        return self._view(scan, axis, window).image(index)

    def masks(self, scan: Scan, axis: str, index: int) -> dict[str, Mask]:
        """The masks of the volume on a slice, (H, W) bool by target, those that are empty there left out."""
        with scan.lock:
            loaded = self._settled(scan)
            view = self._view(scan, axis)
            shown = {name: view.read_mask(mask, index) for name, mask in loaded.masks.items()}
        return {name: mask for name, mask in shown.items() if mask.any()}

    def slice_session(self, scan: Scan, axis: str, index: int) -> Session | None:
        """The session of a slice, None where nobody has acted there."""
        session = scan.slices.get((axis, index))
        return None if session is None or self._stamp(session) is None else self._service.session(session)

    def shown_slices(self, scan: Scan, axis: str) -> dict[int, bool]:
        """The slices that show a mask, or that somebody acted on: whether somebody did."""
        with scan.lock:
            loaded = self._settled(scan)
            view = self._view(scan, axis)
            shown = {
                index: False
                for index in range(view.count)
                if any(view.voxels_of(mask, index).any() for mask in loaded.masks.values())
            }
        return shown | {index: True for (along, index) in scan.slices if along == axis}

    def can_undo(self, scan: Scan) -> bool:
        """Whether `undo` has something to take back."""
        loaded = self._loaded.get(scan.id)
        return loaded is not None and loaded.before is not None

    # Acting.

    def session_to_act_in(self, scan: Scan, axis: str, index: int, window: str) -> Session:
        """The session of a slice, opened if need be; it begins with the masks that the volume has there."""
        masks = self.masks(scan, axis, index)
        session = self.slice_session(scan, axis, index)
        if session is None:
            image = self.image(scan, axis, index, window)
            session = self._service.open(image, scan.query, masks, owner=scan.owner)
            try:
                with self._changing(scan):
                    scan.slices[axis, index] = session.id
                    self._save(scan)
            except BaseException:
                self._service.close_session(session.id)
                raise
        elif not self._agrees(scan, (axis, index), session):
            session.edit(masks, CARRIED)
        return session

    def ask(self, scan: Scan, query: str) -> None:
        """Another request for the whole scan, for slices that are opened from now on."""
        with self._changing(scan):
            scan.query = check_query(query)
            self._save(scan)

    def propagate(self, scan: Scan, axis: str, index: int) -> None:
        """Carry the masks of a slice, and of all that a user or the agent worked on along `axis`, to the others. What
        was drawn along another axis stays as it is.

        DataError where none of them shows anything; BusyError while the scan is worked on.
        """
        view = self._view(scan, axis)
        with self._at_work(scan, view.count):
            with scan.lock:
                loaded = self._settled(scan)
                keys = sorted({index, *(number for along, number in scan.slices if along == axis)})
                start: dict[str, np.ndarray] = {}
                for name, mask in loaded.masks.items():
                    planes = {key: view.read_mask(mask, key) for key in keys}
                    if any(plane.any() for plane in planes.values()):
                        start[name] = scratch(view.volume.shape, bool)
                        for key, plane in planes.items():
                            view.write_mask(start[name], key, plane)
            if not start:
                raise DataError(f"{scan.name}: there is no mask here to carry on; make one first")
            self._through(scan, axis, ScriptedPolicy(_AS_IT_IS), keys, start)

    def find(self, scan: Scan, axis: str) -> None:
        """Let the agent look for what the scan's query names, in the whole volume; corrected slices stay as they are.

        PolicyError and SegmenterError as the agent raises them; BusyError while the scan is worked on.
        """
        with self._at_work(scan, self._view(scan, axis).count):
            self._through(scan, axis, self._service.policy, None, None)

    def undo(self, scan: Scan) -> None:
        """Take back what was carried or found last. DataError where there is nothing."""
        with self._at_work(scan, 0), self._changing(scan):
            loaded = self._load(scan)
            if loaded.before is None:
                raise DataError("nothing was carried on or found since the scan was loaded")
            (loaded.masks, loaded.written), loaded.before, scan.doubted = loaded.before, None, []
            self._save_masks(scan, loaded)

    def accept(self, scan: Scan) -> None:
        """A user says that the masks of the whole scan are right."""
        with self._changing(scan):
            self._settled(scan)
            scan.accepted = self._stamps(scan)
            self._save(scan)

    # What comes of it.

    def export(self, scan: Scan, folder: Path, name: str, kind: str) -> None:
        """Write the masks that show something into `folder`. name: what files begin with. kind: "nifti", one file a
        target; "seg", DICOM; "training", a data set.

        DataError where the source is not DICOM and "seg" is asked for.
        """
        with scan.lock:
            loaded = self._settled(scan)
            masks = {name: mask for name, mask in loaded.masks.items() if mask.any()}
            if not masks:
                return
            make_folder(folder)
            if kind == "training":
                view = self._view(scan, scan.axes[0].name)
                for index in range(view.count):
                    planes = {target: view.read_mask(mask, index) for target, mask in masks.items()}
                    shown = {target: plane for target, plane in planes.items() if plane.any()}
                    if shown:
                        add_to_data_set(folder, view.image(index), shown, scan.query)
            elif kind == "seg":
                from ibisagent.volumes.dicom_output import write_segmentation

                service = self._service
                facts = {"policy": service.policy.name, **provenance_of(service.policy, service.segmenter)}
                write_segmentation(
                    masks, loaded.volume, folder / f"{name}_seg.dcm", {**facts, "ibisagent": package_version()}
                )
            else:
                taken: set[str] = set()
                for target, mask in masks.items():
                    file = folder / f"{name}_mask_{safe_name(target, taken)}.nii.gz"
                    write_nifti(mask, loaded.volume, file)

    # Inside.

    def _through(
        self,
        scan: Scan,
        axis: str,
        policy: Policy,
        keys: Sequence[int] | None,
        start: Mapping[str, np.ndarray] | None,
    ) -> None:
        """Segment the volume with `policy`; what is found takes the place of the masks of the same names."""
        view = self._view(scan, axis)

        def count(_index: int) -> None:
            self._service.go_on()
            done, of = scan.progress or (0, view.count)
            scan.progress = (min(done + 1, of), of)

        recheck = RECHECK if start is None else 0
        segmenter = self._service.segmenter
        with self._service.within_limits():
            found = run_volume(
                view, scan.query, policy, segmenter, keys=keys, recheck=recheck, start=start, on_slice=count
            )
        with self._changing(scan):
            loaded = self._settled(scan)
            loaded.before = loaded.masks, dict(loaded.written)
            loaded.masks = {name: mask for name, mask in {**loaded.masks, **found.masks}.items() if mask.any()}
            if start is None or any(along != axis for along, _ in scan.slices):  # what users drew stands
                loaded.masks = {name: mask.copy() for name, mask in loaded.masks.items()}
                loaded.written = {}
                self._settled(scan)
            scan.doubted = sorted({(axis, one.slice) for one in found.carried if one.doubted})
            scan.accepted = None
            scan.found, scan.carried = scan.found or start is None, scan.carried or start is not None
            self._save_masks(scan, loaded)

    @contextmanager
    def _changing(self, scan: Scan) -> Iterator[None]:
        """Locked; what was changed in memory is as it was before where the block fails, as where the disk is full."""
        with scan.lock:
            loaded = self._loaded.get(scan.id)
            facts = {name: getattr(scan, name) for name in _PLAIN} | {"slices": dict(scan.slices)}
            held = None if loaded is None else (loaded.masks, dict(loaded.written), loaded.before)
            try:
                yield
            except BaseException:
                for name, value in facts.items():
                    setattr(scan, name, value)
                if loaded is not None and held is not None:
                    loaded.masks, loaded.written, loaded.before = held
                else:  # it is read again
                    self._loaded.pop(scan.id, None)
                raise

    @contextmanager
    def _at_work(self, scan: Scan, count: int) -> Iterator[None]:
        with scan.lock:
            if scan.progress is not None:
                raise BusyError("this scan is being worked on: wait until that is done")
            scan.progress = (0, count)
        try:
            yield
        finally:
            scan.progress = None

    def _settled(self, scan: Scan) -> _Loaded:
        """The scan, the masks of its slices' sessions written into those of the volume, the latest last.

        Callers hold the scan's lock.
        """
        loaded = self._load(scan)
        stamps = self._stamps(scan)
        changed = {session for session, stamp in stamps.items() if loaded.written.get(session) != stamp}
        places = {session: place for place, session in scan.slices.items() if session in changed}
        for session in sorted(changed, key=lambda one: stamps[one]):
            axis, index = places[session]
            drawn = self._service.session(session).masks
            view = self._view(scan, axis)
            for name in dict.fromkeys([*loaded.masks, *drawn]):
                mask = drawn.get(name)
                if name not in loaded.masks:
                    if mask is None or not mask.any():
                        continue
                    loaded.masks[name] = scratch(view.volume.shape, bool)
                view.write_mask(loaded.masks[name], index, np.zeros(view.size, bool) if mask is None else mask)
            loaded.written[session] = stamps[session]
        return loaded

    def _agrees(self, scan: Scan, place: Place, session: Session) -> bool:
        """Whether the volume shows on a slice what the slice's session does."""
        view = self._view(scan, place[0])
        with scan.lock:
            volume = {name: view.voxels_of(mask, place[1]) for name, mask in self._settled(scan).masks.items()}
        drawn = {name: view.plane(mask) for name, mask in session.masks.items()}
        empty = np.zeros((1, 1), bool)
        return all(
            np.array_equal(volume.get(name, empty), drawn.get(name, empty))
            or not (volume.get(name, empty).any() or drawn.get(name, empty).any())
            for name in {*volume, *drawn}
        )

    def _stamp(self, session: str) -> int | None:
        try:
            return (self._service.session_folder(session) / SESSION_FILE).stat().st_mtime_ns
        except OSError:  # it was closed
            return None

    def _stamps(self, scan: Scan) -> dict[str, int]:
        found = {session: self._stamp(session) for session in scan.slices.values()}
        return {session: stamp for session, stamp in found.items() if stamp is not None}

    def _view(self, scan: Scan, axis: str, window: str = "auto") -> SliceView:
        if axis not in {one.name for one in scan.axes}:
            raise DataError(f"{scan.name}: has no axis '{axis[:20]}', but {', '.join(one.name for one in scan.axes)}")
        loaded = self._load(scan)
        with self._lock, self._service.within_limits():
            view = loaded.views.get((axis, window))
            if view is None:
                view = SliceView(loaded.volume, "auto" if axis == "stored" else axis, window)
                loaded.views[axis, window] = view
                while len(loaded.views) > _VIEWS:
                    loaded.views.popitem(last=False)
        return view

    def _load(self, scan: Scan) -> _Loaded:
        with self._lock:
            loaded = self._loaded.get(scan.id)
            if loaded is None:
                volume = self._read_volume(self._folder / scan.id, scan.name)
                loaded = _Loaded(volume, self._read_masks(scan, volume), dict(scan.saved))
            self._keep(scan.id, loaded)
        return loaded

    def _keep(self, id_: str, loaded: _Loaded) -> None:
        self._loaded[id_] = loaded
        self._loaded.move_to_end(id_)
        for other in list(self._loaded)[: max(0, len(self._loaded) - MAX_VOLUMES)]:
            if self._scans[other].progress is None:
                del self._loaded[other]

    def _read_volume(self, folder: Path, name: str) -> Volume:
        files = sorted((folder / "in").iterdir())
        with self._service.reading():
            volume = read_volume(files[0] if len(files) == 1 else folder / "in")
        shown = name.partition(".")[0] or name
        return volume if isinstance(volume.origin, DicomOrigin) else replace(volume, name=shown)

    def _described(self, id_: str, name: str, owner: str | None, query: str, volume: Volume) -> Scan:
        with self._service.within_limits():
            main = SliceView(volume)
            others = ("axial", "coronal", "sagittal") if volume.oriented else ()
            views = [main]
            for axis in others:
                if axis != main.axis:
                    try:
                        views.append(SliceView(volume, axis))
                    except TooLargeError:  # of slices in that direction
                        continue
        axes = tuple(Axis(view.axis, view.count, *view.size) for view in views)
        low, high = main.window.low, main.window.high
        named = HOUNSFIELD if volume.modality in ("", "CT") and not volume.coloured else {}
        windows = {"auto": ((low + high) / 2, high - low), **named}
        return Scan(id_, name, owner, query, time.time(), isinstance(volume.origin, DicomOrigin), axes, windows)

    def _save(self, scan: Scan) -> None:
        plain = {name: getattr(scan, name) for name in _PLAIN}
        plain |= {"format": _FORMAT, "version": _VERSION, "axes": [_plain_axis(axis) for axis in scan.axes]}
        plain["slices"] = [[*place, session] for place, session in scan.slices.items()]
        write_whole(json.dumps(plain).encode(), self._folder / scan.id / SCAN_FILE)

    def _save_masks(self, scan: Scan, loaded: _Loaded) -> None:
        arrays: dict[str, Any] = {"names": np.array(list(loaded.masks), dtype=np.str_)}
        arrays |= {f"m{number}": np.packbits(mask) for number, mask in enumerate(loaded.masks.values())}
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write_whole(content.getvalue(), self._folder / scan.id / MASKS_FILE)
        scan.saved = dict(loaded.written)
        self._save(scan)

    def _read_masks(self, scan: Scan, volume: Volume) -> dict[str, np.ndarray]:
        path = self._folder / scan.id / MASKS_FILE
        if not path.is_file():
            return {}
        count = int(np.prod(volume.shape))
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {
                    str(name): np.unpackbits(stored[f"m{number}"], count=count).astype(bool).reshape(volume.shape)
                    for number, name in enumerate(stored["names"])
                }
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{scan.name}: the saved masks are damaged ({error})") from error


_PLAIN = (
    *("id", "name", "owner", "query", "created", "dicom", "windows"),
    *("found", "carried", "doubted", "accepted", "saved"),
)


def _plain_axis(axis: Axis) -> list[Any]:
    return [axis.name, axis.count, axis.height, axis.width]


def _read(path: Path) -> Scan:
    try:
        plain = json.loads(path.read_bytes())
        if plain.pop("format") != _FORMAT or plain.pop("version") != _VERSION:
            raise ValueError("it is of another format or version")
        plain["axes"] = tuple(Axis(*axis) for axis in plain["axes"])
        plain["slices"] = {(axis, index): session for axis, index, session in plain["slices"]}
        plain["doubted"] = [(axis, index) for axis, index in plain["doubted"]]
        return Scan(**plain)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: is no scan, or is damaged ({error})") from error
