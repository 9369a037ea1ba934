"""Which images to label next: doubtful ones that are unlike each other, in the same order every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibisagent.datasets import read_cases
from ibisagent.errors import DataError
from ibisagent.evaluation.selection import Candidate, choose, images_in, suggest
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters import load_segmenter

KINDS = np.eye(4, dtype=np.float32)


def image_of(kind: int, number: int, reliability: float) -> Candidate:
    near = KINDS[kind] + 0.01 * np.random.default_rng(number).normal(size=4).astype(np.float32)
    return Candidate(f"{kind}-{number}", reliability, near)


def names(candidates: list[Candidate], count: int, labelled: list[np.ndarray] | None = None) -> list[str]:
    return [one.name for one in choose(candidates, count, labelled or [])]


def test_the_most_doubtful_comes_first_and_then_none_of_its_kind() -> None:
    pool = [image_of(0, number, 0.1 + number / 100) for number in range(5)]
    pool += [image_of(1, number, 0.5) for number in range(5)] + [image_of(2, 0, 0.6)]
    assert names(pool, 1) == ["0-0"]
    assert {name[0] for name in names(pool, 3)} == {"0", "1", "2"}


def test_what_is_labelled_already_is_not_asked_for_again() -> None:
    pool = [image_of(0, 0, 0.3), image_of(1, 0, 0.4)]
    assert names(pool, 1) == ["0-0"]
    assert names(pool, 1, [KINDS[0], KINDS[2]]) == ["1-0"]


def test_the_order_of_the_files_changes_nothing_and_copies_come_last() -> None:
    pool = [image_of(kind, number, 0.2 + 0.1 * kind) for kind in range(4) for number in range(3)]
    pool.append(Candidate("copy", 0.2, pool[0].features))
    expected = choose(pool, len(pool))
    assert choose(pool[::-1], len(pool)) == expected
    assert expected[-1].name in ("0-0", "copy")
    assert len({one.name for one in expected}) == len(pool)
    assert choose(pool, 99) == expected
    assert choose([], 3) == []


def test_each_says_why() -> None:
    first, second = choose([image_of(0, 0, 0.2), image_of(1, 0, 0.9)], 2)
    assert "0.20" in first.reason
    assert first.distance is None
    assert second.distance is not None
    assert "unlike" in second.reason


def test_the_agent_looks_at_every_image_of_a_folder(tmp_path: Path) -> None:
    for number, shade in enumerate((90, 200)):
        pixels = np.full((40, 60, 3), 20, np.uint8)
        pixels[10:30, 10 + 20 * number : 30 + 20 * number] = shade
        (tmp_path / "inner").mkdir(exist_ok=True)
        write_png(pixels, tmp_path / "inner" / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    replies = ["<action>click + (0.35, 0.5) bright box</action>", "<action>stop</action>"]
    models: dict[str, Any] = {"policy": ScriptedPolicy(replies), "segmenter": load_segmenter("region")}
    told: dict[str, str] = {}
    chosen = suggest(
        tmp_path, "bright box", 9, **models, on_image=lambda path, error: told.update({path.name: str(error or "")})
    )
    assert sorted(one.name for one in chosen) == ["inner/0.png", "inner/1.png"]
    assert all(0 <= one.reliability <= 1 for one in chosen)
    assert (told["0.png"], told["1.png"]) == ("", "")
    assert "broken.png" in told["broken.png"]
    labelled = tmp_path / "labelled.csv"
    labelled.write_text("image,mask,object\ninner/0.png,,bright box\n")
    [left] = suggest(tmp_path, "bright box", 2, labelled=read_cases(labelled), **models)
    assert left.name == "inner/1.png"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        images_in(tmp_path / "empty")


def test_neither_labelled_images_nor_their_copies_and_masks_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = np.random.default_rng(0)
    for number in range(4):
        write_png(draw.integers(0, 255, (40, 60, 3), dtype=np.uint8), tmp_path / f"{number}.png")
    pixels = draw.integers(0, 255, (40, 60, 3), dtype=np.uint8)
    write_png(pixels, tmp_path / "one.png")
    write_png(pixels, tmp_path / "copy.png")
    write_mask_png(np.eye(40, 60, dtype=bool), tmp_path / "mask.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "1.png").read_bytes()[:80])
    (tmp_path / "index.csv").write_text("image,mask,object\none.png,mask.png,box\n0.png,,box\ntorn.png,mask.png,box\n")
    replies = ["<action>click + (0.35, 0.5) box</action>", "<action>stop</action>"]
    models: dict[str, Any] = {"policy": ScriptedPolicy(replies), "segmenter": load_segmenter("region")}
    chosen = suggest(tmp_path, "box", 9, labelled=read_cases(tmp_path), **models)
    assert sorted(one.name for one in chosen) == ["1.png", "2.png", "3.png"]
    assert "torn.png" in caplog.text
    for name in ("torn", "1", "2", "3"):
        (tmp_path / f"{name}.png").unlink()
    (tmp_path / "index.csv").write_text("image,mask,object\none.png,mask.png,box\n0.png,,box\n")
    with pytest.raises(DataError, match="all of its images have labels"):
        suggest(tmp_path, "box", 9, labelled=read_cases(tmp_path), **models)
