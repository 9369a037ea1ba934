"""Volumes in: every format, orientation and spacing; windows, slices, and files that cannot be used."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.pixels import compress
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from volume_phantoms import GRIDS, SHAPE, blob, changed, hounsfield, slice_files, world_points

from ibisagent.errors import ConfigError, DataError, IbisError
from ibisagent.imaging.images import read_image, write_png
from ibisagent.volumes import SliceView, Volume, is_volume, parse_window, read_volume
from ibisagent.volumes.grid import LPS
from ibisagent.volumes.windows import Percentiles, Window, sigmoid

PYDICOM_FILES = sorted(
    path for path in (Path(pydicom.__file__).parent / "data" / "test_files").rglob("*") if path.is_file()
)
INSIDE = blob()
VALUES = hounsfield(INSIDE) // 2 * 2  # the phantom's rescale slope is 2


def real(volume: Volume) -> np.ndarray:
    return volume.values(np.asarray(volume.voxels))


# ------------------------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd"])
def test_files_keep_values_and_places(tmp_path: Path, grid: str, suffix: str) -> None:
    if grid.startswith("P"):
        suffix = {".nii.gz": ".nii", ".nrrd": ".mha"}[suffix]
    file = tmp_path / f"scan{suffix}"
    affine = GRIDS[grid]
    if suffix.startswith(".nii"):
        nib.save(nib.Nifti1Image(VALUES, affine), file)
    else:
        image = sitk.GetImageFromArray(VALUES.transpose())
        lps = LPS @ affine
        spacing = np.linalg.norm(lps[:3, :3], axis=0)
        image.SetSpacing([float(x) for x in spacing])
        image.SetOrigin([float(x) for x in lps[:3, 3]])
        image.SetDirection([float(x) for x in (lps[:3, :3] / spacing).ravel()])
        sitk.WriteImage(image, str(file), True)
    volume = read_volume(file)
    assert volume.name == "scan"
    assert volume.shape == SHAPE
    np.testing.assert_array_equal(real(volume), VALUES)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-3)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_series_keeps_values_and_places(tmp_path: Path, grid: str) -> None:
    """Whatever the order of the files; k may run the other way, each voxel stays where it is."""
    slice_files(tmp_path / "s", VALUES, GRIDS[grid])
    volume = read_volume(tmp_path / "s")
    bright = (real(volume) > 60) & (real(volume) < 300)
    np.testing.assert_allclose(
        world_points(bright, volume.affine), world_points((VALUES > 60) & (VALUES < 300), GRIDS[grid]), atol=0.01
    )
    assert volume.modality == "CT"


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless], ids=lambda uid: uid.keyword)
def test_compressed_files_are_the_same(tmp_path: Path, syntax: str) -> None:
    large = np.pad(VALUES[:, :, 4:6], ((30, 30), (40, 20), (0, 0)), mode="reflect")
    [plain, packed] = slice_files(tmp_path, large, GRIDS["LPS-even"], shuffle=False)
    dataset = pydicom.dcmread(plain)
    compress(dataset, syntax, encoding_plugin="pylibjpeg" if syntax == JPEG2000Lossless else "")
    dataset.save_as(packed)
    assert read_volume(packed).shape == (83, 77, 1)
    np.testing.assert_array_equal(real(read_volume(packed)), real(read_volume(plain)))


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, when it looks for pixels here
def test_pydicoms_files_are_read_or_refused() -> None:
    """Every file that comes with pydicom: an image, or one line that says why not.

    Of those with pixels, refused are only the damaged ones, segmentations, and 12-bit lossy JPEG.
    """
    refused = set()
    for file in PYDICOM_FILES:
        try:
            volume = read_volume(file)
        except IbisError as error:
            said = str(error)
            assert said.startswith(str(file))
            assert len(said.replace(str(file), "").splitlines()) == 1
            assert "; " in said
            with file.open("rb") as opened:
                if opened.read(132)[128:] == b"DICM" and "PixelData" in pydicom.dcmread(file, defer_size=100):
                    refused.add(file.name)
        else:
            view = SliceView(volume)
            assert view.image(view.count // 2).pixels.size
    assert refused == {
        "JPEG-lossy.dcm",
        "JPGExtended.dcm",
        "JPEG2000-embedded-sequence-delimiter.dcm",
        "MR_truncated.dcm",
        "badVR.dcm",
        "liver_1frame.dcm",
        "liver_expb_1frame.dcm",
        "meta_missing_tsyntax.dcm",  # pixels, but no rows and columns
        "nested_priv_SQ.dcm",
    }


def test_multi_frame_files_place_their_frames() -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    dose = read_volume(folder / "rtdose.dcm")
    dataset = pydicom.dcmread(folder / "rtdose.dcm")
    assert dose.shape == (10, 10, 15)
    np.testing.assert_allclose(real(dose).transpose(2, 1, 0), dataset.pixel_array * dataset.DoseGridScaling, rtol=1e-5)
    loop = read_volume(folder / "examples_ybr_color.dcm")
    assert loop.coloured
    assert not loop.oriented
    with pytest.raises(ConfigError, match="does not say how the patient lies"):
        SliceView(loop, "axial")


def test_one_of_multiple_volumes_is_chosen(tmp_path: Path) -> None:
    four = np.stack([VALUES, VALUES + 100], axis=-1)
    nib.save(nib.Nifti1Image(four, GRIDS["RAS-uneven"]), tmp_path / "four.nii.gz")
    with pytest.raises(DataError, match="holds 2 volumes on one grid; choose with --channel 0 to 1"):
        read_volume(tmp_path / "four.nii.gz")
    with pytest.raises(DataError, match="none is number 2"):
        read_volume(tmp_path / "four.nii.gz", channel=2)
    np.testing.assert_array_equal(real(read_volume(tmp_path / "four.nii.gz", channel=1)), VALUES + 100)
    first = slice_files(tmp_path / "two", VALUES, GRIDS["LPS-even"], TemporalPositionIdentifier=1)
    slice_files(tmp_path / "late", VALUES + 200, GRIDS["LPS-even"], TemporalPositionIdentifier=2)
    series = pydicom.dcmread(first[0]).SeriesInstanceUID
    for file in (tmp_path / "late").iterdir():
        changed(file, SeriesInstanceUID=series)
        file.rename(tmp_path / "two" / f"late-{file.name}")
    with pytest.raises(DataError, match="holds 2 volumes"):
        read_volume(tmp_path / "two")
    np.testing.assert_array_equal(real(read_volume(tmp_path / "two", channel=1)), VALUES + 200)


def test_scaled_and_float_files(tmp_path: Path) -> None:
    scaled = nib.Nifti1Image(VALUES, np.eye(4))
    scaled.header.set_slope_inter(0.5, 3)
    nib.save(scaled, tmp_path / "scaled.nii")
    image = nib.load(tmp_path / "scaled.nii")
    np.testing.assert_allclose(real(read_volume(tmp_path / "scaled.nii")), image.get_fdata(), rtol=1e-6)
    values = VALUES.astype(np.float32) / 7
    values[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "float.nii.gz")
    volume = read_volume(tmp_path / "float.nii.gz")
    np.testing.assert_array_equal(real(volume), values)
    assert SliceView(volume, window="0-100%").image(0).pixels.max() == 255


def test_micrometres_become_millimetres(tmp_path: Path) -> None:
    image = nib.Nifti1Image(VALUES, np.diag([500.0, 500, 2000, 1]))
    image.header.set_xyzt_units("micron")
    nib.save(image, tmp_path / "small.nii")
    assert read_volume(tmp_path / "small.nii").spacing_mm == (0.5, 0.5, 2.0)


def test_formats_are_known_by_content_too(tmp_path: Path) -> None:
    [file] = slice_files(tmp_path / "dicom", VALUES[:, :, :1], GRIDS["LPS-even"])
    nib.save(nib.Nifti1Image(VALUES, np.eye(4)), tmp_path / "scan.nii")
    bare = shutil.copy(tmp_path / "scan.nii", tmp_path / "scan")
    write_png(np.zeros((5, 7), np.uint8), tmp_path / "image.png")
    assert is_volume(file)
    assert is_volume(bare)
    assert is_volume(tmp_path / "dicom")
    assert not is_volume(tmp_path / "image.png")
    assert not is_volume(tmp_path / "nothing")
    with pytest.raises(DataError, match="is a volume, not an image"):
        read_image(tmp_path / "scan.nii")


# --------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".dcm"])
def test_cut_off_files_are_refused(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".nrrd":
        sitk.WriteImage(sitk.GetImageFromArray(VALUES), str(whole), False)
    elif suffix == ".dcm":
        slice_files(tmp_path / "s", VALUES[:, :, :1], GRIDS["LPS-even"])[0].rename(whole)
    else:
        nib.save(nib.Nifti1Image(VALUES, np.eye(4)), whole)
    content = whole.read_bytes()
    for share in (0.02, 0.5, 0.97):
        cut = tmp_path / f"cut{suffix}"
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError) as caught:
            read_volume(cut)
        assert str(caught.value).startswith(str(cut))
        assert "\n" not in str(caught.value)


def test_series_that_are_no_even_grid_are_refused(tmp_path: Path) -> None:
    def series(name: str, count: int = 11) -> list[Path]:
        return slice_files(tmp_path / name, VALUES[:, :, :count], GRIDS["LPS-uneven"], shuffle=False)

    series("gap")[4].unlink()
    with pytest.raises(DataError, match=r"slices 3 and 4 are 8.20 mm apart, the others 4.10 mm: a slice is missing"):
        read_volume(tmp_path / "gap")
    series("mixed/a")
    series("mixed/b", 5)
    with pytest.raises(DataError, match=re.escape("holds 2 series: 1 (CT, ")):
        read_volume(tmp_path / "mixed")
    assert {read_volume(tmp_path / "mixed", series=str(number)).shape[2] for number in (1, 2)} == {11, 5}
    lost = series("cut")[5]
    lost.write_bytes(lost.read_bytes()[:-40])
    with pytest.raises(DataError, match="damaged, cut off"):
        read_volume(tmp_path / "cut")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "note.txt").write_text("nothing")
    with pytest.raises(DataError, match="holds no DICOM image"):
        read_volume(tmp_path / "none")


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.nii").touch()
    (tmp_path / "text.nii.gz").write_bytes(gzip.compress(b"no header"))
    (tmp_path / "text.mha").write_text("nothing")
    nib.save(nib.Nifti1Image(VALUES.astype(np.complex64), np.eye(4)), tmp_path / "complex.nii")
    for name in ("empty.nii", "text.nii.gz", "text.mha", "complex.nii", "absent.nii"):
        with pytest.raises(DataError) as caught:
            read_volume(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name))
        assert "\n" not in str(caught.value)


# -------------------------------------------------------------------------------------------------- windows and views


def test_windows_are_read_from_text() -> None:
    lung = parse_window("lung")
    assert lung == "lung"
    assert parse_window("soft-tissue") == "soft tissue"
    window = parse_window("-600/1500")
    assert isinstance(window, Window)
    assert (window.low, window.high) == (-1350, 150)
    assert parse_window("2-98%") == Percentiles(2, 98)
    assert parse_window("auto") is None
    for text in ("lungs", "40/0", "98-2%", "", "40/-5"):
        with pytest.raises(ConfigError):
            parse_window(text)


def test_windows_show_values() -> None:
    window = Window(-100, 100)
    np.testing.assert_array_equal(
        window.apply(np.array([-np.inf, -500, -100, 0, 100, 500, np.inf, np.nan])), [0, 0, 0, 128, 255, 255, 255, 0]
    )
    curve = sigmoid(40, 400).apply(np.array([-1000.0, 40, 1000]))
    np.testing.assert_allclose(curve, [0, 128, 255], atol=1)
    table = Window(0, 3, np.array([10.0, 0, 0, 20]))
    np.testing.assert_array_equal(table.apply(np.array([0.0, 1, 2, 3])), [128, 0, 0, 255])


def test_windows_come_from_the_file(tmp_path: Path) -> None:
    slice_files(tmp_path / "own", VALUES, GRIDS["LPS-even"], WindowCenter=[50, 400], WindowWidth=[201, 1800])
    view = SliceView(read_volume(tmp_path / "own"))
    assert (view.window.low, view.window.high, view.window_source) == (-50.5, 149.5, "the file's own")
    slice_files(tmp_path / "ct", VALUES, GRIDS["LPS-even"])
    assert SliceView(read_volume(tmp_path / "ct")).window_source == "soft tissue"
    slice_files(tmp_path / "mr", VALUES, GRIDS["LPS-even"], Modality="MR", PhotometricInterpretation="MONOCHROME1")
    inverted = read_volume(tmp_path / "mr")
    assert SliceView(inverted).window_source == "0.5 to 99.5 % of the values"
    with pytest.raises(ConfigError, match="for Hounsfield units, this is MR"):
        SliceView(inverted, window="lung")
    shown = SliceView(inverted, window="40/400").image(5).pixels.astype(int)
    np.testing.assert_array_equal(shown, 255 - SliceView(read_volume(tmp_path / "ct"), window="40/400").image(5).pixels)
    nib.save(nib.Nifti1Image(VALUES, np.eye(4)), tmp_path / "ct.nii")
    assert SliceView(read_volume(tmp_path / "ct.nii")).window_source == "soft tissue"  # looks like Hounsfield units


@pytest.mark.parametrize("grid", GRIDS)
def test_slices_are_shown_as_radiologists_expect(grid: str) -> None:
    """A bright point moved towards the patient's left, posterior or inferior moves right or down."""
    affine = GRIDS[grid]
    inverse = np.linalg.inv(affine)
    middle = affine @ np.array([11.0, 8, 5, 1])

    def seen(axis: str, world: tuple[float, float, float]) -> tuple[float, float]:
        place = inverse @ (middle + np.array([*world, 0]))
        index = tuple(int(x) for x in np.rint(place[:3]))
        values = np.zeros(SHAPE, np.uint8)
        values[index] = 200
        view = SliceView(Volume(values, affine, "point"), axis, "100/200")
        images = [view.image(k).pixels[..., 0] for k in range(view.count)]
        brightest = max(images, key=lambda image: int(image.max()))
        rows, columns = np.nonzero(brightest == brightest.max())
        return float(rows.mean()), float(columns.mean())

    step = 4.0
    left, posterior, inferior = (-step, 0.0, 0.0), (0.0, -step, 0.0), (0.0, 0.0, -step)
    for axis, to_the_right, down in (
        ("axial", left, posterior),
        ("coronal", left, inferior),
        ("sagittal", posterior, inferior),
    ):
        row, column = seen(axis, (0, 0, 0))
        assert seen(axis, to_the_right)[1] > column
        assert seen(axis, down)[0] > row


def test_slices_have_their_true_aspect() -> None:
    volume = Volume(VALUES, GRIDS["RAS-uneven"], "scan")  # 23 x 17 x 11 voxels of 0.7 x 1.3 x 4.1 mm
    expected = {"axial": (17 * 1.3, 23 * 0.7), "coronal": (11 * 4.1, 23 * 0.7), "sagittal": (11 * 4.1, 17 * 1.3)}
    for axis, (height, width) in expected.items():
        view = SliceView(volume, axis)
        image = view.image(3)
        assert image.size == view.size
        assert image.spacing_mm is not None
        np.testing.assert_allclose(
            (image.size[0] * image.spacing_mm[0], image.size[1] * image.spacing_mm[1]), (height, width)
        )
        assert image.spacing_mm[0] == pytest.approx(image.spacing_mm[1], rel=0.05)
        assert image.size[0] / image.size[1] == pytest.approx(height / width, rel=0.05)


def test_the_coarse_axis_is_looked_along() -> None:
    assert SliceView(Volume(VALUES, GRIDS["RAS-even"], "scan")).axis == "axial"
    coronal = GRIDS["RAS-even"] @ np.diag([1, 4, 1, 1])
    assert SliceView(Volume(VALUES, coronal, "scan")).axis == "coronal"
    assert SliceView(Volume(VALUES[:1], GRIDS["RAS-even"], "scan")).axis == "sagittal"
    with pytest.raises(ConfigError, match="unknown axis 'up'"):
        SliceView(Volume(VALUES, coronal, "scan"), "up")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_masks_go_back_onto_the_voxels(grid: str, axis: str) -> None:
    view = SliceView(Volume(VALUES, GRIDS[grid], "scan"), axis)
    back = np.zeros(SHAPE, bool)
    for index in range(view.count):
        shown = view.read_mask(INSIDE, index)
        assert shown.shape == view.size
        view.write_mask(back, index, shown)
    np.testing.assert_array_equal(back, INSIDE)
    with pytest.raises(DataError):
        view.write_mask(back, 0, np.zeros((3, 4), bool))
    with pytest.raises(ConfigError, match="has slices 0 to"):
        view.image(view.count)
