"""Folders and manifests become cases; bad input is told in one line that names the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from phantoms import SIZE, disc

from ibisagent.datasets import CaseRow, read_cases, split_by_patient
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.images import write_mask_png, write_png


def make_image(*masks: np.ndarray) -> np.ndarray:
    pixels = np.full((*SIZE, 3), 40, dtype=np.uint8)
    for number, mask in enumerate(masks):
        pixels[mask] = (200 - 50 * number, 120, 90)
    return pixels


SPLEEN, LIVER = disc(20, 30, 9), disc(55, 25, 14)


def write_data_set(folder: Path, name: str = "Set", split: str = "train", stem: str = "p_1_CT_abdomen") -> Path:
    """One image with two objects in the BiomedParseData layout."""
    images, masks = folder / name / split, folder / name / f"{split}_mask"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    write_png(make_image(SPLEEN, LIVER), images / f"{stem}.png")
    write_mask_png(SPLEEN, masks / f"{stem}_spleen.png")
    write_mask_png(LIVER, masks / f"{stem}_left+liver+lobe.png")
    return folder / name


def write_csv(path: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_png(make_image(SPLEEN, LIVER), tmp_path / "a.png")
    write_mask_png(SPLEEN, tmp_path / "a_spleen.png")
    write_mask_png(LIVER, tmp_path / "a_liver.png")
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[SPLEEN], labels[LIVER] = 3, 7
    write_png(labels, tmp_path / "labels.png")
    return tmp_path


def test_biomedparse_names_tell_everything(tmp_path: Path) -> None:
    source = read_cases(write_data_set(tmp_path))
    assert [row.object for row in source.rows] == ["left liver lobe", "spleen"]
    case = source[1]
    assert case.id == "Set/train/p_1_CT_abdomen.png#spleen"
    assert case.query == "Segment the spleen."
    assert dict(case.meta) == {
        "object": "spleen",
        "modality": "CT",
        "site": "abdomen",
        "dataset": "Set",
        "split": "train",
    }
    assert case.targets is not None
    assert np.array_equal(case.targets["spleen"], SPLEEN)
    assert np.array_equal(case.image.pixels, make_image(SPLEEN, LIVER))


def test_a_case_has_the_same_id_however_its_data_are_opened(tmp_path: Path) -> None:
    write_data_set(tmp_path, "Set")
    write_data_set(tmp_path, "Other", split="val")
    together, alone = read_cases(tmp_path), read_cases(tmp_path / "Set")
    assert len(together) == 4
    assert {row.id for row in alone.rows} < {row.id for row in together.rows}
    image, mask = "Set/train/p_1_CT_abdomen.png", "Set/train_mask/p_1_CT_abdomen_spleen.png"
    write_csv(tmp_path / "index.csv", [{"image": image, "mask": mask, "object": "spleen"}])
    assert [row.id for row in read_cases(tmp_path).rows] == ["Set/train/p_1_CT_abdomen.png#spleen"]


def test_the_longest_image_name_owns_a_mask(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path, stem="p_1_CT_abdomen")
    write_data_set(tmp_path, stem="p_1_CT_abdomen_2_CT_chest")
    rows = read_cases(folder).rows
    assert sorted((row.image.stem, row.object) for row in rows) == [
        ("p_1_CT_abdomen", "left liver lobe"),
        ("p_1_CT_abdomen", "spleen"),
        ("p_1_CT_abdomen_2_CT_chest", "left liver lobe"),
        ("p_1_CT_abdomen_2_CT_chest", "spleen"),
    ]


def test_manifest_with_labels_patients_and_absent_objects(files: Path) -> None:
    rows = [
        {"image": "a.png", "mask": "labels.png", "label": 3, "object": "spleen", "modality": "CT", "patient": "anna"},
        {"image": "a.png", "mask": "labels.png", "label": "7", "object": "liver", "query": "Where is the liver?"},
        {"image": "a.png", "mask": None, "object": "kidney", "dataset": "D", "case": 12},
        {"image": "a.png", "mask": "", "object": "", "query": "Is there a kidney?", "answer": "no"},
    ]
    path = files / "cases.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    spleen, liver, kidney, question = read_cases(path)
    assert spleen.targets is not None
    assert liver.targets is not None
    assert kidney.targets is not None
    assert np.array_equal(spleen.targets["spleen"], SPLEEN)
    assert np.array_equal(liver.targets["liver"], LIVER)
    assert not kidney.targets["kidney"].any()
    assert (spleen.patient, kidney.patient) == ("anna", "D/12")
    assert liver.query == "Where is the liver?"
    assert question.targets is None
    assert (question.query, question.answer) == ("Is there a kidney?", "no")
    assert len({case.id for case in (spleen, liver, kidney, question)}) == 4


def test_reading_rows_and_filtering_decodes_nothing(files: Path) -> None:
    (files / "a.png").write_bytes(b"no image at all")
    rows = [{"image": "a.png", "mask": f"a_{thing}.png", "object": thing} for thing in ("spleen", "liver")]
    source = read_cases(write_csv(files / "cases.csv", rows))
    assert [row.object for row in source.filter(lambda row: row.object == "liver").rows] == ["liver"]
    assert [row.object for row in source[:1].rows] == ["spleen"]
    assert set(source.by_id) == {"a.png#spleen", "a.png#liver"}
    assert [int(mask.sum()) for _, mask in source.ground_truths()] == [int(SPLEEN.sum()), int(LIVER.sum())]
    with pytest.raises(DataError, match=r"a\.png"):
        source.by_id["a.png#spleen"]


def test_cases_are_found_by_place_and_by_id(files: Path) -> None:
    rows = [{"image": "a.png", "mask": f"a_{thing}.png", "object": thing} for thing in ("spleen", "liver")]
    source = read_cases(write_csv(files / "cases.csv", rows))
    assert [case.id for case in source] == [source[0].id, source[-1].id]
    assert source.by_id["a.png#liver"].id == source[1].id
    assert source[0].image is source[1].image  # decoded once
    with pytest.raises(IndexError):
        source[2]


def test_filters(tmp_path: Path) -> None:
    write_data_set(tmp_path, "Set")
    write_data_set(tmp_path, "Other", split="val", stem="q_MRI_abdomen")
    assert {row.dataset for row in read_cases(tmp_path, split="val").rows} == {"Other"}
    assert {row.dataset for row in read_cases(tmp_path, modalities=["CT"]).rows} == {"Set"}
    assert {row.object for row in read_cases(tmp_path, objects={"spleen"}).rows} == {"spleen"}
    with pytest.raises(ConfigError, match="'vall'; there are: train, val"):
        read_cases(tmp_path, split="vall")
    with pytest.raises(ConfigError, match="licence_class 'ok'"):
        read_cases(tmp_path, licence_classes=["ok"])
    with pytest.raises(DataError, match="no image-mask pair"):
        read_cases(tmp_path, split="val", modalities=["CT"])


def manifest(**cells: str) -> Callable[[Path], Path]:
    row = {"image": "a.png", "mask": "a_spleen.png", "object": "spleen", **cells}
    return lambda folder: write_csv(folder / "cases.csv", [row])


def text_file(name: str, text: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_text(text)
        return folder / name

    return write


BAD_INPUT = {
    "nothing there": (lambda folder: folder / "nowhere", "nowhere: no such file"),
    "an empty folder": (lambda folder: (folder / "empty").mkdir() or folder / "empty", "neither index.csv nor"),
    "another file": (text_file("cases.xlsx", ""), r"cases\.xlsx: a manifest is"),
    "no rows": (text_file("cases.csv", "image,mask,object\n"), r"cases\.csv: no image-mask pair"),
    "no mask column": (text_file("cases.csv", "image,object\na.png,spleen\n"), "row 2: column 'mask' is missing"),
    "unknown column": (manifest(organ="spleen"), "row 2: unknown column 'organ'; known are: image, mask"),
    "missing image": (manifest(image="b.png"), "row 2: image 'b.png' is not in"),
    "missing mask": (manifest(mask="b_spleen.png"), "row 2: mask 'b_spleen.png' is not in"),
    "no object": (manifest(object=""), "row 2: the cell 'object' is empty"),
    "no image cell": (manifest(image=" "), "row 2: the cell 'image' is empty"),
    "endless query": (manifest(query="x" * 10_000), "row 2: the query has 10000 characters"),
    "area as text": (manifest(area="large"), "row 2: could not convert"),
    "torn row": (text_file("cases.csv", "image,mask,object\na.png,a_spleen.png\n"), "row 2: has not as many cells"),
    "no JSON": (text_file("cases.jsonl", '{"image": "a.png"\n'), "row 1: is not JSON"),
    "nested JSON": (text_file("cases.jsonl", '{"image": ["a.png"]}\n'), "row 1: is not a flat JSON object"),
    "same row twice": (
        text_file("cases.csv", "image,mask,object\n" + "a.png,a_spleen.png,spleen\n" * 2),
        r"row 3: 'a\.png#spleen' is already in .* row 2",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(files: Path, name: str) -> None:
    make, message = BAD_INPUT[name]
    with pytest.raises(DataError, match=message) as caught:
        read_cases(make(files))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(files: Path) -> None:
    (files / "cases.csv").write_bytes("image,mask,object\na.png,a_spleen.png,Grä\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"cases\.csv: cannot be read as UTF-8"):
        read_cases(files / "cases.csv")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros(SIZE, dtype=bool), r"row 2: mask .*a_spleen\.png: shows no 'spleen'"),
        (disc(20, 30, 9, (83, 61)), r"row 2: mask .*a_spleen\.png: is 61 x 83, its image 83 x 61 pixels"),
        (np.zeros((83, 61), dtype=bool), r"row 2: mask .*a_spleen\.png: is 61 x 83, its image 83 x 61 pixels"),
    ],
)
def test_masks_that_do_not_fit(files: Path, mask: np.ndarray, message: str) -> None:
    write_mask_png(mask, files / "a_spleen.png")
    source = read_cases(manifest()(files))
    with pytest.raises(DataError, match=message):
        source[0]


def test_label_that_is_not_in_the_mask(files: Path) -> None:
    source = read_cases(manifest(mask="labels.png", label="5")(files))
    with pytest.raises(DataError, match=r"labels\.png"):
        source[0]


def test_mask_without_image(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path)
    write_mask_png(SPLEEN, folder / "train_mask" / "p_2_CT_abdomen_spleen.png")
    with pytest.raises(DataError, match=r"p_2_CT_abdomen_spleen\.png: no image in"):
        read_cases(folder)


def test_two_images_of_one_name(tmp_path: Path) -> None:
    folder = write_data_set(tmp_path)
    (folder / "train" / "p_1_CT_abdomen.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="shares its name with"):
        read_cases(folder)


def rows_of_patients(counts: Sequence[int]) -> list[CaseRow]:
    return [
        CaseRow(f"{patient}-{number}", Path("a.png"), None, "spleen", "spleen?", patient=f"patient {patient}")
        for patient, count in enumerate(counts)
        for number in range(count)
    ]


def test_split_by_patient_keeps_patients_together_and_shares_close() -> None:
    rows = rows_of_patients([1, 2, 3, 4, 5] * 8)
    splits = split_by_patient(rows, {"train": 8, "val": 2}, seed=3)
    patients = {name: {row.patient for row in part} for name, part in splits.items()}
    assert not patients["train"] & patients["val"]
    assert sum(map(len, splits.values())) == len(rows)
    assert {row.split for row in splits["val"]} == {"val"}
    assert abs(len(splits["val"]) / len(rows) - 0.2) < 0.04
    backwards = split_by_patient(rows[::-1], {"train": 8, "val": 2}, seed=3)
    assert {row.patient for row in backwards["val"]} == patients["val"]
    assert {row.patient for row in split_by_patient(rows, {"train": 8, "val": 2}, seed=4)["val"]} != patients["val"]


def test_no_split_stays_empty() -> None:
    splits = split_by_patient(rows_of_patients([50, 1, 1]), {"train": 1, "val": 1, "test": 1})
    assert all(splits.values())


def test_splits_that_cannot_be_made() -> None:
    rows = rows_of_patients([2, 2])
    with pytest.raises(DataError, match="2 patients cannot fill 3 splits"):
        split_by_patient(rows, {"train": 1, "val": 1, "test": 1})
    with pytest.raises(ConfigError, match="above 0"):
        split_by_patient(rows, {"train": 1, "val": 0})
    with pytest.raises(DataError, match="names no patient"):
        split_by_patient([CaseRow("x", Path("a.png"), None, "spleen", "?")], {"train": 1})


def test_splits_are_asked_for_by_kind_or_by_name(tmp_path: Path) -> None:
    names = ["train", "Training", "valid", "val2", "Test", "fold 3", ""]
    rows = ["image,mask,object,split"]
    for number, name in enumerate(names):
        write_png(np.zeros((4, 4, 3), np.uint8), tmp_path / f"{number}.png")
        rows.append(f"{number}.png,,disc,{name}")
    (tmp_path / "rows.csv").write_text("\n".join(rows))

    def splits(asked: str | None) -> list[str]:
        return [row.split for row in read_cases(tmp_path / "rows.csv", split=asked).rows]

    assert splits(None) == names
    assert splits("train") == ["train", "Training"]
    assert splits("val") == ["valid", "val2"]
    assert splits("test") == ["Test"]
    assert splits("valid") == ["valid"]
    assert splits("fold 3") == ["fold 3"]
    with pytest.raises(ConfigError, match=r"no row has split .validation.; there are: .*valid"):
        splits("validation")
