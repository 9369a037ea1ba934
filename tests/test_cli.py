"""The command line, end to end with the fakes: outputs, bad input, start-up time."""

from __future__ import annotations

import inspect
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from commands import assert_one_line, ibisagent
from replies import text
from typer.testing import Result

from ibisagent.cli import app
from ibisagent.cli import data as of_data
from ibisagent.cli import evaluate as of_eval
from ibisagent.cli.options import Drawing, PolicyChoice
from ibisagent.cli.segment import VolumeChoice, segment
from ibisagent.domain import Click, Stop
from ibisagent.evaluation.audit import write_report
from ibisagent.evaluation.reliability import Reviewer
from ibisagent.evaluation.runs import Setup
from ibisagent.generation.trajectories import TrajectoryConfig
from ibisagent.imaging.images import read_image, read_masks, write_mask_png, write_png
from ibisagent.inference.batch import Batch, VolumeOptions
from ibisagent.policies import load_policy
from ibisagent.store import read_record

SIZE = (61, 83)
QUERY = "Segment the bright box."


FIND = text(Click(45, 30, True, "bright box"), thought="I look for the bright box.")
STOP = text(Stop("The bright box is segmented."))


@pytest.fixture
def ground_truth() -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[20:40, 30:60] = True
    return mask


@pytest.fixture
def image(tmp_path: Path, ground_truth: np.ndarray) -> Path:
    noise = np.random.default_rng(0).integers(0, 20, size=(*SIZE, 3), dtype=np.uint8)
    write_png(np.where(ground_truth[..., None], 200, 20).astype(np.uint8) + noise, tmp_path / "box.png")
    return tmp_path / "box.png"


@pytest.fixture
def script(tmp_path: Path) -> str:
    return scripted(tmp_path, [FIND, STOP])


def scripted(folder: Path, replies: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    (folder / "script.json").write_text(json.dumps(replies))
    return f"scripted:{folder / 'script.json'}"


def run_segment(*arguments: object, policy: str, out: Path) -> Result:
    return ibisagent("segment", *arguments, "--policy", policy, "--segmenter", "region", "-o", out)


# ------------------------------------------------------------------------------------------------- segment, replay


def test_the_mask_of_the_best_turn_can_be_kept_and_is_replayed(image: Path, tmp_path: Path) -> None:
    spread = text(Click(5, 5, True, "bright box"))  # on the ground: the region runs over the whole image
    script = scripted(tmp_path, [FIND, spread, STOP])
    kept = {}
    for keep in ("last", "best"):
        out = tmp_path / keep
        assert run_segment(image, QUERY, "--mask-selection", keep, policy=script, out=out).exit_code == 0
        assert ibisagent("replay", out / "box_record.json", "-o", out / "again").exit_code == 0
        file = "box_mask_bright_box.png"
        assert (out / file).read_bytes() == (out / "again" / file).read_bytes()
        episode, mask = read_record(out / "box_record.json"), read_masks(out / file)["mask"]
        assert (mask == episode.answer_masks["bright box"]).all()
        kept[keep] = next(turn.segmenter_score for turn in episode.turns if (turn.after["bright box"] == mask).all())
    assert kept["best"] >= kept["last"]
    assert_one_line(
        run_segment(image, QUERY, "--mask-selection", "none", policy=script, out=tmp_path), "give best or last"
    )


def test_segment_writes_mask_overlay_and_record(
    image: Path, script: str, tmp_path: Path, ground_truth: np.ndarray
) -> None:
    out = tmp_path / "new" / "out"
    result = run_segment(image, QUERY, policy=script, out=out)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == [
        "box_mask_bright_box.png",
        "box_overlay.png",
        "box_record.json",
    ]
    mask = read_masks(out / "box_mask_bright_box.png")["mask"]
    assert mask.shape == SIZE
    assert (mask & ~ground_truth).sum() == 0
    assert mask.sum() > 0.7 * ground_truth.sum()
    changed = (read_image(out / "box_overlay.png").pixels != read_image(image).pixels).any(axis=2)
    assert (changed == mask).all()
    record = json.loads((out / "box_record.json").read_text())
    assert [turn["thought"] for turn in record["turns"]] == ["I look for the bright box.", ""]
    assert record["made_by"]["segmenter"] == "region"
    assert record["made_by"]["policy"] == script
    assert "turn 1" in result.stdout
    assert "I look for the bright box." in result.stdout
    assert str(out / "box_overlay.png") in result.stdout


def test_segment_speaks_json(image: Path, script: str, tmp_path: Path) -> None:
    result = run_segment(image, tmp_path / "none.png", QUERY, "--json", policy=script, out=tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr == ""
    good, bad = json.loads(result.stdout)["results"]
    assert good["stop"] == "stopped"
    assert good["answer"] == "The bright box is segmented."
    assert Path(good["masks"]["bright box"]).is_file()
    assert Path(good["record"]).is_file()
    assert "none.png" in bad["error"]


def test_multiple_targets_give_multiple_masks(image: Path, tmp_path: Path) -> None:
    names = ["left/part", "left part", "ganz übler: Name", "x" * 150]
    clicks = [Click(40 + index, 30, True, name) for index, name in enumerate(names)]
    policy = scripted(tmp_path, [text(*clicks), text(Stop("No spleen.", ("spleen",)))])
    result = run_segment(image, "Segment the parts.", "--json", policy=policy, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    masks = json.loads(result.stdout)["results"][0]["masks"]
    assert set(masks) == {*names, "spleen"}
    assert len(set(masks.values())) == 5
    sizes = {name: read_masks(path)["mask"].sum() for name, path in masks.items()}
    assert sizes["spleen"] == 0
    assert all(sizes[name] > 0 for name in names)


def test_question_without_pixels_writes_no_mask(image: Path, tmp_path: Path) -> None:
    policy = scripted(tmp_path, [text(Stop("Yes."))])
    result = run_segment(image, "Is this a CT?", policy=policy, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["box_overlay.png", "box_record.json"]
    assert '"Yes."' in result.stdout


def test_equal_stems_do_not_overwrite(image: Path, script: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    copies = [tmp_path / "b" / "box.png", tmp_path / "b" / "BOX.png", tmp_path / "b" / "box-2.png"]
    for number, copy in enumerate(copies, 1):
        pixels = read_image(image).pixels.copy()
        pixels[0, 0] = number
        write_png(pixels, copy)
    result = run_segment(image, *copies, QUERY, "--json", policy=script, out=tmp_path / "out")
    results = json.loads(result.stdout)["results"]
    records = [one["record"].casefold() for one in results]
    assert len(set(records)) == 4
    recorded = [json.loads(Path(one["record"]).read_text()) for one in results]
    assert [one["image_source"] for one in recorded] == [path.name for path in (image, *copies)]
    for one in recorded:
        assert one.pop("made_by")["policy"] == script  # a model that is a file is called as it was given
        assert str(tmp_path) not in json.dumps(one), "a record names a folder of this machine"


def test_model_text_cannot_steer_the_terminal(image: Path, tmp_path: Path) -> None:
    policy = scripted(tmp_path, [text(Stop("\x1b[2Jan\u202eswer [red]"), thought="\x1b]0;title\x07 line\nline")])
    result = run_segment(image, QUERY, policy=policy, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "[red]" in result.stdout
    assert not set("\x1b\x07\u202e") & set(result.stdout)


def test_start_mask_is_refined(image: Path, tmp_path: Path, ground_truth: np.ndarray) -> None:
    write_mask_png(ground_truth, tmp_path / "start.png")
    policy = scripted(tmp_path, [STOP])
    result = run_segment(image, QUERY, "--start-mask", tmp_path / "start.png", policy=policy, out=tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (read_masks(tmp_path / "out" / "box_mask_bright_box.png")["mask"] == ground_truth).all()


def test_replay_rebuilds_and_notices_changes(image: Path, script: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_segment(image, QUERY, policy=script, out=out)
    again = ibisagent("replay", out / "box_record.json", "-o", tmp_path / "again")
    assert again.exit_code == 0, again.output
    for name in ("box_mask_bright_box.png", "box_overlay.png", "box_record.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()

    record = json.loads((out / "box_record.json").read_text())
    record["turns"][0]["actions"][0]["x"] = 3
    (out / "moved_record.json").write_text(json.dumps(record))
    assert_one_line(ibisagent("replay", out / "moved_record.json"), "moved_record.json", "bit for bit")

    image.rename(tmp_path / "elsewhere.png")
    assert_one_line(ibisagent("replay", out / "box_record.json"), "box.png", "--image")
    assert ibisagent("replay", out / "box_record.json", "--image", tmp_path / "elsewhere.png").exit_code == 0
    (tmp_path / "moved").mkdir()
    (tmp_path / "elsewhere.png").rename(tmp_path / "moved" / "box.png")
    assert ibisagent("replay", out / "box_record.json", "--image", tmp_path / "moved").exit_code == 0


# -------------------------------------------------------------------------------------------------------- bad input


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A grey PNG whose header may lie about its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("missing.png", None),
        ("empty.png", b""),
        ("text.png", b"not an image"),
        ("zero.png", png(0, 0)),
        ("flat.png", png(5, 0)),
        ("bomb.png", png(100_000, 100_000, b"\0" * 1000)),
        ("cut.png", "half"),
        ("cut.jpg", "half"),
        ("folder.png", "folder"),
    ],
)
def test_bad_image_is_one_line_and_the_others_are_done(
    name: str, content: bytes | str | None, image: Path, script: str, tmp_path: Path
) -> None:
    bad = tmp_path / name
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content == "half":
        PIL.Image.open(image).convert("RGB").save(bad)
        bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    elif content == "folder":
        bad.mkdir()
    result = run_segment(bad, image, QUERY, policy=script, out=tmp_path / "out")
    assert_one_line(result, name)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "box_mask_bright_box.png",
        "box_overlay.png",
        "box_record.json",
    ]


def test_bad_start_mask(image: Path, script: str, tmp_path: Path) -> None:
    write_mask_png(np.ones((60, 83), dtype=bool), tmp_path / "small.png")
    write_mask_png(np.zeros(SIZE, dtype=bool), tmp_path / "black.png")
    out = tmp_path / "out"
    for name, parts in {"small.png": ("83 x 60", "83 x 61", "box.png"), "black.png": ("empty",)}.items():
        result = run_segment(image, QUERY, "--start-mask", tmp_path / name, policy=script, out=out)
        assert_one_line(result, name, *parts)
    result = run_segment(image, image, QUERY, "--start-mask", tmp_path / "small.png", policy=script, out=out)
    assert_one_line(result, "1 start masks for 2 images")
    assert not list(out.iterdir())


@pytest.mark.parametrize(("query", "part"), [("", "empty"), (" \n ", "empty"), ("disc " * 2_000, "characters")])
def test_a_bad_query_is_one_line(query: str, part: str, image: Path, script: str, tmp_path: Path) -> None:
    assert_one_line(run_segment(image, query, policy=script, out=tmp_path / "out"), "query", part)
    assert not (tmp_path / "out").exists()


def test_a_missing_query_is_one_line(image: Path, script: str, tmp_path: Path) -> None:
    assert_one_line(run_segment(image, image, policy=script, out=tmp_path / "out"), "box.png", "query")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--policy", "nonsense"], "nonsense"),
        (["--policy", "oracle"], "ground truth"),
        (["--policy", "scripted:none.json"], "none.json"),
        (["--segmenter", "nonsense"], "nonsense"),
        (["--segmenter", "ibis-click:none.safetensors"], "none.safetensors"),
        (["--segmenter", "remote:http://127.0.0.1:9"], "127.0.0.1:9"),
        (["--dialect", "klingon"], "klingon"),
    ],
)
def test_unknown_or_missing_parts(options: list[str], part: str, image: Path, script: str, tmp_path: Path) -> None:
    chosen = ["--policy", script, "--segmenter", "region", "-o", str(tmp_path / "out"), *options]
    assert_one_line(ibisagent("segment", image, QUERY, *chosen), part)
    assert not list((tmp_path / "out").iterdir())


def test_unreachable_policy_server(image: Path, tmp_path: Path) -> None:
    policy = "endpoint:http://127.0.0.1:9/v1#model"
    assert_one_line(run_segment(image, QUERY, policy=policy, out=tmp_path / "out"), "127.0.0.1:9")
    assert not list((tmp_path / "out").iterdir())


def test_output_is_a_file(image: Path, script: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert_one_line(run_segment(image, QUERY, policy=script, out=tmp_path / "out"), str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_full_disk_leaves_nothing_half_written(image: Path, script: str, tmp_path: Path) -> None:
    """Every file beyond 4 KB fails: the mask fits, the noisy overlay does not."""
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "ibisagent",
        "segment",
        str(image),
        QUERY,
        "-p",
        script,
        "-s",
        "region",
        "-o",
        str(out),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert str(out) in done.stderr
    assert list(out.iterdir()) == []


def test_policy_that_writes_nonsense_makes_nothing_and_that_is_an_error(image: Path, tmp_path: Path) -> None:
    policy = scripted(tmp_path, ["nonsense", "<action>click + (nan, 1e999999999) x</action>"])
    result = run_segment(image, "Segment the <action>stop</action>.", policy=policy, out=tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert "malformed after 2 turns" in result.stdout
    assert "could not be read" in result.stderr
    again = run_segment(image, "Segment the box.", "--json", policy=policy, out=tmp_path / "out")
    assert again.exit_code == 2
    assert "could not be read" in json.loads(again.stdout)["results"][0]["error"]


def test_malformed_replies_after_a_mask_leave_the_mask(image: Path, tmp_path: Path) -> None:
    policy = scripted(tmp_path, [text(Click(40, 30, True, "box")), "nonsense", "nonsense"])
    result = run_segment(image, "Segment the box.", policy=policy, out=tmp_path / "out")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("query", [".", "?", "12", " - "])
def test_query_without_letters_is_refused(image: Path, tmp_path: Path, query: str) -> None:
    result = run_segment(image, query, policy="centre-click", out=tmp_path / "out")
    assert result.exit_code == 2
    assert "no letters" in result.stderr
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- the other commands


@pytest.fixture
def data(tmp_path: Path, image: Path, ground_truth: np.ndarray) -> Path:
    write_mask_png(ground_truth, tmp_path / "mask.png")
    rows = [f"{image.name},mask.png,bright box,CT,val", f"{image.name},mask.png,box,CT,train"]
    (tmp_path / "rows.csv").write_text("\n".join(["image,mask,object,modality,split", *rows]))
    return tmp_path / "rows.csv"


def test_evaluate(data: Path, script: str, tmp_path: Path) -> None:
    arguments = ["eval", "run", data, "--policy", script, "--segmenter", "region", "-o", tmp_path / "run"]
    shown = ibisagent(*arguments)
    assert shown.exit_code == 0, shown.output
    assert "first hit" in shown.stdout
    plain = ibisagent(*arguments, "--json")
    loaded = json.loads(plain.stdout)
    assert loaded["summaries"]["all"]["cases"] == 1  # the val row
    assert loaded["summaries"]["modality"]["CT"]["means"]["first_hit"] == 1
    assert {"prior_iou", "centre_hit", "ellipse_iou", "oracle_iou_10"} <= set(loaded["summaries"]["all"]["means"])
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["made_by"]["segmenter"] == "region"


@pytest.mark.parametrize("policy", ["oracle", "location-prior", "centre-click"])
def test_evaluate_policies_that_need_data(policy: str, data: Path) -> None:
    result = ibisagent("eval", "run", data, "-p", policy, "-s", "region", "--no-baselines", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["summaries"]["all"]["means"]["first_hit"] == 1


def test_evaluate_lists_failures(data: Path, tmp_path: Path) -> None:
    result = ibisagent("eval", "run", data, "-p", scripted(tmp_path, []), "-s", "region")
    assert result.exit_code == 2
    assert "failed, left out: box.png#bright box" in result.stderr


def test_evaluate_bad_choices(data: Path) -> None:
    assert_one_line(ibisagent("eval", "run", data, "-s", "region", "--by", "colour"), "colour")
    assert_one_line(ibisagent("eval", "run", data, "-s", "region", "--empty", "half"), "half")
    assert_one_line(ibisagent("eval", "run", data, "-s", "region", "--split", "test"), "test")
    assert_one_line(ibisagent("eval", "run", data.with_name("none"), "-s", "region"), "none")


def test_trajectories(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = ibisagent("data", "trajectories", data, "-o", out, "-s", "region", "--iou-threshold", 0.8, "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["overall"]["episodes"] == 2
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert ibisagent("data", "trajectories", data, "-o", out, "-s", "region", "--iou-threshold", 0.8).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert_one_line(
        ibisagent("data", "trajectories", data, "-o", out, "-s", "region", "--iou-threshold", 0.7), "iou_threshold"
    )


def test_servers_refuse_what_cannot_be_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IBIS_TOKEN", raising=False)
    assert_one_line(ibisagent("serve", "policy", "--policy", "centre-click"), "centre-click")
    assert_one_line(ibisagent("serve", "segmenter", "-s", "region", "--host", "0.0.0.0"), "0.0.0.0", "IBIS_TOKEN")


def test_models_lists_every_spec() -> None:
    listed = json.loads(ibisagent("models", "--json").stdout)
    states = {(model["kind"], model["spec"]): model["state"] for model in listed}
    assert states["segmenter", "region"] == "none needed"
    assert states["segmenter", "litemedsam"] == "here"
    assert ("policy", "ibis-nano") in states
    nano = next(model for model in listed if model["spec"] == "ibis-nano")
    assert {"optic disc", "liver"} <= set(nano["names"])
    text = ibisagent("models").stdout
    assert "litemedsam" in text
    assert f"knows {len(nano['names'])} objects: " in text


def test_doctor_runs_one_episode() -> None:
    result = ibisagent("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(result.stdout)}
    assert checks["one episode"]["passed"], checks["one episode"]
    assert checks["weights of litemedsam"]["passed"]
    assert result.exit_code == (0 if all(check["passed"] for check in checks.values()) else 2)


# --------------------------------------------------------------------------------------------------------- start-up


def cpu_seconds(*code: str) -> float:
    """CPU time of a fresh interpreter, the best of three: wall time would measure what else the machine does."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *code], check=True, capture_output=True, env={**os.environ, "COLUMNS": "80"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_the_installed_command_is_this_one() -> None:
    [command] = entry_points(group="console_scripts", name="ibisagent")
    assert command.load() is app


def test_import_is_quick() -> None:
    assert cpu_seconds("-c", "import ibisagent") < 0.3


def test_help_is_quick() -> None:
    assert cpu_seconds("-m", "ibisagent", "--help") < 0.6


def test_heavy_modules_stay_out() -> None:
    code = (
        "import sys, ibisagent, ibisagent.cli, ibisagent.policies, ibisagent.segmenters, ibisagent.inference.session\n"
        "print([name for name in ('torch', 'transformers', 'openvino', 'timm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("given", "used"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_sleep_while_they_wait(given: str | None, used: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", given)
    assert ibisagent("models").exit_code == 0
    assert os.environ["OMP_WAIT_POLICY"] == used


# --- one default, wherever an option is given ---


def defaults(of: Callable[..., object]) -> dict[str, object]:
    parameters = inspect.signature(of).parameters.items()
    return {name: one.default for name, one in parameters if one.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("options", "library"),
    [
        (PolicyChoice, load_policy),
        (Drawing, load_policy),
        (VolumeChoice, VolumeOptions),
        (segment, Batch),
        (of_data.trajectories, TrajectoryConfig),
        (of_data.audit, write_report),
        (of_eval.run, Setup),
        (of_eval.calibrate, Reviewer),
    ],
)
def test_an_option_has_the_default_of_what_it_is_for(
    options: Callable[..., object], library: Callable[..., object]
) -> None:
    """Commands state defaults again, as they are to be listed without loading the library."""
    said, meant = defaults(options), defaults(library)
    said |= {name: meant[name] for name, value in said.items() if value is None and name in meant}  # "as it is"
    common = said.keys() & meant.keys()
    assert common
    assert {name: said[name] for name in common} == {name: meant[name] for name in common}
