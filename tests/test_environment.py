"""The loop: grouping, undo, stops, what a policy can and cannot break, replay."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ibisagent.domain import (
    Box,
    Case,
    Click,
    Completion,
    Image,
    Masks,
    Observation,
    Prompt,
    Reply,
    Stop,
    Turn,
    Undo,
    standing_by_turn,
)
from ibisagent.domain import standing as kept
from ibisagent.environment import KEPT_STATES, MAX_TURNS, PromptState, SegmentationEnv, rollout, turn_limit
from ibisagent.errors import ConfigError, DataError, PolicyError, SegmenterError
from ibisagent.inference.replay import replay
from ibisagent.policies import NANO_FOLDER
from ibisagent.policies.base import Proposal
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import write
from ibisagent.segmenters import Prediction, load_segmenter

SIZE = (61, 83)
IMAGE = Image(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8), source="phantom.png")


@dataclass
class NotebookSegmenter:
    """Paints each prompt into the prior and notes every call: its masks show exactly what it was given."""

    calls: list[tuple[tuple[Prompt, ...], bytes | None]] = field(default_factory=list)
    opened: int = 0
    fail: bool = False
    name: str = "notebook"

    def open(self, image: Image) -> NotebookSegmenter:
        self.opened += 1
        return self

    def describe(self) -> dict[str, str]:
        return {}

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        if self.fail:
            raise SegmenterError("notebook: out of paper; buy more")
        self.calls.append((tuple(prompts), None if prior is None else prior.tobytes()))
        mask = np.zeros(SIZE, dtype=bool) if prior is None else prior.astype(bool).copy()
        for prompt in prompts:
            if isinstance(prompt, Click):
                mask[max(0, prompt.y - 2) : prompt.y + 3, max(0, prompt.x - 2) : prompt.x + 3] = prompt.positive
            else:
                mask[prompt.y0 : prompt.y1, prompt.x0 : prompt.x1] = True
        return Prediction(mask, len(prompts) / 10, mask.astype(np.uint8) + mask)


def case(start: Masks | None = None, query: str = "Segment the spleen.") -> Case:
    return Case("a#spleen", IMAGE, query, start=start or {})


def env(
    segmenter: NotebookSegmenter | None = None, *, max_turns: int = 20, start: Masks | None = None
) -> SegmentationEnv:
    return SegmentationEnv(case(start), segmenter or NotebookSegmenter(), dialect="ibis", max_turns=max_turns)


def do(environment: SegmentationEnv, *actions: Click | Box | Undo | Stop) -> Turn:
    return environment.step(Completion(write(Reply("I look.", actions), SIZE, dialect="ibis")))


def click(x: int, y: int, positive: bool = True, target: str = "spleen") -> Click:
    return Click(x, y, positive, target)


def same(a: Masks, b: Masks) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def test_each_touched_target_is_predicted_once_from_all_its_prompts() -> None:
    segmenter = NotebookSegmenter()
    environment = env(segmenter)
    first = do(environment, click(10, 10), click(40, 20, target="liver"), click(14, 12))
    assert [prompts for prompts, _ in segmenter.calls] == [
        (click(10, 10), click(14, 12)),
        (click(40, 20, target="liver"),),
    ]
    assert first.segmenter_score == pytest.approx(0.15)  # mean of 2/10 and 1/10
    second = do(environment, click(12, 30, False))
    assert segmenter.calls[2][0] == (click(10, 10), click(14, 12), click(12, 30, False))
    assert segmenter.calls[2][1] == (first.after["spleen"].astype(np.uint8) * 2).tobytes()  # its own logits came back
    assert len(segmenter.calls) == 3
    assert second.after["liver"] is first.after["liver"]
    assert same(second.before, first.after)
    assert second.segmenter_score == pytest.approx(0.3)


def test_a_caller_can_end_an_episode() -> None:
    environment = env(NotebookSegmenter())
    turn = do(environment, click(3, 4))
    environment.truncate()
    episode = environment.episode()
    assert (episode.turns, episode.stop, environment.done) == ((turn,), "max_turns", True)
    with pytest.raises(ConfigError, match="has ended"):
        do(environment, click(9, 9))
    stopped = env(NotebookSegmenter())
    do(stopped, Stop(""))
    stopped.truncate()
    assert stopped.episode().stop == "stopped"


def test_image_is_opened_once_and_only_for_a_prompt() -> None:
    segmenter = NotebookSegmenter()
    environment = env(segmenter)
    do(environment, Stop("Nothing to see."))
    assert segmenter.opened == 0
    environment = env(segmenter)
    do(environment, click(3, 4))
    do(environment, click(30, 4))
    assert segmenter.opened == 1


def test_start_mask_is_the_first_prior() -> None:
    start = np.zeros(SIZE, dtype=bool)
    start[5:9, 6:12] = True
    segmenter = NotebookSegmenter()
    environment = env(segmenter, start={"spleen": start})
    assert same(environment.observation.masks, {"spleen": start})
    turn = do(environment, click(60, 50))
    assert segmenter.calls[0][1] == start.tobytes()
    assert turn.after["spleen"][6, 7]
    do(environment, Undo(1))
    assert same(environment.observation.masks, {"spleen": start})


def test_undo_takes_back_the_newest_over_all_targets() -> None:
    segmenter = NotebookSegmenter()
    environment = env(segmenter)
    one = do(environment, click(10, 10))
    do(environment, click(40, 20, target="liver"))
    do(environment, Box(50, 30, 70, 50, "spleen"))
    calls = len(segmenter.calls)
    turn = do(environment, Undo(2))
    assert same(turn.after, one.after)
    assert turn.after["spleen"] is one.after["spleen"]  # restored, not computed again
    assert len(segmenter.calls) == calls
    assert do(environment, Undo(99)).after == {}
    assert do(environment, Undo(1)).after == {}
    assert not environment.done


def test_a_prompt_state_keeps_few_states_and_makes_older_ones_again() -> None:
    clicks = [Click(7 * number, 5 * number, True, "spleen") for number in range(1, 11)]
    segmenter = NotebookSegmenter()
    prompt_state = PromptState(IMAGE, segmenter, {})
    for click in clicks:
        prompt_state.apply([click])
    assert sum(state is not None for state in prompt_state._states) <= KEPT_STATES + 1
    calls = len(segmenter.calls)
    prompt_state.apply([Undo(2)])
    assert len(segmenter.calls) == calls  # not far back: nothing is predicted again
    for steps in (1, 5):
        prompt_state.apply([Undo(steps)])
        left = clicks[: 7 if steps == 1 else 2]
        other = PromptState(IMAGE, NotebookSegmenter(), {})
        for click in left:
            other.apply([click])
        assert np.array_equal(prompt_state.masks["spleen"], other.masks["spleen"])
    prompt_state.apply([clicks[5]])
    other.apply([clicks[5]])
    assert np.array_equal(prompt_state.masks["spleen"], other.masks["spleen"])


def test_undo_of_a_part_of_a_turn_leaves_the_rest_of_it() -> None:
    environment, plain = env(), env()
    do(environment, click(10, 10), click(40, 20), click(60, 50, target="liver"))
    do(plain, click(10, 10))
    assert same(do(environment, Undo(2)).after, plain.observation.masks)


def test_actions_of_one_reply_apply_in_order() -> None:
    environment, plain = env(), env()
    do(environment, click(10, 10))
    turn = do(environment, click(20, 20), Undo(2), click(30, 30), Box(1, 1, 5, 6, "spleen"), Undo(1))
    assert same(turn.after, do(plain, click(30, 30)).after)
    assert kept(environment.observation.turns) == [click(30, 30)]


def test_stop_ends_the_episode() -> None:
    environment = env()
    turn = do(environment, click(10, 10), Stop("Done.", ("liver",)))
    assert turn.after["spleen"].any()
    episode = environment.episode()
    assert (episode.stop, episode.answer, episode.clicks) == ("stopped", Stop("Done.", ("liver",)), 1)
    with pytest.raises(ConfigError, match="has ended"):
        do(environment, click(1, 1))


def test_malformed_replies_change_nothing_and_the_second_in_a_row_ends() -> None:
    environment = env()
    before = do(environment, click(10, 10)).after
    turn = environment.step(Completion("<action>jump</action>"))
    assert turn.reply.problem
    assert same(turn.after, before)
    do(environment, click(30, 10))
    environment.step(Completion(""))
    assert not environment.done
    environment.step(Completion("<think>"))
    assert environment.episode().stop == "malformed"


def test_repeated_prompts_end_the_episode() -> None:
    segmenter = NotebookSegmenter()
    environment = env(segmenter)
    do(environment, click(10, 10))
    do(environment, click(10, 10, False))  # another sign is another click
    do(environment, click(10, 10), click(40, 20))  # one of two is new
    calls = len(segmenter.calls)
    turn = do(environment, click(40, 20))
    assert same(turn.before, turn.after)
    assert len(segmenter.calls) == calls
    assert environment.episode().stop == "repeated"


def test_undoing_a_click_only_to_give_it_again_is_a_repetition() -> None:
    environment = env()
    do(environment, click(10, 10))
    do(environment, Undo(1), click(10, 10))
    assert environment.episode().stop == "repeated"


def test_a_click_that_was_taken_back_may_come_again() -> None:
    environment = env()
    masks = do(environment, click(10, 10)).after
    do(environment, Undo(1))
    assert same(do(environment, click(10, 10)).after, masks)
    assert not environment.done


def test_max_turns() -> None:
    environment = env(max_turns=2)
    do(environment, click(10, 10))
    assert not environment.done
    with pytest.raises(ConfigError, match="has not ended"):
        environment.episode()
    do(environment, click(20, 10))
    assert environment.episode().stop == "max_turns"


def test_too_many_objects_are_malformed() -> None:
    environment = env()
    do(environment, *(click(number, 3, target=f"cell {number}") for number in range(8)))
    turn = do(environment, click(50, 50, target="cell 8"))
    assert turn.reply.problem
    assert not turn.reply.actions
    assert same(turn.before, turn.after)


def test_text_that_cannot_be_stored_is_made_storable() -> None:
    turn = env().step(Completion("<think>\ud800</think><action>undo</action>"))
    turn.completion.text.encode("utf-8")
    turn.reply.thought.encode("utf-8")


def test_a_failing_segmenter_raises_and_leaves_the_environment_as_it_was() -> None:
    segmenter = NotebookSegmenter()
    environment = env(segmenter)
    do(environment, click(10, 10))
    segmenter.fail = True
    with pytest.raises(SegmenterError, match="out of paper"):
        do(environment, click(20, 20))
    segmenter.fail = False
    assert len(environment.observation.turns) == 1
    again = env()
    do(again, click(10, 10))
    assert same(do(environment, click(20, 20)).after, do(again, click(20, 20)).after)


@pytest.mark.parametrize(
    "prediction",
    [
        Prediction(np.zeros((83, 61), dtype=bool), 0.5, np.zeros(1)),
        Prediction(np.zeros(SIZE, dtype=np.uint8), 0.5, np.zeros(1)),
        Prediction(np.zeros(SIZE, dtype=bool), float("nan"), np.zeros(1)),
        Prediction(np.zeros(SIZE, dtype=bool), 1.5, np.zeros(1)),
    ],
)
def test_a_segmenter_that_breaks_its_contract_is_caught(prediction: Prediction) -> None:
    class Broken(NotebookSegmenter):
        def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
            return prediction

    with pytest.raises(SegmenterError, match="notebook"):
        do(env(Broken()), click(1, 1))


class Tripwire(Mapping[str, np.ndarray]):
    """Ground truth that may be read until it is armed."""

    def __init__(self, ground_truth: Mapping[str, np.ndarray]) -> None:
        self.ground_truth, self.armed = ground_truth, False

    def _touch(self) -> Mapping[str, np.ndarray]:
        if self.armed:
            raise AssertionError("the environment looked at the ground truth")
        return self.ground_truth

    def __getitem__(self, name: str) -> np.ndarray:
        return self._touch()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._touch())

    def __len__(self) -> int:
        return len(self._touch())


def test_the_environment_never_reads_the_ground_truth() -> None:
    ground_truth = Tripwire({"spleen": np.ones(SIZE, dtype=bool)})
    guarded = Case(
        "a#spleen", IMAGE, "Segment the spleen.", targets=ground_truth, start={"liver": np.ones(SIZE, dtype=bool)}
    )
    ground_truth.armed = True
    with pytest.raises(AssertionError):
        bool(guarded.targets)
    environment = SegmentationEnv(guarded, NotebookSegmenter(), dialect="ibis")
    do(environment, click(10, 10), Undo(1), click(5, 5))
    environment.step(Completion("?"))
    do(environment, Stop())
    assert environment.observation.masks
    assert environment.episode().masks


def test_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="unknown dialect 'klingon'"):
        SegmentationEnv(case(), NotebookSegmenter(), dialect="klingon")
    with pytest.raises(ConfigError, match="max_turns is 0"):
        env(max_turns=0)


STOP = "<think>.</think><action>stop</action><answer>Done.</answer>"
CLICK = "<think>.</think><action>click + (0.5, 0.5)</action>"


def test_rollout_answers_all_live_environments_in_one_batch() -> None:
    class Counting(ScriptedPolicy):
        batches: list[list[str]]

        def respond(self, observations: Sequence[Observation]) -> list[Completion]:
            self.batches.append([observation.case_id for observation in observations])
            return super().respond(observations)

    lengths = {"a": 1, "b": 3, "c": 2}
    policy = Counting(
        {
            name: [f"<action>click + (0.{n}, 0.5)</action>" for n in range(1, length)] + [STOP]
            for name, length in lengths.items()
        }
    )
    policy.batches = []
    envs = [SegmentationEnv(Case(name, IMAGE, "spleen"), NotebookSegmenter(), dialect="ibis") for name in lengths]
    seen: list[tuple[int, bool]] = []
    episodes = rollout(policy, envs, on_turn=lambda index, turn: seen.append((index, turn.reply.stop is not None)))
    assert policy.batches == [["a", "b", "c"], ["b", "c"], ["b"]]
    assert seen == [(0, True), (1, False), (2, False), (1, False), (2, True), (1, True)]
    assert [(episode.case_id, len(episode.turns)) for episode in episodes] == list(lengths.items())
    assert {episode.provenance["policy"] for episode in episodes} == {"scripted"}
    assert {episode.provenance["segmenter"] for episode in episodes} == {"notebook"}


def test_rollout_refuses_what_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="writes dialect paper"):
        rollout(ScriptedPolicy([STOP], dialect="paper"), [env()])
    with pytest.raises(PolicyError, match="turn 2 was asked"):
        rollout(ScriptedPolicy([CLICK]), [env()])

    class Silent(ScriptedPolicy):
        def respond(self, observations: Sequence[Observation]) -> list[Completion]:
            return []

    with pytest.raises(PolicyError, match="0 completions for 1"):
        rollout(Silent([STOP]), [env()])


def test_no_environments_no_episodes() -> None:
    assert rollout(ScriptedPolicy([STOP]), []) == []


def test_released_replies_in_both_spellings_and_signs_drive_an_episode() -> None:
    replies = [
        "<think>a</think><action>Positive Point (0.5123, 0.2500)</action>",
        "<think>b</think><action>Negative Point (0.7, 0.9)</action>",
    ]
    for ending in ("Terminate", "Termination"):
        policy = ScriptedPolicy(
            [*replies, f"<think>c</think><action>{ending}</action><answer>x</answer>"], dialect="released"
        )
        environment = SegmentationEnv(case(), NotebookSegmenter(), dialect="released")
        (episode,) = rollout(policy, [environment])
        assert episode.stop == "stopped"
        assert kept(episode.turns) == [click(42, 15), click(58, 54, False)]
        assert list(episode.masks) == ["spleen"]


coordinates = st.tuples(st.integers(0, SIZE[1] - 4), st.integers(0, SIZE[0] - 3))
targets = st.sampled_from(["spleen", "liver"])
actions = st.one_of(
    st.builds(lambda at, positive, target: Click(*at, positive, target), coordinates, st.booleans(), targets),
    st.builds(lambda at, target: Box(*at, at[0] + 4, at[1] + 2, target), coordinates, targets),
    st.builds(Undo, st.integers(1, 3)),
)


@settings(max_examples=60)
@given(st.lists(st.lists(actions, min_size=1, max_size=3), min_size=1, max_size=6))
def test_replay_rebuilds_the_masks_and_undo_equals_never_clicked(turns: list[list[Click | Box | Undo]]) -> None:
    environment = env()
    for replies in turns:
        if not environment.done:
            before = environment.observation
            do(environment, *replies)
            given = [action for action in replies if not isinstance(action, Undo)]
            if len(given) == len(replies) and not environment.done:  # take back a whole turn, then give it again
                after = environment.observation.masks
                new = set(given).difference(kept(before.turns))
                assert same(do(environment, Undo(len(new))).after, before.masks)
                assert same(do(environment, *given).after, after)
    if not environment.done:
        do(environment, Stop())
    episode = environment.episode()
    assert same(replay(episode, IMAGE, NotebookSegmenter()), episode.masks)
    prompt_state = PromptState(IMAGE, NotebookSegmenter(), {})  # record and prompt state agree on what stands
    for _, batch in groupby(standing_by_turn(episode.turns), key=lambda one: one[0]):
        prompt_state.apply([prompt for _, prompt in batch])
    assert same(prompt_state.masks, episode.masks)


def test_an_undo_counts_though_the_prompt_after_it_stands_already() -> None:
    environment, twin = env(), env()
    first = do(environment, click(10, 10))
    do(environment, click(40, 20))
    turn = do(environment, Undo(1), click(10, 10))
    assert same(turn.after, first.after)
    assert not environment.done
    assert kept(environment.observation.turns) == [click(10, 10)]
    do(environment, click(50, 30), click(10, 10))
    do(twin, click(10, 10))
    do(twin, click(50, 30))
    assert same(environment.observation.masks, twin.observation.masks)
    do(environment, Undo(1))
    assert same(environment.observation.masks, first.after)  # the repeated click was not counted


def test_an_undo_put_right_in_the_same_reply_repeats() -> None:
    environment = env()
    first = do(environment, click(10, 10))
    turn = do(environment, Undo(1), click(10, 10))
    assert turn.after["spleen"] is first.after["spleen"]
    assert environment.episode().stop == "repeated"


def test_the_answer_is_recorded_with_the_episode() -> None:
    for selection in ("best", "last"):
        environment = SegmentationEnv(case(), NotebookSegmenter(), dialect="ibis", mask_selection=selection)
        best = do(environment, click(10, 10), click(12, 10), click(14, 10))
        do(environment, Undo(2))
        last = do(environment, Stop())
        episode = environment.episode()
        assert episode.mask_selection == selection
        assert same(episode.answer_masks, last.after)
        assert not same(episode.answer_masks, best.after)


def test_turn_limit_is_the_policys_own_or_that_of_the_paper() -> None:
    assert turn_limit(ScriptedPolicy([])) == MAX_TURNS == 20
    assert turn_limit(OraclePolicy([], max_clicks=3)) == 4
    packaged = json.loads((NANO_FOLDER / "config.json").read_text())
    assert packaged["max_turns"] == 5


def test_replay_checks_image_and_segmenter() -> None:
    environment = env()
    do(environment, click(1, 1), Stop())
    other = Image(np.zeros((*SIZE, 3), dtype=np.uint8), source="other.png")
    with pytest.raises(DataError, match=r"other\.png: is not the image of this record, phantom\.png"):
        replay(environment.episode(), other, NotebookSegmenter())
    with pytest.raises(ConfigError, match="segmenter notebook, not paper"):
        replay(environment.episode(), IMAGE, NotebookSegmenter(name="paper"))


def test_replay_of_the_region_segmenter_is_exact() -> None:
    region = load_segmenter("region")
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    ground_truth = (columns - 30) ** 2 + (rows - 25) ** 2 < 200
    noisy = np.random.default_rng(1).integers(0, 90, (*SIZE, 3))
    image = Image((noisy + ground_truth[..., None] * 120).astype(np.uint8))
    asked = Case("x", image, "Segment the spleen.", {"spleen": ground_truth})
    oracle = OraclePolicy([asked], mistakes=0.3, jitter=0.5, seed=2)
    environment = SegmentationEnv(asked, region, dialect="ibis", max_turns=oracle.max_turns)
    (episode,) = rollout(oracle, [environment])
    assert len(episode.turns) > 2
    assert same(replay(episode, image, region), episode.masks)


@dataclass
class Proposing:
    """Proposes the same first turns every time, and stops at the second."""

    proposals: tuple[str, ...]
    name: str = "proposing"
    dialect: str = "ibis"
    asked: int = 0
    belief: np.ndarray | None = None

    @property
    def candidates(self) -> int:
        return len(self.proposals)

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        self.asked += 1
        return [
            Completion(f"<think>x</think><action>stop</action><answer>{len(o.turns)}</answer>") for o in observations
        ]

    def propose(self, observations: Sequence[Observation]) -> list[Proposal]:
        said = self.respond(observations)
        begun = [bool(o.turns) or any(mask.any() for mask in o.masks.values()) for o in observations]
        offered = [Completion(text) for text in self.proposals]
        return [
            Proposal([one]) if has_begun else Proposal(offered, self.belief)
            for one, has_begun in zip(said, begun, strict=True)
        ]


def box(x0: float, x1: float) -> str:
    return f"<think>x</think><action>box ({x0}, 0.2) ({x1}, 0.8)</action>"


def test_of_multiple_first_turns_the_one_that_agrees_with_the_others_is_taken() -> None:
    policy, segmenter = Proposing((box(0.1, 0.3), box(0.6, 0.9), box(0.62, 0.9))), NotebookSegmenter()
    [episode] = rollout(policy, [env(segmenter)])
    assert episode.turns[0].completion.text == policy.proposals[1]
    assert len(episode.turns) == 2  # the others leave no trace
    assert (segmenter.opened, len(segmenter.calls)) == (1, 3)  # the best is not predicted once more
    assert {name: mask.sum() for name, mask in replay(episode, IMAGE, NotebookSegmenter()).items()} == {
        name: mask.sum() for name, mask in episode.answer_masks.items()
    }


def test_of_multiple_first_turns_the_one_that_the_policy_believes_in_is_taken() -> None:
    belief = np.full((8, 8), 0.01)
    belief[2:6, 1:2] = 0.9  # where the first box is; the other two agree with each other
    policy = Proposing((box(0.6, 0.9), box(0.1, 0.3), box(0.62, 0.9)), belief=belief)
    [episode] = rollout(policy, [env()])
    assert episode.turns[0].completion.text == policy.proposals[1]


def test_a_segmenter_begins_from_a_draft_until_the_prompts_are_taken_back() -> None:
    draft = np.zeros(SIZE, bool)
    draft[5:15, 5:15] = True
    environment = env()
    click = write(Reply("I look.", (Click(30, 20, True, "spleen"),)), SIZE, dialect="ibis")
    first = environment.step(Completion(click, drafts={"spleen": draft, "liver": draft}))
    assert first.after.keys() == {"spleen"}  # a draft alone is no mask
    assert (first.after["spleen"] & draft).sum() == draft.sum()
    assert "spleen" not in do(environment, Undo(1)).after
    again = do(environment, Click(30, 20, True, "spleen"))
    assert not (again.after["spleen"] & draft).any()  # its own turn brought none
    do(environment, Stop("x"))
    assert same(replay(environment.episode(), IMAGE, NotebookSegmenter()), environment.episode().masks)


def test_a_draft_takes_the_place_of_all_earlier_prompts_until_it_is_taken_back() -> None:
    start, draft = np.zeros(SIZE, bool), np.zeros(SIZE, bool)
    start[3:9, 3:9], draft[12:20, 12:20] = True, True
    environment = env(start={"spleen": start})
    first = environment.step(Completion(write(Reply("", (Click(4, 4, True, "spleen"),)), SIZE, dialect="ibis")))
    click = write(Reply("", (Click(13, 13, True, "spleen"),)), SIZE, dialect="ibis")
    drafted = environment.step(Completion(click, drafts={"spleen": draft}))
    assert (drafted.after["spleen"] & draft).any()
    assert not (drafted.after["spleen"] & start).any()
    undone = environment.step(Completion(write(Reply("", (Undo(),)), SIZE, dialect="ibis")))
    assert np.array_equal(undone.after["spleen"], first.after["spleen"])


def test_a_policy_whose_likeliest_reply_stops_or_cannot_be_read_is_taken_at_its_word() -> None:
    for first in ("<think>x</think><action>stop</action><answer>no</answer>", "mumble"):
        policy = Proposing((first, box(0.6, 0.9), box(0.62, 0.9)))
        [episode] = rollout(policy, [env()])
        assert episode.turns[0].completion.text == first


def test_a_mask_that_was_brought_is_refined_and_not_proposed_anew() -> None:
    start = np.zeros(SIZE, bool)
    start[3:9, 3:9] = True
    [episode] = rollout(Proposing((box(0.1, 0.3), box(0.6, 0.9))), [env(start={"spleen": start})])
    assert episode.stop == "stopped"
    assert len(episode.turns) == 1
