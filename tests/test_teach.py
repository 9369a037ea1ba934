"""Teaching an agent the user's own objects: what it learns from, what it keeps, and that it forgets nothing."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from small_models import small_qwen
from typer.testing import CliRunner

import ibisagent
from ibisagent.cli import app
from ibisagent.cli.teach import _taught_names
from ibisagent.domain import Box, Case, Image, Observation, Prompt, Turn
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.evaluation.reliability import Queue, Reliability, Reviewer, brought_by, expected_iou_of
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.inference.image import run_case
from ibisagent.policies import Policy, load_policy
from ibisagent.policies.agents import Agent
from ibisagent.policies.following import follow
from ibisagent.policies.mllm import MllmPolicy
from ibisagent.policies.taught import TaughtPolicy
from ibisagent.protocol import parse
from ibisagent.segmenters import Segmenter, load_segmenter
from ibisagent.server.batching import SharedPolicy
from ibisagent.training.teach import TeachProgress, TeachRecipe, teach
from ibisagent.training.teach.part import Compared, Result
from ibisagent.training.teach.reading import folds_of, read_teaching_data
from ibisagent.training.teach.self_check import ACCEPTED, TaughtObject, calibration_of, decide

SIZES = ((72, 91), (85, 64))
OLD = "optic disc"  # one that the packaged policy learned
BRIEF = TeachRecipe(examples=16, batch_size=8, eval_every=8, folds=2, workers=0)
COLUMNS = ("image", "mask", "object", "patient", "split", "modality", "site")


def phantom(seed: int, size: tuple[int, int] = SIZES[0]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Noise with a bright block and a dark one: the pixels, and the masks by name."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(90, 130, (*size, 3), dtype=np.uint8)
    masks = {}
    for name, level, half in (("bright block", 230, 0), ("dark block", 15, size[1] // 2)):
        mask = np.zeros(size, bool)
        top, left = draw.integers(5, size[0] - 30), half + draw.integers(3, size[1] // 2 - 20)
        mask[top : top + 20, left : left + 15] = True
        pixels[mask] = level
        masks[name] = mask
    return pixels, masks


def write_data(folder: Path, count: int, names: Sequence[str] = ("bright block", "dark block"), start: int = 0) -> Path:
    """A manifest of `count` phantoms of two sizes, a patient each."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(start, start + count):
        pixels, masks = phantom(number, SIZES[number % 2])
        write_png(pixels, folder / f"{number}.png")
        for name in names:
            mask = f"{number}-{name}.png"
            write_mask_png(masks[name], folder / mask)
            rows.append(row(f"{number}.png", mask, name, patient=f"p{number}"))
    return write_rows(folder, rows)


def row(image: str, mask: str, name: str, **more: str) -> dict[str, str]:
    return {**dict.fromkeys(COLUMNS, ""), "modality": "phantom", "image": image, "mask": mask, "object": name, **more}


def write_rows(folder: Path, rows: Sequence[dict[str, str]]) -> Path:
    with (folder / "index.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    return folder


def read_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------------------------- what there is


def test_what_was_found_is_told_before_anything_is_learned(tmp_path: Path) -> None:
    data = write_data(tmp_path, 5)
    rows = read_rows(data)
    write_mask_png(np.zeros(SIZES[0], bool), data / "empty.png")
    (data / "3.png").write_bytes(b"no image")
    write_png(phantom(7)[0], data / "kept.png")
    rows[0]["object"] = "Optic_Disc"
    rows[2]["mask"], rows[4]["mask"] = "", "empty.png"  # both say that it is not there
    rows.append(row("kept.png", rows[1]["mask"], "dark block", split="val"))
    found = read_teaching_data([write_rows(data, rows)], {OLD}).found
    assert (found.images, found.patients, found.duplicates, found.left_aside) == (4, 4, 0, 1)
    assert found.objects == {"bright block": 1, "dark block": 4, OLD: 1}
    assert found.absent == {"bright block": 2}
    assert found.renamed == {"Optic_Disc": OLD}
    assert found.sizes == SIZES
    assert len(found.left_out) == 2
    assert "3.png" in found.left_out[0]


def test_the_same_pixels_are_one_image_of_one_patient(tmp_path: Path) -> None:
    data = write_data(tmp_path, 2)
    (data / "copy.png").write_bytes((data / "0.png").read_bytes())
    rows = read_rows(data)
    rows.append(row("copy.png", "0-bright block.png", "bright block", patient="other"))
    material = read_teaching_data([write_rows(data, rows)], ())
    assert (material.found.images, material.found.patients, material.found.duplicates) == (2, 2, 1)


def test_each_object_is_spread_over_the_folds_and_no_patient_is_in_two(tmp_path: Path) -> None:
    data = write_data(tmp_path, 6)
    rows = [one for one in read_rows(data) if one["object"] == "bright block" or one["patient"] in ("p0", "p1", "p2")]
    material = read_teaching_data([write_rows(data, rows)], ())
    folds = folds_of(material, 3)
    assert sorted(patient for fold in folds for patient in fold) == material.patients
    assert [sum(one in ("p0", "p1", "p2") for one in fold) for fold in folds] == [1, 1, 1]
    assert len(folds_of(material, 50)) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: [{**one, "mask": ""} for one in rows], "no image shows an object to learn"),
        (lambda rows: [{**one, "object": "tumor and its edge, or not?"} for one in rows], "rename it in the data"),
        (lambda rows: [{**one, "mask": one["image"].replace("0", "1")} for one in rows[:1]], "the first of 1 left out"),
    ],
)
def test_data_that_teaches_nothing_is_one_line(tmp_path: Path, change, message: str) -> None:
    data = write_data(tmp_path, 2, ["bright block"])
    write_rows(data, change(read_rows(data)))
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        teach([data], tmp_path / "agent", recipe=BRIEF)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- the decision


def signals_of(iou: float) -> dict[str, float]:
    """Of an expert that is far too sure of its masks."""
    return {"quality": 0.9 + iou / 12, "stability": 0.95 + iou / 40, "convergence": 1.0, "belief": 0.8 + iou / 6}


def compared(gains: Sequence[float], before: float = 0.5) -> list[Compared]:
    return [
        Compared("cyst", f"{number}.png", f"p{number}", before, before + gain, 2, 2, signals_of(before + gain))
        for number, gain in enumerate(gains)
    ]


@pytest.mark.parametrize(
    ("gains", "known", "kept"),
    [
        ([0.2, 0.3, 0.1, 0.4], True, True),
        ([0.2, 0.3, -0.1, -0.35], True, False),  # on the mean better, but not surely
        ([0.2, 0.3, -0.1, -0.35], False, True),  # of what the old one never learned that is enough
        ([-0.1, -0.05, 0.1, -0.1], False, False),
        ([0.0, 0.0, 0.0], False, False),
        ([], True, False),  # one image: nothing could be checked, and there is something to lose
        ([], False, True),
    ],
)
def test_the_old_agent_goes_on_answering_where_the_taught_one_is_not_surely_better(gains, known, kept) -> None:
    assert decide("cyst", len(gains), known, compared(gains), check=True).kept is kept


def test_masks_that_the_old_agent_made_do_not_speak_for_it() -> None:
    accepted = compared([-0.12] * 6, before=1.0)
    corrected = [replace(one, patient=f"{one.patient} corrected") for one in compared([0.2] * 4)]
    found = decide("cyst", 10, True, [*accepted, *corrected], check=True)
    assert found.kept, "as good as what was accepted, and better where it had to be corrected"
    assert found.before == pytest.approx(0.6 * ACCEPTED + 0.4 * 0.5)
    assert not decide("cyst", 6, True, compared([-0.3] * 6, before=1.0), check=True).kept


def test_masks_unlike_all_others_are_named() -> None:
    odd = replace(compared([0.0])[0], image="odd.png", patient="x", after=0.02)
    assert decide("cyst", 5, False, [*compared([0.4] * 4), odd], check=True).doubtful == ("odd.png",)
    assert decide("cyst", 5, False, [*compared([-0.4] * 4), odd], check=True).doubtful == ()


# -------------------------------------------------------------------------------------------------- how sure it is

MADE_WITH = {"segmenter": "region", "mask_selection": "best"}


def kept(name: str = "cyst", *, better: bool = True) -> TaughtObject:
    return TaughtObject(name, 12, False, 0.1, 0.5, None, better, "")


def test_the_masks_of_the_check_say_how_sure_the_agent_is() -> None:
    gains = [-0.45, -0.4, -0.3, -0.3, -0.2, 0.0, 0.1, 0.2, 0.3, 0.4]
    other = [
        replace(one, object="scar", after=0.0) for one in compared(gains)
    ]  # not kept: the old agent answers for it
    found = calibration_of([kept(), kept("scar", better=False)], [Result((*compared(gains), *other), MADE_WITH)])
    assert found is not None
    assert (found.cases, found.provenance) == (10, MADE_WITH)
    scores = [found.score(signals_of(0.5 + gain)) for gain in gains]
    assert np.mean(scores) == pytest.approx(0.5 + np.mean(gains), abs=0.1)  # the plain means are above 0.9
    assert scores == sorted(scores)


def test_too_few_masks_of_the_check_say_nothing() -> None:
    absent = replace(compared([0.1])[0], signals={})
    assert calibration_of([kept()], [Result((*compared([0.1] * 9), absent), MADE_WITH)]) is None
    assert calibration_of([kept()], [Result((), {})]) is None


# ------------------------------------------------------------------------------------------------ going by a map


def seen_with(mask: np.ndarray | None, turns: Sequence[Turn] = ()) -> Observation:
    image = Image(np.zeros((64, 96, 3), np.uint8))
    return Observation("", image, "Segment the cyst.", {} if mask is None else {"cyst": mask}, tuple(turns))


def two_parts() -> tuple[np.ndarray, np.ndarray]:
    """A map of two separate blocks and a speck, and the mask of all three on an image of 64 x 96 pixels."""
    region = np.full((64, 64), -6.0, np.float32)
    for rows, columns in ((slice(8, 40), slice(4, 24)), (slice(20, 50), slice(40, 60)), (slice(60, 62), slice(2, 4))):
        region[rows, columns] = 6.0
    return region, cv2.resize(region, (96, 64), interpolation=cv2.INTER_LINEAR) > 0


def test_an_expert_begins_with_clicks_into_each_part_a_box_and_clicks_against_the_rest() -> None:
    region, shown = two_parts()
    first, box, *clicks = follow(seen_with(None), region, "cyst").actions
    assert isinstance(box, Box)
    assert box.y1 < 55  # the speck is left out
    positive = [click for click in (first, *clicks) if click.positive]
    assert {click.x > 48 for click in positive} == {False, True}
    assert all(shown[click.y, click.x] for click in positive)
    against = [click for click in clicks if not click.positive]
    assert against
    assert not any(shown[click.y, click.x] for click in against)


def test_an_expert_corrects_what_its_map_is_sure_of_and_stops_where_they_agree() -> None:
    region, shown = two_parts()
    half = shown.copy()
    half[:, 50:] = False
    click = follow(seen_with(half), region, "cyst").actions[0]
    assert click.positive
    assert (shown & ~half)[click.y, click.x]
    leaked = shown.copy()
    leaked[:, 36:60] = True
    click = follow(seen_with(leaked), region, "cyst").actions[0]
    assert not click.positive
    assert not any(one.positive for one in follow(seen_with(leaked), region, "cyst").prompts)
    assert follow(seen_with(shown), region, "cyst").stop is not None
    assert follow(seen_with(half), region.clip(-0.5, 0.5), "cyst").stop is not None  # sure of nothing


def test_an_expert_acts_alike_on_images_of_any_size() -> None:
    region, _ = two_parts()
    large = Observation("", Image(np.zeros((1280, 1920, 3), np.uint8)), "Segment the cyst.")
    shown = cv2.resize(region, (1920, 1280), interpolation=cv2.INTER_LINEAR) > 0
    actions = follow(large, region, "cyst").actions
    assert all(shown[one.y, one.x] is np.bool_(one.positive) for one in actions if not isinstance(one, Box))
    [box] = [one for one in actions if isinstance(one, Box)]
    [small] = [one for one in follow(seen_with(None), region, "cyst").actions if isinstance(one, Box)]
    assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx(
        [20 * side for side in (small.x0, small.y0, small.x1, small.y1)], abs=25
    )


def test_an_expert_calls_absent_what_its_map_shows_nowhere() -> None:
    stop = follow(seen_with(None), np.full((64, 64), -3.0), "cyst").stop
    assert stop.absent == ("cyst",)
    assert follow(seen_with(None), np.full((64, 64), -1.0), "cyst").prompts


# ------------------------------------------------------------------------------------------------------ the agent


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 3)


@pytest.fixture(scope="module")
def taught(data: Path, tmp_path_factory: pytest.TempPathFactory):
    """An agent that was hardly taught, unchecked; and what was reported meanwhile."""
    reports: list[TeachProgress] = []
    folder = tmp_path_factory.mktemp("agents") / "blocks"
    return teach([data], folder, check=False, recipe=BRIEF, report=reports.append), reports


@pytest.fixture(scope="module")
def agent(taught) -> TaughtPolicy:
    policy = load_policy(str(taught[0].folder))
    assert isinstance(policy, TaughtPolicy)
    return policy


@pytest.fixture(scope="module")
def base() -> MllmPolicy:
    policy = load_policy("ibis-nano")
    assert isinstance(policy, MllmPolicy)
    return policy


def test_an_agent_is_a_folder_that_appears_whole(taught, data: Path) -> None:
    found, reports = taught
    assert {path.name for path in found.folder.iterdir()} == {"agent.json", "README.md", "experts"}
    assert [(one.name, one.images, one.kept) for one in found.objects] == [
        ("bright block", 3, True),
        ("dark block", 3, True),
    ]
    agent = Agent.read(found.folder)
    assert (agent.base, agent.names) == ("ibis-nano", ("bright block", "dark block"))
    [record] = agent.records
    assert (record["data"], record["seed"], record["found"]["images"]) == ([str(data)], 0, 3)
    assert "bright block" in (found.folder / "README.md").read_text()
    stages = list(dict.fromkeys(one.stage for one in reports))
    assert stages == ["reading", "learning", "writing"]
    learning = [one for one in reports if one.stage == "learning"]
    assert (learning[-1].done, learning[-1].total) == (16, 16)
    assert any(one.seconds_left for one in learning)


def test_what_was_not_taught_is_answered_as_before(agent: TaughtPolicy, base: MllmPolicy) -> None:
    image = Image(phantom(9)[0])
    seen = [Observation("", image, query) for query in (f"Segment the {OLD}.", "left kidney", "Which modality is it?")]
    assert [one.text for one in agent.respond(seen)] == [one.text for one in base.respond(seen)]
    assert agent.about(image, OLD) == base.about(image, OLD)


def placed(text: str, image: Image) -> list[Prompt]:
    """The prompts of a reply, whatever they call the object."""
    return [replace(one, target="") for one in parse(text, image.size, dialect="ibis").prompts]


def test_the_expert_answers_for_the_taught_names(agent: TaughtPolicy, base: MllmPolicy) -> None:
    image = Image(phantom(9)[0])
    seen = [
        Observation("", image, query)
        for query in (
            "bright block",
            "the BRIGHT blocks",
            "brigth block",
            "Is there a bright block?",
            "big bright block",
        )
    ]
    said = [placed(one.text, image) for one in agent.respond(seen)]
    assert said[0] == said[1] == said[2] == said[3]
    assert placed(base.respond(seen[:1])[0].text, image) not in said
    for one in seen[:4]:
        [asked] = agent.about(image, one.query)
        assert asked.known or asked.nearest == "bright block"


def test_a_taught_object_is_looked_for_and_part_of_everything(agent: TaughtPolicy) -> None:
    image = Image(phantom(0)[0])
    requests = agent.vocabulary.requests("everything", lambda: agent.look(image, "everything").kinds)
    assert {"bright block", "dark block"} <= {one.asked for one in requests}
    [asked] = agent.about(image, "dark block")
    assert asked.known
    look = agent.look(image, "Segment the dark block.")
    assert not agent.vocabulary.refuses(agent.vocabulary.named("dark block"), look)


def test_two_objects_of_one_sentence_go_to_whom_they_belong(agent: TaughtPolicy) -> None:
    result = ibisagent.segment(phantom(9)[0], "the bright block, the optic disc", policy=agent)
    assert set(result.masks) <= {"bright block", "optic disc"}
    assert result.episode.provenance["policy_taught"] == "bright block, dark block"
    assert result.episode.provenance["policy_base"] == "ibis-nano"


def test_an_agent_brings_how_sure_it_is_of_what_it_was_taught(taught, tmp_path: Path) -> None:
    folder = tmp_path / "sure"
    shutil.copytree(taught[0].folder, folder)
    made_with = {"segmenter": "region", "mask_selection": "best"}
    calibration = Reliability({"quality": 1.0, "belief": 0.5}, -2.0, 12, 0.1, 0.05, made_with)
    calibration.write(folder / "experts" / "1" / "reliability.json")
    agent, region = load_policy(str(folder)), load_segmenter("region")
    image = Image(phantom(9)[0])

    def brought(query: str, policy: Policy = agent, segmenter: Segmenter = region) -> Reliability | None:
        return brought_by(policy, image, query, segmenter)

    assert brought("bright block") == brought("the bright block, the dark block") == calibration
    assert brought(OLD) is None
    assert brought(f"the bright block, the {OLD}") is None
    assert brought("bright block", segmenter=load_segmenter("ellipse")) is None
    assert brought("bright block", load_policy(str(taught[0].folder))) is None
    shared = SharedPolicy(agent)
    try:
        assert brought("bright block", shared) == calibration
    finally:
        shared.close()
    case = Case("9", image, "bright block")
    episode = run_case(case, agent, region)
    queue = Queue(Reviewer(agent, region))
    score = queue.add("9.png", episode, case)
    assert queue.calibrated
    assert score == expected_iou_of(episode, image, case.query, agent, region)
    assert score == calibration.score(Reviewer(agent, region).signals(episode, case))
    plain = Queue(Reviewer(agent, region))
    other = Case("9", image, OLD)
    plain.add("9.png", run_case(other, agent, region), other)
    assert not plain.calibrated


def test_a_finished_agent_is_returned_at_once_and_refused_to_others(taught, data: Path, tmp_path: Path) -> None:
    told = []
    again = teach([data], taught[0].folder, check=False, on_found=told.append)
    assert again == taught[0]
    assert told == [again.found]
    with pytest.raises(ConfigError, match="is of another run"):
        teach([data], taught[0].folder, check=False, seed=1)
    with pytest.raises(ConfigError, match=r"is of other images, masks, .* choose another folder"):
        teach([write_data(tmp_path, 4)], taught[0].folder, check=False)


def test_an_agent_is_taught_again(taught, base: MllmPolicy, tmp_path: Path) -> None:
    data = write_data(tmp_path / "more", 2, ["dark block"], start=20)
    teach([data], tmp_path / "both", policy=str(taught[0].folder), check=False, recipe=BRIEF)
    first, second = Agent.read(tmp_path / "both").experts
    assert (first.names, second.names) == (("bright block",), ("dark block",))
    assert (first.folder / "model.safetensors").read_bytes() == (
        taught[0].folder / "experts" / "1" / "model.safetensors"
    ).read_bytes()
    assert len(Agent.read(tmp_path / "both").records) == 2
    both = load_policy(str(tmp_path / "both"))
    seen = [Observation("", Image(phantom(9)[0]), OLD)]
    assert both.respond(seen)[0].text == base.respond(seen)[0].text


class _StoppedError(Exception):
    pass


def test_a_teaching_that_was_stopped_resumes_and_leaves_nothing_half_done(data: Path, tmp_path: Path) -> None:
    def stop(progress: TeachProgress) -> None:
        if progress.stage == "checking" and progress.done >= 16:
            raise _StoppedError

    folder = tmp_path / "agent"
    with pytest.raises(_StoppedError):
        teach([data], folder, recipe=BRIEF, report=stop)
    with pytest.raises(PolicyError, match=r"holds no config\.json"):
        load_policy(str(folder))
    with pytest.raises(ConfigError, match="is of another run"):
        teach([data], folder, recipe=BRIEF, seed=3)
    with pytest.raises(ConfigError, match=r"is of other images, masks, .* choose another folder"):
        teach([write_data(tmp_path / "more", 4)], folder, recipe=BRIEF)
    done: list[int] = []
    found = teach([data], folder, recipe=BRIEF, report=lambda one: done.append(one.done))
    assert found.calibrated_on == 0  # six masks were judged
    assert "takes 10 masks" in (folder / "README.md").read_text()
    assert 8 not in done  # the half of the first run that was learned already
    assert {path.name for path in folder.iterdir()} <= {"agent.json", "README.md", "experts"}
    for one in found.objects:
        assert one.before is not None
        assert 0 <= one.before <= 1
        assert one.kept is (one.after > one.before) or not one.kept
    load_policy(str(folder))


def test_two_do_not_teach_one_agent(data: Path, tmp_path: Path) -> None:
    def again(_progress: TeachProgress) -> None:
        if _progress.stage == "learning":
            with pytest.raises(ConfigError, match="is being taught by another process"):
                teach([data], tmp_path / "agent", check=False, recipe=BRIEF)
            raise _StoppedError

    with pytest.raises(_StoppedError):
        teach([data], tmp_path / "agent", check=False, recipe=BRIEF, report=again)


def test_the_command_runs_in_processes_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command is slow; what is judged here is that its processes start, report and fail in one line."""
    data = write_data(tmp_path / "data", 1, ["bright block"])
    (tmp_path / "random.py").write_text("raise RuntimeError('a file of the user is not a module of Python')")
    monkeypatch.chdir(tmp_path)
    brief = BRIEF.model_copy(update={"workers": 1})
    found = teach([data], tmp_path / "agent", recipe=brief)
    [one] = found.objects
    assert (one.before, one.kept) == (None, True)
    assert "too few images" in one.reason
    shown = CliRunner().invoke(app, ["teach", str(data), "-o", str(tmp_path / "agent")])
    assert shown.exit_code == 0, shown.output
    assert "fewer than three images" in shown.stderr
    assert "bright block: too few images" in shown.stdout
    as_json = CliRunner().invoke(app, ["teach", str(data), "-o", str(tmp_path / "agent"), "--json"])
    said = json.loads(as_json.stdout)
    assert said["objects"][0]["name"] == "bright block"
    assert (said["found"]["images"], said["found"]["left_out"]) == (1, [])
    with pytest.raises(SystemExit):
        raise SystemExit(
            CliRunner().invoke(app, ["teach", str(tmp_path / "none"), "-o", str(tmp_path / "x")]).exit_code
        )


@pytest.mark.parametrize("policy", ["oracle", "centre-click", "nowhere/at all"])
def test_policies_that_cannot_be_taught_are_one_line(data: Path, tmp_path: Path, policy: str) -> None:
    with pytest.raises(ConfigError, match="cannot be taught"):
        teach([data], tmp_path / "agent", policy=policy)


def test_what_to_label_next_is_asked_for_by_the_taught_names(taught, tmp_path: Path) -> None:
    assert _taught_names(str(taught[0].folder)) == "the bright block, the dark block"
    folder = tmp_path / "comma"
    shutil.copytree(taught[0].folder, folder)
    for file in (folder / "agent.json", folder / "experts" / "1" / "objects.json"):
        file.write_text(file.read_text().replace("bright block", "block, bright"))
    with pytest.raises(ConfigError, match=r"no sentence asks for all .* choose with --query"):
        _taught_names(str(folder))


def test_a_damaged_agent_is_said_to_be_one(taught, tmp_path: Path) -> None:
    folder = tmp_path / "agent"
    folder.mkdir()
    (folder / "agent.json").write_text('{"schema": 1}')
    with pytest.raises(PolicyError, match="is damaged"):
        load_policy(str(folder))
    (folder / "agent.json").write_text('{"schema": 7}')
    with pytest.raises(PolicyError, match="has schema 7"):
        load_policy(str(folder))
    shutil.copytree(taught[0].folder, folder, dirs_exist_ok=True)
    whole = json.loads((folder / "agent.json").read_text())
    [expert] = whole["experts"]
    for change, message in (
        ({"records": ["once"]}, "is damaged"),
        ({"experts": [{**expert, "names": ["bright block", "polyp"]}]}, "experts/1 never learned 'polyp'"),
        ({"experts": [{**expert, "names": "cyst"}]}, "experts/1 never learned 'c'"),
        ({"experts": [{**expert, "folder": "experts/2"}]}, "experts/2 holds no names"),
    ):
        (folder / "agent.json").write_text(json.dumps({**whole, **change}))
        for use in (
            lambda: load_policy(str(folder)),
            lambda: teach([tmp_path], tmp_path / "new", policy=str(folder)),
        ):
            with pytest.raises(PolicyError, match=message):
                use()
    with pytest.raises(ConfigError, match="takes no adapter"):
        load_policy(str(taught[0].folder), adapter=tmp_path)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_a_large_model_is_taught_by_an_adapter(tmp_path: Path) -> None:
    qwen = small_qwen(tmp_path / "qwen")
    data = write_data(tmp_path / "data", 2, ["bright block"])
    settings = {"max_steps": 1, "max_pixels": 3136, "max_length": 20_000, "device": "cpu", "save_steps": 1}
    brief = BRIEF.model_copy(update={"adapter": settings})
    teach([data], tmp_path / "agent", policy=str(qwen), segmenter="region", check=False, recipe=brief)
    agent = Agent.read(tmp_path / "agent")
    assert agent.adapter is not None
    policy = load_policy(str(tmp_path / "agent"))
    assert isinstance(policy, MllmPolicy)
    assert policy.describe()["policy_adapter"] == str(agent.adapter)
    with pytest.raises(ConfigError, match="with the data of both"):
        teach([data], tmp_path / "more", policy=str(tmp_path / "agent"))
