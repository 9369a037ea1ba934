"""Structure sets: the same volume at the same place, for an independent reader, with holes and parts; and back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from matplotlib.path import Path as Outline
from volume_phantoms import GRIDS, blob, changed, hounsfield, slice_files

from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation.scoring import score
from ibisagent.volumes import Volume, read_volume
from ibisagent.volumes.contours import filled, polygons
from ibisagent.volumes.grid import LPS
from ibisagent.volumes.rtstruct import read_rtstruct, write_rtstruct
from ibisagent.volumes.writing import masks_on, write_nifti

SHAPE = (41, 33, 9)
PROVENANCE = {"policy": "oracle", "segmenter": "region", "ibisagent": "0.1.0"}


def series(folder: Path, grid: str = "LPS-uneven") -> Volume:
    slice_files(folder / "series", hounsfield(blob(SHAPE)), GRIDS[grid])
    return read_volume(folder / "series")


def ring(volume: Volume) -> np.ndarray:
    """An ellipsoid with two holes of different size, an island in one, and a part of its own, on six slices."""
    i, j, k = np.ogrid[tuple(slice(side) for side in volume.shape)]
    mask = ((i - 16) / 13) ** 2 + ((j - 15) / 12) ** 2 + ((k - 4) / 4) ** 2 <= 1
    mask &= ~((i - 12) ** 2 + (j - 14) ** 2 <= 12)
    mask &= ~((i - 20) ** 2 + (j - 17) ** 2 <= 4)
    mask |= (i == 12) & (j == 14) & (abs(k - 4) <= 1)
    mask |= (abs(i - 36) <= 2) & (abs(j - 27) <= 3) & (abs(k - 4) <= 2)
    return np.asarray(mask)


def contours(path: Path, number: int = 0) -> list[np.ndarray]:
    """The points of an ROI's contours in DICOM's world."""
    items = pydicom.dcmread(path).ROIContourSequence[number].ContourSequence
    return [np.array(item.ContourData, dtype=float).reshape(-1, 3) for item in items]


def shoelace(points: np.ndarray) -> tuple[float, np.ndarray]:
    """Area in mm2 and centre of gravity of a planar polygon in space, whatever its sense."""
    around = points - points[0]
    cross = np.cross(around[1:-1], around[2:])
    normal = cross.sum(axis=0) / np.linalg.norm(cross.sum(axis=0))
    areas = cross @ normal / 2
    thirds = (around[1:-1] + around[2:]) / 3
    return float(areas.sum()), points[0] + (areas[:, None] * thirds).sum(axis=0) / areas.sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_volume_and_place_are_those_of_the_mask(tmp_path: Path, grid: str) -> None:
    """By the shoelace formula, which shares nothing with the writer: volume within 1%, centre within half a voxel."""
    volume = series(tmp_path, grid)
    mask = ring(volume)
    write_rtstruct({"liver": mask}, volume, tmp_path / "rt.dcm", PROVENANCE)
    parts = [shoelace(points) for points in contours(tmp_path / "rt.dcm")]
    total = sum(area for area, _ in parts) * volume.spacing_mm[2] / 1000
    assert total == pytest.approx(mask.sum() * volume.voxel_ml, rel=0.01)
    centre = sum(area * middle for area, middle in parts) / sum(area for area, _ in parts)
    wanted = (LPS @ volume.affine)[:3] @ [*np.argwhere(mask).mean(axis=0), 1]
    assert np.abs(np.asarray(centre) - wanted).max() < min(volume.spacing_mm) / 2
    np.testing.assert_array_equal(read_rtstruct(tmp_path / "rt.dcm", volume)["liver"], mask)


def test_an_independent_reader_gets_the_same_mask(tmp_path: Path) -> None:
    """matplotlib asks of each pixel's centre whether it is inside, contour by contour, all of them joined."""
    volume = series(tmp_path)
    mask = ring(volume)
    write_rtstruct({"liver": mask}, volume, tmp_path / "rt.dcm", PROVENANCE)
    back = np.zeros(volume.shape, bool)
    to_voxels = np.linalg.inv(LPS @ volume.affine)
    rows, columns = np.mgrid[: volume.shape[1], : volume.shape[0]]
    centres = np.column_stack([columns.ravel(), rows.ravel()])
    for points in contours(tmp_path / "rt.dcm"):
        voxels = points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
        k = round(float(voxels[:, 2].mean()))
        np.testing.assert_allclose(voxels[:, 2], k, atol=0.01)
        inside = Outline(np.vstack([voxels[:, :2], voxels[:1, :2]])).contains_points(centres).reshape(rows.shape)
        back[:, :, k] |= inside.T
    np.testing.assert_array_equal(back, mask)


@pytest.mark.filterwarnings("ignore:Invalid value")  # that the phantom is given
def test_it_says_what_it_is(tmp_path: Path) -> None:
    volume = series(tmp_path)
    mask = ring(volume)
    masks = {"left kidney": mask, "kidney tumor": mask & (np.arange(SHAPE[0]) < 9)[:, None, None], "none": mask & False}
    for file in (tmp_path / "series").iterdir():
        changed(file, StudyTime="11:27:24", PatientSex="U", SpecificCharacterSet="ISO_IR 100", PatientName="Müller^Eva")
    write_rtstruct(masks, volume, tmp_path / "rt.dcm", PROVENANCE)
    made = pydicom.dcmread(tmp_path / "rt.dcm")
    source = [pydicom.dcmread(file) for file in (tmp_path / "series").iterdir()]
    assert [item.ROIName for item in made.StructureSetROISequence] == ["left kidney", "kidney tumor"]
    assert made.StructureSetROISequence[0].ROIGenerationDescription == "oracle with region"
    assert [item.RTROIInterpretedType for item in made.RTROIObservationsSequence] == ["ORGAN", ""]
    code = made.RTROIObservationsSequence[0].RTROIIdentificationCodeSequence[0]
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("64033007", "SCT")
    assert len({tuple(item.ROIDisplayColor) for item in made.ROIContourSequence}) == 2
    assert (made.PatientName, made.PatientID, made.StudyTime, made.PatientSex) == ("Müller^Eva", "MRN77", "112724", "")
    assert made.StudyInstanceUID == source[0].StudyInstanceUID
    assert made.FrameOfReferenceUID == source[0].FrameOfReferenceUID
    images = {item.SOPInstanceUID: item for item in source}
    for item in made.ROIContourSequence[0].ContourSequence:
        assert item.ContourGeometricType == "CLOSED_PLANAR"
        assert item.NumberOfContourPoints == len(item.ContourData) // 3
        image = images[item.ContourImageSequence[0].ReferencedSOPInstanceUID]
        normal = np.cross(image.ImageOrientationPatient[:3], image.ImageOrientationPatient[3:])
        points = np.array(item.ContourData, dtype=float).reshape(-1, 3)
        np.testing.assert_allclose((points - np.array(image.ImagePositionPatient, float)) @ normal, 0, atol=1e-3)


def test_a_structure_set_is_a_start_mask(tmp_path: Path) -> None:
    """With names; a hole drawn as a contour of its own, as other programs do, is a hole too."""
    volume = series(tmp_path)
    mask = ring(volume)
    write_rtstruct({"liver": mask, "spot": blob(SHAPE)}, volume, tmp_path / "rt.dcm", PROVENANCE)
    assert list(masks_on(volume, tmp_path / "rt.dcm")) == ["liver", "spot"]
    made = pydicom.dcmread(tmp_path / "rt.dcm")
    outer = made.ROIContourSequence[1].ContourSequence
    corners = np.array([[9, 14], [12, 14], [12, 18], [9, 18]]) - 0.5
    k = 4
    flat = np.column_stack([corners, np.full(4, k), np.ones(4)])
    hole = pydicom.Dataset()
    hole.ContourGeometricType, hole.NumberOfContourPoints = "CLOSEDPLANAR_XOR", 4
    hole.ContourData = [f"{value:.5f}" for value in (flat @ (LPS @ volume.affine).T)[:, :3].ravel()]
    outer.append(hole)
    for item in outer:
        item.ContourGeometricType = "CLOSEDPLANAR_XOR"
    made.save_as(tmp_path / "xor.dcm")
    back = masks_on(volume, tmp_path / "xor.dcm")["spot"]
    drawn = np.zeros(SHAPE, bool)
    drawn[9:12, 14:18, k] = True
    np.testing.assert_array_equal(back, blob(SHAPE) ^ drawn)


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path: Path) -> None:
    volume = series(tmp_path)
    with pytest.raises(DataError, match="no mask has a voxel"):
        write_rtstruct({"liver": np.zeros(SHAPE, bool)}, volume, tmp_path / "x.dcm", PROVENANCE)
    plain = Volume(np.zeros(SHAPE, np.int16), GRIDS["RAS-even"], "scan")
    with pytest.raises(ConfigError, match="needs a DICOM source"):
        write_rtstruct({"liver": ring(volume)}, plain, tmp_path / "x.dcm", PROVENANCE)
    assert not (tmp_path / "x.dcm").exists()
    write_rtstruct({"liver": ring(volume)}, volume, tmp_path / "rt.dcm", PROVENANCE)
    with pytest.raises(DataError, match="beside the slices"):
        read_rtstruct(tmp_path / "rt.dcm", series(tmp_path / "other", "oblique-uneven"))
    made = pydicom.dcmread(tmp_path / "rt.dcm")
    made.ROIContourSequence[0].ContourSequence = [made.ROIContourSequence[0].ContourSequence[0]]
    made.ROIContourSequence[0].ContourSequence[0].ContourGeometricType = "POINT"
    made.save_as(tmp_path / "points.dcm")
    with pytest.raises(DataError, match="no closed contour"):
        read_rtstruct(tmp_path / "points.dcm", volume)
    whole = (tmp_path / "rt.dcm").read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=re.escape("cut.dcm")):
        read_rtstruct(tmp_path / "cut.dcm", volume)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_and_masks_are_the_same_thing(seed: int) -> None:
    """Random pixels: corners that touch, holes in islands in holes, single rows."""
    random = np.random.default_rng(seed)
    height, width = random.integers(1, 15, 2)
    mask = random.random((height, width)) < random.uniform(0.2, 0.9)
    outlines = polygons(mask)
    np.testing.assert_array_equal(filled(outlines, mask.shape), mask)
    area = sum(_area(points) for points in outlines)
    assert area == pytest.approx(mask.sum())


def _area(points: np.ndarray) -> float:
    after = np.roll(points, -1, axis=0)
    return float((points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum() / 2)


def test_a_structure_set_is_ground_truth(tmp_path: Path) -> None:
    """Of `eval score`: an ROI by name, on the grid of the series that the row names."""
    volume = series(tmp_path)
    mask = ring(volume)
    half = mask & (np.arange(SHAPE[0]) < 16)[:, None, None]
    write_rtstruct({"liver": mask, "spot": half}, volume, tmp_path / "rt.dcm", PROVENANCE)
    (tmp_path / "rows.csv").write_text("image,mask,object\nseries,rt.dcm,liver\nseries,rt.dcm,spot\n")
    (tmp_path / "made").mkdir()
    for name in ("liver", "spot"):
        write_nifti(half, volume, tmp_path / "made" / f"series_{name}.nii.gz")
    found = score(tmp_path / "made", tmp_path / "rows.csv")
    assert not found.problems
    reached = {one.case_id: one.measures["iou"] for one in found.evaluation.results}
    assert reached == {"series#spot": 1, "series#liver": pytest.approx(half.sum() / mask.sum())}
