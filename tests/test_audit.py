"""Spoiled masks come first, with the reason; files that cannot be read are told."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from commands import ibisagent

from ibisagent.datasets import read_cases
from ibisagent.domain import Image
from ibisagent.errors import DataError
from ibisagent.evaluation.audit import MASK_COLOUR, References, audit, describe, draw, redraw, suspicion, write_report
from ibisagent.imaging.images import read_image, write_mask_png, write_png
from ibisagent.segmenters import load_segmenter

SIZE = (90, 121)
PATIENTS = 14


def ellipse(x: float, y: float, across: float, down: float) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return ((columns - x) / across) ** 2 + ((rows - y) / down) ** 2 <= 1


def patient(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(image, liver, spleen) of one of them: alike, never the same."""
    random = np.random.default_rng(number)
    dx, dy, grown = (*random.integers(-3, 4, 2).tolist(), random.uniform(0.9, 1.1))
    liver, spleen = ellipse(38 + dx, 46 + dy, 20 * grown, 25 * grown), ellipse(92 + dx, 40 + dy, 11 * grown, 8 * grown)
    pixels = 40 + 90 * liver[..., None] * np.array([1, 0.8, 0.7]) + 140 * spleen[..., None] * np.array([1, 1, 0.6])
    pixels = pixels + random.normal(0, 4, (*SIZE, 3))
    return pixels.clip(0, 255).astype(np.uint8), liver, spleen


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """28 masks, of which five are wrong: shifted, holed, of the other object, at a place of nothing, too large."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = ["image,mask,object,dataset,patient"]
    for number in range(PATIENTS):
        pixels, liver, spleen = patient(number)
        if number == 2:
            liver = np.roll(liver, 13, axis=1)
        if number == 4:
            liver = liver & ~ellipse(38, 46, 8, 8)
        if number == 6:
            spleen = liver
        if number == 8:
            spleen = ellipse(60, 75, 11, 8)
        if number == 10:
            liver = ellipse(50, 46, 40, 40)
        write_png(pixels, folder / f"{number}.png")
        for name, mask in (("liver", liver), ("spleen", spleen)):
            write_mask_png(mask, folder / f"{number}_{name}.png")
            lines.append(f"{number}.png,{number}_{name}.png,{name},phantoms,p{number}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


WRONG = {"2.png#liver", "4.png#liver", "6.png#spleen", "8.png#spleen", "10.png#liver"}


def test_corrupted_masks_are_the_worst_and_say_why(data: Path) -> None:
    found = audit(read_cases(data), load_segmenter("region"))
    assert len(found.findings) == 2 * PATIENTS
    assert not found.failures
    worst = {finding.case_id: finding for finding in found.findings[:6]}
    assert worst.keys() >= WRONG  # the sixth may be the liver that another name has as well
    assert "it is the mask of 'liver'" in worst["6.png#spleen"].reasons
    assert any("holes make up" in reason for reason in worst["4.png#liver"].reasons)
    assert any("unlike other masks called 'spleen'" in reason for reason in worst["8.png#spleen"].reasons)
    for finding in found.findings:
        assert finding.leaks - finding.missed == finding.pixels - finding.suggestion.sum()
    good = [finding for finding in found.findings if finding.case_id not in WRONG | {"6.png#liver"}]
    assert max(finding.suspicion for finding in good) < min(worst[case_id].suspicion for case_id in WRONG)


def test_a_part_can_be_held_against_all(data: Path) -> None:
    everything = read_cases(data)
    some = everything.filter(lambda row: row.patient in ("p1", "p2"))
    found = audit(some, load_segmenter("region"), among=everything)
    assert found.findings[0].case_id == "2.png#liver"
    alone = audit(some, load_segmenter("region"))  # two patients only: it still works
    assert len(alone.findings) == 4


def test_masks_that_cannot_be_read_are_failures(data: Path) -> None:
    (data / "3_liver.png").write_bytes(b"no image")
    write_mask_png(np.zeros(SIZE, dtype=bool), data / "5_liver.png")
    found = audit(read_cases(data), load_segmenter("region"))
    assert set(found.failures) == {"3.png#liver", "5.png#liver"}
    assert len(found.findings) == 2 * PATIENTS - 2
    (data / "none.csv").write_text("image,mask,object\n1.png,,liver\n")
    with pytest.raises(DataError, match="no row has a mask"):
        audit(read_cases(data / "none.csv"), load_segmenter("region"))


def test_the_report_shows_the_worst(data: Path, tmp_path: Path) -> None:
    cases = read_cases(data)
    found = audit(cases, load_segmenter("region"))
    folder = tmp_path / "report"
    folder.mkdir()
    page = write_report(found, cases, folder, images=3).read_text()
    assert page.count("<img ") == 3
    assert "<h1>28 masks, worst first</h1>" in page
    assert sorted(file.name for file in (folder / "images").iterdir()) == ["001.png", "002.png", "003.png"]
    with (folder / "findings.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case_id"] for row in rows] == [finding.case_id for finding in found.findings]
    assert json.loads((folder / "findings.json").read_text())["failures"] == {}
    image = read_image(folder / "images" / "001.png").pixels
    assert (image == np.array(MASK_COLOUR)).all(axis=2).any()


def test_names_cannot_write_into_the_page(data: Path, tmp_path: Path) -> None:
    index = data / "index.csv"
    index.write_text(index.read_text().replace("spleen,phantoms", "<script>alert(1)</script>,phantoms"))
    cases = read_cases(data)
    page = write_report(audit(cases, load_segmenter("region")), cases, tmp_path, images=30).read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_descriptions_of_a_ring() -> None:
    pixels, liver, _ = patient(0)
    ring = liver & ~ellipse(38, 46, 8, 8)
    share, count = describe(pixels, ring).holes
    assert count == 1
    assert share == pytest.approx(1 - ring.sum() / liver.sum(), abs=0.02)
    assert describe(pixels, liver).holes == (0.0, 0)
    good, moved = describe(pixels, liver).border, describe(pixels, np.roll(liver, 12, axis=0)).border
    assert good[0] > moved[0] + 0.3
    everything = describe(pixels, np.ones(SIZE, dtype=bool))  # no outline, no ring: still finite
    assert np.isfinite(np.concatenate([everything.form, everything.look, everything.border])).all()


def test_a_name_that_nobody_else_has_is_judged_by_the_image_alone(data: Path) -> None:
    rows = read_cases(data).rows
    pixels, liver, _ = patient(1)
    references = References([(rows[0], describe(pixels, liver))])
    signals = references.signals(rows[0], describe(pixels, liver))
    assert signals["form"] == signals["look"] == signals["other form"] == 0
    assert 0 < suspicion({**signals, "segmenter": 0.0, "twin": 0.0}) < 0.5


def test_redraw_and_draw() -> None:
    pixels, liver, _ = patient(1)
    image = Image(pixels)
    assert redraw(image, liver, load_segmenter("ellipse")).sum() == pytest.approx(liver.sum(), rel=0.1)
    assert draw(image, liver, np.zeros(SIZE, dtype=bool)).shape == (333, 896, 3)
    with pytest.raises(DataError, match="without any pixel"):
        redraw(image, np.zeros(SIZE, dtype=bool), load_segmenter("ellipse"))


def test_the_command_lists_the_worst_first(data: Path, tmp_path: Path) -> None:
    (data / "3_liver.png").write_bytes(b"no image")
    out = tmp_path / "out"
    result = ibisagent("data", "audit", data, "-o", out, "-s", "region", "--images", 2)
    assert result.exit_code == 2  # one mask could not be looked at
    assert "27 masks, worst first" in result.output
    assert "3_liver.png" in result.output
    assert (out / "index.html").is_file()
    result = ibisagent("data", "audit", data, "-o", out, "-s", "region", "--limit", 5, "--json")
    assert len(json.loads(result.stdout)["findings"]) == 5
