"""Scans as clinics have them: irregular headers, folders with other files, mosaics, uneven slices, odd windows."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pydicom
import pytest
from commands import ibisagent
from pydicom.uid import generate_uid
from typer.testing import Result
from volume_phantoms import GRIDS, blob, changed, enhanced, hounsfield, mosaic, slice_files, world_points

from ibisagent.errors import ConfigError, DataError, TooLargeError
from ibisagent.imaging import limits
from ibisagent.volumes import SliceView, Volume, read_volume, whole_series
from ibisagent.volumes.dicom_output import check_source, write_report, write_segmentation
from ibisagent.volumes.grid import LPS
from ibisagent.volumes.measures import measure
from ibisagent.volumes.writing import masks_on, write_nifti

INSIDE = blob()
VALUES = hounsfield(INSIDE) // 2 * 2
PROVENANCE = {"policy": "oracle", "segmenter": "region", "ibisagent": "0.1.0"}
UNEVEN = np.array([0.0, 4, 8, 12, 16, 20, 27, 34, 41, 48, 55])


def segment(*arguments: object) -> Result:
    fast = ("--policy", "centre-click", "--segmenter", "region", "--recheck", 0, "--slices", "5")
    return ibisagent("segment", *arguments, *fast)


def sequential(folder: Path) -> list[Path]:
    """The phantom as a head that was scanned slice by slice: 4 mm apart, then 7."""
    files = slice_files(folder, VALUES, GRIDS["LPS-even"], shuffle=False)
    for k, file in enumerate(files):
        changed(file, ImagePositionPatient=[0, 0, float(UNEVEN[k])])
    return files


# -------------------------------------------------------------------------------------------- objects of odd headers


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, where the phantom writes what is not allowed
@pytest.mark.parametrize(
    ("header", "written", "told"),
    [
        ({"SpecificCharacterSet": ""}, {"PatientName": "Doe^Jane"}, "UTF-8"),
        (
            {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎"},
            {"PatientName": "Yamada^Tarou=山田^太郎"},
            "UTF-8",
        ),
        ({"SpecificCharacterSet": "ISO 2022 IR 100", "PatientName": "Müller"}, {"PatientName": "Müller"}, "UTF-8"),
        ({"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller"}, {"PatientName": "Müller"}, ""),
        ({"StudyTime": "11:27:24"}, {"StudyTime": "112724"}, "StudyTime 112724"),
        ({"StudyTime": "094836.214743984"}, {"StudyTime": "094836.214743"}, "StudyTime 094836.214743"),
        ({"StudyTime": "noon"}, {"StudyTime": ""}, "no StudyTime"),
        ({"StudyDate": "2020.01.02"}, {"StudyDate": "20200102"}, "StudyDate 20200102"),
        ({"PatientBirthDate": "00000000"}, {"PatientBirthDate": ""}, "no PatientBirthDate"),
        ({"PatientBirthDate": "19990231"}, {"PatientBirthDate": ""}, "no PatientBirthDate"),
        ({"PatientSex": "U"}, {"PatientSex": ""}, "no PatientSex"),
        ({"PatientSex": "female"}, {"PatientSex": "F"}, "PatientSex F"),
        ({"PatientAge": "45"}, {}, "no PatientAge"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.5"}, {}, ""),  # retired, which no library knows
    ],
)
def test_irregular_text_withholds_no_mask(
    tmp_path: Path, header: dict[str, object], written: dict[str, str], told: str
) -> None:
    slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"], **header)
    volume = read_volume(tmp_path / "s")
    notes = check_source(volume, tmp_path / "seg.dcm", PROVENANCE)
    assert told in " ".join(notes)
    assert bool(notes) == bool(told)
    seg = write_segmentation({"liver": INSIDE}, volume, tmp_path / "seg.dcm", PROVENANCE)
    write_report({"liver": measure(SliceView(volume), INSIDE)}, seg, volume, tmp_path / "sr.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], masks_of(volume))
    for name in ("seg.dcm", "sr.dcm"):
        made = pydicom.dcmread(tmp_path / name)
        assert {key: str(made.get(key)) for key in written} == written
        assert made.PatientID == "MRN77"


def masks_of(volume: Volume) -> np.ndarray:
    assert volume.shape == INSIDE.shape
    return INSIDE


def test_a_frame_of_reference_is_made_where_there_is_none(tmp_path: Path) -> None:
    for file in slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"]):
        dataset = pydicom.dcmread(file)
        del dataset.FrameOfReferenceUID
        dataset.save_as(file)
    volume = read_volume(tmp_path / "s")
    assert "FrameOfReferenceUID" in check_source(volume, tmp_path / "seg.dcm", PROVENANCE)[0]
    frames = {
        write_segmentation({"liver": INSIDE}, volume, tmp_path / f"{n}.dcm", PROVENANCE).FrameOfReferenceUID
        for n in "ab"
    }
    assert len(frames) == 1  # of one series, so that viewers lay them over each other


@pytest.mark.parametrize("per_frame", [False, True])
def test_pixel_measures_may_stand_with_each_frame(tmp_path: Path, per_frame: bool) -> None:
    volume = read_volume(enhanced(tmp_path / "e.dcm", [VALUES], [(500, 900)], per_frame=per_frame))
    write_segmentation({"a": INSIDE, "b": INSIDE}, volume, tmp_path / "seg.dcm", PROVENANCE)
    read = hd.seg.segread(tmp_path / "seg.dcm")
    assert read.SegmentsOverlap == "YES"
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["b"], INSIDE)
    back = read.get_volume(segment_numbers=[2], combine_segments=True, relabel=False)
    np.testing.assert_allclose(
        world_points(back.array > 0, LPS @ back.affine), world_points(INSIDE, volume.affine), atol=1e-3
    )


def test_a_format_that_fails_fails_alone_and_at_once(tmp_path: Path) -> None:
    files = slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"])
    for file in files:
        dataset = pydicom.dcmread(file)
        del dataset.SOPInstanceUID
        dataset.save_as(file, enforce_file_format=False)
    alone = segment(tmp_path / "s", "liver", "-o", tmp_path / "alone", "--format", "seg")
    assert alone.exit_code == 2
    assert "slice 5" not in alone.stdout  # refused before the first turn
    assert "SOPInstanceUID" in alone.stderr
    both = segment(tmp_path / "s", "liver", "-o", tmp_path / "both", "--format", "seg", "--format", "nifti")
    assert both.exit_code == 2
    assert "SOPInstanceUID" in both.stderr
    assert list((tmp_path / "both").glob("*_mask_liver.nii.gz"))
    assert not list((tmp_path / "both").glob("*.dcm"))
    again = segment(tmp_path / "s", "liver", "-o", tmp_path / "both", "--format", "seg", "--format", "nifti")
    assert again.exit_code == 2  # what is kept lacks it still
    nib.save(nib.Nifti1Image(VALUES, GRIDS["LPS-even"]), tmp_path / "n.nii.gz")
    mixed = segment(tmp_path / "n.nii.gz", "liver", "-o", tmp_path / "m", "--format", "sr", "--format", "rle", "--json")
    assert "needs a DICOM source" in json.loads(mixed.stdout)["results"][0]["error"]
    assert (tmp_path / "m" / "n_masks.json").exists()


# ----------------------------------------------------------------------------------------------------------- windows


def test_the_window_is_that_of_the_chosen_frames(tmp_path: Path) -> None:
    bright, dark = np.where(INSIDE, 2000, 500), np.where(INSIDE, 100, -100)
    file = enhanced(tmp_path / "e.dcm", [bright, dark], [(1250, 1867), (0, 401)])
    for channel, window in enumerate([(316.5, 2182.5), (-200.5, 199.5)]):
        view = SliceView(read_volume(file, channel=channel))
        assert (view.window.low, view.window.high) == window
        assert len(np.unique(view.image(5).pixels)) == 2


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_a_window_that_shows_nothing_is_not_used(tmp_path: Path, modality: str) -> None:
    values = np.where(INSIDE, 300, 40) + np.random.default_rng(0).integers(0, 20, INSIDE.shape) * 2
    slice_files(tmp_path / "s", values.astype(np.int16), GRIDS["LPS-even"], Modality=modality)
    for file in (tmp_path / "s").iterdir():
        changed(file, WindowCenter=16384, WindowWidth=32768)
    view = SliceView(read_volume(tmp_path / "s"))
    assert view.window.high - view.window.low < 500
    assert ("shows nothing" in view.window_source) == (modality == "MR")


def scanner(padding: int | None = None) -> np.ndarray:
    index = np.indices((60, 60, 16))
    radius = np.hypot(index[0] - 29.5, index[1] - 29.5)
    values = np.where(radius < 20, 50, -1000) + np.random.default_rng(0).integers(-10, 10, radius.shape)
    values[radius < 4] = 700
    return values if padding is None else np.where(radius > 29, padding, values)


def crop() -> np.ndarray:
    """Tight around organs: soft tissue, some fat, some bone, no air."""
    random = np.random.default_rng(0)
    kind = random.choice(3, (40, 40, 12), p=(0.75, 0.15, 0.1))
    return np.choose(kind, (50, -90, 500)) + random.normal(0, 15, kind.shape)


@pytest.mark.parametrize(
    "make",
    [
        scanner,
        lambda: scanner(-3024),
        lambda: scanner(-2000),
        lambda: scanner(-32768),
        lambda: scanner(-3024) + 0.37,
        lambda: scanner().astype(np.float32) + np.random.default_rng(1).normal(0, 0.3, (60, 60, 16)),
        crop,
    ],
)
def test_hounsfield_units_are_seen_through_padding_and_resampling(make: Callable[[], np.ndarray]) -> None:
    view = SliceView(Volume(make(), np.diag([-1.0, -1, 3, 1]), "ct"))
    assert view.window_source == "soft tissue"


def magnitude() -> np.ndarray:
    return np.abs(np.where(scanner() > 0, 900, 0) + np.random.default_rng(2).normal(0, 20, (60, 60, 16)))


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [
        (magnitude(), -1, 1000),
        (magnitude() - 30 * (magnitude() < 5), -50, 1000),  # the undershoot of a resampled edge
        (np.where(scanner() > 0, magnitude(), -9999), 700, 1000),
        ((magnitude() - 300) / 400, -1, 2),
        (np.random.default_rng(3).uniform(-4096, 4096, (40, 40, 9)), -4096, 4096),
        (np.clip(scanner(), 0, None), -1, 720),
    ],
)
def test_other_values_are_no_hounsfield_units(values: np.ndarray, low: float, high: float) -> None:
    view = SliceView(Volume(values, np.diag([-1.0, -1, 3, 1]), "mr"))
    assert view.window_source != "soft tissue"
    assert low <= view.window.low < view.window.high <= high


# ----------------------------------------------------------------------------------------------------------- folders


def test_one_unusable_member_does_not_fail_the_set(tmp_path: Path) -> None:
    files = slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"])
    (tmp_path / "s" / "._IM0001.dcm").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4072))
    (tmp_path / "s" / "IM0013.dcm").touch()
    (tmp_path / "s" / "notes.dcm").write_text("no DICOM")
    (tmp_path / "s" / "damaged.dcm").write_bytes(bytes(128) + b"DICM" + b"\2\0\0\0UL\4\0" * 9)
    shutil.copy(files[3], tmp_path / "s" / "copy of IM0004.dcm")
    shutil.copytree(tmp_path / "s", tmp_path / "s" / "exported again")
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.voxels, read_volume(files).voxels)
    [note] = volume.notes
    for part in ("there twice (", "2 empty (IM0013.dcm", "not DICOM (", "2 of macOS beside the images"):
        assert part in note
    assert volume.shape == VALUES.shape


def test_slices_that_share_a_uid_by_mistake_all_count(tmp_path: Path) -> None:
    for file in slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"]):
        changed(file, SOPInstanceUID="1.2.3")
    assert read_volume(tmp_path / "s").shape == VALUES.shape


def test_localizers_and_smaller_stacks_are_passed_over(tmp_path: Path) -> None:
    def joined(name: str, *others: tuple[np.ndarray, str], **attributes: object) -> Path:
        series = pydicom.dcmread(slice_files(tmp_path / name, VALUES, GRIDS["LPS-even"])[0]).SeriesInstanceUID
        for number, (values, grid) in enumerate(others):
            part = tmp_path / name / str(number)
            slice_files(part, values, GRIDS[grid], **{"SeriesInstanceUID": series, **attributes})
        return tmp_path / name

    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    other = joined("other", (VALUES[:, :, :2], "SAL-even"), SeriesInstanceUID=generate_uid(), ImageType=kind)
    assert read_volume(other).shape == VALUES.shape
    assert "2 localizers" in read_volume(other).notes[0]
    same = read_volume(joined("same", (VALUES[:, :, :2], "SAL-even"), (VALUES[:9, :, :3], "LPS-even")))
    assert same.shape == VALUES.shape
    assert "the largest stack of 3 is read (11 axial of 23 x 17)" in same.notes[0]
    tie = joined("tie", (VALUES, "SAL-even"))
    with pytest.raises(DataError, match=r"form 2 stacks .* choose with --series SERIES/STACK"):
        read_volume(tie)
    assert {read_volume(tie, series=f"1/{number}").shape for number in (1, 2)} == {VALUES.shape}
    with pytest.raises(DataError, match="none is number 3"):
        read_volume(tie, series="1/3")


def test_slices_given_one_by_one_are_one_volume(tmp_path: Path) -> None:
    files = slice_files(tmp_path / "a", VALUES, GRIDS["LPS-even"], shuffle=False)
    others = slice_files(tmp_path / "b", VALUES[:, :, :4], GRIDS["LPS-even"])
    photo = tmp_path / "photo.png"
    (tmp_path / "a" / "broken.dcm").touch()
    paths = [str(path) for path in (*files[:2], photo, *others, *files[2:], tmp_path / "a" / "broken.dcm")]
    groups = whole_series(paths)
    assert [len(group) for group in groups] == [12, 1, 4]
    np.testing.assert_array_equal(read_volume(groups[0]).voxels, read_volume(tmp_path / "a").voxels)
    result = segment(*files, "liver", "-o", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    [told] = json.loads(result.stdout)["results"]
    assert told["image"] == str(tmp_path / "a")
    for file in files:  # views rather than slices
        dataset = pydicom.dcmread(file)
        del dataset.ImagePositionPatient
        dataset.save_as(file)
    assert len(whole_series([str(file) for file in files])) == len(files)


# ------------------------------------------------------------------------------------------------------ one tolerance


@pytest.mark.parametrize("grid", ["LPS-uneven", "oblique-uneven"])
def test_a_grid_that_is_read_takes_its_own_masks_back(tmp_path: Path, grid: str) -> None:
    files = slice_files(tmp_path / "s", VALUES, GRIDS[grid], shuffle=False)
    for k, file in enumerate(files):
        dataset = pydicom.dcmread(file)
        across = np.array(dataset.ImageOrientationPatient[:3], float)
        dataset.ImagePositionPatient = list(
            np.round(np.array(dataset.ImagePositionPatient) + across * 0.1 * (-1) ** k, 6)
        )
        dataset.PixelSpacing = [dataset.PixelSpacing[0], f"{float(dataset.PixelSpacing[1]) + 1e-6 * k:.6f}"]
        dataset.save_as(file)
    volume = read_volume(tmp_path / "s")
    write_segmentation({"liver": INSIDE}, volume, tmp_path / "seg.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], INSIDE)
    moved = Volume(VALUES, volume.affine + np.array([[0, 0, 0, 0.1], [0] * 4, [0] * 4, [0] * 4]), "moved")
    write_nifti(INSIDE, moved, tmp_path / "moved.nii.gz")
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "moved.nii.gz")["mask"], INSIDE)


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "SAL"])
def test_a_mask_on_the_same_grid_is_turned(tmp_path: Path, codes: str) -> None:
    slice_files(tmp_path / "s", VALUES, GRIDS["oblique-uneven"])
    volume = read_volume(tmp_path / "s")
    image = nib.Nifti1Image(INSIDE.astype(np.uint8), volume.affine)
    orientation = nib.orientations.ornt_transform(
        nib.io_orientation(volume.affine), nib.orientations.axcodes2ornt(tuple(codes))
    )
    nib.save(image.as_reoriented(orientation), tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "mask.nii.gz")["mask"], INSIDE)
    off = volume.affine.copy()
    off[0, 3] += 2
    nib.save(nib.Nifti1Image(INSIDE.astype(np.uint8), off).as_reoriented(orientation), tmp_path / "off.nii.gz")
    with pytest.raises(DataError, match=r"lies up to 2\.00 mm beside"):
        masks_on(volume, tmp_path / "off.nii.gz")


def test_a_segmentation_across_another_axis_is_laid_on_the_voxels(tmp_path: Path) -> None:
    """Written of a sagittal view of the same grid, its frames lie across the axial slices."""
    slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"])
    volume = read_volume(tmp_path / "s")
    affine = volume.affine[:, [1, 2, 0, 3]]
    slice_files(tmp_path / "t", np.ascontiguousarray(VALUES.transpose(1, 2, 0)), affine)
    turned = read_volume(tmp_path / "t")
    inside = masks_on(turned, _nifti(tmp_path / "m.nii.gz", INSIDE, volume.affine))["mask"]
    write_segmentation({"liver": inside}, turned, tmp_path / "seg.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], INSIDE)


def _nifti(path: Path, mask: np.ndarray, affine: np.ndarray) -> Path:
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), path)
    return path


# --------------------------------------------------------------------------------------------------- places of slices


@pytest.mark.parametrize("grid", ["LPS-uneven", "oblique-uneven"])
def test_a_mosaic_is_unpacked(tmp_path: Path, grid: str) -> None:
    volume = read_volume(mosaic(tmp_path / "m", VALUES, GRIDS[grid]))
    assert volume.shape == VALUES.shape
    np.testing.assert_allclose(volume.affine, GRIDS[grid], atol=1e-4)
    np.testing.assert_array_equal(volume.values(np.asarray(volume.voxels)), VALUES)
    write_segmentation({"liver": INSIDE}, volume, tmp_path / "seg.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], INSIDE)
    with pytest.raises(DataError, match="is a mosaic of slices without the private header"):
        read_volume(mosaic(tmp_path / "n", VALUES, GRIDS[grid], told=False))


def test_a_whole_slide_in_tiles_is_refused(tmp_path: Path) -> None:
    file = enhanced(tmp_path / "w.dcm", [VALUES], [(0, 1)])
    changed(file, SOPClassUID="1.2.840.10008.5.1.4.1.1.77.1.6")
    with pytest.raises(DataError, match="is a whole-slide image cut into tiles; save the region"):
        read_volume(file)


@pytest.mark.parametrize("shape", [(96, 90, 4), (96, 4, 90), (4, 96, 90)])
def test_a_slab_is_looked_at_across_its_thin_side(shape: tuple[int, int, int]) -> None:
    view = SliceView(Volume(np.zeros(shape, np.int16), np.eye(4), "slab"))
    assert view.count == 4


def test_uneven_slices_are_segmented_each_for_itself(tmp_path: Path) -> None:
    sequential(tmp_path / "s")
    volume = read_volume(tmp_path / "s")
    assert volume.heights == tuple(UNEVEN)
    assert "4 to 7 mm apart" in volume.notes[0]
    found = measure(SliceView(volume), INSIDE)
    reach = np.array([4, 4, 4, 4, 4, 5.5, 7, 7, 7, 7, 7])
    assert found.volume_ml == pytest.approx((INSIDE.sum(axis=(0, 1)) * reach).sum() * 0.81 / 1000)
    with pytest.raises(ConfigError, match="only axial ones are shown"):
        SliceView(volume, "coronal")
    with pytest.raises(DataError, match="unevenly spaced"):
        write_nifti(INSIDE, volume, tmp_path / "m.nii.gz")
    write_segmentation({"liver": INSIDE}, volume, tmp_path / "seg.dcm", PROVENANCE)
    np.testing.assert_array_equal(masks_on(volume, tmp_path / "seg.dcm")["liver"], INSIDE)
    heights = {
        float(group.PlanePositionSequence[0].ImagePositionPatient[2])
        for group in pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence
    }
    assert heights == set(UNEVEN[INSIDE.any(axis=(0, 1))])
    result = segment(tmp_path / "s", "liver", "-o", tmp_path / "out", "--format", "nifti", "--format", "seg")
    assert result.exit_code == 2
    assert "unevenly spaced" in result.stderr
    assert list((tmp_path / "out").glob("*_seg.dcm"))
    assert not list((tmp_path / "out").glob("*.nii.gz"))


# ------------------------------------------------------------------------------------------------------ other files


def test_files_are_known_by_what_they_hold(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VALUES, GRIDS["oblique-uneven"])
    nib.save(image, tmp_path / "plain.nii")
    content = (tmp_path / "plain.nii").read_bytes()
    (tmp_path / "zipped.nii").write_bytes(gzip.compress(content))
    (tmp_path / "named.nii.gz").write_bytes(content)
    nib.save(nib.Nifti1Pair(VALUES, GRIDS["oblique-uneven"]), tmp_path / "pair.img")
    nib.save(nib.MGHImage(VALUES, GRIDS["oblique-uneven"]), tmp_path / "free.mgz")
    with zipfile.ZipFile(tmp_path / "one.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("__MACOSX/._plain.nii", "x")
        archive.write(tmp_path / "plain.nii", "in/plain.nii")
    for name in ("zipped.nii", "named.nii.gz", "pair.img", "pair.hdr", "free.mgz", "one.zip"):
        volume = read_volume(tmp_path / name)
        np.testing.assert_array_equal(volume.values(np.asarray(volume.voxels)), VALUES, name)
        np.testing.assert_allclose(volume.affine, GRIDS["oblique-uneven"], atol=1e-4)
        write_nifti(INSIDE, volume, tmp_path / "mask.nii.gz")
        np.testing.assert_array_equal(masks_on(volume, tmp_path / "mask.nii.gz")["mask"], INSIDE)
    (tmp_path / "pair.img").unlink()
    with pytest.raises(DataError, match=r"half of a pair, and pair.img is not beside it"):
        read_volume(tmp_path / "pair.hdr")
    nib.save(nib.AnalyzeImage(VALUES, np.eye(4)), tmp_path / "old.img")
    with pytest.raises(DataError, match="does not say which side is left"):
        read_volume(tmp_path / "old.img")


def test_an_archive_of_a_series_is_read_and_bounded(tmp_path: Path) -> None:
    files = slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"])
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, f"STUDY/{file.name}")
    volume = read_volume(tmp_path / "s.zip")
    np.testing.assert_array_equal(volume.voxels, read_volume(tmp_path / "s").voxels)
    write_segmentation({"liver": INSIDE}, volume, tmp_path / "seg.dcm", PROVENANCE)  # its files are still there
    folder = volume.origin.frames[0][0].parent
    assert folder.exists()
    del volume
    assert not folder.exists()
    with limits.at_most(voxels=2000), pytest.raises(TooLargeError, match="unpacks to"):
        read_volume(tmp_path / "s.zip")
    with zipfile.ZipFile(tmp_path / "out.zip", "w") as archive:
        archive.writestr("../../elsewhere.dcm", "x")
    with pytest.raises(DataError, match="elsewhere; pack it again"):
        read_volume(tmp_path / "out.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "s.zip").read_bytes()[:500])
    with pytest.raises(DataError, match="cannot be unpacked"):
        read_volume(tmp_path / "cut.zip")


@pytest.mark.parametrize("name", ["ModalityLUTSequence", "VOILUTSequence"])
def test_an_empty_table_is_none(tmp_path: Path, name: str) -> None:
    slice_files(tmp_path / "s", VALUES, GRIDS["LPS-even"], **{name: [pydicom.Dataset()]})
    volume = read_volume(tmp_path / "s")
    assert volume.window is None
    assert volume.values(np.asarray(volume.voxels)).max() == VALUES.max()


def test_messages_quote_no_python(tmp_path: Path) -> None:
    [file] = slice_files(tmp_path / "s", VALUES[:, :, :1], GRIDS["LPS-even"])
    dataset = pydicom.dcmread(file)
    del dataset.BitsStored
    dataset.save_as(file)
    nib.save(nib.Nifti1Image(VALUES, np.eye(4)), tmp_path / "x.nii")
    content = bytearray((tmp_path / "x.nii").read_bytes())
    content[70:72] = b"\xff\xff"  # the kind of its values
    (tmp_path / "x.nii").write_bytes(content)
    for path in (file, tmp_path / "x.nii"):
        with pytest.raises(DataError) as caught:
            read_volume(path)
        for word in ("object", "attribute", "NoneType", "Error", "<class", "KeyError", "invalid literal"):
            assert word not in str(caught.value).replace(str(tmp_path), ""), str(caught.value)


# ------------------------------------------------------------------------------------------------------- the commands


def test_volumes_are_in_the_review_queue_and_slices_replay_with_theirs(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(VALUES, GRIDS["LPS-uneven"]), tmp_path / "x.nii")
    out = tmp_path / "out"
    for _ in range(2):  # made, then kept
        result = segment(tmp_path / "x.nii", "liver", "-o", out, "--review-queue")
        assert result.exit_code == 0, result.output
        [entry] = json.loads((out / "review.json").read_text())["worst_first"]
        assert entry["image"] == str(tmp_path / "x.nii")
        assert 0 <= entry["score"] <= 1
        assert entry["quality"] > 0
    assert (out / "x_mask_liver.nii.gz").exists()
    records = sorted(out.glob("*_record.json"))
    assert len(records) == 2
    replayed = ibisagent("replay", *records, "--image", tmp_path / "x.nii")
    assert replayed.exit_code == 0, replayed.output
    assert replayed.stdout.count("bit for bit") == 1
    [piece] = [record for record in records if "slice" in record.name]
    alone = ibisagent("replay", piece, "--image", tmp_path)
    assert alone.exit_code == 2
    assert "replay x_record.json" in alone.stderr
