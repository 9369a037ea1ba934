"""What 'check-rewards' tells of a batch: terms that vary, terms that do not, and which one decides."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from commands import ibisagent
from typer.testing import Result

from ibisagent.datasets import read_cases
from ibisagent.domain import Case, Click, Completion, Episode, Image, Mask, Reply, Stop, Turn
from ibisagent.errors import DataError
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.rewards import RewardWeights
from ibisagent.store import EpisodeStore, write_record
from ibisagent.training.reward_check import check_rewards, read_episodes, read_ground_truth

SIZE = (41, 60)


def area(x0: int, y0: int, x1: int, y1: int) -> Mask:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


GROUND_TRUTH = area(10, 10, 30, 30)
CASES = {
    name: Case(name, Image(np.zeros((*SIZE, 3), dtype=np.uint8)), "Segment the spleen.", {"spleen": GROUND_TRUTH})
    for name in ("a", "b")
}


def play(case_id: str, *masks: Mask, click: tuple[int, int] = (15, 15), stop: bool = True) -> Episode:
    """An episode whose every click, from `click` on, leads to the next of `masks`, then a Stop or nonsense."""
    turns, before = [], {}
    for number, mask in enumerate(masks):
        after = {"spleen": mask}
        given = Click(click[0] + number, click[1], True, "spleen")  # the same one again would say nothing
        turns.append(Turn(Completion(""), Reply("", (given,)), before, after, 0.5))
        before = after
    last = Reply("", (Stop("Done."),)) if stop else Reply(problem="no action")
    turns.append(Turn(Completion(""), last, before, before))
    return Episode(case_id, "Segment the spleen.", SIZE, "", "", {}, tuple(turns), "stopped", {})


GOOD, POOR, LOST = area(10, 10, 30, 30), area(10, 10, 22, 30), area(0, 0, 4, 4)


def test_every_term_of_a_mixed_batch_varies() -> None:
    batch = [
        play("a", GOOD),
        play("a", *[LOST] * 6, click=(2, 2), stop=False),
        play("b", POOR, GOOD),
        play("b", POOR, click=(40, 5)),
    ]
    report = check_rewards(batch, CASES)
    assert (report.episodes, report.cases, report.groups) == (4, 2, 2)
    assert report.constant == []
    terms = {term.name: term for term in report.terms}
    assert list(terms) == ["answer", "format", "click", "progress", "length"]
    assert (terms["format"].minimum, terms["format"].maximum, terms["format"].mean) == (0, 1, 0.75)
    assert terms["format"].varies == 0.5
    assert terms["answer"].varies == 1
    assert sum(term.share or 0 for term in report.terms) == pytest.approx(1)
    assert (terms["answer"].correlation or 0) > 0.9
    assert report.dominant is terms["answer"]
    assert report.total.varies == 1


def test_what_lies_between_groups_is_not_taken_for_a_signal() -> None:
    """Case "a" is easy, "b" is hard: the answer varies over the batch, but only the length within the groups."""
    batch = [play("a", *[GOOD] * 6), play("a", *[GOOD] * 7), play("b", *[LOST] * 6), play("b", *[LOST] * 7)]
    report = check_rewards(batch, CASES, RewardWeights(click=0, format=0, progress=0))
    terms = {term.name: term for term in report.terms}
    assert not terms["answer"].constant
    assert terms["answer"].varies == 0
    assert terms["answer"].share == pytest.approx(0)
    assert report.dominant is terms["length"]
    assert terms["length"].share == pytest.approx(1)
    alone = check_rewards([batch[0], batch[3]], CASES, RewardWeights(click=0, format=0, progress=0))
    assert alone.groups == 0
    assert alone.terms[0].varies is None
    assert alone.dominant is not None
    assert alone.dominant.name == "answer"


def test_constant_terms_are_named_and_have_no_correlation() -> None:
    report = check_rewards([play("a", GOOD), play("b", GOOD)], CASES, RewardWeights(turns=1))
    assert report.constant == ["answer", "format", "click", "progress", "length", "turns"]
    assert report.dominant is None
    assert all(term.correlation is None and term.share is None for term in report.terms)


def test_episodes_without_ground_truth_are_left_out() -> None:
    stranger = play("c", GOOD)
    report = check_rewards([play("a", GOOD), stranger, play("a", POOR)], CASES)
    assert report.episodes == 2
    assert [failure.case_id for failure in report.failures] == ["c"]
    with pytest.raises(DataError, match=r"1 episodes could be scored.*case c: the data hold no such case"):
        check_rewards([play("a", GOOD), stranger], CASES)


# ------------------------------------------------------------------------------------------------------ command line


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_png(np.full((*SIZE, 3), 40, dtype=np.uint8), tmp_path / f"{name}.png")
        write_mask_png(GROUND_TRUTH, tmp_path / f"{name}_mask.png")
    rows = ["image,mask,object", "a.png,a_mask.png,spleen", "b.png,b_mask.png,spleen"]
    (tmp_path / "data.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "data.csv"


def run(*arguments: object) -> Result:
    return ibisagent("train", "check-rewards", *arguments)


def test_the_command_reads_stores_and_records_and_fails_loudly(data: Path, tmp_path: Path) -> None:
    a, b = (row.id for row in read_cases(data).rows)
    EpisodeStore(tmp_path / "run").append([play(a, GOOD), play(b, *[LOST] * 6, click=(2, 2), stop=False)])
    write_record(play(a, POOR, GOOD), tmp_path / "one.json")
    assert [episode.case_id for episode in read_episodes(tmp_path / "run")] == [a, b]
    result = run(tmp_path / "run", tmp_path / "one.json", "--data", data)
    assert result.exit_code == 0, result.output
    assert "3 episodes of 2 cases, 1 of them with more than one episode" in result.stdout
    assert " decides: " in result.stdout
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80

    EpisodeStore(tmp_path / "same").append([play(a, GOOD), play(b, GOOD, GOOD)])
    result = run(tmp_path / "same", "--data", data, "--json")
    assert result.exit_code == 1
    told = "constant over all 2 episodes, so nothing can be learned from it: answer (3), format (1), length (1)"
    assert result.stderr.splitlines() == [told]
    plain = json.loads(result.stdout)
    assert plain["constant"] == ["answer", "format", "length"]
    assert plain["dominant"] == "click"


def test_the_command_takes_weights_and_tells_what_is_missing(data: Path, tmp_path: Path) -> None:
    a, b = (row.id for row in read_cases(data).rows)
    recipe = tmp_path / "rl.toml"
    recipe.write_text("[rewards]\nformat = 0\nlength = 0\nturns = 0.1\n")
    store = EpisodeStore(tmp_path / "run")
    store.append([play(a, GOOD), play(b, LOST, LOST, click=(2, 2)), play("stranger", GOOD)])
    result = run(store.folder, "--data", data, "--config", recipe, "--json")
    assert [term["name"] for term in json.loads(result.stdout)["terms"]] == ["answer", "click", "progress", "turns"]
    assert result.exit_code == 2
    assert "failed, left out: stranger: the data hold no such case" in result.stderr
    result = run(tmp_path / "none", "--data", data)
    assert result.exit_code == 2
    assert "no such folder" in result.stderr


def test_ground_truth_may_be_what_build_data_exported(tmp_path: Path) -> None:
    from ibisagent.generation.config import FactoryConfig, read_table
    from ibisagent.generation.exports import prompt_case, read_grpo
    from ibisagent.generation.stages import Plan, build

    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    lines = ["image,mask,object,modality,split"]
    for number in range(3):
        disc = (columns - 20 - 5 * number) ** 2 + (rows - 20) ** 2 <= 64
        level = np.where(disc, 200, 60 + 20 * number).astype(np.uint8)
        write_png(np.repeat(level[..., None], 3, axis=2), tmp_path / f"{number}.png")
        write_mask_png(disc, tmp_path / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,{'spleen' if number else 'liver'},CT,train")
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    build(Plan(read_cases(tmp_path / "data.csv"), out, FactoryConfig(segmenter="region", min_iou=0.5)))
    ground_truth = read_ground_truth(out)
    records = list(read_grpo(out / "export"))
    assert set(ground_truth) == {record["id"] for record in records}
    verl = [one for path in sorted((out / "export" / "verl").glob("*")) for one in read_table(path).to_pylist()]
    for record in verl:
        told = record["extra_info"]
        case, same = (
            ground_truth[told["id"]],
            prompt_case(told["id"], told["query"], json.loads(record["reward_model"]["ground_truth"])),
        )
        assert case.image.sha256 == same.image.sha256
        assert (case.query, case.answer, list(case.targets or ())) == (
            same.query,
            same.answer,
            list(same.targets or ()),
        )
        assert bool(case.targets) is (case.answer is None)
    absent = prompt_case("x", "Where is the kidney?", {**records[0], "targets": [], "absent": ["kidney"]})
    assert absent.targets is not None
    assert not absent.targets["kidney"].any()
    started = [record for record in records if record["start"]]
    assert started
    assert any(mask.any() for mask in ground_truth[started[0]["id"]].start.values())
    kept = list(EpisodeStore(out / "filter").read())
    report = check_rewards(kept, ground_truth)
    assert report.failures == ()
    assert report.episodes == len(kept)
    with pytest.raises(DataError, match="holds no ground truth"):
        prompt_case("x", "?", {"targets": []})
