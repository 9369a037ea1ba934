"""Volumes on the command line: files, formats, privacy, bad input, a DICOMweb server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from commands import assert_one_line, ibisagent
from orthanc import MISSING, orthanc
from typer.testing import Result
from volume_phantoms import GRIDS, blob, hounsfield, slice_files

from ibisagent.domain import Click, Reply, Stop
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.masks import dice
from ibisagent.protocol import write
from ibisagent.store import read_record
from ibisagent.volumes import SliceView, Volume, read_volume
from ibisagent.volumes import dicomweb as dicomweb
from ibisagent.volumes.writing import masks_on, read_volume_masks, write_nifti

SHAPE = (47, 61, 24)
INSIDE = blob(SHAPE, centre=(20, 33, 11), radii=(13, 12, 8))
PRIVATE = ("Doe", "Jane", "MRN77", "19700102", "20240304", "1970")


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    nib.save(nib.Nifti1Image(hounsfield(INSIDE), GRIDS["LPS-uneven"]), tmp_path / "scan.nii.gz")
    return tmp_path / "scan.nii.gz"


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A policy that clicks on the object's middle, which is there on slices 4 to 18, and stops."""
    size = SliceView(Volume(hounsfield(INSIDE), GRIDS["LPS-uneven"], "scan")).size
    click = Click(20, round(33.5 * 1.3 / 0.7), True, "liver")
    replies = [write(Reply("I look.", (action,)), size, dialect="ibis") for action in (click, Stop("The liver."))]
    (tmp_path / "script.json").write_text(json.dumps(replies))
    return f"scripted:{tmp_path / 'script.json'}"


def segment(*arguments: object, script: str) -> Result:
    return ibisagent("segment", *arguments, "--policy", script, "--segmenter", "region", "--recheck", 0)


def test_a_volume_is_segmented(tmp_path: Path, scan: Path, script: str) -> None:
    out = tmp_path / "out"
    result = segment(scan, "the liver", "-o", out, "--slices", "8,12,16", "--json", script=script)
    assert result.exit_code == 0, result.output
    [told] = json.loads(result.stdout)["results"]
    masks, affine = read_volume_masks(told["masks"]["liver"]["nifti"])
    np.testing.assert_allclose(affine, GRIDS["LPS-uneven"], atol=1e-4)
    middle = slice(6, 18)
    assert dice(masks["mask"][:, :, middle].reshape(47, -1), INSIDE[:, :, middle].reshape(47, -1)) > 0.85
    assert told["measures"]["liver"]["volume_ml"] == pytest.approx(masks["mask"].sum() * 0.7 * 1.3 * 4.1 / 1000)
    record = json.loads((out / "scan_record.json").read_text())
    assert [asked["slice"] for asked in record["asked"]] == [8, 12, 16]
    assert record["made_by"]["segmenter"] == "region"
    assert record["cost"] == told["cost"]
    assert told["cost"]["policy_calls"] == 6
    for asked in record["asked"]:
        episode = read_record(out / asked["records"][0])
        assert episode.masks["liver"].any()
    assert {path.name for path in out.iterdir()} == {
        "scan_mask_liver.nii.gz",
        "scan_measures.json",
        "scan_measures.csv",
        "scan_overlay.png",
        "scan_record.json",
        *(f"scan_slice-{index:04d}_record.json" for index in (8, 12, 16)),
    }


def test_the_result_of_a_volume_is_kept_and_another_is_never_replaced(tmp_path: Path, scan: Path, script: str) -> None:
    out = tmp_path / "out"

    def run(source: Path, *more: object) -> Result:
        return segment(source, "the liver", "-o", out, "--slices", "8,12", "--json", *more, script=script)

    assert run(scan).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    [kept] = json.loads(run(scan).stdout)["results"]
    assert kept == {"image": str(scan), "record": str(out / "scan_record.json"), "kept": True}
    [refused] = json.loads(run(scan, "--window", "lung").stdout)["results"]
    assert "window" in refused["error"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    other = tmp_path / "other" / "scan.nii.gz"
    other.parent.mkdir()
    nib.save(nib.Nifti1Image(hounsfield(INSIDE) + 1, GRIDS["LPS-uneven"]), other)
    [made] = json.loads(run(other).stdout)["results"]
    assert Path(made["record"]).name.startswith("scan_liver-")
    assert before.items() <= {path.name: path.read_bytes() for path in out.iterdir()}.items()
    [again] = json.loads(run(scan, "--window", "lung", "--overwrite").stdout)["results"]
    assert again["record"] == str(out / "scan_record.json")
    assert (out / "scan_record.json").read_bytes() != before["scan_record.json"]


def test_dicom_comes_out_of_dicom_and_names_nobody_elsewhere(tmp_path: Path, script: str) -> None:
    slice_files(tmp_path / "Doe_Jane_MRN77", hounsfield(INSIDE), GRIDS["LPS-uneven"])
    out = tmp_path / "out"
    formats = [part for name in ("nifti", "seg", "sr", "rle", "png") for part in ("--format", name)]
    result = segment(tmp_path / "Doe_Jane_MRN77", "liver", "-o", out, "--slices", "::4", *formats, script=script)
    assert result.exit_code == 0, result.output
    assert "names the patient as its source does" in result.stdout
    volume = read_volume(tmp_path / "Doe_Jane_MRN77")
    seg, stack = masks_on(volume, out / f"{volume.name}_seg.dcm"), masks_on(volume, out / f"{volume.name}_mask_liver")
    np.testing.assert_array_equal(seg["liver"], stack["mask"])
    written = [path for path in out.rglob("*") if path.is_file()]
    assert len(written) > SHAPE[2]
    for path in written:
        assert not [word for word in PRIVATE if word in path.name], path
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = bytes(nib.load(path).header.structarr.tobytes())
        if path.suffix != ".dcm":
            assert not [word for word in PRIVATE if word.encode() in content], path
    # the line that says what was read is the user's own path; nothing below it names anybody
    said = "\n".join(result.output.splitlines()[1:]).replace(str(out), "")
    assert not [word for word in PRIVATE if word in said]
    assert pydicom.dcmread(out / f"{volume.name}_sr.dcm").PatientID == "MRN77"


def test_a_lone_dicom_image_is_a_volume_of_one_slice(tmp_path: Path, script: str) -> None:
    [file] = slice_files(tmp_path / "one", hounsfield(INSIDE)[:, :, 11:12], GRIDS["LPS-uneven"])
    result = segment(file, "liver", "-o", tmp_path / "out", script=script)
    assert result.exit_code == 0, result.output
    [mask] = (tmp_path / "out").glob("*_mask_liver.nii.gz")
    assert dice(read_volume_masks(mask)[0]["mask"][:, :, 0], INSIDE[:, :, 11]) > 0.9


def test_a_start_mask_is_refined(tmp_path: Path, scan: Path, script: str) -> None:
    volume = read_volume(scan)
    write_nifti(INSIDE, volume, tmp_path / "start.nii.gz")
    result = segment(
        scan, "liver", "-o", tmp_path / "out", "--start-mask", tmp_path / "start.nii.gz", "--json", script=script
    )
    assert result.exit_code == 0, result.output
    asked = json.loads((tmp_path / "out" / "scan_record.json").read_text())["asked"]
    shown = np.flatnonzero(INSIDE.any(axis=(0, 1)))
    assert [row["slice"] for row in asked] == sorted({*(int(k) for k in shown[::10]), int(shown[-1])})
    wrong = Volume(hounsfield(INSIDE)[:, :, :-1], GRIDS["LPS-uneven"], "scan")
    write_nifti(INSIDE[:, :, :-1], wrong, tmp_path / "wrong.nii.gz")
    result = segment(scan, "liver", "-o", tmp_path / "no", "--start-mask", tmp_path / "wrong.nii.gz", script=script)
    assert_one_line(result, "wrong.nii.gz", "resample the mask onto its grid")
    assert not list((tmp_path / "no").iterdir())


def test_a_record_is_replayed_without_its_policy(tmp_path: Path, scan: Path, script: str) -> None:
    """Searched for, and with rechecks; and as a refinement of a start mask, on an axis and at a window of its own."""
    write_nifti(INSIDE, read_volume(scan), tmp_path / "start.nii.gz")
    searched, refined = tmp_path / "searched", tmp_path / "refined"
    for out, options in (
        (searched, ("--recheck", 2)),
        (refined, ("--start-mask", tmp_path / "start.nii.gz", "--axis", "coronal", "--window", "40/600")),
    ):
        made = ibisagent("segment", scan, "liver", "-o", out, *options, "-p", script, "-s", "region")
        assert made.exit_code == 0, made.output
        again = tmp_path / "again" / out.name
        replayed = ibisagent("replay", out / "scan_record.json", "--image", scan, "-o", again)
        assert replayed.exit_code == 0, replayed.output
        assert "give the recorded masks bit for bit (liver)" in replayed.stdout
        files = {path.name: path.read_bytes() for path in out.iterdir()}
        rebuilt = {path.name: path.read_bytes() for path in again.iterdir()}
        assert rebuilt.keys() == files.keys()
        for name in files:
            if not name.endswith(".gz"):  # which hold the time
                assert rebuilt[name] == files[name], name
        masks = [read_volume_masks(folder / "scan_mask_liver.nii.gz")[0]["mask"] for folder in (out, again)]
        np.testing.assert_array_equal(*masks)

    record = searched / "scan_record.json"
    assert {asked["why"] for asked in json.loads(record.read_text())["asked"]} > {"search"}
    assert_one_line(ibisagent("replay", record), "scan is not there", "--image")
    scan.rename(searched / "scan.nii.gz")
    assert ibisagent("replay", record).exit_code == 0  # found beside the record
    other = hounsfield(INSIDE, seed=1)
    nib.save(nib.Nifti1Image(other, GRIDS["LPS-uneven"]), tmp_path / "other.nii.gz")
    assert_one_line(ibisagent("replay", record, "--image", tmp_path / "other.nii.gz"), "is not the image of the record")
    nib.save(nib.Nifti1Image(other, GRIDS["RAS-uneven"]), tmp_path / "other.nii.gz")
    assert_one_line(ibisagent("replay", record, "--image", tmp_path / "other.nii.gz"), "has another grid")
    changed = json.loads(record.read_text())
    changed["masks_sha256"]["liver"] = "0" * 64
    record.write_text(json.dumps(changed))
    assert_one_line(ibisagent("replay", record), "'liver' cannot be rebuilt bit for bit")
    del changed["recheck"]
    record.write_text(json.dumps(changed))
    assert_one_line(ibisagent("replay", record), "lacks 'recheck'")


def test_what_cannot_be_used_is_one_line(tmp_path: Path, scan: Path, script: str) -> None:
    cut = tmp_path / "cut.nii.gz"
    cut.write_bytes(scan.read_bytes()[:900])
    out = tmp_path / "out"
    assert_one_line(segment(cut, "liver", "-o", out, script=script), "cut.nii.gz", "damaged, cut off")
    assert_one_line(segment(scan, "liver", "-o", out, "--axis", "up", script=script), "unknown axis 'up'")
    assert_one_line(segment(scan, "liver", "-o", out, "--slices", "99", script=script), "give 0 to 23")
    assert_one_line(segment(scan, "liver", "-o", out, "--window", "lungs", script=script), "unknown window")
    assert_one_line(segment(scan, "liver", "-o", out, "--format", "gif", script=script), "unknown format 'gif'")
    assert_one_line(segment(scan, "liver", "-o", out, "--format", "seg", script=script), "needs a DICOM source")
    assert_one_line(segment(scan, "liver", "-o", out, "--store", "http://127.0.0.1:9", script=script), "--format seg")
    assert not list(out.glob("*"))
    both = segment(cut, scan, "liver", "-o", out, "--slices", "11", script=script)
    assert both.exit_code == 2
    assert (out / "scan_record.json").exists()  # the other one is done


def test_a_remote_model_is_said_to_get_images(tmp_path: Path, scan: Path, script: str) -> None:
    options = ("--policy", script, "--segmenter", "remote:http://127.0.0.1:9")
    result = ibisagent("segment", scan, "liver", "-o", tmp_path, *options)
    assert result.exit_code == 2
    assert result.stderr.splitlines()[0] == "images are sent to http://127.0.0.1:9"
    result = ibisagent("segment", scan, "liver", "-o", tmp_path, "--policy", "one-shot:endpoint:http://127.0.0.1:9#m")
    assert result.stderr.splitlines()[0] == "images are sent to http://127.0.0.1:9"


def test_addresses_are_checked(tmp_path: Path, script: str) -> None:
    with pytest.raises(ConfigError, match="names no study"):
        dicomweb.fetch_series("http://127.0.0.1:9/dicom-web", tmp_path)
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/dicom-web: cannot be reached"):
        dicomweb.fetch_series("http://me:secret@127.0.0.1:9/dicom-web/studies/1.2/series/1.3", tmp_path)


# ------------------------------------------------------------------------------------------------------------ Orthanc


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Its DICOMweb address; ended with the test."""
    if MISSING:
        pytest.skip(MISSING)
    with orthanc(tmp_path) as address:
        yield address


def test_from_a_server_and_back(tmp_path: Path, script: str, server: str) -> None:
    files = slice_files(tmp_path / "series", hounsfield(INSIDE), GRIDS["LPS-uneven"])
    dicomweb.store(server, files)
    header = pydicom.dcmread(files[0])
    study = f"{server}/studies/{header.StudyInstanceUID}"
    out = tmp_path / "out"
    result = segment(
        f"{study}/series/{header.SeriesInstanceUID}",
        "liver",
        "-o",
        out,
        *("--slices", "::4", "--format", "seg", "--format", "sr", "--store", server),
        script=script,
    )
    assert result.exit_code == 0, result.output
    assert f"are sent to {server}" in result.stderr
    volume = read_volume(tmp_path / "series")
    mine = masks_on(volume, out / f"{volume.name}_seg.dcm")["liver"]
    made = {str(pydicom.dcmread(path).Modality): pydicom.dcmread(path) for path in out.glob("*.dcm")}
    assert set(made) == {"SEG", "SR"}
    for modality, dataset in made.items():
        (tmp_path / modality).mkdir()
        dicomweb.fetch_series(f"{study}/series/{dataset.SeriesInstanceUID}", tmp_path / modality)
        [back] = (tmp_path / modality).iterdir()
        assert pydicom.dcmread(back).SOPInstanceUID == dataset.SOPInstanceUID
        if modality == "SEG":
            np.testing.assert_array_equal(masks_on(volume, back)["liver"], mine)
    # the study has one series of images: its address is enough, masks and reports are not mistaken for it
    (tmp_path / "study").mkdir()
    dicomweb.fetch_series(study, tmp_path / "study")
    np.testing.assert_array_equal(read_volume(tmp_path / "study").voxels, volume.voxels)
    with pytest.raises(DataError, match=r"dicom-web: (the server answered 404|the server has no such series)"):
        dicomweb.fetch_series(f"{study}/series/1.2.3", tmp_path / "study")


def test_the_series_of_a_study_on_a_server(tmp_path: Path, server: str) -> None:
    from ibisagent.volumes.series import list_series

    study = pydicom.uid.generate_uid()
    for number, slices in ((2, 24), (1, 3)):
        values = hounsfield(INSIDE)[:, :, :slices]
        facts = {"SeriesNumber": number, "SeriesDescription": f"Thorax {number}", "StudyInstanceUID": study}
        dicomweb.store(server, slice_files(tmp_path / str(number), values, GRIDS["LPS-uneven"], **facts))
    found = {one.series_number: one for one in list_series(f"{server}/studies/{study}")}
    assert found["2"].description == "Thorax 2"
    assert (found["2"].slices, found["1"].slices, found["2"].plane) == (24, 3, "axial")
    assert found["2"].spacing_mm == pytest.approx((0.7, 1.3, 4.1))
    assert found["2"].place.startswith(f"{server}/studies/{study}/series/")
    told = ibisagent("data", "series", f"{server}/studies/{study}", "--json")
    assert len(json.loads(told.stdout)["series"]) == 2
