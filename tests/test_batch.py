"""Many inputs into one folder: names come from the input, nothing is replaced unasked, a stopped run resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import contents, killed
from replies import text

from ibisagent.cli.output import JsonStream
from ibisagent.domain import Click, Stop
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.images import write_png
from ibisagent.inference.batch import Batch, Failed, ImageResult, Listener, VolumeOptions
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.segmenters.region import RegionSegmenter

SIZE = (61, 83)


def policy(target: str = "box") -> ScriptedPolicy:
    return ScriptedPolicy([text(Click(45, 30, True, target)), text(Stop("Done."))], dialect="ibis")


def image(path: Path, shift: int = 0) -> str:
    """A file with a bright box on the ground, `shift` pixels to the right."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZE, 3), 30, np.uint8)
    pixels[20:40, 30 + shift : 60 + shift] = 220
    write_png(pixels, path)
    return str(path)


def batch(
    folder: Path, query: str = "the box", *, target: str = "box", overwrite: bool = False, **more: object
) -> Batch:
    return Batch(policy(target), RegionSegmenter(), query, folder, overwrite=overwrite, **more)  # type: ignore[arg-type]


def test_two_images_of_one_name_keep_both_results_in_any_order_of_runs(tmp_path: Path) -> None:
    left, right = image(tmp_path / "left" / "eye.png"), image(tmp_path / "right" / "eye.png", 5)
    together, apart = tmp_path / "together", tmp_path / "apart"
    both = list(batch(together).run([left, right]))
    [first], [second] = list(batch(apart).run([left])), list(batch(apart).run([right]))
    assert contents(together).keys() == contents(apart).keys()
    assert [Path(one.to_json()["record"]).name for one in both] == [
        Path(one.to_json()["record"]).name for one in (first, second)
    ]
    before = contents(together)
    [again] = batch(together).run([right])  # alone, it finds its own result
    assert isinstance(again, ImageResult)
    assert again.kept
    assert again.to_json()["record"] == both[1].to_json()["record"]
    assert contents(together) == before


def test_a_second_query_replaces_nothing_and_names_its_object(tmp_path: Path) -> None:
    eye, out = image(tmp_path / "eye.png"), tmp_path / "out"
    [disc] = batch(out, "the optic disc").run([eye])
    before = contents(out)
    [cup] = batch(out, "the optic cup").run([eye])
    assert before.items() <= contents(out).items()
    assert Path(disc.to_json()["record"]).name == "eye_record.json"
    assert "optic_cup" in Path(cup.to_json()["record"]).name


def test_names_that_differ_in_case_alone_do_not_meet(tmp_path: Path) -> None:
    inputs = [image(tmp_path / "a" / "Eye.png"), image(tmp_path / "b" / "eye.png", 5)]
    records = [one.to_json()["record"].casefold() for one in batch(tmp_path / "out").run(inputs)]
    assert len(set(records)) == 2


def test_other_settings_are_refused_and_overwrite_leaves_no_stale_mask(tmp_path: Path) -> None:
    eye, out = image(tmp_path / "eye.png"), tmp_path / "out"
    assert [one.to_json().get("kept") for one in batch(out).run([eye])] == [None]
    before = contents(out)
    [refused] = batch(out, max_turns=7).run([eye])
    assert isinstance(refused, Failed)
    assert "max_turns" in str(refused.error)
    assert "--overwrite" in str(refused.error)
    assert contents(out) == before
    [made] = batch(out, target="other box", overwrite=True).run([eye])
    assert isinstance(made, ImageResult)
    assert not made.kept
    assert sorted(contents(out)) == ["eye_mask_other_box.png", "eye_overlay.png", "eye_record.json"]


def test_another_start_mask_is_another_setting(tmp_path: Path) -> None:
    eye, out = image(tmp_path / "eye.png"), tmp_path / "out"
    list(batch(out).run([eye]))
    mask = np.zeros(SIZE, bool)
    mask[25:30, 40:50] = True
    write_png(mask.astype(np.uint8) * 255, tmp_path / "start.png")
    [refused] = batch(out).run([eye], [tmp_path / "start.png"])
    assert isinstance(refused, Failed)
    assert "start mask" in str(refused.error)
    with pytest.raises(ConfigError, match="2 start masks for 1 images"):
        list(batch(out).run([eye], [None, None]))


def test_a_failing_input_does_not_stop_the_others_and_listeners_hear_of_all(tmp_path: Path) -> None:
    heard: list[str] = []

    class Ears(Listener):
        def started(self, path: str) -> None:
            heard.append(Path(path).name)

    inputs = [image(tmp_path / "a.png"), str(tmp_path / "none.png"), image(tmp_path / "b.png")]
    results = list(batch(tmp_path / "out", listener=Ears()).run(inputs))
    assert [type(one).__name__ for one in results] == ["ImageResult", "Failed", "ImageResult"]
    assert heard == ["a.png", "none.png", "b.png"]


def test_a_folder_that_cannot_be_used_is_told_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be used as a folder"):
        batch(tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="--format seg"):
        VolumeOptions(store="http://127.0.0.1/dicom-web")


def test_a_killed_command_resumes_and_ends_with_every_result_once(tmp_path: Path) -> None:
    inputs = [image(tmp_path / "in" / f"{number:02}.png", number % 9) for number in range(12)]
    script = tmp_path / "script.json"
    script.write_text(json.dumps([text(Click(45, 30, True, "box")), text(Stop("Done."))]))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "ibisagent", "segment", *inputs, "the box", "-o", str(out)]
    command += ["-p", f"scripted:{script}", "-s", "region", "--json"]
    for lines in (4, 9):
        assert killed(command, after_lines=lines)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)["results"]
    assert [one["image"] for one in results] == inputs
    kept = [one["image"] for one in results if one.get("kept")]
    assert 2 <= len(kept) < 12
    assert f"{len(kept)} of 12 results were there already" in done.stderr
    assert sorted(contents(out)) == sorted(
        f"{number:02}_{what}" for number in range(12) for what in ("mask_box.png", "overlay.png", "record.json")
    )


def test_a_json_stream_is_whole_and_each_item_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with JsonStream("results", {"query": "x"}) as stream:
        stream.add({"a": 1})
        early = capsys.readouterr().out
        stream.add({"b": "two\nlines"})
    text = early + capsys.readouterr().out
    assert json.loads(early.splitlines()[1]) == {"a": 1}
    assert json.loads(text) == {"query": "x", "results": [{"a": 1}, {"b": "two\nlines"}]}
    assert {"a": 1} in [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    with JsonStream("results", {}) as _:
        pass
    assert json.loads(capsys.readouterr().out) == {"results": []}
