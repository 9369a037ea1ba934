"""What there is to learn from: all pairs of the user's data that can be read, each object under the name that the
policy will be asked for."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ibisagent.datasets import CaseRow, CaseSource, EmptyMaskError, read_cases, split_kind
from ibisagent.domain import Case
from ibisagent.errors import ConfigError, DataError
from ibisagent.files import one_line
from ibisagent.query import known_as, means_everything, requests
from ibisagent.segmenters.backbone_sizes import SIDE
from ibisagent.training.images import squash

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """What the data holds, told before any teaching.

    objects: images that show each object, by the name that it is taught under. absent: images that are known not to
    show it. renamed: names of the data that mean the same as another one, which they are taught under: one that the
    policy knows, else the first that the data have, as of "Cyst" and "cysts". sizes: of
    the images, (height, width), the commonest first. left_aside: pairs for validation or testing. duplicates: pairs
    that are there more than once, counted once. left_out: pairs that cannot be learned from, each with its reason in
    one line.
    """

    objects: dict[str, int]
    absent: dict[str, int]
    renamed: dict[str, str]
    images: int
    patients: int
    sizes: tuple[tuple[int, int], ...]
    left_aside: int
    duplicates: int
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class TeachingData:
    """Pairs to learn from: readable, of distinct image and object; `row.mask` is None where the object is absent.

    patient: whom each row's image is of, by the row's id; images with the same pixels are of the same one. sha256: hash
    of all pixels, masks and names.
    """

    rows: tuple[CaseRow, ...]
    patient: dict[str, str]
    sha256: str
    found: Found

    @property
    def names(self) -> list[str]:
        """Of the objects, in order."""
        return sorted({row.object for row in self.rows})

    @property
    def patients(self) -> list[str]:
        """In order."""
        return sorted(set(self.patient.values()))

    def of(self, patients: Collection[str]) -> CaseSource:
        """The pairs of these patients. DataError for none."""
        return CaseSource([row for row in self.rows if self.patient[row.id] in patients], "the data to teach from")


def read_teaching_data(data: Sequence[Path], known: Collection[str]) -> TeachingData:
    """All that can be learned from the data sets at `data`.

    known: names that the policy learned. Pairs for validation or testing are left aside where there are others, so that
    the agent can be judged on them. DataError where no object is shown at all, by a name that can be asked for.
    """
    if not data:
        raise ConfigError("nothing to teach from: name a folder of labelled images, or a manifest")
    rows = [row for path in data for row in read_cases(path).rows if row.object and not (row.answer and not row.mask)]
    for_training = [row for row in rows if split_kind(row.split) not in ("val", "test")]
    kept, left_aside = (for_training, len(rows) - len(for_training)) if for_training else (rows, 0)
    if rows and not for_training:
        log.warning("all pairs are for validation or testing; they are learned from, so judge the agent on others")
    reader = _Reader(known)
    for row in kept:
        reader.add(row)
    return reader.finished(", ".join(map(str, data)), left_aside)


class _Reader:
    def __init__(self, known: Collection[str]) -> None:
        self._known = known
        self._names: dict[str, str] = {}
        self._rows: dict[tuple[str, str], CaseRow] = {}
        self._patients: dict[str, str] = {}
        self._size: dict[str, tuple[int, int]] = {}
        self._masks: dict[tuple[str, str], bytes] = {}
        self._left_out: list[str] = []
        self._duplicates = 0
        self._content = hashlib.sha256()

    def add(self, row: CaseRow) -> None:
        """Read one pair. An empty mask says that the object is absent."""
        try:
            row, case = _decoded(row)
        except DataError as error:
            self._leave_out(str(error))
            return
        where = row.where or row.id
        try:
            name = self._names.setdefault(row.object, self._named(row.object))
        except DataError as error:
            self._leave_out(f"{where}: {error}")
            return
        image = case.image.sha256
        mask = next(iter((case.targets or {}).values()))
        packed = np.packbits(mask).tobytes()
        if row.mask is not None and not squash(mask).any():
            self._leave_out(
                f"{where}: {name} covers {int(mask.sum())} of {mask.shape[1]} x {mask.shape[0]} pixels, less than the"
                f" agent sees on its {SIDE} x {SIDE}; cut the image"
            )
            return
        if (image, name) in self._rows:
            if packed == self._masks[image, name]:
                self._duplicates += 1
            else:
                before = self._rows[image, name].where or self._rows[image, name].id
                self._leave_out(
                    f"{where}: has another mask of {name} than the same image at {before}; keep the right one"
                )
            return
        self._masks[image, name] = packed
        number = len(self._rows)
        # the id says nothing of where the data are, which may have been moved when a teaching is resumed
        self._rows[image, name] = replace(row, id=f"{number:05} {name}", object=name, query=f"Segment the {name}.")
        self._patients.setdefault(image, row.patient or image)
        self._size[image] = case.image.size
        self._content.update(repr((image, name, self._patients[image])).encode() + packed)

    def _leave_out(self, reason: str) -> None:
        reason = one_line(reason, 400)
        self._left_out.append(reason)
        log.warning("left out: %s", reason)

    def _named(self, name: str) -> str:
        """What an object is taught as: the name that the policy knows for it, or that came before, else its own."""
        name = " ".join(name.split())
        taught = known_as(name, self._known) or known_as(name, set(self._names.values())) or name
        if means_everything(taught):
            raise DataError(f"object '{one_line(name)}': asks for all that there is; rename it in the data")
        try:
            asked = requests(f"Segment the {taught}.", {*self._known, taught})
        except ConfigError as error:
            raise DataError(f"object '{one_line(name)}': {error}; rename it in the data") from error
        if [one.asked for one in asked] != [taught]:
            raise DataError(f"object '{one_line(name)}': no sentence can ask for this name; rename it in the data")
        return taught

    def finished(self, where: str, left_aside: int) -> TeachingData:
        """All that was read. DataError where no object is shown."""
        shown = Counter(name for (_, name), row in self._rows.items() if row.mask is not None)
        absent = Counter(name for (_, name), row in self._rows.items() if row.mask is None)
        if not shown:
            reason = f"; the first of {len(self._left_out)} left out: {self._left_out[0]}" if self._left_out else ""
            raise DataError(f"{where}: no image shows an object to learn{reason}")
        rows = {key: row for key, row in self._rows.items() if key[1] in shown}
        for (_, name), row in self._rows.items():
            if name not in shown:
                self._leave_out(
                    f"{row.where or row.image}: no image shows {name}, so that it is absent teaches nothing"
                )
        sizes = Counter(self._size[image] for image in dict.fromkeys(image for image, _ in rows))
        images = {image for image, _ in rows}
        patient = {row.id: self._patients[image] for (image, _), row in rows.items()}
        found = Found(
            dict(sorted(shown.items())),
            {name: absent[name] for name in sorted(shown) if absent[name]},
            {own: name for own, name in self._names.items() if " ".join(own.split()) != name},
            len(images),
            len(set(patient.values())),
            tuple(size for size, _ in sizes.most_common()),
            left_aside,
            self._duplicates,
            tuple(self._left_out),
        )
        return TeachingData(tuple(rows.values()), patient, self._content.hexdigest(), found)


def _decoded(row: CaseRow) -> tuple[CaseRow, Case]:
    source = CaseSource([row], row.where)
    try:
        return row, source[0]
    except EmptyMaskError:
        row = replace(row, mask=None, label=None)
        return row, CaseSource([row], row.where)[0]


def folds_of(material: TeachingData, count: int) -> list[list[str]]:
    """`count` groups of patients, each object spread over them as evenly as can be; fewer where there are fewer."""
    rows: dict[str, list[CaseRow]] = defaultdict(list)
    for row in material.rows:
        rows[material.patient[row.id]].append(row)
    folds: list[list[str]] = [[] for _ in range(min(count, len(rows)))]
    shown: list[Counter[str]] = [Counter() for _ in folds]
    for patient in sorted(rows, key=lambda one: (-len(rows[one]), one)):
        names = [row.object for row in rows[patient] if row.mask is not None]
        fewest = min(range(len(folds)), key=lambda k: (sum(shown[k][name] for name in names), len(folds[k]), k))
        folds[fewest].append(patient)
        shown[fewest].update(names)
    return folds
