"""What users give to be taught from: each slip is named, costs no more than itself, and harms nothing."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from typer.testing import CliRunner

from ibisagent.cli import app
from ibisagent.cli.teach import _print_found
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.training.teach import Found, TeachRecipe, teach
from ibisagent.training.teach.reading import TeachingData, read_teaching_data

SIZE = (60, 80)
BRIEF = TeachRecipe(examples=4, batch_size=4, eval_every=4, folds=2, workers=0)


def photo(number: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(number).integers(60, 200, (*size, 3), dtype=np.uint8)


def box(top: int, left: int, height: int, width: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + height, left : left + width] = True
    return mask


def write_rows(folder: Path, rows: Sequence[Sequence[str]], columns: str = "image,mask,object") -> Path:
    text = "\n".join([columns, *(",".join(f'"{cell}"' for cell in row) for row in rows)])
    (folder / "index.csv").write_text(text + "\n", encoding="utf-8")
    return folder


def ten(folder: Path, names: Sequence[str] = ("cyst",), masks: Sequence[np.ndarray] = ()) -> list[list[str]]:
    """Rows of ten images of each object, whose files are written; masks: of the first ones."""
    rows = []
    for number in range(10):
        write_png(photo(number), folder / f"{number}.png")
        for place, name in enumerate(names):
            file = f"{number}-{place}.png"
            own = masks[number] if number < len(masks) else box(5 + number, 5 + 2 * place, 20, 15)
            write_mask_png(own, folder / file)
            rows.append([f"{number}.png", file, name])
    return rows


def read(folder: Path, rows: Sequence[Sequence[str]], columns: str = "image,mask,object") -> TeachingData:
    return read_teaching_data([write_rows(folder, rows, columns)], {"optic disc", "spleen"})


def found(folder: Path, rows: Sequence[Sequence[str]], columns: str = "image,mask,object") -> Found:
    return read(folder, rows, columns).found


def test_one_image_and_one_object(tmp_path: Path) -> None:
    seen = found(tmp_path, ten(tmp_path)[:1])
    assert (seen.images, seen.patients, seen.objects, seen.left_out) == (1, 1, {"cyst": 1}, ())


def test_eight_objects_in_every_image(tmp_path: Path) -> None:
    names = [f"structure {letter}" for letter in "abcdefgh"]
    seen = found(tmp_path, ten(tmp_path, names))
    assert seen.objects == dict.fromkeys(names, 10)
    assert seen.images == 10


def test_one_unreadable_file_of_ten_costs_one_pair(tmp_path: Path) -> None:
    rows = ten(tmp_path)
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:50])
    seen = found(tmp_path, rows)
    assert (seen.images, len(seen.left_out)) == (9, 1)
    assert "4.png" in seen.left_out[0]


def test_a_mask_of_another_size_costs_one_pair(tmp_path: Path) -> None:
    rows = ten(tmp_path, masks=[box(2, 2, 9, 9, (30, 40))])
    seen = found(tmp_path, rows)
    assert (seen.images, len(seen.left_out)) == (9, 1)


def test_all_masks_empty_is_one_line(tmp_path: Path) -> None:
    rows = ten(tmp_path, masks=[np.zeros(SIZE, bool)] * 10)
    with pytest.raises(DataError, match="no image shows an object to learn"):
        read(tmp_path, rows)


def test_what_is_smaller_than_the_agent_sees_is_said(tmp_path: Path) -> None:
    large = (1200, 1600)
    write_png(photo(1, large), tmp_path / "large.png")
    write_mask_png(box(701, 803, 1, 2, large), tmp_path / "dot.png")
    rows = [*ten(tmp_path)[:3], ["large.png", "dot.png", "cyst"]]
    seen = found(tmp_path, rows)
    assert seen.objects == {"cyst": 3}
    [reason] = seen.left_out
    assert "cyst covers 2 of 1600 x 1200 pixels, less than the agent sees" in reason
    with pytest.raises(DataError, match=r"the first of 1 left out: .* cyst covers 2 of"):
        read(tmp_path, rows[3:])


@pytest.mark.parametrize("pixels", [1, 2, 3])
def test_a_few_pixels_of_a_small_image_are_learned(tmp_path: Path, pixels: int) -> None:
    assert found(tmp_path, ten(tmp_path, masks=[box(9, 9, 1, pixels)] * 10)).objects == {"cyst": 10}


def test_an_object_that_fills_the_image_is_one(tmp_path: Path) -> None:
    assert found(tmp_path, ten(tmp_path, masks=[np.ones(SIZE, bool)] * 10)).objects == {"cyst": 10}


@pytest.mark.parametrize(
    "name", ["Zyste größer", "左肾", "GGO/consolidation", "T1-lesion (left)", "cyst #2", "cyst, stone", "  cyst  "]
)
def test_names_of_any_letters_can_be_taught(tmp_path: Path, name: str) -> None:
    assert list(found(tmp_path, ten(tmp_path, [name])).objects) == [" ".join(name.split())]


@pytest.mark.parametrize("name", ["cyst and its wall, or not?", "everything", "all organs", "which modality is this"])
def test_names_that_no_sentence_asks_for_are_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="rename it in the data") as caught:
        read(tmp_path, ten(tmp_path, [name]))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_name_that_no_sentence_asks_for_costs_no_other(tmp_path: Path) -> None:
    rows = ten(tmp_path)
    rows[3][2] = "everything"
    seen = found(tmp_path, rows)
    assert seen.objects == {"cyst": 9}
    [reason] = seen.left_out
    assert "row 5: object 'everything'" in reason
    assert "rename it in the data" in reason


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no image shows an object to learn; the first of 10 left out") as caught:
        read(tmp_path, ten(tmp_path, ["x" * 300]))
    assert "\n" not in str(caught.value)


def test_two_names_of_one_known_object_do_not_contradict_each_other_silently(tmp_path: Path) -> None:
    seen = found(tmp_path, ten(tmp_path, ["lien", "spleen"]))
    assert seen.renamed == {"lien": "spleen"}
    assert seen.objects == {"spleen": 10}
    assert len(seen.left_out) == 10
    assert "another mask of spleen than the same image" in seen.left_out[0]


def test_one_name_written_in_many_ways_is_one_object(tmp_path: Path) -> None:
    hidden = "cy\u00adst\u200b"  # a soft hyphen and a zero-width space, as they come with text that was copied
    ways = ["Cyst", "cyst", "cysts", "CYST", "the cyst", hidden, "cyst_wall", "Cyst wall", "cyst-walls", "left cyst"]
    rows = [[image, mask, way] for (image, mask, _), way in zip(ten(tmp_path), ways, strict=True)]
    seen = found(tmp_path, rows)
    assert seen.objects == {"Cyst": 6, "cyst_wall": 3, "left cyst": 1}
    assert seen.renamed == {
        **dict.fromkeys(["cyst", "cysts", "CYST", "the cyst", hidden], "Cyst"),
        **dict.fromkeys(["Cyst wall", "cyst-walls"], "cyst_wall"),
    }


def test_what_is_told_of_a_name_does_not_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "\x1b[31mcyst"
    seen = found(tmp_path, [*ten(tmp_path, [name]), ["0.png", "", "\x1b[31mstone"]])
    _print_found(seen)
    told = capsys.readouterr().err + seen.left_out[0]
    assert "cyst (10)" in told
    assert "\x1b" not in told


def test_an_object_that_no_image_shows_is_named(tmp_path: Path) -> None:
    rows = ten(tmp_path)
    seen = found(tmp_path, [*rows, ["0.png", "", "stone"], ["1.png", "", "stone"]])
    assert seen.objects == {"cyst": 10}
    assert len(seen.left_out) == 2
    assert "row 12: no image shows stone" in seen.left_out[0]


def test_data_for_validation_alone_are_learned_from_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [[*row, "val"] for row in ten(tmp_path)]
    seen = found(tmp_path, rows, "image,mask,object,split")
    assert (seen.objects, seen.left_aside) == ({"cyst": 10}, 0)
    assert "judge the agent on others" in caplog.text


def test_rows_are_the_same_wherever_the_data_are(tmp_path: Path) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        for part in ("train", "train_mask"):
            (folder / part).mkdir(parents=True)
        write_png(photo(1), folder / "train" / "b_CT_abdomen.png")
        write_mask_png(box(5, 5, 20, 20), folder / "train_mask" / "b_CT_abdomen_cyst.png")
    one, two = (read_teaching_data([folder], ()) for folder in (first, second))
    assert (one.sha256, [row.id for row in one.rows]) == (two.sha256, [row.id for row in two.rows])


def test_the_same_image_with_two_objects_and_again_is_one_image(tmp_path: Path) -> None:
    rows = ten(tmp_path, ["cyst", "stone"])[:2]
    (tmp_path / "again.png").write_bytes((tmp_path / "0.png").read_bytes())
    seen = found(tmp_path, [*rows, ["again.png", "0-0.png", "cyst"]])
    assert (seen.images, seen.objects, seen.duplicates) == (1, {"cyst": 1, "stone": 1}, 1)


def test_patients_that_are_missing_in_part_are_those_of_their_images(tmp_path: Path) -> None:
    rows = [[*row, "p1" if number < 4 else ""] for number, row in enumerate(ten(tmp_path))]
    assert found(tmp_path, rows, "image,mask,object,patient").patients == 7


@pytest.mark.parametrize("pixels", [np.uint8, np.uint16])
def test_grey_images_of_8_and_16_bits_are_read(tmp_path: Path, pixels: type) -> None:
    rows = ten(tmp_path)[:3]
    for number in range(3):
        grey = photo(number)[..., 0].astype(pixels) * (200 if pixels is np.uint16 else 1)
        cv2.imwrite(str(tmp_path / f"{number}.png"), grey)
    assert found(tmp_path, rows).images == 3


def test_images_of_two_sizes(tmp_path: Path) -> None:
    write_png(photo(50, (40, 40)), tmp_path / "square.png")
    write_mask_png(box(3, 3, 9, 9, (40, 40)), tmp_path / "square-mask.png")
    assert found(tmp_path, [*ten(tmp_path), ["square.png", "square-mask.png", "cyst"]]).sizes == (SIZE, (40, 40))


def test_coco_and_folders_of_masks_and_scans_are_learned_from(tmp_path: Path) -> None:
    coco = tmp_path / "coco"
    coco.mkdir()
    write_png(photo(1), coco / "a.png")
    shape = {"id": 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 300, "bbox": [5, 5, 20, 15]}
    said = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1]}],
        "annotations": [{**shape, "segmentation": [[5, 5, 25, 5, 25, 20, 5, 20]]}],
        "categories": [{"id": 1, "name": "cyst"}],
    }
    (coco / "instances.json").write_text(json.dumps(said))
    pairs = tmp_path / "pairs"
    for part in ("train", "train_mask"):
        (pairs / part).mkdir(parents=True)
    write_png(photo(2), pairs / "train" / "b_CT_abdomen.png")
    write_mask_png(box(5, 5, 20, 20), pairs / "train_mask" / "b_CT_abdomen_cyst.png")
    task = tmp_path / "Task99_Cyst"
    for part in ("imagesTr", "labelsTr"):
        (task / part).mkdir(parents=True)
    label = np.zeros((32, 30, 5), np.uint8)
    label[8:20, 8:20, 1:4] = 1
    values = label.astype(np.int16) * 200 + np.arange(5, dtype=np.int16)
    for part, content in (("imagesTr", values), ("labelsTr", label)):
        nibabel.save(nibabel.Nifti1Image(content, np.eye(4)), task / part / "cyst_1.nii.gz")
    described = {"labels": {"0": "background", "1": "cyst"}, "modality": {"0": "CT"}, "name": "Cyst"}
    listed = [{"image": "./imagesTr/cyst_1.nii.gz", "label": "./labelsTr/cyst_1.nii.gz"}]
    (task / "dataset.json").write_text(json.dumps({**described, "training": listed, "test": []}))
    seen = read_teaching_data([coco / "instances.json", pairs, task], ()).found
    assert seen.objects == {"cyst": 5}
    assert seen.patients == 3  # the slices of a scan are of one patient


@pytest.mark.parametrize("name", ["scan.nii.gz", "slice.dcm", "image.png"])
def test_a_file_that_is_no_data_set_is_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x00\x01\x02nothing")
    with pytest.raises(DataError, match=name) as caught:
        teach([tmp_path / name], tmp_path / "agent")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_used_is_said_before_anything_is_learned(tmp_path: Path) -> None:
    data = write_rows(tmp_path, ten(tmp_path))
    for message, settings in (
        ("unknown segmenter 'medsam'", {"segmenter": "medsam"}),
        ("seed -1: give one from 0", {"seed": -1}),
        ("seed 9223372036854775808: give", {"seed": 2**63}),
    ):
        with pytest.raises(ConfigError, match=message):
            teach(str(data), str(tmp_path / "agent"), check=False, recipe=BRIEF, **settings)
    assert not (tmp_path / "agent" / ".teaching").exists()


def test_options_that_do_nothing_together_are_refused(tmp_path: Path) -> None:
    data = str(write_rows(tmp_path, ten(tmp_path)))
    out = str(tmp_path / "agent")
    for words, message in (
        ([data, "-o", out, "--query", "cyst"], "--suggest N"),
        ([data, "-o", out, "--labelled", data], "--suggest N"),
        ([data, "--suggest", "2", "-o", out], "--suggest teaches nothing"),
        ([data, "--suggest", "2"], "ibis-nano was taught nothing: --query"),
        ([data, "-o", out, "--seed", "-1"], "--seed"),
    ):
        run = CliRunner().invoke(app, ["teach", *words])
        assert run.exit_code == 2
        assert message in run.stderr
    assert not Path(out).exists()


# -------------------------------------------------------------------------------------------------- where it goes


def test_a_folder_of_other_files_is_left_as_it_is(tmp_path: Path) -> None:
    data = write_rows(tmp_path, ten(tmp_path))
    (tmp_path / "README.md").write_text("my data")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"holds other files \(0-0\.png\); choose a new folder"):
        teach([data], tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_and_a_folder_below_a_file_are_one_line(tmp_path: Path) -> None:
    data = write_rows(tmp_path, ten(tmp_path))
    for out in (tmp_path / "0.png", tmp_path / "0.png" / "agent"):
        with pytest.raises(DataError, match="choose another"):
            teach([data], out)


def test_a_disk_that_is_full_is_one_line_and_leaves_no_agent(tmp_path: Path) -> None:
    data = write_rows(tmp_path, ten(tmp_path))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for most in (100, 100_000):  # nothing at all can be written; what is learned cannot be
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))  # writing more fails as it does on a full disk
            with pytest.raises(DataError, match="cannot be written") as caught:
                teach([data], tmp_path / "agent", check=False, recipe=BRIEF)
            assert "\n" not in str(caught.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "agent" / "agent.json").exists()
