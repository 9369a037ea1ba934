"""Series below a folder: what the list tells, which are chosen, whole folders in one resumable run, slice numbers."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import ibisagent
from volume_phantoms import GRIDS, blob, changed, hounsfield, slice_files

from ibisagent.domain import Click, Reply, Stop
from ibisagent.errors import ConfigError, DataError
from ibisagent.inference.batch import Batch, PassedOver, VolumeOptions, VolumeResult
from ibisagent.inference.studies import segment_studies
from ibisagent.inference.volume import choose_slices
from ibisagent.policies import load_policy
from ibisagent.protocol import write
from ibisagent.segmenters import load_segmenter
from ibisagent.volumes import SliceView, read_volume
from ibisagent.volumes.label_maps import write_label_map
from ibisagent.volumes.rtstruct import read_rtstruct
from ibisagent.volumes.series import list_series, parse_selection
from ibisagent.volumes.writing import read_volume_masks

SHAPE = (31, 27, 8)
VALUES = hounsfield(blob(SHAPE))


def series(folder: Path, number: int, *, slices: int = 8, grid: str = "LPS-uneven", **attributes: object) -> list[Path]:
    return slice_files(folder, VALUES[:, :, :slices], GRIDS[grid], SeriesNumber=number, **attributes)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Two studies: a CT, its scout, a diffusion MR; a sagittal CT and a gappy one in one folder."""
    root = tmp_path / "studies"
    series(root / "a" / "ct", 2, SeriesDescription="Thorax B70 lung")
    series(root / "a" / "scout", 1, slices=1, SeriesDescription="Scout")
    for weight in (0, 800):
        for file in series(root / "a" / "mr", 5, Modality="MR", SeriesDescription="ep2d_diff", EchoTime="61.5"):
            changed(file, DiffusionBValue=float(weight), SeriesInstanceUID="1.2.3.5")
            shutil.move(file, file.with_name(f"{file.name}-{weight}"))
    series(root / "b", 7, grid="PIR-even", SeriesDescription="Sagittal")
    [gone, *_] = [file for file in series(root / "b" / "gap", 8) if "IM0003" in file.name]
    gone.unlink()
    return root


@pytest.fixture
def script(tmp_path: Path) -> str:
    size = SliceView(read_volume_of(tmp_path / "one")).size
    click = Click(12, round(14.5 * 1.3 / 0.7), True, "liver")
    replies = [write(Reply("I look.", (action,)), size, dialect="ibis") for action in (click, Stop("The liver."))]
    (tmp_path / "script.json").write_text(json.dumps(replies))
    return f"scripted:{tmp_path / 'script.json'}"


def read_volume_of(folder: Path) -> object:
    series(folder, 1)
    return read_volume(folder)


def test_the_list_tells_what_each_series_is(studies: Path) -> None:
    found = {one.series_number: one for one in list_series(studies)}
    assert list(found) == ["1", "2", "5", "7", "8"]
    ct = found["2"]
    assert (ct.number, ct.modality, ct.description, ct.slices, ct.size) == (2, "CT", "Thorax B70 lung", 8, SHAPE[:2])
    assert ct.spacing_mm == pytest.approx((0.7, 1.3, 4.1))
    assert (ct.plane, found["7"].plane, ct.problem) == ("axial", "sagittal", "")
    assert ct.place == str(studies / "a" / "ct")
    assert found["5"].b_values == (0, 800)
    assert found["5"].echo_times_ms == (61.5,)
    assert "2 volumes on one grid" in found["5"].problem
    assert "slice" in found["8"].problem
    result = ibisagent("data", "series", studies, "--json")
    told = json.loads(result.stdout)["series"]
    assert [one["series_number"] for one in told] == list(found)
    assert told[1]["files"] == 8
    shown = ibisagent("data", "series", studies)
    assert shown.exit_code == 0
    assert "Thorax B70" in shown.stdout


def test_a_refusal_names_every_series_and_the_list(tmp_path: Path) -> None:
    for number in range(1, 13):
        series(tmp_path / f"s{number}", number, slices=2, SeriesDescription=f"Thorax {number} lung")
    with pytest.raises(DataError, match=r"12 \(CT, Thorax 12 lung, 2 files\).*'ibisagent data series'"):
        read_volume(tmp_path)
    [sixth] = [one for one in list_series(tmp_path) if one.number == 6]
    assert sixth.series_number == "6"
    assert read_volume(tmp_path, series="6").name == read_volume(tmp_path / "s6").name


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("all", ["1", "2", "7"]),
        ("CT axial >= 5 slices", ["2"]),
        ("sagittal", ["7"]),
        ("ct <= 1 mm", ["7"]),
        ("'LUNG'", ["2"]),
        ("CT axial < 5 slices", ["1"]),
        ("MR", []),
    ],
)
def test_a_choice_in_words(studies: Path, text: str, chosen: list[str]) -> None:
    selection = parse_selection(text)
    assert [one.series_number for one in list_series(studies) if not selection.why_not(one)] == chosen


@pytest.mark.parametrize("text", ["", "  ", "CT axial >= many slices", "transverse", "CT >= 20 bananas", "axial;"])
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="selection"):
        parse_selection(text)


def test_whole_folders_resume_and_list_what_they_passed_over(tmp_path: Path, studies: Path, script: str) -> None:
    out = tmp_path / "out"
    common = ("segment", studies, "the liver", "--select", "CT axial >= 5 slices", "--select", "sagittal", "-o", out)
    common = (*common, "--policy", script, "--segmenter", "region", "--recheck", 0, "--slices", "::3")
    first = ibisagent(*common, "--format", "rtstruct", "--format", "seg.nrrd")
    assert first.exit_code == 0, first.output
    rows = list(csv.DictReader((out / "series.csv").read_text().splitlines()))
    assert [(row["series_number"], row["outcome"]) for row in rows] == [
        ("1", "passed over"),
        ("2", "segmented"),
        ("5", "passed over"),
        ("7", "segmented"),
        ("8", "passed over"),
    ]
    assert rows[0]["why"] == "has 1 slices, not >= 5"
    assert "2 volumes on one grid" in rows[2]["why"]
    name = rows[1]["record"].removesuffix("_record.json")
    volume = read_volume(studies / "a" / "ct")
    drawn = read_rtstruct(out / f"{name}_rtstruct.dcm", volume)["liver"]
    layers, _ = read_volume_masks(out / f"{name}_masks.seg.nrrd")
    np.testing.assert_array_equal(drawn, layers["liver"])
    assert drawn.any()
    before = {file: file.stat().st_mtime_ns for file in out.iterdir() if file.name != "series.csv"}
    (out / rows[3]["record"]).unlink()  # as if killed before it was done
    again = ibisagent(*common, "--format", "rtstruct", "--format", "seg.nrrd", "--json")
    assert again.exit_code == 0, again.output
    told = json.loads(again.stdout)["results"]
    assert ["kept" in one for one in told] == [False, True, False, False, False]
    rows = list(csv.DictReader((out / "series.csv").read_text().splitlines()))
    assert [row["outcome"] for row in rows][1::2] == ["segmented before", "segmented"]
    kept = [file for file in before if file.name.startswith(name)]
    assert all(file.stat().st_mtime_ns == before[file] for file in kept)
    assert set(before) == {file for file in out.iterdir() if file.name != "series.csv"}


def test_one_object_of_a_start_mask(tmp_path: Path, script: str) -> None:
    volume = read_volume(tmp_path / "one")
    spot = np.zeros(SHAPE, bool)
    spot[3:6, 3:6, 3:6] = True
    write_label_map({"organ": blob(SHAPE), "spot": spot}, volume, tmp_path / "labels.nii.gz")
    common = ("segment", tmp_path / "one", "the liver", "--policy", script, "--segmenter", "region", "--recheck", 0)
    common = (*common, "--start-mask", tmp_path / "labels.nii.gz", "-o", tmp_path / "out", "--json")
    refused = ibisagent(*common)
    assert refused.exit_code == 2
    assert "'organ', 'spot'; say which one to refine with --label" in json.loads(refused.stdout)["results"][0]["error"]
    done = ibisagent(*common, "--label", "Spot")
    assert done.exit_code == 0, done.output
    record = json.loads(Path(json.loads(done.stdout)["results"][0]["record"]).read_text())
    assert {asked["slice"] for asked in record["asked"]} <= {3, 4, 5}


def test_slices_by_the_numbers_that_viewers_show(tmp_path: Path) -> None:
    files = slice_files(tmp_path / "one", VALUES, GRIDS["LPS-uneven"], shuffle=False)
    for number, file in enumerate(files):
        changed(file, InstanceNumber=100 - number)  # from head to foot
    view = SliceView(read_volume(tmp_path / "one"))
    assert choose_slices(view, "instance 100,93") == [0, 7]
    assert choose_slices(view, "instance 95:98") == [3, 4, 5]
    assert choose_slices(view, "1,3") == [1, 3]
    with pytest.raises(ConfigError, match="has 93 to 100"):
        choose_slices(view, "instance 12")
    across = SliceView(read_volume(tmp_path / "one"), axis="sagittal")
    with pytest.raises(ConfigError, match="as they were taken"):
        choose_slices(across, "instance 95")


def test_whole_folders_from_python(tmp_path: Path, studies: Path, script: str) -> None:
    options = VolumeOptions(slices="::3", recheck=0, formats=("labels",))
    batch = Batch(load_policy(script), load_segmenter("region"), "the liver", tmp_path / "out", volumes=options)
    results = list(segment_studies(batch, [str(studies)], [parse_selection("CT axial >= 5 slices")]))
    assert [type(one) for one in results] == [PassedOver, VolumeResult, PassedOver, PassedOver, PassedOver]
    assert isinstance(results[1], VolumeResult)
    assert results[1].outputs.masks["liver"]["labels"].name.endswith("_labels.nii.gz")
    with pytest.raises(ConfigError, match="no series is chosen"):
        list(segment_studies(batch, [str(studies)], []))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no DICOM file"):
        list(segment_studies(batch, [str(tmp_path / "empty")], [parse_selection("all")]))
