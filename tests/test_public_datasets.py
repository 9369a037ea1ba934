"""Public benchmarks in their own files, made small here; the catalogue; leaks between two data sets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from commands import ibisagent
from phantoms import SIZE, disc
from pycocotools import mask as coco

from ibisagent.datasets import cases_to_judge, layout_of, read_cases
from ibisagent.datasets.catalogue import BENCHMARKS, check_copy
from ibisagent.datasets.leaks import find_leaks, fingerprint, near_duplicates
from ibisagent.domain import Mask
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.images import write_mask_png, write_png

LIVER, SPLEEN = disc(22, 30, 14), disc(60, 25, 8)


def make_image(*masks: Mask, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 60, (*SIZE, 3)).astype(np.uint8)
    for number, mask in enumerate(masks):
        pixels[mask] = (200 - 40 * number, 120, 90)
    return pixels


def ground_truth(folder: Path, index: int) -> Mask:
    case = read_cases(folder)[index]
    (mask,) = (case.targets or {}).values()
    return mask


# BiomedParseData with its JSON


def biomedparse(folder: Path) -> Path:
    for kind in ("test", "test_mask"):
        (folder / "MSD" / "Task09" / kind).mkdir(parents=True)
    home = folder / "MSD" / "Task09"
    for stem in ("p1_CT_abdomen", "p2_CT_abdomen"):
        write_png(make_image(LIVER, SPLEEN), home / "test" / f"{stem}.png")
        for thing, mask in (("liver", LIVER), ("left+spleen", SPLEEN)):
            write_mask_png(mask, home / "test_mask" / f"{stem}_{thing}.png")
    listed = [{"file_name": "p1_CT_abdomen.png", "mask_file": "p1_CT_abdomen_left+spleen.png", "image_id": 0}]
    (home / "test.json").write_text(json.dumps({"images": [], "annotations": listed}))
    return folder


def test_biomedparse_takes_the_pairs_that_its_json_lists(tmp_path: Path) -> None:
    folder = biomedparse(tmp_path / "data")
    (row,) = read_cases(folder).rows
    assert (row.id, row.object, row.split) == ("MSD/Task09/test/p1_CT_abdomen.png#left spleen", "left spleen", "test")
    assert (row.modality, row.site, row.dataset) == ("CT", "abdomen", "MSD/Task09")
    assert np.array_equal(ground_truth(folder, 0), SPLEEN)
    (folder / "MSD" / "Task09" / "test.json").unlink()
    assert len(read_cases(folder)) == 4


# MedSegBench


def medsegbench(folder: Path) -> Path:
    folder.mkdir()
    images = np.stack([make_image(LIVER), make_image(LIVER, SPLEEN), make_image()])
    labels = np.stack([LIVER * 1, LIVER * 1 + SPLEEN * 8, LIVER * 0]).astype(np.uint8)
    np.savez_compressed(folder / "abdomenus_128.npz", test_images=images, test_label=labels)
    np.savez(folder / "kvasir_256.npz", train_images=images[..., 0], train_label=(labels > 0).astype(np.uint8))
    return folder


def test_medsegbench_archives(tmp_path: Path) -> None:
    folder = medsegbench(tmp_path / "data")
    source = read_cases(folder)
    found = [(row.dataset, row.split, row.object, row.modality) for row in source.rows]
    assert found == [
        ("abdomenus", "test", "liver", "ultrasound"),
        ("abdomenus", "test", "liver", "ultrasound"),
        ("abdomenus", "test", "spleen", "ultrasound"),
        ("kvasir", "train", "polyp", "endoscope"),
        ("kvasir", "train", "polyp", "endoscope"),
    ]  # the image that shows nothing is no case
    assert np.array_equal(source[1].image.pixels, make_image(LIVER, SPLEEN))
    assert np.array_equal(ground_truth(folder, 2), SPLEEN)
    assert np.array_equal(ground_truth(folder, 4), LIVER | SPLEEN)
    grey = source[3].image.pixels
    assert (grey == make_image(LIVER)[..., :1]).all()
    assert [row.dataset for row in read_cases(folder / "kvasir_256.npz").rows] == ["kvasir", "kvasir"]


def test_columns_first_archives_are_read_alike(tmp_path: Path) -> None:
    labels = np.asfortranarray(np.stack([LIVER, SPLEEN]).astype(np.uint8))
    np.savez(tmp_path / "kvasir_128.npz", val_images=np.asfortranarray(labels * 200), val_label=labels)
    assert np.array_equal(ground_truth(tmp_path, 1), SPLEEN)


# Medical Segmentation Decathlon


def decathlon(folder: Path, *, shift: float = 0.0) -> Path:
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    labels = np.zeros((83, 61, 6), dtype=np.uint8)  # voxels [i, j, k]; i grows to the patient's right
    labels[10:30, 5:20, 2:4], labels[50:70, 30:50, 3] = 1, 2
    values = (labels * 90 + 5).astype(np.int16)
    affine = np.diag([1.0, 1.0, 3.0, 1.0])
    nibabel.save(nibabel.Nifti1Image(values, affine), folder / "imagesTr" / "la_1.nii.gz")
    moved = affine.copy()
    moved[0, 3] = shift
    nibabel.save(nibabel.Nifti1Image(labels, moved), folder / "labelsTr" / "la_1.nii.gz")
    index = {
        "name": "Heart",
        "licence": "CC BY-SA 4.0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "left atrium", "2": "aorta"},
        "training": [{"image": "./imagesTr/la_1.nii.gz", "label": "./labelsTr/la_1.nii.gz"}],
    }
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def test_decathlon_slices(tmp_path: Path) -> None:
    folder = decathlon(tmp_path / "Task02_Heart")
    source = read_cases(folder)
    assert [(row.image.name, row.object) for row in source.rows] == [
        ("2", "left atrium"),
        ("3", "aorta"),
        ("3", "left atrium"),
    ]
    assert {row.patient for row in source.rows} == {"Heart/la_1"}
    case = source[0]
    mask = (case.targets or {})["left atrium"]
    assert case.image.size == mask.shape == (61, 83)
    assert mask.sum() == 20 * 15
    # radiological: anterior (large j) on top, the patient's right (large i) on the left
    assert mask[61 - 20 : 61 - 5, 83 - 30 : 83 - 10].all()
    assert case.image.pixels[mask].min() > case.image.pixels[~mask].max()
    assert (case.meta["modality"], case.meta["split"]) == ("MRI", "train")


def test_labels_on_another_grid_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lies on another grid"):
        read_cases(decathlon(tmp_path / "Task02_Heart", shift=2.0))


# COCO


def instances(folder: Path) -> Path:
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    for name in ("a.png", "b.png"):
        write_png(make_image(LIVER, SPLEEN), folder / "images" / name)
    compressed = coco.encode(np.asfortranarray(SPLEEN, dtype=np.uint8))
    flat = LIVER.flatten(order="F").astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    square = [[10.0, 5.0, 20.0, 5.0, 20.0, 15.0, 10.0, 15.0]]

    def annotation(image: int, category: int, shape: Any, **more: Any) -> dict[str, Any]:
        return {"id": 1, "image_id": image, "category_id": category, "segmentation": shape, **more}

    content = {
        "images": [{"id": n, "file_name": name, "height": 61, "width": 83} for n, name in ((4, "a.png"), (5, "b.png"))],
        "categories": [{"id": 1, "name": "red_cell"}, {"id": 2, "name": "nucleus"}],
        "annotations": [
            annotation(4, 1, {"size": [61, 83], "counts": compressed["counts"].decode()}),
            annotation(4, 1, {"size": [61, 83], "counts": runs}),
            annotation(4, 2, square),
            annotation(5, 1, square, iscrowd=0),
            annotation(5, 1, {"size": [61, 83], "counts": runs}, iscrowd=1),
        ],
    }
    (folder / "annotations" / "instances_val.json").write_text(json.dumps(content))
    return folder / "annotations" / "instances_val.json"


def test_coco_instances_of_a_category_are_one_mask(tmp_path: Path) -> None:
    file = instances(tmp_path / "data")
    source = read_cases(file)
    assert [(row.id, row.split) for row in source.rows] == [("a.png#red cell", "val"), ("a.png#nucleus", "val")]
    assert np.array_equal(ground_truth(file, 0), LIVER | SPLEEN)
    square = ground_truth(file, 1)
    assert square[6:14, 11:19].all()
    assert 80 <= square.sum() <= 121


def test_coco_masks_that_are_all_crowds_are_read_and_mixed_pairs_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = instances(tmp_path / "data")
    read_cases(file)
    assert "1 pairs left out" in caplog.text
    assert "iscrowd" in caplog.text
    content = json.loads(file.read_text())
    del content["annotations"][3]  # the polygon beside the run lengths, which CVAT marks so
    file.write_text(json.dumps(content))
    caplog.clear()
    assert [row.id for row in read_cases(file).rows][-1] == "b.png#red cell"
    assert np.array_equal(ground_truth(file, 2), LIVER)
    assert not caplog.text


@pytest.mark.parametrize("shape", [[], [[]], [[float("nan"), 1, 9, 1, 9, 9]], [[1e9, 1, 9, 1, 9, 9]], [5, 5, 9, 9]])
def test_coco_shapes_that_cannot_be_drawn_are_refused(tmp_path: Path, shape: Any) -> None:
    file = instances(tmp_path / "data")
    content = json.loads(file.read_text())
    content["annotations"] = [{"id": 1, "image_id": 4, "category_id": 1, "segmentation": shape}]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="cannot be drawn") as error:
        ground_truth(file, 0)
    assert "\n" not in str(error.value)


def test_coco_without_its_image_says_so(tmp_path: Path) -> None:
    file = instances(tmp_path / "data")
    (tmp_path / "data" / "images" / "a.png").unlink()
    with pytest.raises(DataError, match=r"image 'a\.png' is not in"):
        read_cases(file)


@pytest.mark.parametrize(
    ("splits", "judged"),
    [
        (("train", "val", "test"), "val"),
        (("Train", "valid", "test"), "valid"),
        (("training", "Validation"), "Validation"),
        (("train", "test"), "test"),
        (("train", "fold 3"), "fold 3"),
    ],
)
def test_training_rows_are_not_judged_unless_asked_for(
    tmp_path: Path, splits: tuple[str, ...], judged: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_png(make_image(LIVER, SPLEEN), tmp_path / "a.png")
    write_mask_png(LIVER, tmp_path / "m.png")
    lines = ["image,mask,object,split", *(f"a.png,m.png,liver {split},{split}" for split in splits)]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    everything, cases = cases_to_judge(tmp_path / "m.csv")
    assert len(everything) == len(splits)
    assert [row.split for row in cases.rows] == [judged]
    assert f"split {judged}: 1 of {len(splits)} rows" in caplog.text
    assert [row.split for row in cases_to_judge(tmp_path / "m.csv", splits[0])[1].rows] == [splits[0]]
    (tmp_path / "m.csv").write_text("\n".join(lines[:2]) + "\n")
    with pytest.raises(ConfigError, match=f"--split {splits[0]}"):
        cases_to_judge(tmp_path / "m.csv")


# SA-Med2D-20M and MeCoVQA


def samed2d(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    name = "ct_00--CT_ORG--volume-8--x_0016"
    write_png(make_image(LIVER, SPLEEN), folder / "images" / f"{name}.png")
    parts = {"0001_000": LIVER, "0003_000": SPLEEN, "0003_001": disc(40, 50, 5)}
    for part, mask in parts.items():
        write_mask_png(mask, folder / "masks" / f"{name}--{part}.png")
    (folder / "SAMed2D_v1.json").write_text(
        json.dumps({f"images/{name}.png": [f"masks/{name}--{part}.png" for part in parts]})
    )
    (folder / "SAMed2D_v1_class_mapping_id.json").write_text(
        json.dumps({"CT_ORG": {"liver": "0001", "kidney_left": "0003"}})
    )
    return folder


def test_samed2d_joins_instances_of_a_class(tmp_path: Path) -> None:
    folder = samed2d(tmp_path / "SAMed2Dv1")
    source = read_cases(folder)
    assert [(row.object, row.modality, row.dataset, row.patient) for row in source.rows] == [
        ("liver", "CT", "CT_ORG", "CT_ORG--volume-8"),
        ("kidney left", "CT", "CT_ORG", "CT_ORG--volume-8"),
    ]
    assert np.array_equal(ground_truth(folder, 0), LIVER)
    assert np.array_equal(ground_truth(folder, 1), SPLEEN | disc(40, 50, 5))


def mecovqa(folder: Path) -> Path:
    samed2d(folder / "SAMed2Dv1")
    name = "ct_00--CT_ORG--volume-8--x_0016"

    def said(question: str, answer: str) -> list[dict[str, str]]:
        return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]

    mask = f"Sure, <SEG>.<mask>masks/{name}--0001_000.png</mask>"
    items = [
        {"image": f"images/{name}.png", "conversations": said("Segment the liver, please.", mask)},
        {"image": f"images/{name}.png", "conversations": said("Where is the largest organ?", mask)},
        {"image": f"images/{name}.png", "conversations": said("Which modality is this?", "CT.")},
    ]
    (folder / "test").mkdir()
    (folder / "test" / "MeCoVQA_Grounding_test.json").write_text(json.dumps(items))
    return folder / "test" / "MeCoVQA_Grounding_test.json"


def test_mecovqa_asks_its_own_questions(tmp_path: Path) -> None:
    file = mecovqa(tmp_path)
    source = read_cases(file)
    assert [(row.query, row.object, row.split) for row in source.rows] == [
        ("Segment the liver, please.", "liver", "test"),
        ("Where is the largest organ?", "liver", "test"),
    ]
    assert len(source.by_id) == 2
    assert np.array_equal(ground_truth(file, 1), LIVER)


# all of them

MAKERS: dict[str, Callable[[Path], Path]] = {
    "biomedparse": biomedparse,
    "medsegbench": medsegbench,
    "msd": decathlon,
    "coco": instances,
    "samed2d": samed2d,
    "mecovqa": lambda folder: mecovqa(folder.parent),
}


def test_every_benchmark_has_a_maker() -> None:
    assert MAKERS.keys() == BENCHMARKS.keys()


@pytest.mark.parametrize("name", MAKERS)
def test_a_local_copy_is_recognised_and_checked(name: str, tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path / "data")
    assert layout_of(path) == name
    copy = check_copy(path)
    assert copy.layout == name
    assert copy.pairs == len(read_cases(path)) == copy.checked
    assert not copy.problems


BROKEN: dict[str, tuple[Callable[[Path], Path], str, Callable[[Path], None]]] = {
    "JSON of something else": (instances, "neither COCO", lambda path: path.write_text("{}") and None),
    "cut-off JSON": (instances, "is not JSON", lambda path: path.write_text('{"images": [') and None),
    "no Decathlon labels": (
        decathlon,
        "is not the index",
        lambda path: (path / "dataset.json").write_text("{}") and None,
    ),
    "archive without arrays": (
        lambda folder: medsegbench(folder) / "kvasir_256.npz",
        "has no array",
        lambda path: np.savez(path, other=np.zeros(3)),
    ),
    "no archive": (
        lambda folder: medsegbench(folder) / "kvasir_256.npz",
        "is no NumPy archive",
        lambda path: path.write_bytes(b"PK") and None,
    ),
    "labels of another shape": (
        lambda folder: medsegbench(folder) / "kvasir_256.npz",
        "does not fit",
        lambda path: np.savez(path, val_images=np.zeros((2, 5, 6)), val_label=np.zeros((2, 6, 5))),
    ),
    "a missing image": (samed2d, "cannot", lambda path: (path / "SAMed2D_v1.json").write_text("[]") and None),
    "a question without image": (
        lambda folder: mecovqa(folder.parent),
        "no image 'images/none.png'",
        lambda path: path.write_text(json.dumps([{"image": "images/none.png", "conversations": []}])) and None,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_damage_is_told_in_one_line(name: str, tmp_path: Path) -> None:
    make, message, damage = BROKEN[name]
    path = make(tmp_path / "data")
    damage(path)
    with pytest.raises(DataError, match=message.replace("cannot", "is not that of SA-Med2D")) as caught:
        read_cases(path)
    assert "\n" not in str(caught.value)


def test_objects_in_archives_are_never_unpickled(tmp_path: Path) -> None:
    path = tmp_path / "kvasir_128.npz"
    np.savez(path, val_images=np.array([{"a": 1}], dtype=object), val_label=np.zeros((1, 5, 6)))
    with pytest.raises(DataError, match="holds Python objects"):
        read_cases(path)


def test_problems_of_single_cases_are_listed(tmp_path: Path) -> None:
    folder = samed2d(tmp_path / "SAMed2Dv1")
    next((folder / "masks").glob("*0001_000.png")).write_bytes(b"")
    copy = check_copy(folder)
    assert (copy.pairs, copy.checked, len(copy.problems)) == (2, 2, 1)
    assert "0001_000.png" in copy.problems[0]


def manifest(folder: Path, seeds: dict[str, int], *, noise: int = 0, patient: str = "") -> Path:
    folder.mkdir()
    lines = ["image,mask,object,patient"]
    for name, seed in seeds.items():
        random = np.random.default_rng(seed)
        coarse = random.integers(20, 220, (6, 8, 3)).astype(np.uint8)
        pixels = np.kron(coarse, np.ones((10, 10, 1), dtype=np.uint8))[:58, :77].astype(int)
        pixels += np.random.default_rng(9).integers(-noise, noise + 1, pixels.shape)
        write_png(pixels.clip(0, 255).astype(np.uint8), folder / f"{name}.png")
        mask = np.zeros((58, 77), dtype=bool)
        mask[10:30, 20:60] = True
        write_mask_png(mask, folder / f"{name}_mask.png")
        lines.append(f"{name}.png,{name}_mask.png,liver,{patient or name}")
    (folder / "index.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_leaks_are_found_and_only_they(tmp_path: Path) -> None:
    train = read_cases(manifest(tmp_path / "train", {"a": 1, "b": 2, "c": 3}))
    val = read_cases(manifest(tmp_path / "val", {"x": 2, "y": 7, "c": 8}, noise=2))
    leaks = find_leaks(val, train)
    assert [(Path(mine).name, Path(other).name) for mine, other, _ in leaks.images] == [("x.png", "b.png")]
    assert leaks.patients == ("c",)
    assert leaks.compared == (3, 3)
    assert not leaks.unread


def test_nearest_fingerprint_within_reach() -> None:
    random = np.random.default_rng(0)
    codes = {str(number): random.bytes(32) for number in range(50)}
    flipped = bytearray(codes["7"])
    for bit in random.choice(256, 9, replace=False):
        flipped[bit // 8] ^= 1 << bit % 8
    known = {name: code.hex() for name, code in codes.items()}
    assert near_duplicates({"new": flipped.hex()}, known, 15) == {"new": ("7", 9)}
    assert near_duplicates({"new": flipped.hex()}, known, 8) == {}
    with pytest.raises(ConfigError, match="0 to 15"):
        near_duplicates({}, {}, 16)
    assert len(fingerprint(make_image(LIVER))) == 64


def test_the_command_lists_checks_and_compares(tmp_path: Path) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        result = ibisagent("data", "check", *arguments)
        return result.exit_code, result.output

    listed = ibisagent("data", "list")
    assert listed.exit_code == 0
    assert all(name in listed.output for name in BENCHMARKS)
    train, val = manifest(tmp_path / "train", {"a": 1, "b": 2}), manifest(tmp_path / "val", {"x": 2, "y": 7})
    assert run(train, "--json")[0] == 0
    code, text = run(val, "--against", train, "--json")
    assert code == 2
    assert len(json.loads(text)["leaks"]["images"]) == 1
    assert run("--against", train)[0] == 2
