"""`ibisagent eval score`: masks of all kinds, results by hand, and everything that does not fit named one by one."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import phantoms
import pytest
from commands import ibisagent
from pycocotools import mask as coco

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.datasets.catalogue import BENCHMARKS
from ibisagent.domain import Mask
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation.metrics import EmptyRule, mean_share, quotient
from ibisagent.evaluation.scoring import Scores, score
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.imaging.masks import encode_rle, overlap

SIZE = (40, 60)
box_mask = partial(phantoms.box_mask, size=SIZE)
NAMES = ("one", "two", "three")

GROUND_TRUTH = box_mask(10, 10, 30, 20)
HALF = box_mask(10, 10, 20, 20)  # IoU 0.5, Dice 2 / 3


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "ground truth").mkdir(parents=True)
    rows = ["image,mask,object,modality,patient"]
    for number, name in enumerate(NAMES):
        write_png(np.full((*SIZE, 3), 40 * number, dtype=np.uint8), folder / f"{name}.png")
        write_mask_png(GROUND_TRUTH, folder / "ground truth" / f"{name}_left+lung.png")
        rows.append(f"{name}.png,ground truth/{name}_left+lung.png,left lung,CT,p{number}")
    rows.append("three.png,,spleen,CT,p2")
    (folder / "index.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    folder.mkdir()
    return folder


def ious(found: Scores) -> dict[str, float]:
    return {one.case_id: one.measures["iou"] for one in found.evaluation.results}


def kinds(found: Scores) -> list[tuple[str, str]]:
    return [(problem.kind, problem.case_id or Path(problem.file).name) for problem in found.problems]


def test_every_way_to_name_a_mask(data: Path, made: Path) -> None:
    (made / "ground truth").mkdir()
    write_mask_png(GROUND_TRUTH, made / "ground truth" / "one_left+lung.png")
    write_mask_png(HALF, made / "two_mask_left_lung.png")
    write_mask_png(HALF, made / "Three_left lung.tif.png")  # no ending that is dropped: not this name
    write_mask_png(HALF, made / "THREE_left lung.png")
    write_mask_png(GROUND_TRUTH & False, made / "three_spleen.png")
    found = score(made, data)
    expected = {"one.png#left lung": 1, "two.png#left lung": 0.5, "three.png#left lung": 0.5, "three.png#spleen": 1}
    assert ious(found) == expected
    assert kinds(found) == [("unknown name", "Three_left lung.tif.png")]
    means = found.evaluation.summaries()["all"].means
    assert means["dice"] == pytest.approx((1 + 2 / 3 + 2 / 3 + 1) / 4)
    assert means["positive_iou"] == pytest.approx(2 / 3)
    assert means["hd95_px"] == pytest.approx((0 + 10 + 10 + 0) / 4, abs=0.5)


def test_masks_of_all_or_nothing_are_named(data: Path, made: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_mask_png(GROUND_TRUTH, made / "one_left_lung.png")
    write_mask_png(GROUND_TRUTH | True, made / "two_left_lung.png")
    write_mask_png(GROUND_TRUTH & False, made / "three_left_lung.png")
    found = score(made, data)
    assert len(found.evaluation.results) == 3
    assert "two_left_lung.png: its mask is all" in caplog.text
    assert "three_left_lung.png: its mask is empty" in caplog.text
    assert "one_left_lung.png" not in caplog.text


def test_what_does_not_fit_is_named_and_never_averaged(data: Path, made: Path) -> None:
    write_mask_png(box_mask(5, 5, 15, 10, size=(20, 30)), made / "one_left_lung.png")  # half the size
    (made / "sub").mkdir()
    for folder in (made, made / "sub"):
        write_mask_png(GROUND_TRUTH, folder / "two_left_lung.png")
    write_mask_png(GROUND_TRUTH, made / "four_left_lung.png")
    (made / "three_spleen.png").write_bytes(b"no image")
    found = score(made, data)
    assert not found.evaluation.results
    assert sorted(kinds(found)) == [
        ("duplicate", "two.png#left lung"),
        ("duplicate", "two.png#left lung"),
        ("missing", "three.png#left lung"),
        ("unknown name", "four_left_lung.png"),
        ("unreadable", "three.png#spleen"),
        ("wrong size", "one.png#left lung"),
    ]
    assert len(found.evaluation.failures) == 4
    assert found.strict == {"iou": 0, "dice": 0}
    resized = score(made, data, resize_targets=True)
    assert ious(resized) == {"one.png#left lung": 1}
    assert resized.strict["iou"] == 0.25


def write_codes(file: Path, lines: Sequence[object]) -> Path:
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_run_length_codes(data: Path, tmp_path: Path) -> None:
    runs = coco.encode(np.asfortranarray(HALF, dtype=np.uint8))
    plain = [int(run) for run in np.diff(np.flatnonzero(np.diff(np.r_[2, HALF.T.ravel(), 2])))]
    assert plain[0] == 10 * SIZE[0] + 10
    codes = write_codes(
        tmp_path / "made.jsonl",
        [
            {"case_id": "one.png#left lung", "segmentation": encode_rle(GROUND_TRUTH)},
            {"image": "two.png", "object": "left lung", "rle": {"size": SIZE, "counts": runs["counts"].decode()}},
            {"case_id": "three.png#left lung", "segmentation": {"size": SIZE, "counts": plain}},
            {"case_id": "three.png#spleen", "segmentation": {"size": SIZE, "counts": [5, 3]}},
            {"case_id": "nobody", "segmentation": encode_rle(GROUND_TRUTH)},
            "{",
        ],
    )
    found = score(codes, data)
    assert ious(found) == {"one.png#left lung": 1, "two.png#left lung": 0.5, "three.png#left lung": 0.5}
    assert kinds(found) == [
        ("unreadable", "made.jsonl, line 6"),
        ("unknown name", "made.jsonl, line 5"),
        ("unreadable", "three.png#spleen"),
    ]


def write_nifti(mask: np.ndarray, file: Path, affine: np.ndarray) -> None:
    file.parent.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), file)


def test_a_volume_is_scored_where_it_lies(tmp_path: Path, made: Path) -> None:
    ground_truth = np.zeros((12, 14, 5), dtype=bool)
    ground_truth[2:8, 3:9, 1:4] = True
    affine = np.diag([0.5, 0.5, 3.0, 1.0])
    moved = affine.copy()
    moved[0, 3] = 1.0
    for name in ("a", "b", "c", "d"):
        write_nifti(ground_truth, tmp_path / "ground truth" / f"{name}.nii.gz", affine)
    write_nifti(ground_truth[:, :, ::1], made / "a.nii.gz", affine)
    write_nifti(ground_truth, made / "b.nii", moved)
    write_nifti(ground_truth[:, :, :4], made / "c.nii.gz", affine)
    shifted = np.roll(ground_truth, 1, axis=0)
    write_nifti(shifted, made / "d.nii.gz", affine)
    found = score(made, tmp_path / "ground truth")
    assert ious(found) == {"a": 1, "d": pytest.approx(5 / 7)}
    assert kinds(found) == [("other geometry", "b"), ("wrong size", "c")]
    assert "1.00 mm" in found.problems[0].message
    measures = found.evaluation.results[1].measures
    assert measures["hd95_mm"] == pytest.approx(0.5)  # one voxel of 0.5 mm
    assert measures["nsd_2mm"] == 1
    with pytest.raises(ConfigError, match="no splits"):
        score(made, tmp_path / "ground truth", split="val")
    write_mask_png(HALF, made / "c.png")
    assert ("other geometry", "d") not in kinds(score(made, tmp_path / "ground truth"))


def flipped(affine: np.ndarray) -> np.ndarray:
    """The same voxels, counted from the other end of the first axis (and left where they lie: another body)."""
    turned = affine.copy()
    turned[0, 0] *= -1
    return turned


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda mask, affine: (mask, affine + np.eye(4, k=3)), "other geometry"),  # 1 mm aside
        (lambda mask, affine: (mask, affine @ np.diag([1, 1, 1.5, 1])), "other geometry"),  # thicker slices
        (lambda mask, affine: (mask, flipped(affine)), "other geometry"),
        (lambda mask, affine: (mask[:, :, 1:], affine), "wrong size"),  # a slice less
        (lambda mask, affine: (mask.transpose(1, 0, 2), affine), "wrong size"),
        (lambda mask, affine: (mask * np.linspace(0.2, 1, 5), affine), "unreadable"),  # probabilities are no mask
    ],
)
def test_a_volume_that_does_not_fit_is_told_and_left_out(
    change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]], kind: str, tmp_path: Path, made: Path
) -> None:
    ground_truth, affine = np.zeros((12, 14, 5), dtype=np.float32), np.diag([0.5, 0.5, 3.0, 1.0])
    ground_truth[2:8, 3:9, 1:4] = 1
    (tmp_path / "ground truth").mkdir()
    for name in ("a", "b"):
        nib.save(nib.Nifti1Image(ground_truth, affine), tmp_path / "ground truth" / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(ground_truth, affine), made / "a.nii.gz")
    nib.save(nib.Nifti1Image(*change(ground_truth, affine)), made / "b.nii.gz")
    check_that_only_one_counts(
        score(made, tmp_path / "ground truth", tmp_path / "run"), tmp_path / "run", kind, "b.nii.gz"
    )


def check_that_only_one_counts(found: Scores, run: Path, kind: str, file: str) -> None:
    """Of two cases one is right; the other is a problem of its file, in no mean, and 0 in the strict ones."""
    assert [(problem.kind, Path(problem.file).name) for problem in found.problems] == [(kind, file)]
    summary = found.evaluation.summaries()["all"]
    assert (summary.cases, summary.means["iou"], found.strict["iou"]) == (1, 1, 0.5)
    with (run / "problems.csv").open() as table:
        assert [(row["kind"], Path(row["file"]).name) for row in csv.DictReader(table)] == [(kind, file)]


def test_an_image_is_no_volume_and_a_volume_no_image(data: Path, tmp_path: Path, made: Path) -> None:
    volume = np.zeros((12, 14, 5), dtype=bool)
    volume[2:8, 3:9, 1:4] = True
    for name in ("a", "b"):
        write_nifti(volume, tmp_path / "ground truth" / f"{name}.nii.gz", np.eye(4))
    write_nifti(volume, made / "a.nii.gz", np.eye(4))
    write_mask_png(HALF, made / "b.png")
    check_that_only_one_counts(
        score(made, tmp_path / "ground truth", tmp_path / "r"), tmp_path / "r", "other geometry", "b.png"
    )
    write_nifti(volume, made / "one_left_lung.nii.gz", np.eye(4))
    assert ("other geometry", "one.png#left lung") in kinds(score(made, data))


def test_a_name_that_means_multiple_cases_is_told(tmp_path: Path, made: Path) -> None:
    rows = ["image,mask,object"]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_png(np.zeros((*SIZE, 3), dtype=np.uint8), tmp_path / folder / "one.png")
        write_mask_png(GROUND_TRUTH, tmp_path / folder / "one_mask.png")
        rows.append(f"{folder}/one.png,{folder}/one_mask.png,liver")
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    write_mask_png(GROUND_TRUTH, made / "one_liver.png")
    found = score(made, tmp_path / "rows.csv")
    assert not found.evaluation.results
    assert [kind for kind, _ in kinds(found)] == ["duplicate"] * 2
    assert "means multiple cases" in found.problems[0].message


def test_a_code_beside_an_image_is_a_duplicate(data: Path, made: Path) -> None:
    code = {"case_id": "one.png#left lung", "segmentation": encode_rle(GROUND_TRUTH)}
    write_codes(made / "codes.jsonl", [code, {**code, "case_id": "two.png#left lung"}, code])
    write_mask_png(GROUND_TRUTH, made / "two_left_lung.png")
    write_mask_png(GROUND_TRUTH, made / "three_left_lung.png")
    found = score(made, data)
    assert ious(found) == {"three.png#left lung": 1}
    assert sorted(kinds(found)) == [
        *[("duplicate", "one.png#left lung")] * 2,
        *[("duplicate", "two.png#left lung")] * 2,
        ("missing", "three.png#spleen"),
    ]


# What public benchmarks count, worked out by hand


def coded(cases: CaseSource, masks: Sequence[Mask], file: Path) -> Path:
    """A code for every case, in order."""
    lines = [{"case_id": row.id, "segmentation": encode_rle(mask)} for row, mask in zip(cases.rows, masks, strict=True)]
    return write_codes(file, lines)


def test_biomedparse_counts_the_dice_of_each_annotation(tmp_path: Path) -> None:
    """Mean and median of the Dice by data set and modality; instances of an object are one mask."""
    folder = tmp_path / "Some" / "Organs"
    for kind in ("test", "test_mask"):
        (folder / kind).mkdir(parents=True)
    both = GROUND_TRUTH | box_mask(40, 25, 50, 35)  # 200 and 100 pixels
    ground_truths = {
        "p1_CT_chest_lung": both,
        "p1_CT_chest_liver": GROUND_TRUTH,
        "p2_CT_chest_liver": GROUND_TRUTH,
        "p3_MRI_abdomen_liver": GROUND_TRUTH,
    }
    for name, ground_truth in ground_truths.items():
        write_mask_png(ground_truth, folder / "test_mask" / f"{name}.png")
        write_png(np.zeros((*SIZE, 3), dtype=np.uint8), folder / "test" / f"{name.rpartition('_')[0]}.png")
    cases = read_cases(tmp_path / "Some")
    by_name = {f"{row.image.stem}_{row.object}": row.id for row in cases.rows}
    assert by_name.keys() == ground_truths.keys()
    masks = {"p1_CT_chest_lung": GROUND_TRUTH, "p1_CT_chest_liver": HALF, "p2_CT_chest_liver": GROUND_TRUTH & False}
    made = {by_name[name]: masks.get(name, ground_truth) for name, ground_truth in ground_truths.items()}
    found = score(coded(cases, [made[row.id] for row in cases.rows], tmp_path / "made.jsonl"), tmp_path / "Some")
    assert not found.problems
    dices = {one.case_id: one.measures["dice"] for one in found.evaluation.results}
    assert dices[by_name["p1_CT_chest_lung"]] == pytest.approx(2 * 200 / (200 + 300))
    assert dices[by_name["p1_CT_chest_liver"]] == pytest.approx(2 * 100 / (100 + 200))
    assert dices[by_name["p2_CT_chest_liver"]] == 0  # nothing found of what is there
    ct = (0.8 + 2 / 3 + 0) / 3
    assert found.evaluation.summaries("modality")["CT"].means["dice"] == pytest.approx(ct)
    assert found.evaluation.summaries("modality")["MRI"].means["dice"] == 1
    assert found.evaluation.summaries("dataset")["all"].means["dice"] == pytest.approx((3 * ct + 1) / 4)
    medians = {name: one.means["dice_median"] for name, one in found.evaluation.summaries("modality").items()}
    assert medians == pytest.approx({"all": (2 / 3 + 0.8) / 2, "CT": 2 / 3, "MRI": 1})


def test_medsegbench_counts_iou_and_f1_of_each_image(tmp_path: Path) -> None:
    """Means over the images; one that does not show the object counts 1 there, and is no case here."""
    labels = np.stack([GROUND_TRUTH, GROUND_TRUTH, GROUND_TRUTH, GROUND_TRUTH & False]).astype(np.uint8)
    images = np.zeros((4, *SIZE, 3), dtype=np.uint8)
    np.savez(tmp_path / "kvasir_256.npz", test_images=images, test_label=labels)
    cases = read_cases(tmp_path)
    assert len(cases) == 3
    shifted = box_mask(20, 10, 40, 20)  # half of it outside: IoU 1 / 3, F1 1 / 2
    found = score(coded(cases, [HALF, shifted, GROUND_TRUTH & False], tmp_path / "made.jsonl"), tmp_path)
    means = found.evaluation.summaries()["all"].means
    assert means["iou"] == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert means["dice"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)


@pytest.mark.parametrize(("benchmark", "mean"), [("medsegbench", (0.5 + 1) / 2), ("mecovqa", (0.5 + 0) / 2)])
def test_the_official_rule_for_two_empty_masks_is_one_of_ours(benchmark: str, mean: float) -> None:
    rule: EmptyRule = "one" if BENCHMARKS[benchmark].empty_iou else "zero"
    pairs = [overlap(HALF, GROUND_TRUTH), overlap(GROUND_TRUTH & False, GROUND_TRUTH & False)]
    assert quotient(mean_share(one, one.iou, rule) for one in pairs) == pytest.approx(mean)


def test_labels_in_a_volume(tmp_path: Path, made: Path) -> None:
    labels = np.zeros((12, 14, 5), dtype=np.uint8)
    labels[2:8, 3:9, 1:4] = 1
    labels[9:11, 3:9, 1:4] = 2
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "ct.nii.gz")
    rows = ["image,mask,object,label", *(f"ct.nii.gz,ct.nii.gz,{name},{name[-1]}" for name in ("part 1", "part 2"))]
    rows.append("ct.nii.gz,ct.nii.gz,part x,#ff0000")
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    write_nifti(labels == 1, made / "ct_part_1.nii.gz", affine)
    write_nifti(labels == 1, made / "ct_part_2.nii.gz", affine)
    write_nifti(labels == 1, made / "ct_part_x.nii.gz", affine)
    found = score(made, tmp_path / "rows.csv")
    assert ious(found) == {"ct.nii.gz#part 1": 1, "ct.nii.gz#part 2": 0}
    assert kinds(found) == [("unreadable", "ct.nii.gz#part x")]
    assert "#ff0000" in found.problems[0].message


def test_data_without_masks_cannot_be_scored(data: Path, made: Path) -> None:
    with pytest.raises(DataError, match="no mask"):
        score(made, data)
    with pytest.raises(DataError, match="no folder"):
        score(made / "none", data)


def test_the_command_scores_and_names_what_is_missing(data: Path, made: Path, tmp_path: Path) -> None:
    write_mask_png(HALF, made / "one_left_lung.png")
    out = tmp_path / "out"
    arguments = [str(one) for one in ("eval", "score", made, data, "-o", out)]
    shown = ibisagent(*arguments)
    assert shown.exit_code == 2, shown.output
    assert "1 of 4 cases scored; with 0 for each of the others: mean IoU 0.125" in shown.stdout
    assert "missing: three.png#spleen: no mask was made for it" in shown.stderr
    with (out / "problems.csv").open() as table:
        assert [row["kind"] for row in csv.DictReader(table)] == ["missing"] * 3
    for name in ("two", "three"):
        write_mask_png(GROUND_TRUTH, made / f"{name}_left_lung.png")
    write_mask_png(GROUND_TRUTH & False, made / "three_spleen.png")
    again = ibisagent(*arguments, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["strict"]["iou"] == pytest.approx(3.5 / 4)
    assert json.loads((out / "evaluation.json").read_text())["summaries"]["all"]["cases"] == 4
