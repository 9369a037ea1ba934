"""What is offered at the start to be labelled: folders, scans and data sets, and nothing beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import loopback
import nibabel
import numpy as np
import PIL.Image
import pytest
from loopback import png
from volume_phantoms import GRIDS, blob, hounsfield, slice_files

from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.masks import decode_rle
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.offers import MAX_OFFERS, offers_of
from ibisagent.server.service import FullError, Limits, Service
from ibisagent.server.volumes import PackageVolumes

CLICK = "<action>click + (0.3133, 0.3197) bright box</action>"


@contextmanager
def offering(data: Path, *places: Path, **how: Any) -> Iterator[tuple[httpx.Client, Service]]:
    """A client of a server that offers these places."""
    models = ScriptedPolicy([CLICK, "<action>stop</action>"]), RegionSegmenter()
    limits = Limits(sessions=2, idle_seconds=100)
    service = Service(*models, data, limits=limits, volumes=PackageVolumes(), offers=offers_of(places, **how))
    with (
        loopback.serving(create_app(service, mounts=standard_mounts(page=True))) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client, service


def worklist(client: httpx.Client) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.get("/v1/worklist").raise_for_status().json()
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images and a scan of a user, and what is not theirs beside them."""
    folder = tmp_path / "to label"
    (folder / "more").mkdir(parents=True)
    for name in ("eye-10.png", "eye-9.png", "more/eye.png"):
        (folder / name).write_bytes(png())
    (folder / "notes.txt").write_text("not for visitors")
    (folder / ".hidden.png").write_bytes(png())
    nibabel.save(nibabel.Nifti1Image(hounsfield(blob((20, 18, 9))), GRIDS["RAS-uneven"]), folder / "ct.nii.gz")
    (tmp_path / "outside.png").write_bytes(png(noise=40))
    return folder


def data_set(root: Path) -> Path:
    """Two images with the masks of a box and of an object that is absent from one."""
    (root / "images").mkdir(parents=True)
    mask = np.zeros((61, 83), np.uint8)
    mask[10:30, 12:40] = 255
    PIL.Image.fromarray(mask).save(root / "box.png")
    for name in ("a", "b"):
        (root / "images" / f"{name}.png").write_bytes(png())
    lines = ["image,mask,object,split", *(f"images/{name}.png,box.png,bright box,test" for name in "ab")]
    (root / "index.csv").write_text("\n".join([*lines, "images/a.png,,plate,train"]))
    return root


def test_a_folder_is_listed_and_opened_when_it_is_looked_at(folder: Path, tmp_path: Path) -> None:
    with offering(tmp_path / "data", folder) as (client, service):
        listed = worklist(client)
        assert [one["name"] for one in listed] == ["eye-9.png", "eye-10.png", "eye.png", "ct.nii.gz"]
        assert {one["opened"] for one in listed} == {False}
        assert not service.session_ids
        first, scan = listed[0]["id"], listed[3]["id"]
        assert client.get(f"/v1/sessions/{first}/thumbnail").status_code == 200
        session = client.post(f"/v1/sessions/{first}/click", json={"x": 20, "y": 20}).raise_for_status().json()
        assert session["image"] == "eye-9.png"
        assert client.get(f"/v1/scans/{scan}").raise_for_status().json()["axes"][0]["count"] == 9
        again = worklist(client)
        assert [one["id"] for one in again] == [one["id"] for one in listed], "the order changed"
        assert [one["opened"] for one in again] == [True, False, False, True]
        assert str(folder) not in json.dumps([again, session])
    with offering(tmp_path / "data", folder) as (client, _):  # tomorrow
        again = worklist(client)
        assert [(one["id"], one["state"]) for one in again[:2]] == [(first, "corrected"), (listed[1]["id"], "new")]


def test_nothing_beside_what_is_offered_is_read(folder: Path, tmp_path: Path) -> None:
    names = [folder / "notes.txt", folder / ".hidden.png", tmp_path / "outside.png", folder / "eye-9.png"]
    with offering(tmp_path / "data", folder) as (client, service):
        for name in names:
            for written in (str(name), name.name, f"../{name.name}", name.as_uri()):
                for address in ("sessions/{}", "sessions/{}/image", "scans/{}", "scans/{}/thumbnail"):
                    path = httpx.URL("/v1/" + address.format(written.replace("/", "%2F")))
                    assert client.get(path).status_code in (404, 405, 422), written
        assert not service.session_ids


def test_a_file_that_cannot_be_used_is_told_without_its_place(folder: Path, tmp_path: Path) -> None:
    with offering(tmp_path / "data", folder) as (client, service):
        listed = worklist(client)
        (folder / "eye-9.png").write_bytes(b"no image")
        (folder / "ct.nii.gz").unlink()
        for one, kind in ((listed[0], "sessions"), (listed[3], "scans")):
            answer = client.get(f"/v1/{kind}/{one['id']}")
            assert answer.status_code == 422
            assert one["name"] in answer.json()["detail"]
            assert str(tmp_path) not in answer.text
        assert not service.session_ids
        assert not list((tmp_path / "data" / "sessions").iterdir())


def test_what_idles_unused_goes_and_is_offered_still_what_is_deleted_is_not(folder: Path, tmp_path: Path) -> None:
    with offering(tmp_path / "data", folder) as (client, service):
        first, second, third = (one["id"] for one in worklist(client)[:3])
        for id_ in (first, second, third):  # more than `sessions`: they are the operator's
            client.get(f"/v1/sessions/{id_}").raise_for_status()
        client.post(f"/v1/sessions/{second}/click", json={"x": 20, "y": 20}).raise_for_status()
        for id_ in (first, second):
            service._touched[id_] -= 200
        assert service.expire() == 1
        assert [one["opened"] for one in worklist(client)[:3]] == [False, True, True]
        assert client.delete(f"/v1/sessions/{third}").status_code == 204
        assert [one["id"] for one in worklist(client)[:3]] == [first, second, worklist(client)[2]["id"]]
        assert client.get(f"/v1/sessions/{third}").status_code == 404
    assert (folder / "more" / "eye.png").read_bytes() == png(), "a file of the operator was touched"


@pytest.mark.parametrize("ground_truth", [False, True])
def test_a_data_set_brings_its_requests_and_its_masks_where_they_are_asked_for(
    ground_truth: bool, tmp_path: Path
) -> None:
    place = data_set(tmp_path / "set")
    with offering(tmp_path / "data", place, ground_truth=ground_truth) as (client, _):
        listed = worklist(client)
        assert sorted(one["name"] for one in listed) == ["a.png", "a.png", "b.png"]
        assert {one["given"] for one in listed} == {"masks" if ground_truth else "query"}
        box = next(one for one in listed if "bright box" in one["query"])
        view = client.get(f"/v1/sessions/{box['id']}").raise_for_status().json()
        assert view["query"] == box["query"]
        assert len(view["targets"]) == ground_truth
        if ground_truth:
            assert decode_rle(view["targets"][0]["mask"]).sum() == 20 * 28
        plate = next(one for one in listed if "plate" in one["query"])
        assert client.get(f"/v1/sessions/{plate['id']}").raise_for_status().json()["targets"] == []


def test_dicom_series_of_a_folder_are_scans(tmp_path: Path) -> None:
    values = hounsfield(blob((20, 18, 5)))
    slice_files(tmp_path / "studies" / "ct", values, GRIDS["RAS-uneven"], SeriesDescription="Abdomen")
    with offering(tmp_path / "data", tmp_path / "studies") as (client, _):
        [one] = worklist(client)
        assert (one["kind"], one["name"]) == ("scan", "Abdomen")
        view = client.get(f"/v1/scans/{one['id']}").raise_for_status().json()
        assert view["dicom"]
        assert {axis["count"] for axis in view["axes"]} == {20, 18, 5}


def test_what_cannot_be_offered_is_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        offers_of([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image and no scan"):
        offers_of([tmp_path / "empty"])
    with pytest.raises(ConfigError, match="for data sets"):
        offers_of([folder], ground_truth=True)
    assert len(offers_of([data_set(tmp_path / "set")], split="test")) == 2
    rows = "\n".join(f"images/a.png,,object {number}" for number in range(MAX_OFFERS + 1))
    (tmp_path / "set" / "long.csv").write_text(f"image,mask,object\n{rows}")
    with pytest.raises(ConfigError, match="too many for one list"):
        offers_of([tmp_path / "set" / "long.csv"])


def test_a_browser_opens_a_whole_folder_and_programs_only_so_many_sessions(tmp_path: Path) -> None:
    models = ScriptedPolicy([CLICK]), RegionSegmenter()
    service = Service(*models, tmp_path, limits=Limits(sessions=3))
    image = service.read_upload(png(), "a.png")
    for _ in range(10):
        service.open(image, "box", owner="annotator")
    for _ in range(2):
        service.open(image, "box")
    with pytest.raises(FullError, match="3 sessions in use"):
        service.open(image, "box")
    with pytest.raises(FullError, match="3 sessions in use"):
        service.open(image, "box", owner="another")
    service.open(image, "box", owner="annotator")
    service.close()
