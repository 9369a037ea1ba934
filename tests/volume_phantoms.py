"""Volumes drawn in code, never cubic, and the same as DICOM files."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedMRImageStorage, ExplicitVRLittleEndian, generate_uid

from ibisagent.volumes.grid import LPS

SHAPE = (23, 17, 11)


def turned(angles: Sequence[float]) -> np.ndarray:
    """A rotation about x, y and z in turn, angles in degrees."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(angles)):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[[first, second], [first, second]] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def affine_of(directions: np.ndarray, spacing: Sequence[float], corner: Sequence[float]) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions * spacing, corner
    return affine


STRAIGHT = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1.0, 1.0]),
    "LAS": np.diag([-1.0, 1.0, 1.0]),
    "PIR": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "SAL": np.array([[0.0, 0, -1], [0, 1, 0], [1, 0, 0]]),
    "oblique": turned((12, -7, 20)) @ np.diag([-1.0, -1.0, 1.0]),
}
SPACINGS = {"even": (0.9, 0.9, 0.9), "uneven": (0.7, 1.3, 4.1)}
GRIDS = {
    f"{turn}-{space}": affine_of(STRAIGHT[turn], SPACINGS[space], (-31.25, 17.5, 140.75))
    for turn in STRAIGHT
    for space in SPACINGS
}
"""Twelve orientations and spacings: index to world millimetres, RAS+."""


def blob(
    shape: Sequence[int] = SHAPE, centre: Sequence[float] | None = None, radii: Sequence[float] | None = None
) -> np.ndarray:
    """An ellipsoid (I, J, K) bool that is like none of its mirror images."""
    middle = centre or [side * share for side, share in zip(shape, (0.4, 0.55, 0.45), strict=True)]
    size = radii or [side * share for side, share in zip(shape, (0.3, 0.25, 0.28), strict=True)]
    index = np.ogrid[tuple(slice(side) for side in shape)]
    inside: np.ndarray = sum(((i - m) / r) ** 2 for i, m, r in zip(index, middle, size, strict=True)) <= 1
    inside[int(middle[0]) :, int(middle[1]), int(middle[2])] = True  # a spine towards i
    return inside


def hounsfield(inside: np.ndarray, seed: int = 0) -> np.ndarray:
    """int16: air, soft tissue in the middle, the object a little brighter, with noise."""
    noise = np.random.default_rng(seed).normal(0, 8, inside.shape)
    body = np.full(inside.shape, -40.0)
    body[0], body[-1] = -1000, 900
    return np.rint(np.where(inside, 110, body) + noise).astype(np.int16)


def slice_files(
    folder: Path, values: np.ndarray, affine: np.ndarray, *, shuffle: bool = True, **attributes: object
) -> list[Path]:
    """Write (I, J, K) int16 as one CT file per k; `affine` must have k along the cross product of i and j in LPS.

    If it has not, the slices are written in the order that has; voxels stay where they are in the world.
    """
    lps = LPS @ affine
    across, down, step = (lps[:3, axis] for axis in range(3))
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(1).permutation(values.shape[2]) if shuffle else np.arange(values.shape[2])
    files = []
    for number, k in enumerate(order):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = folder / f"IM{number:04d}"
        dataset = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
        dataset.SOPClassUID, dataset.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.FrameOfReferenceUID = study, series, frame
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = (
            "Doe^Jane",
            "MRN77",
            "19700102",
            "F",
        )
        dataset.StudyDate, dataset.StudyTime, dataset.AccessionNumber, dataset.StudyID = (
            "20240304",
            "101112",
            "A1",
            "S1",
        )
        dataset.SeriesDate = dataset.ContentDate = dataset.AcquisitionDate = "20240304"
        dataset.SeriesTime = dataset.ContentTime = dataset.AcquisitionTime = "101112"
        dataset.ReferringPhysicianName, dataset.Manufacturer, dataset.ManufacturerModelName = "", "Phantom", "M"
        dataset.PatientPosition, dataset.PositionReferenceIndicator, dataset.KVP = "HFS", "", "120"
        dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        dataset.AcquisitionNumber = 1
        dataset.Modality, dataset.SeriesNumber, dataset.InstanceNumber = "CT", 3, number + 1
        dataset.Rows, dataset.Columns = values.shape[1], values.shape[0]
        dataset.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        dataset.SliceThickness = f"{spacing[2]:.6f}"
        dataset.ImageOrientationPatient = [f"{x:.10f}" for x in (*(across / spacing[0]), *(down / spacing[1]))]
        dataset.ImagePositionPatient = [f"{x:.8f}" for x in lps[:3, 3] + k * step]
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PixelRepresentation = 1, "MONOCHROME2", 1
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 16, 15
        dataset.RescaleSlope, dataset.RescaleIntercept, dataset.RescaleType = "2", "-1024", "HU"
        stored = (values[:, :, k].astype(np.int32) + 1024) // 2
        dataset.PixelData = stored.astype("<i2").T.tobytes()
        for name, value in attributes.items():
            setattr(dataset, name, value)
        dataset.save_as(file, enforce_file_format=True)
        files.append(file)
    return files


def world_points(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(N, 3) places of the voxels of a mask, in a fixed order."""
    points = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    return points[np.lexsort(np.round(points, 2).T)]


def changed(file: Path, **attributes: object) -> None:
    """Set attributes of a DICOM file."""
    dataset = pydicom.dcmread(file)
    for name, value in attributes.items():
        setattr(dataset, name, value)
    dataset.save_as(file)


def csa_header(slices: int, normal: Sequence[float]) -> bytes:
    """The private header of a Siemens scanner (CSA2, as nibabel documents it) that says how a mosaic is cut."""
    tags = {"NumberOfImagesInMosaic": ("US", [str(slices)]), "SliceNormalVector": ("FD", [f"{x:.8f}" for x in normal])}
    content = b"SV10\4\3\2\1" + struct.pack("<2I", len(tags), 77)
    for name, (representation, values) in tags.items():
        content += struct.pack("<64si4s3i", name.encode(), len(values), representation.encode(), 6, len(values), 77)
        for value in values:
            text = value.encode() + b"\0"
            content += struct.pack("<4i", len(text), len(text), 77, len(text)) + text + b"\0" * (-len(text) % 4)
    return content


def mosaic(folder: Path, values: np.ndarray, affine: np.ndarray, *, told: bool = True) -> Path:
    """(I, J, K) int16 as Siemens scanners save it: all slices tiled in one image; told: with the private header."""
    across = int(np.ceil(np.sqrt(values.shape[2])))
    columns, rows, count = values.shape
    tiled = np.zeros((across * columns, across * rows, 1), np.int16)
    for k in range(count):
        row, column = k // across * rows, k % across * columns
        tiled[column : column + columns, row : row + rows, 0] = values[:, :, k]
    shift = np.eye(4)  # the header gives the corner of a slice as large as the mosaic, around the same middle
    shift[:2, 3] = -(across - 1) * columns / 2, -(across - 1) * rows / 2
    kind = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"]
    spacing = float(np.linalg.norm(affine[:3, 2]))
    [file] = slice_files(folder, tiled, affine @ shift, ImageType=kind, Modality="MR", SpacingBetweenSlices=spacing)
    if told:
        dataset = pydicom.dcmread(file)
        block = dataset.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        block.add_new(0x10, "OB", csa_header(count, (LPS @ affine)[:3, 2] / spacing))
        dataset.save_as(file)
    return file


def enhanced(
    path: Path, stacks: Sequence[np.ndarray], windows: Sequence[tuple[float, float]], *, per_frame: bool = False
) -> Path:
    """An enhanced MR file of multiple (I, J, K) int16 volumes on one grid, 1 x 1 x 3 mm, each with its (centre, width).

    per_frame: pixel measures stand with each frame rather than with all of them.
    """

    def one(**attributes: object) -> list[pydicom.Dataset]:
        item = pydicom.Dataset()
        for name, value in attributes.items():
            setattr(item, name, value)
        return [item]

    [file] = slice_files(path.parent, np.zeros((*stacks[0].shape[:2], 1), np.int16), np.diag([-1.0, -1, 3, 1]))
    dataset = pydicom.dcmread(file)
    file.unlink()
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = EnhancedMRImageStorage
    dataset.Modality = "MR"
    for name in ("ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"):
        delattr(dataset, name)
    measures = one(PixelSpacing=[1, 1], SliceThickness=3, SpacingBetweenSlices=3)
    [shared] = one(PlaneOrientationSequence=one(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]))
    if not per_frame:
        shared.PixelMeasuresSequence = measures
    frames, pixels = [], b""
    for number, (stack, (centre, width)) in enumerate(zip(stacks, windows, strict=True)):
        for k in range(stack.shape[2]):
            [frame] = one(
                PlanePositionSequence=one(ImagePositionPatient=[0, 0, 3 * k]),
                FrameContentSequence=one(TemporalPositionIndex=number + 1),
                FrameVOILUTSequence=one(WindowCenter=centre, WindowWidth=width),
            )
            if per_frame:
                frame.PixelMeasuresSequence = measures
            frames.append(frame)
            pixels += stack[:, :, k].T.astype("<i2").tobytes()
    dataset.SharedFunctionalGroupsSequence, dataset.PerFrameFunctionalGroupsSequence = [shared], frames
    dataset.NumberOfFrames, dataset.PixelData = len(frames), pixels
    dataset.save_as(path)
    return path
