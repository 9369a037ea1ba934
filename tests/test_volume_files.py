"""Masks to files and back: the same voxels at the same places, for every format, orientation and spacing."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from volume_phantoms import GRIDS, SHAPE, blob, changed, hounsfield, slice_files, world_points

from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.images import read_masks
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes.dicom_output import write_report, write_segmentation
from ibisagent.volumes.grid import LPS
from ibisagent.volumes.measures import longest_diameter, measure, write_measures
from ibisagent.volumes.writing import masks_on, read_volume_masks, write_nifti, write_png_stack, write_rle

INSIDE = blob()
VALUES = hounsfield(INSIDE)
PROVENANCE = {"policy": "oracle", "segmenter": "region", "ibisagent": "0.1.0"}


def source(folder: Path, grid: str, kind: str) -> Volume:
    if kind == "dicom":
        slice_files(folder / "series", VALUES, GRIDS[grid])
        return read_volume(folder / "series")
    image = nib.Nifti1Image(VALUES, GRIDS[grid])
    image.set_qform(GRIDS[grid], 1)
    image.header["descrip"] = b"Doe Jane 1970"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"MRN77"))
    nib.save(image, folder / "scan.nii.gz")
    return read_volume(folder / "scan.nii.gz")


def bright(volume: Volume) -> np.ndarray:
    """The object, found again in the voxels as read."""
    values = volume.values(np.asarray(volume.voxels))
    return np.asarray((values > 60) & (values < 300))


def same_places(mask: np.ndarray, affine: np.ndarray, grid: str) -> None:
    ground_truth = (VALUES > 60) & (VALUES < 300)
    np.testing.assert_allclose(world_points(mask, affine), world_points(ground_truth, GRIDS[grid]), atol=0.01)


@pytest.mark.parametrize("grid", GRIDS)
def test_masks_of_nifti_come_back(tmp_path: Path, grid: str) -> None:
    volume = source(tmp_path, grid, "nifti")
    mask = bright(volume)
    write_nifti(mask, volume, tmp_path / "mask.nii.gz")
    write_png_stack(mask, volume, tmp_path / "stack")
    write_rle({"liver": mask}, volume, tmp_path / "rle.json")
    for name in ("mask.nii.gz", "stack", "rle.json"):
        masks, affine = read_volume_masks(tmp_path / name)
        [back] = masks.values()
        np.testing.assert_array_equal(back, mask)
        same_places(back, affine, grid)
        [on] = masks_on(volume, tmp_path / name).values()
        np.testing.assert_array_equal(on, mask)
    written, read = nib.load(tmp_path / "mask.nii.gz"), nib.load(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(written.affine, read.affine)
    for field in ("qform_code", "sform_code", "pixdim", "xyzt_units", "quatern_b", "srow_x"):
        np.testing.assert_array_equal(written.header[field], read.header[field])
    assert not written.header.extensions
    assert not bytes(written.header["descrip"]).strip(b"\0")


@pytest.mark.parametrize("grid", GRIDS)
def test_masks_of_dicom_come_back(tmp_path: Path, grid: str) -> None:
    """As NIfTI and as SEG, whose frames highdicom reads at the same places too."""
    volume = source(tmp_path, grid, "dicom")
    mask = bright(volume)
    write_nifti(mask, volume, tmp_path / "mask.nii")
    masks, affine = read_volume_masks(tmp_path / "mask.nii")
    same_places(masks["mask"], affine, grid)
    write_segmentation(
        {"liver": mask, "spot": mask & (np.arange(SHAPE[0]) < 9)[:, None, None]},
        volume,
        tmp_path / "seg.dcm",
        PROVENANCE,
    )
    back = masks_on(volume, tmp_path / "seg.dcm")
    np.testing.assert_array_equal(back["liver"], mask)
    assert 0 < back["spot"].sum() < mask.sum()
    same_places(back["liver"], volume.affine, grid)
    read = hd.seg.segread(tmp_path / "seg.dcm").get_volume(segment_numbers=[1], combine_segments=True, relabel=False)
    same_places(read.array > 0, LPS @ read.affine, grid)


def test_segmentations_say_what_they_are(tmp_path: Path) -> None:
    volume = source(tmp_path, "LPS-uneven", "dicom")
    mask = bright(volume)
    write_segmentation(
        {"liver": mask, "left lung tumor": mask, "gizmo": mask}, volume, tmp_path / "seg.dcm", PROVENANCE
    )
    seg = hd.seg.segread(tmp_path / "seg.dcm")
    kinds = [item.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for item in seg.SegmentSequence]
    assert kinds == ["Liver", "Neoplasm", "Tissue"]
    assert [item.SegmentLabel for item in seg.SegmentSequence] == ["liver", "left lung tumor", "gizmo"]
    assert seg.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "oracle with region"
    uids = {pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / "series").iterdir()}
    derived = {
        item.SourceImageSequence[0].ReferencedSOPInstanceUID
        for group in seg.PerFrameFunctionalGroupsSequence
        for item in group.DerivationImageSequence
    }
    assert derived <= uids
    assert len(derived) == mask.any(axis=(0, 1)).sum()
    assert seg.PatientID == "MRN77"
    with pytest.raises(DataError, match="no mask has a voxel"):
        write_segmentation({"liver": mask & False}, volume, tmp_path / "none.dcm", PROVENANCE)
    with pytest.raises(ConfigError, match="needs a DICOM source"):
        write_segmentation({"liver": mask}, source(tmp_path, "LPS-even", "nifti"), tmp_path / "x.dcm", PROVENANCE)


@pytest.mark.filterwarnings("ignore")  # of highdicom, about what the phantom's headers lack
@pytest.mark.parametrize("grid", ["LPS-uneven", "oblique-even"])
def test_a_multi_frame_file_is_its_series(tmp_path: Path, grid: str) -> None:
    """Enhanced CT made by highdicom of the series: the same voxels and places, and a SEG that refers to its frames."""
    from highdicom.legacy import LegacyConvertedEnhancedCTImage

    series = source(tmp_path, grid, "dicom")
    legacy = [pydicom.dcmread(file) for file in (tmp_path / "series").iterdir()]
    for dataset in legacy:
        dataset.BodyPartExamined, dataset.FrameType = "CHEST", ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    LegacyConvertedEnhancedCTImage(legacy, hd.UID(), 7, hd.UID(), 1).save_as(tmp_path / "many.dcm")
    volume = read_volume(tmp_path / "many.dcm")
    np.testing.assert_array_equal(bright(volume), bright(series))
    np.testing.assert_allclose(volume.affine, series.affine, atol=1e-4)
    np.testing.assert_allclose(volume.values(volume.voxels), series.values(series.voxels))
    mask = bright(volume)
    write_segmentation({"liver": mask}, volume, tmp_path / "seg.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], mask)
    np.testing.assert_array_equal(masks_on(series, tmp_path / "seg.dcm")["liver"], mask)


def test_a_dose_grid_is_a_source_too(tmp_path: Path) -> None:
    """A multi-frame file without functional groups: SEG gets its places from the grid, and refers to its frames."""
    volume = read_volume(Path(pydicom.__file__).parent / "data" / "test_files" / "rtdose.dcm")
    mask = blob(volume.shape)
    write_nifti(mask, volume, tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "mask.nii.gz")["mask"], mask)
    write_segmentation({"liver": mask}, volume, tmp_path / "seg.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], mask)
    frames = [
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedFrameNumber - 1
        for group in pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence
    ]
    assert frames == list(np.flatnonzero(mask.any(axis=(0, 1))))


def test_reports_hold_the_measurements(tmp_path: Path) -> None:
    volume = source(tmp_path, "LPS-uneven", "dicom")
    mask = bright(volume)
    measured = {"liver": measure(SliceView(volume), mask)}
    seg = write_segmentation({"liver": mask}, volume, tmp_path / "seg.dcm", PROVENANCE)
    write_report(measured, seg, volume, tmp_path / "sr.dcm", PROVENANCE)
    report = hd.sr.srread(tmp_path / "sr.dcm")
    [group] = report.content.get_volumetric_roi_measurement_groups()
    values = {item.name.meaning: item.value for item in group.get_measurements()}
    assert values["Volume"] == pytest.approx(mask.sum() * 0.7 * 1.3 * 4.1 / 1000, abs=1e-3)
    assert values["Area"] == pytest.approx(measured["liver"].area_mm2, abs=1e-3)
    assert values["Long axis"] == pytest.approx(measured["liver"].longest_diameter_mm, abs=1e-3)
    assert group.reference_type.meaning == "Referenced Segment"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="dciodvfy is not installed (Debian package dicom3tools)")
@pytest.mark.parametrize("grid", ["LPS-uneven", "oblique-even"])
def test_dciodvfy_finds_no_error(tmp_path: Path, grid: str) -> None:
    volume = source(tmp_path, grid, "dicom")
    mask = bright(volume)
    seg = write_segmentation({"liver": mask, "tumor": mask}, volume, tmp_path / "seg.dcm", PROVENANCE)
    measured = {name: measure(SliceView(volume), mask) for name in ("liver", "tumor")}
    write_report(measured, seg, volume, tmp_path / "sr.dcm", PROVENANCE)
    for name in ("seg.dcm", "sr.dcm"):
        said = subprocess.run(["dciodvfy", str(tmp_path / name)], capture_output=True, text=True, check=False)
        errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
        assert not errors, name


def test_masks_of_other_grids_are_refused(tmp_path: Path) -> None:
    volume = source(tmp_path, "RAS-uneven", "nifti")
    small = Volume(VALUES[:-1], GRIDS["RAS-uneven"], "small")
    moved = Volume(VALUES, GRIDS["RAS-uneven"] + np.eye(4, k=3) * 3, "moved")
    with pytest.raises(DataError, match="have 22 x 17 x 11 and 23 x 17 x 11 voxels"):
        write_nifti(INSIDE[:-1], volume, tmp_path / "no.nii.gz")
    for other in (small, moved):
        write_nifti(np.ones(other.shape, bool), other, tmp_path / f"{other.name}.nii.gz")
        with pytest.raises(DataError, match="resample the mask onto its grid"):
            masks_on(volume, tmp_path / f"{other.name}.nii.gz")
    with pytest.raises(DataError, match="is neither a mask nor a label map"):
        masks_on(volume, tmp_path / "scan.nii.gz")
    folder = tmp_path / "d"
    folder.mkdir()
    dicom = source(folder, "LPS-even", "dicom")
    write_segmentation({"liver": bright(dicom)}, dicom, tmp_path / "seg.dcm", PROVENANCE)
    for file in (folder / "series").iterdir():
        place = pydicom.dcmread(file).ImagePositionPatient
        changed(file, ImagePositionPatient=[place[0] + 5, place[1], place[2]])
    with pytest.raises(DataError, match="lies beside the grid"):
        masks_on(read_volume(folder / "series"), tmp_path / "seg.dcm")


def test_damaged_mask_files_are_refused(tmp_path: Path) -> None:
    volume = source(tmp_path, "RAS-uneven", "nifti")
    write_rle({"liver": INSIDE}, volume, tmp_path / "rle.json")
    write_png_stack(INSIDE, volume, tmp_path / "stack")
    content = json.loads((tmp_path / "rle.json").read_text())
    del content["masks"]["liver"][0]["rle"]["counts"]
    (tmp_path / "rle.json").write_text(json.dumps(content))
    (tmp_path / "stack" / "slice-0003.png").unlink()
    (tmp_path / "other.json").write_text("[1]")
    for name in ("rle.json", "stack", "other.json"):
        with pytest.raises(DataError) as caught:
            read_volume_masks(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))


def test_a_stack_is_replaced_but_no_other_folder(tmp_path: Path) -> None:
    volume = source(tmp_path, "RAS-uneven", "nifti")
    write_png_stack(INSIDE, volume, tmp_path / "stack")
    write_png_stack(~INSIDE, volume, tmp_path / "stack")
    assert read_masks(tmp_path / "stack" / "slice-0000.png")["mask"].all()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(DataError):
        write_png_stack(INSIDE, volume, tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    assert {path.name for path in tmp_path.iterdir()} == {"scan.nii.gz", "stack", "mine"}


# ------------------------------------------------------------------------------------------------------- measurements


def test_measures_of_a_box(tmp_path: Path) -> None:
    mask = np.zeros(SHAPE, bool)
    mask[3:13, 4:9, 2:6] = True  # 10 x 5 x 4 voxels of 0.7 x 1.3 x 4.1 mm
    volume = Volume(VALUES, GRIDS["oblique-uneven"], "scan")
    found = measure(SliceView(volume, "axial"), mask)
    assert found.voxels == 200
    assert found.volume_ml == pytest.approx(200 * 0.7 * 1.3 * 4.1 / 1000)
    assert found.area_mm2 == pytest.approx(7 * 6.5)
    assert found.slices == (2, 5)
    # from the middle of an outer edge to that of the opposite corner pixel
    assert found.longest_diameter_mm == pytest.approx(max(np.hypot(9 * 0.7, 6.5), np.hypot(7, 4 * 1.3)), rel=1e-5)
    write_measures({"liver": found}, "scan", tmp_path / "m.csv")
    write_measures({"liver": found}, "scan", tmp_path / "m.json")
    [row] = csv.DictReader((tmp_path / "m.csv").read_text().splitlines())
    plain = json.loads((tmp_path / "m.json").read_text())["measures"]["liver"]
    assert float(row["volume_ml"]) == plain["volume_ml"] == found.volume_ml
    assert (row["first_slice"], row["last_slice"]) == ("2", "5")


def test_the_diameter_of_a_disc() -> None:
    rows, columns = np.ogrid[:120, :90]
    disc = ((rows - 60) * 0.5) ** 2 + ((columns - 45) * 0.8) ** 2 <= 20**2
    assert longest_diameter(disc, (0.5, 0.8)) == pytest.approx(40, abs=0.9)
    assert longest_diameter(disc & False, (0.5, 0.8)) == 0


def test_measures_of_an_empty_mask_and_of_an_image_without_spacing() -> None:
    volume = Volume(VALUES, GRIDS["RAS-even"], "scan")
    assert measure(SliceView(volume), INSIDE & False).volume_ml == 0
    image = Volume(VALUES, np.eye(4), "scan", oriented=False, spacing_known=False)
    found = measure(SliceView(image), INSIDE)
    assert (found.voxels, found.volume_ml, found.area_mm2) == (INSIDE.sum(), None, None)
