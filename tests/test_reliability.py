"""One calibrated score per mask, from signals that need no ground truth."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from commands import ibisagent

from ibisagent.domain import Action, Box, Case, Completion, Image, Observation, Reply, Stop
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.errors import ConfigError, DataError
from ibisagent.evaluation.reliability import Queue, Reliability, Reviewer, fit, gain_of_dropping, signals
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.imaging.masks import iou
from ibisagent.policies import load_policy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import write
from ibisagent.segmenters import load_segmenter

SIZE = (61, 83)


def blob(x: int, y: int, radius: int) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def case(number: int, *, noise: int = 0) -> Case:
    ground_truth = blob(25 + number % 30, 28, 9 + number % 7)
    pixels = np.where(ground_truth, 180, 40)[..., None] * np.ones(3)
    pixels += np.random.default_rng(number).normal(0, 1 + noise, (*SIZE, 3))
    return Case(
        f"case {number}", Image(pixels.clip(0, 255).astype(np.uint8)), "Segment the liver.", {"liver": ground_truth}
    )


def oracle_episode(one: Case, spec: str = "region"):  # type: ignore[no-untyped-def]
    policy = load_policy("oracle", cases=[one])
    (episode,) = rollout(policy, [SegmentationEnv(one, load_segmenter(spec), dialect="ibis", max_turns=4)])
    return episode


def test_a_clear_object_is_stable_and_noise_is_not() -> None:
    segmenter = load_segmenter("region")
    clear, noisy = case(1), case(1, noise=45)
    steady = signals(oracle_episode(clear), clear.image, segmenter)
    shaky = signals(oracle_episode(noisy), noisy.image, segmenter)
    assert steady["stability"] > 0.98 > shaky["stability"] > 0
    assert signals(oracle_episode(noisy), noisy.image, segmenter) == shaky  # the same draws again
    assert signals(oracle_episode(noisy), noisy.image, segmenter, seed=1) != shaky


def test_agreement_of_further_episodes() -> None:
    one = case(3)
    episode = oracle_episode(one)
    other = oracle_episode(one, "ellipse")
    found = signals(episode, one.image, load_segmenter("region"), others=[episode, other])
    assert 0.5 < found["agreement"] < 1
    assert signals(episode, one.image, load_segmenter("region"), others=[episode])["agreement"] == 1


def test_nothing_handed_out_scores_nothing() -> None:
    one = case(2)
    policy = load_policy("centre-click")
    stop = policy.respond([Observation("x", one.image, one.query, {}, oracle_episode(one).turns)])[0].text
    (episode,) = rollout(ScriptedPolicy([stop]), [SegmentationEnv(one, load_segmenter("region"), dialect="ibis")])
    found = signals(episode, one.image, load_segmenter("region"))
    assert found == {"quality": 0.0, "stability": 0.0, "convergence": 0.0}
    assert Reliability.plain(list(found)).score(found) == 0


def test_convergence_is_how_little_had_to_be_mended() -> None:
    one = case(3)
    segmenter = load_segmenter("ellipse")

    def convergence(*actions: Action) -> tuple[float, list[np.ndarray]]:
        replies = [write(Reply("", (action,)), SIZE, dialect="ibis") for action in actions]
        env = SegmentationEnv(one, segmenter, dialect="ibis", max_turns=len(actions))
        (episode,) = rollout(ScriptedPolicy(replies), [env])
        return signals(episode, one.image, segmenter)["convergence"], [turn.after["liver"] for turn in episode.turns]

    wide, half = Box(20, 20, 40, 36, "liver"), Box(20, 20, 30, 36, "liver")
    assert convergence(wide)[0] == convergence(wide, Stop("Done."))[0] == 1
    found, masks = convergence(wide, half, Stop("Done."))
    assert found == iou(masks[0], masks[1]) < 0.5  # the turn that changed most counts, not the last


def made_up(count: int, seed: int = 0) -> tuple[list[dict[str, float]], list[float]]:
    """Quality is overconfident by far, stability says half of it."""
    random = np.random.default_rng(seed)
    ious = random.beta(2, 1.5, count)
    found = [
        {
            "quality": float(np.clip(0.55 + 0.45 * value + random.normal(0, 0.05), 0, 1)),
            "stability": float(np.clip(value + random.normal(0, 0.25), 0, 1)),
        }
        for value in ious
    ]
    return found, ious.tolist()


def test_twenty_cases_mend_an_overconfident_score() -> None:
    found, ious = made_up(20)
    fitted = fit(found, ious)
    assert fitted.cases == 20
    new, measured = made_up(400, seed=5)
    from ibisagent.evaluation.calibration import calibration

    plain = [Reliability.plain(["quality", "stability"]).score(one) for one in new]
    scores = [fitted.score(one) for one in new]
    assert calibration(scores, measured).expected_error < 0.08 < calibration(plain, measured).expected_error
    assert gain_of_dropping(scores, measured) > 0.05
    assert fitted.error is not None
    assert fitted.error < 0.2


def test_the_belief_is_the_score_until_cases_say_otherwise() -> None:
    doubted = {"quality": 0.9, "stability": 0.95, "convergence": 1.0, "belief": 0.4}
    assert Reliability.plain(list(doubted)).score(doubted) == pytest.approx(0.4)

    random = np.random.default_rng(3)
    beliefs = random.uniform(0.2, 0.9, 60)
    cases = [{"quality": float(random.uniform(0.85, 0.95)), "belief": float(belief)} for belief in beliefs]
    right = fit(cases[:20], (beliefs[:20] + random.normal(0, 0.08, 20)).clip(0, 1).tolist())
    assert np.abs([right.score(one) - one["belief"] for one in cases[20:]]).mean() < 0.06
    too_sure = fit(cases[:20], (0.4 * beliefs[:20]).tolist())
    scores = np.array([too_sure.score(one) for one in cases[20:]])
    assert np.abs(scores - 0.4 * beliefs[20:]).mean() < 0.5 * np.abs(beliefs[20:] - 0.4 * beliefs[20:]).mean()


@pytest.mark.parametrize("told", [0.0, 0.05, 0.5, 0.999])
def test_any_confidence_is_brought_to_what_was_measured(told: float) -> None:
    found = [{"quality": told, "stability": told + number * 1e-5} for number in range(20)]
    for reached in (0.02, 0.4, 0.98):
        fitted = fit(found, [reached] * 20)
        assert fitted.score({"quality": told or 1e-9, "stability": told}) == pytest.approx(reached, abs=0.06)


def test_a_signal_that_is_nearly_always_the_same_is_left_out() -> None:
    found, ious = made_up(20)
    settled = [one | {"convergence": 1.0 if number % 10 else 0.3} for number, one in enumerate(found)]
    assert dict(fit(settled, ious).weights) == dict(fit(found, ious).weights)
    often = [one | {"convergence": 1.0 if number % 2 else 0.3} for number, one in enumerate(found)]
    assert list(fit(often, ious).weights) == ["quality", "stability", "convergence"]
    assert list(fit([{"convergence": 1.0}] * 20, ious).weights) == ["convergence"]


def test_gain_of_dropping_by_hand() -> None:
    assert gain_of_dropping([0.9, 0.1, 0.8, 0.7, 0.6], [1.0, 0.0, 1.0, 1.0, 1.0]) == pytest.approx(0.2)
    assert gain_of_dropping([0.1, 0.9, 0.8, 0.7, 0.6], [1.0, 0.0, 1.0, 1.0, 1.0]) == pytest.approx(-0.05)


def test_a_calibration_is_read_back_and_kept_to_its_models(tmp_path: Path) -> None:
    fitted = fit(*made_up(20), {"segmenter": "region", "policy": "oracle"})
    fitted.write(tmp_path / "c.json")
    assert Reliability.read(tmp_path / "c.json") == fitted
    fitted.check({"segmenter": "region", "policy": "oracle", "more": "x"})
    with pytest.raises(ConfigError, match="made with segmenter region, this run has ellipse"):
        fitted.check({"segmenter": "ellipse"})
    with pytest.raises(ConfigError, match="needs the signal quality"):
        fitted.score({"stability": 0.5})
    for content in ("{}", "[]", "{", '{"kind": "ibisagent reliability 2", "weights": 3, "bias": 0}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(DataError, match="or something else"):
            Reliability.read(tmp_path / "bad.json")
    with pytest.raises(DataError, match="cannot be read"):
        Reliability.read(tmp_path / "none.json")


def test_what_cannot_be_fitted() -> None:
    found, ious = made_up(9)
    with pytest.raises(DataError, match="give at least 10"):
        fit(found, ious)
    found, ious = made_up(12)
    with pytest.raises(DataError, match="different signals"):
        fit([*found[:-1], {"quality": 0.5}], ious)
    with pytest.raises(ConfigError, match="draws nothing"):
        Reviewer(load_policy("centre-click"), load_segmenter("region"), samples=2)


def test_the_queue_is_worst_first(tmp_path: Path) -> None:
    segmenter = load_segmenter("region")
    cases = [case(number, noise=noise) for number, noise in ((1, 0), (2, 50), (3, 0))]
    queue = Queue(Reviewer(load_policy("oracle", cases=cases), segmenter))
    for one in cases:
        queue.add(one.id, oracle_episode(one), one)
    assert queue.worst_first[0]["image"] == "case 2"
    queue.write(tmp_path)
    with (tmp_path / "review.csv").open() as file:
        assert [row["image"] for row in csv.DictReader(file)] == [entry["image"] for entry in queue.worst_first]
    assert json.loads((tmp_path / "review.json").read_text())["calibrated"] is False
    with pytest.raises(ConfigError, match="needs the signal agreement"):
        Queue(Reviewer(load_policy("oracle", cases=cases), segmenter), Reliability({"agreement": 1.0}, 0.0))


def test_calibrate_then_segment_with_a_review_queue(tmp_path: Path) -> None:
    lines = ["image,mask,object"]
    for number in range(12):
        one = case(number, noise=4 * number)
        write_png(one.image.pixels, tmp_path / f"{number}.png")
        write_mask_png((one.targets or {})["liver"], tmp_path / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,liver")
    (tmp_path / "index.csv").write_text("\n".join(lines) + "\n")
    models = ["--policy", "centre-click", "--segmenter", "region"]

    def run(*arguments: str) -> tuple[int, str]:
        result = ibisagent(*arguments, *models, "--device", "cpu")
        return result.exit_code, result.output

    made = str(tmp_path / "c.json")
    code, text = run("eval", "calibrate", str(tmp_path), "-o", made)
    assert code == 0, text
    assert "fitted on 12 cases" in text
    images = [str(tmp_path / f"{number}.png") for number in (0, 11)]
    out = ["-o", str(tmp_path / "out"), "--review-queue", "--calibration", made]
    code, text = run("segment", *images, "Segment the liver.", *out, "--json")
    assert code == 0, text
    review = json.loads(text)["review"]
    assert {entry["image"] for entry in review} == set(images)
    assert review[0]["score"] <= review[1]["score"]
    assert json.loads((tmp_path / "out" / "review.json").read_text())["calibrated"] is True
    code, text = run("segment", *images, "Segment the liver.", "-o", str(tmp_path / "out"), "--calibration", made)
    assert code == 2
    assert "--review-queue" in text


def test_a_policy_that_draws_is_asked_again() -> None:
    class Drawing:
        """Clicks on the object, or at temperature beside it."""

        name, dialect, temperature = "drawing", "ibis", 0.0

        def respond(self, observations: list[Observation]) -> list[Completion]:
            spec = "random-clicks" if self.temperature else "centre-click"
            return load_policy(spec).respond(observations)

    one = case(13)
    segmenter = load_segmenter("region")
    policy = Drawing()
    reviewer = Reviewer(policy, segmenter, samples=2, max_turns=3)  # type: ignore[arg-type]
    (episode,) = rollout(policy, [SegmentationEnv(one, segmenter, dialect="ibis", max_turns=3)])  # type: ignore[arg-type]
    assert 0 <= reviewer.signals(episode, one)["agreement"] < 1
    assert policy.temperature == 0.0
