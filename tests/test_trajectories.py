"""Oracle runs: complete, resumable after kill -9 to the byte, honest about failures and changed settings."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from commands import contents, killed

from ibisagent.datasets import CaseSource, read_cases
from ibisagent.domain import Click, Completion, Episode, Image, Reply, Stop, Turn, Undo
from ibisagent.errors import ConfigError, SegmenterError
from ibisagent.generation.trajectories import TrajectoryConfig, generate
from ibisagent.imaging.images import read_image, write_mask_png, write_png
from ibisagent.inference.replay import replay
from ibisagent.segmenters import SegmenterSession, load_segmenter
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.store import EpisodeStore

SIZE = (61, 83)
CONFIG = TrajectoryConfig(
    mistakes=0.2, jitter=0.4, box_first=0.3, iou_threshold=0.85, max_clicks=8, seed=5, shard_cases=4
)


def write_phantoms(folder: Path, count: int) -> None:
    """`count` pairs in the BiomedParseData layout: discs of two modalities on noisy ground."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for name in ("train", "train_mask"):
        (folder / "Phantoms" / name).mkdir(parents=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        x, y, radius = draw.integers(18, 60), draw.integers(15, 45), draw.integers(8, 14)
        ground_truth = (columns - x) ** 2 + (rows - y) ** 2 <= radius**2
        pixels = draw.integers(0, 90, (*SIZE, 3)) + ground_truth[..., None] * 110
        stem = f"p{number}_{'CT' if number % 3 else 'MRI'}_abdomen"
        write_png(pixels.astype(np.uint8), folder / "Phantoms" / "train" / f"{stem}.png")
        write_mask_png(ground_truth, folder / "Phantoms" / "train_mask" / f"{stem}_spleen.png")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder, 22)
    return folder


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    generate(read_cases(data), load_segmenter("region"), folder, CONFIG)
    return folder


def test_every_pair_gets_one_episode_that_can_be_replayed(data: Path, undisturbed: Path) -> None:
    cases = read_cases(data)
    episodes = list(EpisodeStore(undisturbed).read())
    assert [episode.case_id for episode in episodes] == [row.id for row in cases.rows]
    region = load_segmenter("region")
    for episode in episodes:
        assert episode.stop == "stopped"
        masks = replay(episode, read_image(episode.image_source), region)
        assert np.array_equal(masks["spleen"], episode.masks["spleen"])
    provenance = episodes[0].provenance
    assert {"policy": "oracle", "segmenter": "region", "seed": "5", "mistakes": "0.2"}.items() <= provenance.items()
    assert "ibisagent" in provenance


def test_summary_and_progress(data: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    summary = generate(
        read_cases(data),
        load_segmenter("region"),
        tmp_path / "run",
        CONFIG,
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 22) for done in (0, 4, 8, 12, 16, 20, 22)]
    assert (summary.cases, summary.failed) == (22, 0)
    assert summary.overall is not None
    assert summary.overall.episodes == 22
    assert summary.overall.mean_iou > 0.8
    assert summary.overall.mean_turns > summary.overall.mean_clicks  # the stop, and every Undo
    assert {name: group.episodes for name, group in summary.by_modality.items()} == {"CT": 14, "MRI": 8}
    on_disk = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert on_disk["overall"]["mean_iou"] == summary.overall.mean_iou
    assert (tmp_path / "run" / "failures.jsonl").read_text() == ""


def test_batch_size_changes_nothing(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    generate(read_cases(data), load_segmenter("region"), tmp_path / "run", CONFIG, batch_size=3)
    assert contents(tmp_path / "run") == contents(undisturbed)


def test_a_case_has_the_same_episode_in_other_company(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    few = read_cases(data).filter(lambda row: "MRI" in row.id)
    generate(few, load_segmenter("region"), tmp_path / "run", CONFIG)
    episodes = {episode.case_id: episode for episode in EpisodeStore(undisturbed).read()}
    for episode in EpisodeStore(tmp_path / "run").read():
        other = episodes[episode.case_id]
        assert [turn.completion for turn in episode.turns] == [turn.completion for turn in other.turns]


def test_a_finished_run_is_not_touched_again(data: Path, undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.parquet")}
    generate(read_cases(data), load_segmenter("region"), undisturbed, CONFIG)
    assert {path: path.stat().st_mtime_ns for path in undisturbed.glob("*.parquet")} == before


CHILD = """
import sys
from ibisagent.datasets import read_cases
from ibisagent.segmenters import load_segmenter
from ibisagent.segmenters.region import RegionSegmenter
from ibisagent.generation.trajectories import TrajectoryConfig, generate

class Announcing(RegionSegmenter):
    def open(self, image):
        print(image.source, flush=True)
        return super().open(image)

config = TrajectoryConfig(**eval(sys.argv[3]))
generate(read_cases(sys.argv[1]), Announcing(), sys.argv[2], config, batch_size=2)
print("finished", flush=True)
"""


def test_kill_9_and_start_again_gives_the_same_bytes(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    """A real process is killed at random moments of its work until it gets through; nothing is lost or doubled."""
    options = {name: getattr(CONFIG, name) for name in TrajectoryConfig.__slots__}
    command = [sys.executable, "-c", CHILD, str(data), str(tmp_path / "run"), repr(options)]
    moments = random.Random(0)
    kills = 0
    for _ in range(20):
        if not killed(command, after_lines=moments.randint(5, 9)):  # opened images: in the middle of a shard
            break
        kills += 1
    assert kills >= 3
    assert contents(tmp_path / "run") == contents(undisturbed)


def test_a_half_written_shard_is_made_again(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    cases, region = read_cases(data), load_segmenter("region")
    generate(cases, region, tmp_path / "run", CONFIG)
    shard = tmp_path / "run" / "episodes-000002.parquet"
    (tmp_path / "run" / ".episodes-000002.parquet.abc.part").write_bytes(shard.read_bytes()[:100])
    shard.unlink()
    generate(cases, region, tmp_path / "run", CONFIG)
    assert contents(tmp_path / "run") == contents(undisturbed)


class Moody(RegionSegmenter):
    """Fails on one image until it is cured."""

    def __init__(self, dislikes: str) -> None:
        self.dislikes = dislikes

    def open(self, image: Image) -> SegmenterSession:
        if self.dislikes and self.dislikes in image.source:
            raise SegmenterError("region: not this one; take another")
        return super().open(image)


def test_failed_cases_are_listed_and_tried_again(tmp_path: Path) -> None:
    write_phantoms(tmp_path / "data", 9)
    broken = tmp_path / "data" / "Phantoms" / "train" / "p4_CT_abdomen.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    cases, moody = read_cases(tmp_path / "data"), Moody("p7_")
    summary = generate(cases, moody, tmp_path / "run", CONFIG)
    assert (summary.cases, summary.failed) == (9, 2)
    failures = [json.loads(line) for line in (tmp_path / "run" / "failures.jsonl").read_text().splitlines()]
    assert [failure["case_id"].split("/")[-1][:2] for failure in failures] == ["p4", "p7"]
    assert "image file is truncated" in failures[0]["error"]
    assert "not this one" in failures[1]["error"]
    assert len(set(EpisodeStore(tmp_path / "run").open().column("case_id"))) == 7

    broken.write_bytes(whole)
    moody.dislikes = ""
    assert generate(cases, moody, tmp_path / "run", CONFIG).failed == 0
    generate(cases, load_segmenter("region"), tmp_path / "fresh", CONFIG)
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")


def test_broken_machinery_ends_the_run_instead_of_failing_every_case(data: Path, tmp_path: Path) -> None:
    with pytest.raises(SegmenterError, match="20 cases in a row failed, the last one: region: not this one"):
        generate(read_cases(data), Moody("abdomen"), tmp_path / "run", CONFIG)
    assert list(EpisodeStore(tmp_path / "run").read()) == []
    assert generate(read_cases(data), load_segmenter("region"), tmp_path / "run", CONFIG).failed == 0


@pytest.mark.parametrize(
    "change", [{"seed": 6}, {"mistakes": 0.0}, {"dialect": "paper", "box_first": 0.0}, {"shard_cases": 5}]
)
def test_another_config_needs_another_folder(data: Path, undisturbed: Path, change: dict[str, float]) -> None:
    before = contents(undisturbed)
    with pytest.raises(ConfigError, match="choose another folder") as caught:
        generate(read_cases(data), load_segmenter("region"), undisturbed, replace(CONFIG, **change))
    assert any(name in str(caught.value) for name in change)
    assert contents(undisturbed) == before


def test_other_data_or_segmenter_need_another_folder(data: Path, undisturbed: Path) -> None:
    class Renamed(RegionSegmenter):
        name = "region-2"

    with pytest.raises(ConfigError, match="cases was 22, now it is 21"):
        generate(read_cases(data)[:-1], load_segmenter("region"), undisturbed, CONFIG)
    with pytest.raises(ConfigError, match="segmenter was region, now it is region-2"):
        generate(read_cases(data), Renamed(), undisturbed, CONFIG)
    swapped = CaseSource(read_cases(data).rows[::-1], "swapped")
    with pytest.raises(ConfigError, match="cases_sha256"):
        generate(swapped, load_segmenter("region"), undisturbed, CONFIG)


def test_cases_whose_files_changed_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_phantoms(tmp_path / "data", 10)
    generate(read_cases(tmp_path / "data"), load_segmenter("region"), tmp_path / "run", CONFIG)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.parquet")}
    mask = next((tmp_path / "data" / "Phantoms" / "train_mask").glob("p9_*"))
    ground_truth = np.zeros(SIZE, dtype=bool)
    ground_truth[5:25, 5:25] = True
    write_mask_png(ground_truth, mask)
    generate(read_cases(tmp_path / "data"), load_segmenter("region"), tmp_path / "run", CONFIG)
    assert "the files of 1 of 10 cases have changed" in caplog.text
    generate(read_cases(tmp_path / "data"), load_segmenter("region"), tmp_path / "fresh", CONFIG)
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("*.parquet")}
    assert [name for name in before if before[name] != after[name]] == ["episodes-000002.parquet"]


def test_unrelated_folders(data: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "episodes-000000.parquet").write_bytes((undisturbed / "episodes-000000.parquet").read_bytes())
    with pytest.raises(ConfigError, match=r"holds episodes-000000\.parquet, but no run\.json"):
        generate(read_cases(data), load_segmenter("region"), tmp_path, CONFIG)
    for text in ("{", "[]"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match=r"run\.json: is damaged"):
            generate(read_cases(data), load_segmenter("region"), tmp_path, CONFIG)


@pytest.mark.parametrize("options", [{"shard_cases": 0}, {"mistakes": 1.5}, {"dialect": "klingon"}, {"max_clicks": 0}])
def test_config_checks_itself(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        TrajectoryConfig(**options)


def test_an_undo_undoes_the_turns_before_it() -> None:
    a, b, c, d = (Click(x, 3, True, "spleen") for x in (1, 2, 3, 4))
    steps = [(a,), (b, c), (Undo(1),), (d,), (Undo(2),), (c,), (Stop(),)]
    turns = tuple(Turn(Completion(""), Reply("", actions), {}, {}) for actions in steps)
    episode = Episode("x", "?", SIZE, "", "", {}, turns, "stopped", {})
    assert episode.undone_turns == {1, 3}


def test_undone_turns_are_the_planned_mistakes(undisturbed: Path) -> None:
    wrong = 0
    for episode in EpisodeStore(undisturbed).read():
        followed = {index for index, turn in enumerate(episode.turns[1:]) if isinstance(turn.reply.actions[0], Undo)}
        assert episode.undone_turns == followed
        wrong += len(followed)
    assert wrong > 3
