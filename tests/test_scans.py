"""Scans that are labelled slice by slice, without HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from volume_phantoms import GRIDS, blob, hounsfield, slice_files

from ibisagent.errors import DataError
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.scans import Scans
from ibisagent.server.service import Limits, MissingError, Service
from ibisagent.server.volumes import PackageVolumes
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes.grid import scratch
from ibisagent.volumes.writing import masks_on

SHAPE = (40, 30, 14)
CENTRE = (14, 14, 6)
CLICK = "<action>click + (0.4, 0.5) blob</action>"


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    models = ScriptedPolicy([CLICK, "<action>stop</action>"]), RegionSegmenter()
    one = Service(*models, tmp_path / "data", limits=Limits(), volumes=PackageVolumes())
    yield one
    one.close()


def content() -> bytes:
    values = hounsfield(blob(SHAPE, CENTRE, (9, 8, 6)))
    return bytes(nibabel.Nifti1Image(values, GRIDS["RAS-uneven"]).to_bytes())


def click(session: Any, view: SliceView, index: int) -> None:
    """Where the blob is on a slice."""
    inside = scratch(view.volume.shape, bool)
    inside[...] = blob(SHAPE, CENTRE, (9, 8, 6))
    rows, columns = np.nonzero(view.read_mask(inside, index))
    session.click(int(np.median(columns)), int(np.median(rows)), target="blob")


def view_of(affine: np.ndarray) -> SliceView:
    return SliceView(Volume(hounsfield(blob(SHAPE, CENTRE, (9, 8, 6))), affine, "phantom"), "axial")


def test_masks_of_slices_are_those_of_the_volume_and_are_carried_on(service: Service, tmp_path: Path) -> None:
    scans, view = Scans(service), view_of(GRIDS["RAS-uneven"])
    scan = scans.open([("blob.nii", content())], "blob", None)
    assert [(axis.name, axis.count) for axis in scan.axes] == [("axial", 14), ("coronal", 30), ("sagittal", 40)]
    assert scans.state(scan) == "new"
    with pytest.raises(DataError, match="no mask here"):
        scans.propagate(scan, "axial", 6)
    session = scans.session_to_act_in(scan, "axial", 6, "auto")
    assert session is scans.session_to_act_in(scan, "axial", 6, "lung"), "another window is the same slice"
    click(session, view, 6)
    assert np.array_equal(view.plane(session.masks["blob"]), view.plane(scans.masks(scan, "axial", 6)["blob"]))
    assert scans.shown_slices(scan, "axial") == {6: True}
    assert scans.masks(scan, "coronal", 14)["blob"].any(), "it is seen from the other sides"
    scans.propagate(scan, "axial", 6)
    carried = scans.shown_slices(scan, "axial")
    assert {5, 6, 7} <= carried.keys()
    assert carried[6]
    assert not carried[7]
    scans.undo(scan)
    assert scans.shown_slices(scan, "axial") == {6: True}
    scans.propagate(scan, "axial", 6)
    before = scans.masks(scan, "axial", 7)["blob"]
    other = scans.session_to_act_in(scan, "axial", 7, "auto")
    assert np.array_equal(other.masks["blob"], before), "a slice begins with what was carried there"
    other.remove("blob")
    assert scans.masks(scan, "axial", 7) == {}
    scans.accept(scan)
    assert scans.state(scan) == "accepted"
    everything = scans.shown_slices(scan, "axial")
    again = Scans(service)  # as after a restart
    scan = again.get(scan.id, None)
    assert again.state(scan) == "accepted"
    assert again.shown_slices(scan, "axial") == everything
    again.export(scan, tmp_path / "out", "blob", "nifti")
    labelled = np.asarray(nibabel.load(tmp_path / "out" / "blob_mask_blob.nii.gz").dataobj) > 0
    for index in range(14):
        mask = again.masks(scan, "axial", index).get("blob", np.zeros(view.size, bool))
        assert np.array_equal(view.read_mask(labelled, index), mask)
    session.undo()
    assert again.state(scan) == "corrected", "it is no more what was accepted"
    again.close(scan)
    assert not service.session_ids
    assert not list((tmp_path / "data" / "scans").iterdir())


def test_the_agent_finds_it_and_users_stand(service: Service) -> None:
    scans, view = Scans(service), view_of(GRIDS["RAS-uneven"])
    scan = scans.open([("blob.nii", content())], "blob", None)
    session = scans.session_to_act_in(scan, "axial", 6, "auto")
    click(session, view, 6)
    session.brush([(1.5, 1.5)], 1, target="blob")
    mine = scans.masks(scan, "axial", 6)["blob"]
    scans.find(scan, "axial")
    assert np.array_equal(scans.masks(scan, "axial", 6)["blob"], mine)
    assert len(scans.shown_slices(scan, "axial")) > 1


def test_what_was_drawn_along_another_axis_stands_when_masks_are_carried_on(service: Service) -> None:
    scans, view = Scans(service), view_of(GRIDS["RAS-uneven"])
    scan = scans.open([("blob.nii", content())], "blob", None)
    click(scans.session_to_act_in(scan, "axial", 6, "auto"), view, 6)
    scans.propagate(scan, "axial", 6)
    scans.session_to_act_in(scan, "coronal", 14, "auto").brush([(1.5, 1.5)], 1, target="blob")
    drawn = scans.masks(scan, "coronal", 14)["blob"]
    scans.propagate(scan, "axial", 6)
    assert np.array_equal(scans.masks(scan, "coronal", 14)["blob"], drawn)
    scans.undo(scan)
    assert np.array_equal(scans.masks(scan, "coronal", 14)["blob"], drawn), "what was before was changed as well"


def test_a_dicom_series_and_what_is_none(service: Service, tmp_path: Path) -> None:
    scans = Scans(service)
    files = slice_files(tmp_path / "ct", hounsfield(blob()), GRIDS["LPS-uneven"])
    sent = [(file.name, file.read_bytes()) for file in files]
    scan = scans.open(sent, "blob", "a visitor")
    assert scan.dicom
    assert scans.get(scan.id, "a visitor") is scan
    for stranger in ("another", None):
        with pytest.raises(MissingError):
            scans.get(scan.id, stranger)
        assert not scans.of(stranger)
    for wrong in ([("a.nii", b"nothing")], [("a.nii", b"")], []):
        with pytest.raises(DataError) as refused:
            scans.open(wrong, "blob", None)
        assert str(tmp_path) not in str(refused.value)
    assert len(list((tmp_path / "data" / "scans").iterdir())) == 1


def test_a_scan_goes_only_where_that_was_asked_for(tmp_path: Path) -> None:
    models = ScriptedPolicy([CLICK, "<action>stop</action>"]), RegionSegmenter()
    for days, left in ((None, 1), (1.0, 0)):
        limits = Limits(delete_seconds=None if days is None else days * 86400)
        service = Service(*models, tmp_path / str(days), limits=limits, volumes=PackageVolumes())
        scans = Scans(service)
        scan = scans.open([("blob.nii", content())], "blob", None)
        service.expire(now=time.time() + 3600)
        assert scans.of(None) == [scan]
        service.expire(now=time.time() + 30 * 86400)
        assert len(scans.of(None)) == left
        assert scans.folder(scan).exists() == bool(left)
        service.close()


def test_the_masks_of_a_dicom_series_come_out_as_a_dicom_segmentation(service: Service, tmp_path: Path) -> None:
    scans = Scans(service)
    files = slice_files(tmp_path / "ct", hounsfield(blob(SHAPE, CENTRE, (9, 8, 6))), GRIDS["LPS-uneven"])
    scan = scans.open([(file.name, file.read_bytes()) for file in files], "blob", None)
    scans.export(scan, tmp_path / "out", "ct", "seg")
    assert not (tmp_path / "out").exists(), "nothing was found in it so far"
    click(scans.session_to_act_in(scan, "axial", 6, "auto"), view_of(GRIDS["LPS-uneven"]), 6)
    drawn = scans.masks(scan, "axial", 6)["blob"]
    scans.export(scan, tmp_path / "out", "ct", "seg")
    [file] = (tmp_path / "out").iterdir()
    volume = read_volume(tmp_path / "ct")
    written = masks_on(volume, file)["blob"]
    assert written.sum() > 0
    np.testing.assert_array_equal(SliceView(volume, "axial").read_mask(written, 6), drawn)
