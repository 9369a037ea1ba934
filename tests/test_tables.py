"""Tables that a spreadsheet opens: no name from outside becomes a formula, and what is written is read back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibisagent.datasets import read_cases
from ibisagent.evaluation import tables
from ibisagent.evaluation.results import CaseResult, Evaluation
from ibisagent.files import csv_text, markdown_cell, plain_cell
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.volumes.measures import Measures, write_measures

SOURCE = Path(__file__).parent.parent / "src" / "ibisagent"

FORMULAS = ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", " =1", "'=1", "\uff1d1", "=HYPERLINK(0)"]


def cells(table: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(table, newline="")))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_written_as_text_and_read_back(text: str) -> None:
    [[written]] = cells(csv_text([[text]]))
    assert written == f"'{text}"
    assert plain_cell(written) == text


@pytest.mark.parametrize("value", ["-0.25", "+0.1", "-1e-05", "-inf", "-12", "left-sided", "a=b", "'quoted'", ""])
def test_numbers_and_other_texts_stay_as_they_are(value: str) -> None:
    [[written, *_]] = cells(csv_text([[value, "x"]]))
    assert written == value == plain_cell(written)


def test_numbers_are_never_defused() -> None:
    assert csv_text([["a", "b", "c"], [-1, -0.5, None]]) == "a,b,c\n-1,-0.5,\n"


@given(st.text().filter(lambda text: "\0" not in text))
def test_every_text_is_read_back(text: str) -> None:
    [[written, _]] = cells(csv_text([[text, "x"]]))
    assert plain_cell(written) == text


def test_tables_of_an_evaluation_run_nothing() -> None:
    name = "=HYPERLINK(1)"
    results = [CaseResult(f"{name}|{part}", name, name, name, name, None, {"iou": -0.5}) for part in ("a", "b")]
    written = tables.files(Evaluation({}, tuple(results), ()))
    for file in ("cases.csv", "summary.csv"):
        for row in cells(written[file]):
            assert not any(cell.startswith("=") for cell in row), row
    assert "-0.5" in cells(written["cases.csv"])[1]


def test_measurements_run_nothing(tmp_path: Path) -> None:
    write_measures({"=1+1": Measures(1, -1.0, None, None, None, None, None)}, "@scan", tmp_path / "m.csv")
    _, row = cells((tmp_path / "m.csv").read_text())
    assert row[:4] == ["'@scan", "'=1+1", "1", "-1.0"]


def test_a_manifest_names_the_files_that_are_meant(tmp_path: Path) -> None:
    for name in ("=a.png", "-b.png"):
        write_png(np.full((6, 8, 3), 9, np.uint8), tmp_path / name)
        write_mask_png(np.ones((6, 8), dtype=bool), tmp_path / f"{name}-mask.png")
    rows = [["image", "mask", "object"], *([name, f"{name}-mask.png", "+disc"] for name in ("=a.png", "-b.png"))]
    (tmp_path / "index.csv").write_text(csv_text(rows))
    assert [row.image.name for row in read_cases(tmp_path).rows] == ["=a.png", "-b.png"]
    assert {row.object for row in read_cases(tmp_path).rows} == {"+disc"}
    bare = (tmp_path / "index.csv").read_text().replace("'", "")  # as other programs write it
    (tmp_path / "index.csv").write_text(bare)
    assert [row.image.name for row in read_cases(tmp_path).rows] == ["=a.png", "-b.png"]


def test_markdown_cells_hold_no_markup() -> None:
    assert markdown_cell("a | b\n<script>[x](y)") == "a / b &lt;script>\\[x](y)"


def test_tables_are_written_in_one_place() -> None:
    for file in SOURCE.rglob("*.py"):
        if file.name != "files.py":
            text = file.read_text(encoding="utf-8")
            assert "csv.writer" not in text, f"{file.name} writes CSV by itself; take files.csv_text"
            assert "DictWriter" not in text, f"{file.name} writes CSV by itself; take files.csv_text"
