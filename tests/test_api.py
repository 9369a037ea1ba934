"""The first lines of Python: ibisagent.segment and ibisagent.segment_volume."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
from volume_phantoms import GRIDS, blob, hounsfield

import ibisagent
from ibisagent.domain import Action, Click, Reply, Stop
from ibisagent.imaging.images import write_png
from ibisagent.inference import api
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import write
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.volumes import SliceView, Volume

SIZE = (61, 83)
BOX = (slice(20, 40), slice(30, 60))


def policy(click: Click, size: tuple[int, int] = SIZE) -> ScriptedPolicy:
    def said(*actions: Action) -> str:
        return write(Reply("", actions), size, dialect="ibis")

    return ScriptedPolicy([said(click), said(Stop("The box is segmented.", ("cup",)))], dialect="ibis")


@pytest.fixture
def pixels() -> np.ndarray:
    made = np.full((*SIZE, 3), 30, np.uint8)
    made[BOX] = 220
    return made


def test_files_arrays_and_pil_images_give_the_same_masks(pixels: np.ndarray, tmp_path: Path) -> None:
    write_png(pixels, tmp_path / "eye.png")
    click = Click(45, 30, True, "box")
    given = [str(tmp_path / "eye.png"), tmp_path / "eye.png", pixels, pixels[..., 0], PIL.Image.fromarray(pixels)]
    masks = []
    for image in given:
        found = ibisagent.segment(image, "the box", policy=policy(click), segmenter=RegionSegmenter())
        mask = found.masks["box"]
        assert mask.sum() == mask[BOX].sum() > 0.7 * 20 * 30
        masks.append(mask)
        assert (found.answer, found.absent) == ("The box is segmented.", ("cup",))
        assert found.episode.stop == "stopped"
    assert all((mask == masks[0]).all() for mask in masks)
    outputs = ibisagent.segment(given[0], "the box", policy=policy(click), segmenter="region").save(tmp_path / "out")
    assert outputs.record == tmp_path / "out" / "eye_record.json"
    assert sorted(ibisagent.read_record(outputs.record).masks) == ["box"]
    assert found.save(tmp_path / "out", "mine").overlay == tmp_path / "out" / "mine_overlay.png"


def test_a_start_mask_is_a_file_or_an_array(pixels: np.ndarray, tmp_path: Path) -> None:
    start = np.zeros(SIZE, bool)
    start[25:30, 40:50] = True
    write_png(pixels, tmp_path / "eye.png")
    write_png(start.astype(np.uint8) * 255, tmp_path / "start.png")
    stop = ScriptedPolicy([write(Reply("", (Stop("Done."),)), SIZE, dialect="ibis")], dialect="ibis")
    for image, mask in ((tmp_path / "eye.png", tmp_path / "start.png"), (pixels, start), (tmp_path / "eye.png", start)):
        found = ibisagent.segment(image, "the box", policy=stop, segmenter="region", start_mask=mask)
        np.testing.assert_array_equal(found.episode.start["box"], start)
    for mask in (start[:-1], start.astype(np.uint8), np.zeros(SIZE, bool)):
        with pytest.raises(ibisagent.DataError, match="start_mask"):
            ibisagent.segment(pixels, "the box", policy=stop, segmenter="region", start_mask=mask)
    with pytest.raises(ibisagent.DataError, match="as an array"):
        ibisagent.segment(pixels, "the box", policy=stop, segmenter="region", start_mask=tmp_path / "start.png")


@pytest.mark.parametrize("bad", [np.zeros((4, 5, 2), np.uint8), np.zeros((4, 5), float), np.zeros((0, 5), np.uint8)])
def test_arrays_that_are_no_image_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ibisagent.DataError, match="uint8"):
        ibisagent.segment(bad, "the box", policy=policy(Click(1, 1, True, "box")), segmenter="region")


def test_models_are_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (api._models("centre-click", "region") for _ in range(2))
    assert first[0] is second[0]
    assert first[1] is second[1]
    with pytest.raises(ibisagent.ConfigError, match="no-such-policy"):
        ibisagent.segment(np.zeros((4, 5), np.uint8), "the box", policy="no-such-policy", segmenter="region")


def test_a_volume_is_segmented_and_saved(tmp_path: Path) -> None:
    inside = blob((47, 61, 24), centre=(20, 33, 11), radii=(13, 12, 8))
    nib.save(nib.Nifti1Image(hounsfield(inside), GRIDS["LPS-uneven"]), tmp_path / "scan.nii.gz")
    size = SliceView(Volume(hounsfield(inside), GRIDS["LPS-uneven"], "scan")).size
    click = Click(20, round(33.5 * 1.3 / 0.7), True, "liver")
    found = ibisagent.segment_volume(
        tmp_path / "scan.nii.gz", "the liver", policy=policy(click, size), segmenter="region", slices="11", recheck=0
    )
    assert found.masks["liver"].shape == inside.shape
    assert found.masks["liver"][..., 11].any()
    outputs = found.save(tmp_path / "out")
    assert outputs.masks["liver"]["nifti"] == tmp_path / "out" / "scan_mask_liver.nii.gz"
    assert outputs.measures["liver"].voxels == found.masks["liver"].sum()


def test_one_object_of_a_label_map_is_refined_as_on_the_command_line(tmp_path: Path) -> None:
    inside = blob((47, 61, 24), centre=(20, 33, 11), radii=(13, 12, 8))
    volume = Volume(hounsfield(inside), GRIDS["LPS-uneven"], "scan")
    nib.save(nib.Nifti1Image(hounsfield(inside), GRIDS["LPS-uneven"]), tmp_path / "scan.nii.gz")
    labels = inside.astype(np.uint8)
    labels[:3, :3, :3] = 2
    nib.save(nib.Nifti1Image(labels, GRIDS["LPS-uneven"]), tmp_path / "labels.nii.gz")
    size = SliceView(volume).size
    stop = ScriptedPolicy([write(Reply("", (Stop("Done."),)), size, dialect="ibis")], dialect="ibis")

    def refine(**more: str) -> ibisagent.SegmentedVolume:
        return ibisagent.segment_volume(
            tmp_path / "scan.nii.gz", "the liver", policy=stop, segmenter="region", slices="11", recheck=0,
            start_mask=tmp_path / "labels.nii.gz", **more,
        )  # fmt: skip

    with pytest.raises(ibisagent.DataError, match="holds 2 objects"):
        refine()
    assert list(refine(label="1").masks) == ["liver"]
