"""What lies on a disk: folders of one run, safe names, PNG files, and text that stays in one line."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from ibisagent.errors import ConfigError, DataError
from ibisagent.files import (
    MAX_NAME_BYTES,
    FileHashes,
    claim,
    file_names,
    one_line,
    png_bytes,
    safe_name,
    same_run,
    try_file,
    try_folder,
    unfinished_folder,
)

FACTS = {"seed": 0, "sides": (3, 4), "recipe": {"rate": 0.1, "device": "cpu"}}


def test_a_folder_is_claimed_by_one_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    claim(path, FACTS, write=False)
    assert not path.exists()
    claim(path, FACTS)
    written = path.read_bytes()
    claim(path, FACTS)
    assert path.read_bytes() == written
    with pytest.raises(ConfigError, match=r"another run \(seed was 0, now it is 1\); choose another folder") as caught:
        claim(path, {**FACTS, "seed": 1})
    assert str(path) in str(caught.value)
    with pytest.raises(ConfigError, match=r"another run \(rate was 0\.1, now it is 0\.2\)"):
        claim(path, {**FACTS, "recipe": {"rate": 0.2, "device": "cpu"}})
    with pytest.raises(ConfigError, match=r"another run \(more was None, now it is 5\)"):
        claim(path, {**FACTS, "more": 5})
    assert path.read_bytes() == written


def test_what_is_free_may_change_and_notes_are_not_compared(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    claim(path, FACTS, notes={"version": "1"})
    moved = {**FACTS, "recipe": {"rate": 0.1, "device": "cuda"}}
    claim(path, moved, free={"device"}, notes={"version": "2"})
    assert json.loads(path.read_text())["version"] == "2"
    assert json.loads(path.read_text())["recipe"]["device"] == "cuda"
    with pytest.raises(ConfigError, match="device"):
        claim(path, FACTS, notes={"version": "2"})


def test_folders_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "episodes").mkdir()
    with pytest.raises(ConfigError, match=r"holds episodes, but no run\.json; choose another folder"):
        claim(tmp_path / "run.json", FACTS, leftovers=[tmp_path / "none", tmp_path / "episodes"])
    for content in ("{", "[]", '"text"'):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(DataError, match=r"run\.json: is damaged"):
            claim(tmp_path / "run.json", FACTS)


def test_long_facts_are_told_in_one_line() -> None:
    with pytest.raises(ConfigError) as caught:
        same_run({"text": "a\n" * 1000}, {"text": "b\n" * 1000}, "here")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    same_run({"text": "a", "out": 1}, {"text": "a", "out": 2}, "here", free={"out"})


def test_names_are_safe_and_distinct() -> None:
    taken: set[str] = set()
    said = ["left/lung", "Left lung", "..", "", "\u00fc" * 99, "CON\x00", "../../etc"]
    names = [safe_name(name, taken) for name in said]
    assert names[:4] == ["left_lung", "Left_lung-2", "image", "image-2"]
    assert len(names[4].encode()) <= MAX_NAME_BYTES
    assert names[4] == "\u00fc" * (MAX_NAME_BYTES // 2)
    assert not any(set(name) & set("/\\\x00") or name.startswith(".") for name in names)
    assert len({name.casefold() for name in names}) == len(said)
    assert file_names(["a/eye.png", "b/eye.tif", Path("Eye.jpg")]) == ["eye", "eye-2", "Eye-3"]


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4)])
def test_png_keeps_every_value(shape: tuple[int, ...]) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8)
    for image in (pixels, PIL.Image.fromarray(pixels)):
        assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(png_bytes(image)))), pixels)


def test_png_of_masks_and_palettes() -> None:
    mask = np.eye(5, 7, dtype=bool)
    assert np.array_equal(np.asarray(PIL.Image.open(io.BytesIO(png_bytes(mask)))), mask * np.uint8(255))
    palette = PIL.Image.fromarray(np.full((5, 7, 3), (1, 2, 3), np.uint8)).quantize(2)
    assert np.asarray(PIL.Image.open(io.BytesIO(png_bytes(palette))))[0, 0].tolist() == [1, 2, 3]


def test_text_in_one_line() -> None:
    assert one_line(" a\n\tb\x1b[31m\u202ec ") == "a b [31m c"
    assert one_line("x" * 500, 10) == "x" * 9 + "\u2026"
    assert one_line(ValueError("two\nlines")) == "two lines"
    assert one_line(ValueError(" ")) == "ValueError"
    assert one_line("") == ""


def test_hashes_are_kept_by_size_and_times(tmp_path: Path) -> None:
    file, kept = tmp_path / "a.bin", tmp_path / "contents.json"
    file.write_bytes(b"first")

    def now() -> str:
        hashes = FileHashes(kept)
        found = hashes.of(file)
        hashes.write()
        return found

    first = now()
    assert first == now() == hashlib.sha256(b"first").hexdigest()
    known = json.loads(kept.read_text())
    known[str(file)][-1] = "kept"
    kept.write_text(json.dumps(known))
    assert now() == "kept"  # the file was not read again
    times = file.stat()
    file.write_bytes(b"other")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert now() == hashlib.sha256(b"other").hexdigest()
    file.unlink()
    assert now() == ""
    kept.write_text("[1")
    with pytest.raises(DataError, match=r"contents\.json: is damaged"):
        FileHashes(kept)


def test_places_for_results_are_tried(tmp_path: Path) -> None:
    try_folder(tmp_path / "new" / "folder")
    try_file(tmp_path / "new" / "file.json")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder"]
    (tmp_path / "file").write_text("")
    for problem in (lambda: try_folder(tmp_path / "file"), lambda: try_file(tmp_path / "file" / "x")):
        with pytest.raises(DataError, match="choose another"):
            problem()
    with pytest.raises(DataError, match="is a folder"):
        try_file(tmp_path)


def test_what_a_killed_run_left_of_a_result_goes_with_the_next_one(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path, "a/b") as part:
        (part / "half.png").write_bytes(b"x")
        shutil.copytree(part, tmp_path / "kept")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]
    (tmp_path / "kept").rename(part)  # as after a kill
    with unfinished_folder(tmp_path, "a/b") as again:
        assert again == part
        assert not list(again.iterdir())
    assert not list(tmp_path.iterdir())
