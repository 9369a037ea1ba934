"""Label maps: names, colours and places as nibabel, pynrrd and slicerio read them, and back as start masks."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
import slicerio
from volume_phantoms import GRIDS, SHAPE, blob, hounsfield, world_points

from ibisagent.errors import DataError
from ibisagent.volumes import Volume
from ibisagent.volumes.grid import LPS
from ibisagent.volumes.label_maps import choose_label, write_label_map, write_slicer_segmentation
from ibisagent.volumes.terms import term
from ibisagent.volumes.writing import masks_on, read_volume_masks

LIVER = blob()
TUMOR = LIVER & (np.arange(SHAPE[0]) < 9)[:, None, None]
SPLEEN = np.zeros(SHAPE, bool)
SPLEEN[16:21, 1:4, 2:7] = True
APART = {"liver": LIVER & ~TUMOR & ~SPLEEN, "spleen": SPLEEN}
OVER = {"liver": LIVER & ~SPLEEN, "liver tumor": TUMOR, "spleen": SPLEEN}


def volume(grid: str = "oblique-uneven") -> Volume:
    return Volume(hounsfield(LIVER), GRIDS[grid], "scan")


@pytest.mark.parametrize("grid", GRIDS)
def test_nifti_says_which_number_is_what(tmp_path: Path, grid: str) -> None:
    write_label_map(OVER, volume(grid), tmp_path / "scan_labels.nii.gz")
    image = nib.load(tmp_path / "scan_labels.nii.gz")
    labels = np.asarray(image.dataobj)
    described = json.loads((tmp_path / "scan_labels.json").read_text())["labels"]
    assert [(one["value"], one["name"]) for one in described] == [(1, "liver"), (2, "liver tumor"), (3, "spleen")]
    assert described[0]["type"] == {"value": "10200004", "meaning": "Liver", "scheme": "SCT"}
    assert described[0]["colour"] == "#" + bytes(term("liver").colour).hex()
    np.testing.assert_array_equal(labels == 2, TUMOR)  # the smaller object is whole
    assert described[0]["voxels_given_to_smaller_objects"] == (OVER["liver"] & TUMOR).sum()
    np.testing.assert_allclose(world_points(labels == 3, image.affine), world_points(SPLEEN, GRIDS[grid]), atol=0.01)
    back, _ = read_volume_masks(tmp_path / "scan_labels.nii.gz")
    assert set(back) == set(OVER)
    np.testing.assert_array_equal(masks_on(volume(grid), tmp_path / "scan_labels.nii.gz")["spleen"], SPLEEN)


def test_itk_snap_reads_the_names_and_so_do_we(tmp_path: Path) -> None:
    write_label_map({'the "big" liver': APART["liver"], "spleen": SPLEEN}, volume(), tmp_path / "x.nii.gz")
    lines = [line.split(None, 7) for line in (tmp_path / "x.txt").read_text().splitlines()]
    assert [(line[0], line[7]) for line in lines] == [
        ("0", '"Clear Label"'),
        ("1", "\"the 'big' liver\""),
        ("2", '"spleen"'),
    ]
    assert [int(part) for part in lines[2][1:4]] == list(term("spleen").colour)
    (tmp_path / "x.json").unlink()
    assert list(read_volume_masks(tmp_path / "x.nii.gz")[0]) == ["the 'big' liver", "spleen"]
    (tmp_path / "x.txt").unlink()
    masks, _ = read_volume_masks(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(choose_label(masks, "2", "x"), SPLEEN)
    with pytest.raises(DataError, match="no label 'liver'; it holds '1', '2'"):
        choose_label(masks, "liver", "x")
    (tmp_path / "x.json").write_text('{"labels": [{"value": "one"}]}')
    with pytest.raises(DataError, match=r"x\.json: is damaged"):
        read_volume_masks(tmp_path / "x.nii.gz")


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("masks", [APART, OVER], ids=["one layer", "layers"])
def test_slicer_segmentations(tmp_path: Path, grid: str, masks: dict[str, np.ndarray]) -> None:
    """As 3D Slicer's own package reads them: names, colours, codes, every voxel where it was."""
    path = tmp_path / "scan.seg.nrrd"
    write_slicer_segmentation(masks, volume(grid), path)
    read = slicerio.read_segmentation(str(path))
    assert slicerio.segment_names(read) == list(masks)
    for name, mask in masks.items():
        segment = slicerio.segment_from_name(read, name)
        np.testing.assert_allclose(segment["color"], np.array(term(name).colour) / 255, atol=1e-5)
        kind = term(name).kind
        assert segment["terminology"]["type"] == [kind.scheme, kind.value, kind.meaning]
        voxels = read["voxels"] if read["voxels"].ndim == 3 else read["voxels"][segment["layer"]]
        affine = LPS @ np.array(read["ijkToLPS"])
        points = world_points(voxels == segment["labelValue"], affine)
        np.testing.assert_allclose(points, world_points(mask, GRIDS[grid]), atol=0.01)
    back = masks_on(volume(grid), path)
    assert list(back) == list(masks)
    for name, mask in masks.items():
        np.testing.assert_array_equal(back[name], mask)
    assert sitk.ReadImage(str(path)).GetSize() == SHAPE


def test_a_plain_nrrd_is_no_segmentation(tmp_path: Path) -> None:
    sitk.WriteImage(sitk.GetImageFromArray(LIVER.astype(np.uint8)), str(tmp_path / "x.seg.nrrd"))
    with pytest.raises(DataError, match="names no segment"):
        read_volume_masks(tmp_path / "x.seg.nrrd")
