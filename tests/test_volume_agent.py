"""The agent on a volume, with the fakes: search, propagation, rechecks, multiple targets, cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from volume_phantoms import GRIDS, blob

from ibisagent.domain import Click, Image, Masks, Reply, Stop
from ibisagent.errors import ConfigError
from ibisagent.imaging.masks import dice
from ibisagent.inference.volume import (
    Look,
    SliceCases,
    VolumeSegmentation,
    between,
    parse_slices,
    run_volume,
    slice_id,
    vanishing,
)
from ibisagent.policies.oracle import OraclePolicy
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.protocol import write
from ibisagent.segmenters import Memory, Prediction, SegmenterSession, load_segmenter
from ibisagent.volumes import SliceView, Volume

SHAPE = (47, 61, 40)
INSIDE = blob(SHAPE, radii=(14, 12, 13))
SMALL = blob(SHAPE, centre=(39, 50, 26), radii=(5, 6, 7))


def volume(*objects: np.ndarray, grid: str = "LPS-even") -> Volume:
    values = np.random.default_rng(0).normal(0, 6, SHAPE)
    for inside in objects:
        values[inside] += 150
    return Volume(np.rint(values).astype(np.int16), GRIDS[grid], "phantom")


def run(view: SliceView, ground_truths: dict[str, np.ndarray], **options: object) -> VolumeSegmentation:
    oracle = OraclePolicy(
        SliceCases(view, "liver", ground_truths)
    )  # it knows when to stop: its last masks are its answer
    options = {"mask_selection": "last", **options}
    return run_volume(view, "liver", oracle, load_segmenter("region"), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", ["LPS-even", "PIR-uneven", "oblique-uneven"])
def test_key_slices_are_carried_through_the_volume(grid: str) -> None:
    view = SliceView(volume(INSIDE, grid=grid), "axial")
    keys = range(4, view.count, 10)
    found = run(view, {"liver": INSIDE}, keys=keys, recheck=0)
    assert dice(found.masks["liver"].reshape(len(INSIDE), -1), INSIDE.reshape(len(INSIDE), -1)) > 0.9
    assert [asked.slice for asked in found.asked] == list(keys)
    assert {carried.slice for carried in found.carried}.isdisjoint(keys)


def test_the_object_is_searched_and_followed_to_its_ends() -> None:
    view = SliceView(volume(SMALL))
    found = run(view, {"liver": SMALL}, recheck=5)
    shown = np.flatnonzero(SMALL.any(axis=(0, 1)))
    assert dice(found.masks["liver"][:, :, shown[3]], SMALL[:, :, shown[3]]) > 0.8
    assert dice(found.masks["liver"].reshape(47, -1), SMALL.reshape(47, -1)) > 0.85
    beyond = [asked.slice for asked in found.asked if asked.why != "search" and not SMALL[:, :, asked.slice].any()]
    assert beyond  # there the agent said that it ends
    assert not any(found.masks["liver"][:, :, index].any() for index in beyond)


def test_an_absent_object_is_searched_at_a_bounded_number_of_places() -> None:
    view = SliceView(volume())
    found = run(view, {"liver": INSIDE & False})
    assert not found.masks
    assert 8 <= len(found.asked) <= view.count / 2
    assert {asked.why for asked in found.asked} == {"search"}


def test_multiple_targets_are_carried_together() -> None:
    view = SliceView(volume(INSIDE, SMALL))
    found = run(view, {"liver": INSIDE, "spleen": SMALL}, keys=range(2, 40, 6), recheck=0)
    for name, ground_truth in (("liver", INSIDE), ("spleen", SMALL)):
        assert dice(found.masks[name].reshape(47, -1), ground_truth.reshape(47, -1)) > 0.85, name
    shared = {carried.slice for carried in found.carried if carried.target == "liver"} & {
        carried.slice for carried in found.carried if carried.target == "spleen"
    }
    assert shared
    opened_without_prompt = found.cost.encoder_calls - len({carried.slice for carried in found.carried})
    assert opened_without_prompt <= len(found.asked)  # one opening serves all targets


class Remembering:
    """The region segmenter with a memory, which says of every image what was last remembered."""

    def __init__(self) -> None:
        self._plain = load_segmenter("region")
        self.name = "remembering"
        self.shown: list[dict[str, int]] = []

    def open(self, image: Image) -> SegmenterSession:
        """For the agent's on-policy states."""
        return self._plain.open(image)

    def describe(self) -> dict[str, str]:
        """See `Segmenter`."""
        return self._plain.describe()

    def memory(self) -> Memory:
        """See `segmenters.Memory`."""
        owner = self

        class Kept:
            masks: Masks

            def remember(self, image: Image, masks: Masks) -> None:
                assert all(mask.shape == image.size and mask.any() for mask in masks.values())
                owner.shown.append({name: int(mask.sum()) for name, mask in masks.items()})
                self.masks = dict(masks)

            def predict(self, image: Image) -> dict[str, Prediction]:
                return {name: Prediction(mask, 0.9, np.zeros(0)) for name, mask in self.masks.items()}

        return Kept()


def test_a_segmenter_with_a_memory_follows_with_it() -> None:
    inside = np.zeros((31, 43, 24), bool)
    inside[8:20, 10:30] = True
    view = SliceView(Volume(np.where(inside, 200, 0).astype(np.int16), GRIDS["LPS-even"], "bar"))
    segmenter = Remembering()
    oracle = OraclePolicy(SliceCases(view, "liver", {"liver": inside}))
    found = run_volume(view, "liver", oracle, segmenter, keys=[4, 16], recheck=8, mask_selection="last")
    assert dice(found.masks["liver"].reshape(31, -1), inside.reshape(31, -1)) > 0.95
    assert len(segmenter.shown) >= 2  # both key slices
    assert all(shown.keys() == {"liver"} for shown in segmenter.shown)
    assert len({carried.slice for carried in found.carried} | {asked.slice for asked in found.asked}) == 24
    assert found.cost.predictions >= 20


def test_a_recheck_spares_what_it_was_not_asked_about() -> None:
    """The agent that looks at one target's end does not empty the other."""
    view = SliceView(volume(INSIDE, SMALL))
    found = run(view, {"liver": INSIDE, "spleen": SMALL}, recheck=3)
    for name, ground_truth in (("liver", INSIDE), ("spleen", SMALL)):
        assert dice(found.masks[name].reshape(47, -1), ground_truth.reshape(47, -1)) > 0.85, name


def test_cost_grows_linearly_with_the_slices() -> None:
    costs = []
    for length in (20, 40, 80):
        inside = np.zeros((31, 43, length), bool)
        inside[8:20, 10:30] = True
        view = SliceView(Volume(np.where(inside, 200, 0).astype(np.int16), GRIDS["LPS-even"], "bar"))
        costs.append(run(view, {"liver": inside}, keys=range(0, length, 10), recheck=0).cost)
    first, second, third = costs
    assert second.policy_calls == 2 * first.policy_calls
    assert third.encoder_calls - second.encoder_calls == 2 * (second.encoder_calls - first.encoder_calls)
    assert third.encoder_calls <= 80
    assert third.predictions <= 80 + 2 * third.policy_calls


def test_start_masks_are_refined() -> None:
    view = SliceView(volume(INSIDE))
    seen: list[int] = []
    stop = write(Reply("", (Stop("Done."),)), view.size, dialect="ibis")
    found = run_volume(
        view,
        "liver",
        ScriptedPolicy([stop]),
        load_segmenter("region"),
        keys=[18],
        start={"liver": INSIDE},
        on_slice=seen.append,
    )
    np.testing.assert_array_equal(found.masks["liver"][:, :, 18], INSIDE[:, :, 18])
    assert 17 in seen
    assert 19 in seen
    assert dice(found.masks["liver"][:, :, 19], INSIDE[:, :, 19]) > 0.8


def test_an_episode_is_reported_with_its_slice() -> None:
    view = SliceView(volume(INSIDE))
    told: list[tuple[int, str, str]] = []
    click = write(Reply("", (Click(19, 33, True, "liver"),)), view.size, dialect="ibis")
    policy = ScriptedPolicy([click, write(Reply("", (Stop(""),)), view.size, dialect="ibis")])
    found = run_volume(
        view,
        "liver",
        policy,
        load_segmenter("region"),
        keys=[18],
        recheck=0,
        on_episode=lambda index, why, episode, image: told.append((index, why, episode.case_id)),
    )
    assert told == [(18, "key", slice_id(view, 18))]
    assert found.cost.policy_calls == 2


def test_slices_are_read_from_text() -> None:
    assert parse_slices("3, 7,-1", 12) == [3, 7, 11]
    assert parse_slices("::5", 12) == [0, 5, 10]
    assert parse_slices("2:6:2,9", 12) == [2, 4, 9]
    for text in ("12", "a", "", "1:2:3:4", "9:3", "::0"):
        with pytest.raises(ConfigError, match="slices"):
            parse_slices(text, 12)


@pytest.mark.parametrize("keys", [[40], [-1], []])
def test_slices_that_are_not_there_are_refused(keys: Sequence[int]) -> None:
    with pytest.raises(ConfigError, match="has slices 0 to 39"):
        run(SliceView(volume()), {"liver": INSIDE}, keys=keys)


def test_shapes_are_interpolated() -> None:
    rows, columns = np.ogrid[:50, :70]
    left, right = ((rows - 25) ** 2 + (columns - c) ** 2 <= 15**2 for c in (28, 40))
    middle = (rows - 25) ** 2 + (columns - 34) ** 2 <= 15**2
    assert dice(between(left, right, 0.5), middle) > 0.9
    np.testing.assert_array_equal(between(left, right, 0), left)
    np.testing.assert_array_equal(between(left, right, 1), right)


def test_an_abrupt_end_is_seen() -> None:
    """The object ends right after a key slice; nobody is asked again, and the mask ends with it."""
    ended = INSIDE.copy()
    ended[:, :, 21:] = False
    view = SliceView(volume(ended))
    found = run(view, {"liver": ended}, keys=range(0, 40, 10), recheck=0)
    assert ended[:, :, 20].any()
    assert found.masks["liver"][:, :, 20].any()
    assert not found.masks["liver"][:, :, 22:].any()


def test_looks_compare_a_mask_with_what_the_agent_saw() -> None:
    view = SliceView(volume(INSIDE))
    seen, masks = view.image(18), [view.read_mask(INSIDE, index) for index in (18, 20)]
    look = Look(seen, masks[0])
    assert look.kept(view.image(20), masks[1]) > 0.8
    assert look.kept(view.image(20), np.roll(masks[1], 30, axis=1) & ~masks[1]) < 0.3
    flat = Look(view.image(0), masks[0])  # nothing is told by brightness there
    assert flat.kept(view.image(18), masks[0]) == 1


def test_shapes_vanish() -> None:
    rows, columns = np.ogrid[:50, :70]
    disc = (rows - 25) ** 2 + (columns - 34) ** 2 <= 20**2
    np.testing.assert_array_equal(vanishing(disc, 0), disc)
    half = (rows - 25) ** 2 + (columns - 34) ** 2 <= 10**2
    assert dice(vanishing(disc, 0.5), half) > 0.9
    assert not vanishing(disc, 1).any()


def test_a_recheck_is_believed_over_older_slices() -> None:
    """Two key slices far apart; the object leaves the way between their shapes, which rechecks find."""
    bent = np.zeros(SHAPE, bool)
    for k in range(SHAPE[2]):
        middle = 12 + round(20 * np.sin(np.pi * k / (SHAPE[2] - 1)))
        bent[middle - 7 : middle + 8, 20:40, k] = True
    view = SliceView(volume(bent))
    found = run(view, {"liver": bent}, keys=[0, 39], recheck=4)
    assert dice(found.masks["liver"].reshape(47, -1), bent.reshape(47, -1)) > 0.85
    assert len(found.asked) <= 12  # it is in no doubt all the way: what is expected starts from the newest recheck
