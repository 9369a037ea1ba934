"""Masks made by anything, measured against labelled data: PNG and other images, NIfTI, run-length codes.

Which file belongs to which case, first rule that fits (blanks, "+" and case do not matter):

1. the path of the case's own mask, relative to the data, in the folder of masks (a mirrored tree);
2. the name of the case's mask; 3. IMAGE_mask_OBJECT, as `ibisagent segment` names them; 4. IMAGE_OBJECT.

A `.jsonl` file, or those in the folder, holds one JSON object a line: "case_id" (as `ibisagent eval run` has it:
IMAGE#OBJECT), or "image" and "object"; and "segmentation" or "rle", a COCO run-length code {"size": [H, W], "counts":
text, or a list of runs}. A ground truth in NIfTI (a folder of such masks, or a manifest that names them) wants NIfTI.

Whatever does not fit is a `Problem` of its file: never resampled, never scored, never left out in silence.
"""

from __future__ import annotations

import json
import logging
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ibisagent.datasets import IMAGE_SUFFIXES, CaseRow, CaseSource, cases_to_judge
from ibisagent.domain import Mask, Masks
from ibisagent.environment import package_version
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation import mask_measures, size_of
from ibisagent.evaluation.metrics import EMPTY_RULE, EmptyRule, resize_target
from ibisagent.evaluation.results import CaseResult, Evaluation
from ibisagent.evaluation.runs import CASES_NAME, RUN_NAME, write_results
from ibisagent.files import claim, csv_text, try_folder, write_whole
from ibisagent.imaging.images import read_masks
from ibisagent.imaging.masks import decode_runs, overlap
from ibisagent.inference.cases import Failure
from ibisagent.store import plain_masks

log = logging.getLogger(__name__)

ProblemKind = Literal["missing", "duplicate", "wrong size", "other geometry", "unreadable", "unknown name"]
PROBLEMS_NAME = "problems.csv"
_NIFTI = (".nii", ".nii.gz")


@dataclass(frozen=True, slots=True)
class Problem:
    """One file, or case, that could not be scored. file: "" for a missing one. case_id: "" for an unknown name."""

    kind: ProblemKind
    file: str
    case_id: str
    message: str


@dataclass(frozen=True, slots=True)
class Scores:
    """What was scored, and everything that was not.

    evaluation: of the cases that were scored; the others are its failures. strict: mean IoU and Dice over all cases,
    with 0 for each that was not scored.
    """

    evaluation: Evaluation
    problems: tuple[Problem, ...]
    strict: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Found:
    """A mask that was made: where it is, and how to read it."""

    file: str
    read: Callable[[], tuple[Mask, np.ndarray | None]]
    volume: bool


@dataclass(frozen=True, slots=True)
class _GroundTruth:
    """The ground truth of a case. affine: of a volume."""

    masks: Masks
    patient: str
    spacing_mm: tuple[float, ...] | None
    affine: np.ndarray | None


class _MisfitError(Exception):
    def __init__(self, kind: ProblemKind, message: str) -> None:
        super().__init__(message)
        self.kind: ProblemKind = kind


def score(
    made: Path,
    data: Path,
    folder: Path | None = None,
    *,
    split: str | None = None,
    limit: int | None = None,
    resize_targets: bool = False,
    empty: EmptyRule = EMPTY_RULE,
) -> Scores:
    """Measure the masks in `made`, a folder or a .jsonl file, against the masks of `data`.

    folder: write a run there that `eval compare` and `eval report` read, and problems.csv. split, limit: as for
    `cases_to_judge`. resize_targets: an image's mask of another size is compared with the ground truth, resized to it
    by nearest neighbour; otherwise it is a problem. DataError if `made` holds no mask at all, or the data cannot be
    read. A mask that is all or nothing of an image is scored, and a warning names it.
    """
    if folder is not None:
        try_folder(folder)
    cases = _cases(data, split, limit)
    found, problems = _assign(made, cases, data)
    lines: list[dict[str, Any]] = []
    for index, row in enumerate(cases.rows):
        error = next((problem for problem in problems if problem.case_id == row.id), None)
        if error is None:
            try:
                lines.append({"index": index, **_judge(row, found[row.id], cases, resize_targets)})
                continue
            except _MisfitError as misfit:
                error = Problem(misfit.kind, found[row.id].file, row.id, str(misfit))
            except DataError as unreadable:
                error = Problem("unreadable", found[row.id].file, row.id, str(unreadable))
            problems.append(error)
        lines.append({"index": index, "failure": asdict(Failure(row.id, f"{error.kind}: {error.message}"))})
    facts = {
        "ibisagent": package_version(),
        "policy": f"masks of {made}",
        "segmenter": "none",
        "data": str(data),
        "split": ", ".join(sorted({row.split for row in cases.rows} - {""})),
        "cases": str(len(cases)),
        "resize_targets": str(resize_targets),
    }
    results = tuple(CaseResult.read(line["result"]) for line in lines if "result" in line)
    failures = tuple(Failure(**line["failure"]) for line in lines if "failure" in line)
    evaluation = Evaluation(facts, results, failures)
    strict = {name: sum(one.measures[name] for one in results) / len(cases) for name in ("iou", "dice")}
    if folder is not None:
        claim(folder / RUN_NAME, facts)
        write_whole("".join(json.dumps(line) + "\n" for line in lines).encode(), folder / CASES_NAME)
        told = [[problem.kind, problem.file, problem.case_id, problem.message] for problem in problems]
        write_whole(csv_text([["kind", "file", "case_id", "message"], *told]).encode(), folder / PROBLEMS_NAME)
        write_results(evaluation, folder, empty)
    return Scores(evaluation, tuple(problems), strict)


def _cases(data: Path, split: str | None, limit: int | None) -> CaseSource:
    """The cases with something to segment; a folder of NIfTI masks is a data set, too."""
    volumes = sorted(file for file in data.iterdir() if _is_nifti(file)) if data.is_dir() else []
    if volumes and not (data / "index.csv").exists():
        if split is not None:
            raise ConfigError(f"{data}: is a folder of NIfTI masks, which has no splits; leave --split out")
        names = [_bare(file.name) for file in volumes]
        rows = [
            CaseRow(name, file, file, name, f"Segment the {name}.", dataset=data.name, patient=name, where=str(file))
            for name, file in zip(names, volumes, strict=True)
        ]
        return CaseSource(rows[:limit], str(data))
    return cases_to_judge(data, split, limit)[1].filter(lambda row: bool(row.object))


def _assign(made: Path, cases: CaseSource, data: Path) -> tuple[dict[str, _Found], list[Problem]]:
    """({case id: its mask}, what is missing, double or of no case)."""
    base = data if data.is_dir() else data.parent
    by_path, by_name, by_id = (defaultdict[str, list[_Found]](list) for _ in range(3))
    everything: list[_Found] = []
    problems: list[Problem] = []
    for key, one in _made(made, problems):
        everything.append(one)
        if key.startswith("#"):
            by_id[key[1:]].append(one)
        else:
            by_path[_key(key)].append(one)
            by_name[_key(Path(key).name)].append(one)
    if not everything and not problems:
        raise DataError(f"{made}: holds no mask; give PNG, TIFF or NIfTI masks, or a .jsonl file of run-length codes")
    claims: dict[str, list[_Found]] = {}
    owners: dict[int, list[str]] = defaultdict(list)
    for row in cases.rows:
        image, thing = _bare(row.image.name), row.object
        named: list[_Found] = []
        if row.mask is not None and row.label is None:
            inside = row.mask.is_relative_to(base)
            named = by_path[_key(_bare(row.mask.relative_to(base).as_posix()))] if inside else []
            named = named or by_name[_key(_bare(row.mask.name))]
        named = named or by_name[_key(f"{image}_mask_{thing}")] or by_name[_key(f"{image}_{thing}")]
        claimed = [*by_id[row.id], *by_id[f"{row.image.name}#{thing}"], *by_id[f"{image}#{thing}"], *named]
        claims[row.id] = list({id(one): one for one in claimed}.values())
        for one in claims[row.id]:
            owners[id(one)].append(row.id)
    for case_id, claimed in claims.items():
        shared = [one for one in claimed if len(owners[id(one)]) > 1]
        if not claimed:
            problems.append(Problem("missing", "", case_id, "no mask was made for it"))
        elif len(claimed) > 1:
            names = ", ".join(one.file for one in claimed)
            problems += [Problem("duplicate", one.file, case_id, f"multiple masks: {names}") for one in claimed]
        elif shared:
            names = ", ".join(owners[id(shared[0])])
            problems.append(Problem("duplicate", shared[0].file, case_id, f"this name means multiple cases: {names}"))
    for one in everything:
        if id(one) not in owners:
            problems.append(Problem("unknown name", one.file, "", "no case has this name"))
    return {case_id: claimed[0] for case_id, claimed in claims.items() if len(claimed) == 1}, problems


def _made(made: Path, problems: list[Problem]) -> Iterator[tuple[str, _Found]]:
    """(path without ending, relative to the folder; or "#" and a case id; mask)."""
    if made.is_file() and made.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _coded(made, problems)
        return
    if not made.is_dir():
        raise DataError(f"{made}: is no folder and no .jsonl file; give the folder that holds the masks")
    for file in sorted(made.rglob("*")):
        where = file.relative_to(made).as_posix()
        if file.suffix.lower() in (".jsonl", ".ndjson"):
            yield from _coded(file, problems)
        elif _is_nifti(file):
            yield _bare(where), _Found(str(file), lambda file=file: _read_volume_mask(file), True)  # type: ignore[misc]
        elif file.suffix.lower() in IMAGE_SUFFIXES:
            yield _bare(where), _Found(str(file), lambda file=file: (read_masks(file)["mask"], None), False)  # type: ignore[misc]


def _coded(file: Path, problems: list[Problem]) -> Iterator[tuple[str, _Found]]:
    """The run-length codes of one file."""
    with file.open(encoding="utf-8") as lines:
        for number, text in enumerate(lines, start=1):
            if not text.strip():
                continue
            where = f"{file}, line {number}"
            try:
                line = json.loads(text)
                name = line["case_id"] if "case_id" in line else f"{line['image']}#{line['object']}"
                code = line["segmentation"] if "segmentation" in line else line["rle"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                message = f"is no run-length code of a case ({error!r}); give case_id and segmentation"
                problems.append(Problem("unreadable", where, "", message))
                continue
            yield f"#{name}", _Found(where, lambda code=code, where=where: (_decode(code, where), None), False)  # type: ignore[misc]


def _decode(code: Any, where: str) -> Mask:
    try:
        return decode_runs(code)
    except DataError as error:
        raise DataError(f"{where}: cannot be read ({error})") from error


def _judge(row: CaseRow, found: _Found, cases: CaseSource, resize_targets: bool) -> dict[str, Any]:
    """A plain line of a run: result, masks, ground truth."""
    ground_truth = _ground_truth(row, cases)
    mask, affine = found.read()
    if mask.all() or not mask.any():
        log.warning("%s: its mask is %s; look whether it was meant so", found.file, "all" if mask.any() else "empty")
    if found.volume != (ground_truth.affine is not None):
        wanted = "a NIfTI volume" if ground_truth.affine is not None else "an image"
        raise _MisfitError("other geometry", f"{found.file}: the ground truth is {wanted}; save the mask as one")
    size = next(iter(ground_truth.masks.values())).shape
    targets = dict(ground_truth.masks)
    if mask.shape != size:
        if not resize_targets or found.volume:
            sides = [" x ".join(map(str, shape)) for shape in (mask.shape, size)]
            raise _MisfitError(
                "wrong size", f"{found.file}: is {sides[0]}, the ground truth {sides[1]}; save it at that size"
            )
        targets = {name: resize_target(target, mask.shape) for name, target in targets.items()}
    if affine is not None and ground_truth.affine is not None:
        _check_place(found.file, affine, ground_truth.affine, size)
    pairs = [(mask, target) for target in targets.values()]
    result = CaseResult(
        row.id,
        row.object,
        row.modality,
        row.dataset,
        ground_truth.patient,
        None,
        mask_measures(pairs, ground_truth.spacing_mm),
        overlap(*pairs[0]),
        size_of(list(targets.values())) if ground_truth.affine is None else "",
    )
    flat = ground_truth.affine is None
    return {
        "result": asdict(result),
        "episode": None,
        "image": str(row.image) if flat and mask.shape == size else "",
        "masks": plain_masks({row.object: mask}) if flat else [],
        "targets": plain_masks(targets) if flat else [],
    }


def _ground_truth(row: CaseRow, cases: CaseSource) -> _GroundTruth:
    if row.mask is not None and row.mask.suffix.lower() == ".dcm":
        return _dicom_ground_truth(row, row.mask)
    if row.mask is None or not _is_nifti(row.mask):
        case = cases.decode(row)
        return _GroundTruth(case.targets or {}, case.patient or case.image.sha256, case.image.spacing_mm, None)
    from ibisagent.volumes import read_volume

    volume = read_volume(row.mask)
    values = volume.values(np.asarray(volume.voxels))
    if row.label is not None and not str(row.label).isdecimal():
        raise DataError(f"{row.where}: label '{row.label}' is no value of a volume; give a whole number")
    mask = values != 0 if row.label is None else values == int(row.label)
    spacing = volume.spacing_mm if volume.spacing_known else None
    return _GroundTruth({row.object: mask}, row.patient or str(row.image), spacing, volume.affine)


def _dicom_ground_truth(row: CaseRow, file: Path) -> _GroundTruth:
    """The ground truth in a DICOM segmentation or structure set, on the grid of the row's image.

    label: the segment or ROI; default the row's object, or the only one there is.
    """
    from ibisagent.volumes import read_volume
    from ibisagent.volumes.label_maps import choose_label
    from ibisagent.volumes.writing import masks_on

    volume = read_volume(row.image)
    masks = masks_on(volume, file)
    alone = len(masks) == 1 and row.label is None
    mask = next(iter(masks.values())) if alone else choose_label(masks, str(row.label or row.object), file)
    spacing = volume.spacing_mm if volume.spacing_known else None
    return _GroundTruth({row.object: mask}, row.patient or str(row.image), spacing, volume.affine)


def _read_volume_mask(file: Path) -> tuple[Mask, np.ndarray]:
    from ibisagent.volumes.writing import read_volume_masks

    masks, affine = read_volume_masks(file)
    if len(masks) != 1:
        raise DataError(f"{file}: is not a mask of one object, it holds {len(masks)}; save the one that is meant")
    return next(iter(masks.values())), affine


def _check_place(file: str, ours: np.ndarray, theirs: np.ndarray, shape: Sequence[int]) -> None:
    from ibisagent.volumes.grid import places_off_mm, tolerance_mm

    off = places_off_mm(ours, theirs, shape)
    if off > tolerance_mm(theirs):
        raise _MisfitError(
            "other geometry",
            f"{file}: lies up to {off:.2f} mm beside the ground truth; resample it onto the grid of the ground truth",
        )


def _is_nifti(file: Path) -> bool:
    return file.name.lower().endswith(_NIFTI)


def _bare(name: str) -> str:
    """A path without its ending."""
    return re.sub(r"(\.nii)?\.gz$|\.[A-Za-z]{2,5}$", "", name)


def _key(name: str) -> str:
    """A name as compared."""
    return re.sub(r"[^\w./-]+|_+", "_", name).casefold()
