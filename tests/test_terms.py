"""Coded terms and colours of objects: codes that DICOM's dictionary holds, for every name that is known."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from pydicom.sr._concepts_dict import concepts

from ibisagent.generation.teacher.phrasings import DESCRIPTIONS
from ibisagent.volumes import terms
from ibisagent.volumes.terms import colours, term

TABLE = list(csv.DictReader((Path(terms.__file__).parent / "terms.csv").read_text(encoding="utf-8").splitlines()))
MEANINGS: dict[str, set[str]] = {}
for keyword in concepts["SCT"].values():
    for value, (meaning, _) in keyword.items():
        MEANINGS.setdefault(value, set()).add(meaning.casefold())


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row["name"])
def test_every_code_is_in_the_dictionary_of_dicom(row: dict[str, str]) -> None:
    assert row["category"]
    assert row["type"]
    for column in ("category", "type", "modifier", "region"):
        if row[column]:
            value, meaning = row[column].split(" ", 1)
            assert any(known.startswith(meaning.casefold()) for known in MEANINGS[value]), row[column]
    assert len(bytes.fromhex(row["colour"][1:])) == 3


def test_names_that_questions_are_asked_about_are_known() -> None:
    names = {row["name"] for row in TABLE}
    assert set(DESCRIPTIONS) <= names
    assert all(term(name).known for name in DESCRIPTIONS)


def test_sides_spellings_and_findings() -> None:
    assert term("left kidney").kind.meaning == "Kidney"
    assert term("Right_Kidney").modifier == terms.Code("24028007", "Right")
    assert term("kidneys") == term("kidney")
    assert term("Brain tumour") == term("brain tumor")
    assert term("oesophagus").kind.value == "32849002"
    cyst = term("pancreas cyst")
    assert (cyst.kind.meaning, cyst.region and cyst.region.meaning) == ("Cyst", "Pancreas")
    assert term("ovarian cancer").kind.meaning == "Neoplasm"  # the organ is not known, the finding is
    assert term("ovarian cancer").region is None
    assert term("cartilage").kind.meaning == "Cartilage"  # by DICOM's own context groups
    assert not term("gizmo").known
    assert term("gizmo") == term("Gizmo")


def test_colours_differ_within_a_file() -> None:
    chosen = colours(["liver", "liver tumor", "lung tumor", "kidney tumor", "gizmo", "gadget"])
    assert len(set(chosen.values())) == len(chosen)
    assert chosen["liver"] == term("liver").colour
    assert chosen["liver tumor"] == term("liver tumor").colour
