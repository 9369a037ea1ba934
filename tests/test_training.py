"""The recipes of the packaged weights, in miniature: they run, learn, resume and save what the package loads."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from ibisagent.cli import app
from ibisagent.datasets import read_cases
from ibisagent.domain import Box, Case, Click, Completion, Image, Observation, Reply, Stop, Undo
from ibisagent.environment import SegmentationEnv
from ibisagent.errors import ConfigError, DataError
from ibisagent.imaging.clicks import next_click
from ibisagent.policies import load_policy
from ibisagent.policies.nano_input import LOCATIONS
from ibisagent.protocol import START_LINE, parse, render, write
from ibisagent.segmenters import load_segmenter
from ibisagent.segmenters.backbone_sizes import SIDE
from ibisagent.segmenters.click_network import ClickNetwork
from ibisagent.segmenters.ibis_click import PACKAGED_WEIGHTS, read_click_network
from ibisagent.segmenters.letterbox import letterbox, letterbox_scale, prompt_maps
from ibisagent.training.click import trainer as click_recipe
from ibisagent.training.click.states import Pair, new_state
from ibisagent.training.click.states import pairs_from as click_pairs
from ibisagent.training.finetune.recipes import RlRecipe
from ibisagent.training.images import FeatureCache, TrainingImages, context_features, random_turn, read_training_cases
from ibisagent.training.nano import on_policy as on_policy
from ibisagent.training.nano import trainer as nano_recipe
from ibisagent.training.nano.curriculum import Curriculum, Example, pairs_of
from ibisagent.training.nano.on_policy import OnPolicyStates, first_turn_of, recap_of, sure_part


def disc_case(index, shape=(97, 131)):
    random = np.random.default_rng(index)
    ground_truth = np.zeros(shape, np.uint8)
    centre = (int(random.integers(35, 95)), int(random.integers(30, 65)))
    cv2.circle(ground_truth, centre, int(random.integers(12, 26)), 1, cv2.FILLED)
    pixels = random.integers(20, 60, (*shape, 3)).astype(np.uint8)
    pixels[ground_truth > 0] += 120
    meta = {"dataset": "discs", "modality": "CT", "site": "brain"}
    return Case(
        f"disc-{index}", Image(pixels), "Segment the disc.", {"disc": ground_truth > 0}, patient=str(index), meta=meta
    )


@pytest.fixture(scope="module")
def cases():
    return [disc_case(index) for index in range(12)]


@pytest.fixture(scope="module")
def feature_cache(cases, tmp_path_factory):
    return FeatureCache.of(cases, tmp_path_factory.mktemp("feature_cache"), 2, 0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe in a file for a tiny network, and 24 discs on disk; the hash of their names holds some out."""
    folder = tmp_path_factory.mktemp("discs")
    rows = ["image,mask,object,patient,split,dataset,licence_class"]
    for index in range(24):
        case = disc_case(index)
        cv2.imwrite(str(folder / f"{index}.png"), case.image.pixels[..., ::-1])
        cv2.imwrite(str(folder / f"{index}_mask.png"), case.targets["disc"].astype(np.uint8) * 255)
        rows.append(f"{index}.png,{index}_mask.png,disc,p{index},train,{'rings' if index > 20 else 'discs'},ok")
    (folder / "index.csv").write_text("\n".join(rows))
    lines = [
        f'data = "{folder}"',
        f'out = "{folder / "run"}"',
        "states = 48",
        "side = 64",
        "batch_size = 4",
        "eval_every = 24",
        "augmentations_per_image = 1",
    ]
    lines += ['licence_class = "ok"', "widths = [8, 8, 16, 16, 16]", "depth = [1, 1, 1, 1, 1]", "seed = 3"]
    path = folder / "recipe.toml"
    path.write_text("\n".join(lines))
    return path


def test_a_click_network_is_trained_from_a_recipe_and_used(recipe, cases, capsys):
    assert app(["train", "click", str(recipe), "--json"], standalone_mode=False) is None
    weights = Path(json.loads(capsys.readouterr().out)["weights"])
    segmenter = load_segmenter(f"ibis-click:{weights}", device="cpu", runtime="torch")
    ground_truth = cases[0].targets["disc"]
    point = next_click(ground_truth, np.zeros_like(ground_truth), "disc")
    assert segmenter.open(cases[0].image).predict([point]).mask.shape == ground_truth.shape
    described = json.loads(weights.with_suffix(".json").read_text())
    assert described["trained"]["states"] == 48
    assert "data" not in described["trained"]  # names folders of the machine
    assert described["quality"] != [1.0, 0.0]  # fitted on held-out patients
    assert list((weights.parent / "tensorboard").iterdir())


def test_a_click_run_goes_on_from_its_checkpoint_and_refuses_that_of_another_recipe(recipe, tmp_path):
    plan = click_recipe.ClickRecipe.read(recipe).model_copy(update={"out": tmp_path, "tensorboard": False})
    seen = []

    def stop_half_way(states, loss, metrics):
        seen.append(states)
        if states == 28:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        click_recipe.train(plan, stop_half_way)
    click_recipe.train(plan, lambda states, loss, metrics: seen.append(states))
    assert seen == [*range(4, 29, 4), *range(28, 49, 4)]  # the checkpoint was written at 24
    with pytest.raises(ConfigError, match="another run \\(learning_rate was"):
        click_recipe.train(plan.model_copy(update={"learning_rate": 0.5}))
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in [*recipe.parent.glob("*.png"), recipe.parent / "index.csv"]:
        shutil.copy(file, moved)
    elsewhere = plan.model_copy(update={"data": (moved,)})
    click_recipe.train(elsewhere)
    shutil.copy(moved / "4_mask.png", moved / "3_mask.png")
    with pytest.raises(ConfigError, match="images or masks of its data have changed"):
        click_recipe.train(elsewhere)


def test_an_episode_sees_the_part_of_the_context_where_its_view_lies(cases, feature_cache):
    """Whatever the view and the augmentation: the image, turned as in the cache and sampled at the places, is it."""
    random = np.random.default_rng(5)
    pairs = click_pairs(cases, feature_cache.place)
    weights = np.full(len(pairs), 1 / len(pairs))
    augmentations_per_image = set()
    for _ in range(30):
        state = new_state(pairs, weights, feature_cache, 64, random, made_up=0)
        augmentation, number = state.context
        augmentations_per_image.add(augmentation)
        image = cv2.resize(cases[number].image.pixels, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        turned = cv2.warpAffine(image, feature_cache.turns[augmentation, number], (SIDE, SIDE))
        brightness = torch.from_numpy(turned.mean(axis=2, dtype=np.float32))[None, None]
        seen = F.grid_sample(brightness, torch.from_numpy(state.places)[None], align_corners=False)[0, 0].numpy()
        view = state.ground_truth.reshape(8, 8, 8, 8).mean(axis=(1, 3))
        assert state.places.shape == (8, 8, 2)
        assert seen[view == 1].min(initial=255) > 85  # the disc is bright, and the rest dark
        assert seen[view == 0].max(initial=0) < 85
    assert augmentations_per_image == {0, 1}


def test_images_are_embedded_once(recipe, tmp_path):
    plan = click_recipe.ClickRecipe.read(recipe)
    cases = list(read_cases(plan.data[0], split="train"))[:3]
    first = FeatureCache.of(cases, tmp_path, 1, 0)
    written = (next(tmp_path.iterdir()) / "features.f16").stat().st_mtime_ns
    again = FeatureCache.of(cases, tmp_path, 1, 0)
    assert np.array_equal(first.features, again.features)
    assert first.done.all()
    assert [(folder / "features.f16").stat().st_mtime_ns for folder in tmp_path.iterdir()] == [written]


def test_data_sets_can_be_left_out(recipe, tmp_path):
    plan = click_recipe.ClickRecipe.read(recipe).model_copy(update={"out": tmp_path})
    with pytest.raises(DataError, match="no pair is left to train on"):
        click_recipe.train(plan.model_copy(update={"leave_out": ("discs", "rings")}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate = 1", "data: Field required"),
        ('data = "x"\nout = "y"\nrates = 1', "rates: there is no such setting"),
        ('data = "x"\nout = "y"\nside = 100', "side: .*multiple of 32"),
        ("learning_rate = ", "not TOML"),
    ],
)
def test_a_bad_recipe_is_one_line(tmp_path, text, message):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        click_recipe.ClickRecipe.read(path)
    assert "\n" not in str(caught.value)


def test_settings_of_a_recipe_can_be_replaced(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('data = "x"\nout = "y"\nmax_steps = 1\n[rewards]\nclick = 0.5')
    changes = ["out=some where", "learning_rate = 1e-3", 'report_to=["tensorboard"]', "rewards.length=0", "lora.rank=2"]
    recipe = RlRecipe.read(path, changes)
    assert (recipe.out, recipe.learning_rate, recipe.report_to, recipe.max_steps) == (
        Path("some where"),
        1e-3,
        ("tensorboard",),
        1,
    )
    assert (recipe.rewards.click, recipe.rewards.length, recipe.lora.rank) == (0.5, 0.0, 2)
    for change, message in (("rate", "write NAME=VALUE"), ("=1", "write NAME=VALUE"), ("max_steps.x=1", "is no table")):
        with pytest.raises(ConfigError, match=message):
            RlRecipe.read(path, [change])
    with pytest.raises(ConfigError, match=r"max_steps: .*valid integer.*'many'"):
        RlRecipe.read(path, ["max_steps=many"])


def test_the_recipes_of_the_packaged_weights_are_valid():
    recipes = Path(__file__).parent.parent / "recipes"
    click_recipe.ClickRecipe.read(recipes / "ibis-click.toml")
    nano_recipe.NanoRecipe.read(recipes / "ibis-nano.toml")
    nano_recipe.NanoRecipe.read(recipes / "ibis-nano-on-policy.toml", ["start=somewhere"])


def test_images_without_a_usable_object_do_not_hang_training(cases, feature_cache):
    pair = click_pairs(cases, feature_cache.place)[0]
    empty = Pair(pair.pixels, np.zeros_like(pair.mask), "all", pair.regions)
    with pytest.raises(DataError, match="show no object"):
        new_state([empty], np.ones(1), feature_cache, 64, np.random.default_rng(0), made_up=0.0)


def test_quality_is_fitted():
    logits = np.random.default_rng(0).normal(0, 2, 4000)
    slope, shift = click_recipe.fit_quality(logits, 1 / (1 + np.exp(-(0.5 * logits - 1))))
    assert (slope, shift) == pytest.approx((0.5, -1), abs=0.01)


def test_one_step_of_the_click_recipe_lowers_the_loss_on_what_it_saw(cases, feature_cache):
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    pairs = click_pairs(cases, feature_cache.place)
    weights = np.full(len(pairs), 1 / len(pairs))
    states = [new_state(pairs, weights, feature_cache, 64, random) for _ in range(4)]
    inputs = torch.from_numpy(np.stack([state.network_input() for state in states]))
    ground_truth = torch.from_numpy(np.stack([state.ground_truth for state in states])[:, None].astype(np.float32))
    features = torch.from_numpy(
        np.stack([feature_cache.features[state.context] for state in states]).astype(np.float32)
    )
    places = torch.from_numpy(np.stack([state.places for state in states]))
    network = ClickNetwork()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = click_recipe.mask_loss(network(inputs, features, places)[0], ground_truth)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_parts_of_an_object_are_taken_back_by_a_click_each_or_taken_alone_in_their_box(cases, feature_cache):
    random = np.random.default_rng(2)
    (pair, *_) = click_pairs(cases, feature_cache.place)
    discs = np.zeros(pair.mask.shape, np.uint8)
    for centre in ((20, 20), (70, 20), (20, 70), (70, 70)):
        cv2.circle(discs, centre, 12, 1, cv2.FILLED)
    in_parts = Pair(pair.pixels, discs > 0, "all", pair.regions)
    taken_back = alone = 0
    for _ in range(60):
        state = new_state([in_parts], np.ones(1), feature_cache, 96, random, made_up=0, window_share=0, parts_share=1)
        boxes = [prompt for prompt in state.prompts if isinstance(prompt, Box)]
        negative = [prompt for prompt in state.prompts if isinstance(prompt, Click) and not prompt.positive]
        count, _ = cv2.connectedComponents(state.ground_truth.astype(np.uint8))
        if negative:
            taken_back += 1
            whole = state.probability > 0.5
            extra, extra_labels = cv2.connectedComponents((whole & ~state.ground_truth).astype(np.uint8))
            assert count > 1, "something is left"
            assert sorted(extra_labels[click.y, click.x] for click in negative) == list(range(1, extra))
        elif boxes:
            alone += 1
            assert count == 2
            (box,) = boxes
            inside = state.ground_truth[box.y0 : box.y1, box.x0 : box.x1]
            assert inside.sum() > 0.5 * state.ground_truth.sum()
            assert inside.mean() > 0.3, "a box of this part, not of all"
    assert taken_back > 10
    assert alone > 10


def test_states_hold_prompts_that_fit_their_ground_truth(cases, feature_cache):
    random = np.random.default_rng(1)
    pairs = click_pairs(cases, feature_cache.place)
    weights = np.full(len(pairs), 1 / len(pairs))
    for _ in range(40):
        state = new_state(pairs, weights, feature_cache, 64, random)
        assert state.network_input().shape == (7, 64, 64)
        clicks = [prompt for prompt in state.prompts if isinstance(prompt, Click)]
        started = state.probability.any()
        assert started or all(state.ground_truth[click.y, click.x] == click.positive for click in clicks)
        assert state.prompts


def test_letterbox_and_prompts_share_one_grid():
    plane = np.zeros((61, 83, 3), np.float32)
    plane[40, 70] = 1
    scale = letterbox_scale((61, 83), 256)
    boxed = letterbox(plane, 256)
    assert boxed.shape == (256, 256, 3)
    y, x = np.unravel_index(boxed[..., 0].argmax(), (256, 256))
    disc = prompt_maps([Click(70, 40, True, "")], 256, scale)[0]
    assert disc[y, x] == 1
    assert not boxed[round(61 * scale) :].any()


def test_patients_are_held_out_by_name_alone():
    names = [f"patient-{index}" for index in range(2000)]
    held_out = [name for name in names if click_recipe.is_development(name)]
    assert held_out == [name for name in reversed(names) if click_recipe.is_development(name)][::-1]
    assert 0.03 < len(held_out) / len(names) < 0.1


@pytest.fixture(scope="module")
def images(recipe):
    return TrainingImages.of(read_cases(recipe.parent, split="train"))


@pytest.fixture(scope="module")
def context(images, tmp_path_factory):
    return context_features(images, tmp_path_factory.mktemp("context"))


@pytest.fixture(scope="module")
def curriculum(images, context):
    return Curriculum(images, pairs_of(images), ClickNetwork().eval(), context, seed=0)


def test_examples_are_replies_that_the_protocol_reads_and_places_that_are_right(curriculum):
    kinds = set()
    for example in curriculum.draw(120):
        reply = parse(example.reply, (SIDE, SIDE), dialect="ibis", default_target="disc")
        assert reply.problem is None
        kinds.add(tuple(type(action).__name__ for action in reply.actions))
        for place in example.places:
            assert place.sum() == pytest.approx(1, abs=1e-3)
        clicks = [action for action in reply.actions if isinstance(action, Click)]
        for click in clicks:
            assert example.ground_truth[click.y, click.x] == click.positive
            assert example.current[click.y, click.x] != click.positive
    assert {("Click", "Box"), ("Click",), ("Stop",)} <= kinds


@pytest.fixture(scope="module")
def on_policy_of(images, context):
    segmenter = read_click_network(PACKAGED_WEIGHTS).eval()
    return lambda believe: OnPolicyStates(images, pairs_of(images), segmenter, context, 0, believe=believe)


def doubts(examples):
    return np.full((len(examples), LOCATIONS, LOCATIONS), 0.5, np.float32)


def knows(examples):
    assert not any(example.current.any() for example in examples)  # a map that sees the mask follows it
    return np.stack(
        [cv2.resize(example.ground_truth.astype(np.float32), (LOCATIONS, LOCATIONS)) for example in examples]
    )


def test_only_what_the_policy_is_sure_of_is_to_be_corrected():
    ground_truth, mask = np.zeros((2, SIDE, SIDE), bool)
    ground_truth[:, :128], mask[:, 64:192] = True, True
    belief = np.full((LOCATIONS, LOCATIONS), 0.5, np.float32)
    assert (sure_part(ground_truth, mask, belief) == mask).all()
    belief[:, :16] = 0.99  # the missed quarter
    goal = sure_part(ground_truth, mask, belief)
    assert goal[:, :60].all()
    assert (goal[:, 68:] == mask[:, 68:]).all()
    belief[:, 32:] = 0.01  # and the leak
    assert np.mean(sure_part(ground_truth, mask, belief) == ground_truth) > 0.95
    assert (
        sure_part(ground_truth, np.zeros_like(mask), belief * 0 + 0.5) == ground_truth
    ).all()  # a first turn is asked for anyway


def test_a_policy_begins_where_its_map_is_brightest_and_around_what_it_marks():
    belief = np.zeros((LOCATIONS, LOCATIONS), np.float32)
    belief[10:20, 30:50], belief[12, 33] = 0.7, 0.9
    click, box = first_turn_of(belief)
    assert (click.x // 4, click.y // 4, click.positive) == (33, 12, True)
    assert (box.x0, box.y0, box.x1, box.y1) == (120, 40, 200, 80)


def test_a_policy_that_sees_nothing_sure_is_taught_to_stop_and_sees_its_replies(on_policy_of):
    drawn = on_policy_of(doubts).draw(80)
    later = [example for example in drawn if example.current.any()]
    assert later
    assert all("stop" in example.reply for example in later)
    assert any((example.kept == 0).any() for example in later)  # through a feature dropout
    recalling = [example for example in later if "Your replies so far:\n- click +" in example.prompt]
    assert recalling
    assert all(example in recalling or START_LINE in example.prompt for example in later)


def test_a_policy_that_knows_better_corrects_and_takes_back_what_did_harm(on_policy_of):
    curriculum = on_policy_of(knows)
    later = [example for _ in range(8) for example in curriculum.draw(100) if example.current.any()]
    replies = [parse(example.reply, (SIDE, SIDE), dialect="ibis", default_target="disc") for example in later]
    assert all(reply.problem is None for reply in replies)
    kinds = Counter(type(reply.actions[0]).__name__ for reply in replies)
    assert min(kinds["Click"], kinds["Stop"]) > 10
    undoing = [example for example, reply in zip(later, replies, strict=True) if Undo() in reply.actions]
    assert undoing
    for example in undoing:  # only a click of its own can be taken back, and only once
        lines = example.prompt.split("Your replies so far:\n")[1].splitlines()
        assert len(lines) == 2
        assert lines[1].startswith("- click")
    assert any(
        not example.current.any() and "Your replies so far" in example.prompt for example in first_view(curriculum)
    )


def first_view(curriculum):
    return [example for example in curriculum.draw(100) if "I look for" in example.reply]


def test_the_last_click_is_wrong_if_it_lies_wrong_and_looks_so():
    ground_truth, before, worse = np.zeros((3, SIDE, SIDE), bool)
    ground_truth[64:128, 64:128] = before[64:128, 64:120] = True
    worse[64:128, 64:192] = True
    sees, blind = knows([Example(0, ground_truth, ground_truth)])[0], np.full((LOCATIONS, LOCATIONS), 0.5, np.float32)

    def wrong(prompt, mask, belief, before=before):
        return on_policy._State([[prompt]], [prompt], mask, mask, before).last_was_wrong(ground_truth, belief)

    off, on, box = Click(160, 90, True, ""), Click(122, 90, True, ""), Box(64, 64, 192, 128, "")
    assert wrong(off, worse, sees)
    assert not wrong(off, ground_truth, sees)  # it gained something all the same
    assert not wrong(on, worse, sees)
    assert not wrong(off, worse, blind + 0.2)  # it takes the click to be right
    assert wrong(Click(100, 90, False, ""), before & False, sees)
    assert not wrong(box, worse, sees)
    assert not wrong(off, worse, sees, before=None)


def test_a_correction_that_gains_nothing_is_not_taught(on_policy_of, monkeypatch):
    curriculum = on_policy_of(knows)
    monkeypatch.setattr(on_policy, "GAIN", 2.0)  # more than any click can
    later = [example for example in curriculum.draw(100) if example.current.any()]
    assert later
    assert all("stop" in example.reply or "undo" in example.reply for example in later)


def test_the_replies_so_far_are_told_as_to_the_policy(cases, feature_cache):
    case = replace(cases[0], query="Find the disc.")
    environment = SegmentationEnv(case, load_segmenter("ibis-click"), dialect="ibis")
    said = [Click(40, 50, True, ""), Box(20, 30, 70, 80, "")], [Click(5, 6, False, "")], [Undo()]
    for actions in said:
        environment.step(Completion(write(Reply("", tuple(actions)), case.image.size, dialect="ibis")))
    message = render(environment.observation, dialect="ibis", history="actions", style="alpha")[-1]
    text = next(part["text"] for part in message["content"] if part["type"] == "text")
    assert text == f"{case.query}\n{recap_of(case.query, said, case.image.size)}"


def test_context_features_turn_with_their_view(images):
    curriculum = Curriculum(images, pairs_of(images), None, np.empty(0), seed=0)
    random = np.random.default_rng(3)
    image = cv2.GaussianBlur(random.random((SIDE, SIDE)).astype(np.float32), (0, 0), 24)
    image = (image - image.min()) / np.ptp(image)
    turn = random_turn("CT", random)
    small = cv2.resize(image, (28, 28), interpolation=cv2.INTER_AREA)
    curriculum._context = np.repeat(small[None, None], 2, axis=1)
    turned = curriculum._contexts([Example(0, np.empty(0), None, turn)])[0, 0].numpy()
    wanted = cv2.resize(cv2.warpAffine(image, turn, (SIDE, SIDE)), (28, 28), interpolation=cv2.INTER_AREA)
    assert np.abs(turned - wanted)[6:-6, 6:-6].max() < 0.05


def test_training_the_policy_learns_and_saves_a_loadable_model(images, tmp_path):
    torch.manual_seed(0)
    pairs = pairs_of(images)
    processor = nano_recipe.build_processor(["disc"])
    model = nano_recipe.build_model(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    examples = Curriculum(images, pairs, None, np.empty(0), seed=1).draw(4)
    totals = []
    for _ in range(5):
        loss, parts = nano_recipe.losses(model, examples, processor)
        assert set(parts) == {"words", "places", "region", "overlap"}
        totals.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert totals[-1] < 0.9 * totals[0]
    found = nano_recipe.validate(model, processor, pairs[:3], images)
    assert 0 <= found["hit"] <= 1
    nano_recipe.save(model, processor, tmp_path / "ibis-nano")
    assert sum(file.stat().st_size for file in (tmp_path / "ibis-nano").glob("*.safetensors")) < 18_500_000


def test_a_batch_in_which_no_place_is_named_is_learned_from():
    processor = nano_recipe.build_processor(["disc"])
    model = nano_recipe.build_model(processor)
    example = Example(0, np.zeros((SIDE, SIDE, 3), np.uint8), np.zeros((SIDE, SIDE), bool), query="Segment the disc.")
    example.answer("I see no disc here.", Stop("There is no disc here.", ("disc",)))
    loss, parts = nano_recipe.losses(model, [example], processor)
    loss.backward()
    assert np.isfinite(loss.item())
    assert parts["places"] == 0


@pytest.mark.parametrize(
    "name",
    ["nuclei (0, 1)", "spot (0.508, 0.242)", "a <image> b", "<|end|>", "</action>", "a; stop", 'say "disc"', "a\nb"],
)
def test_a_name_is_never_read_as_a_place_an_image_or_a_mark(name):
    """What users call their objects is text: the batch has the places and images that it would have for "disc"."""
    processor = nano_recipe.build_processor(["disc", name])
    words = len(processor.tokenizer) - nano_recipe.LOCATIONS**2
    seen = []
    for called in ("disc", name):
        example = Example(0, np.zeros((SIDE, SIDE, 3), np.uint8), None, query=f"Segment the {called}.")
        example.recap = recap_of(example.prompt, [[Click(3, 4, True, "")]], (SIDE, SIDE))
        example.answer(f"I look for the {called}.", Click(9, 9, True, called), Box(0, 0, 8, 8, called))
        batch, _ = nano_recipe.collate([example], processor)
        ids, labels = batch["input_ids"], batch["labels"]
        marks = processor.tokenizer.convert_tokens_to_ids(
            ["<|user|>", "<|assistant|>", "<|end|>", "<image>", "<action>"]
        )
        seen.append(
            [int((ids >= words).sum()), int((labels >= words).sum()), *(int((ids == one).sum()) for one in marks)]
        )
        reply = processor.tokenizer.decode(labels[labels >= 0][:-1], clean_up_tokenization_spaces=False)
        assert {action.target for action in parse(reply, (SIDE, SIDE), dialect="ibis").actions} == {called}
    assert seen[0] == seen[1]


def test_training_on_absent_rows_alone_fails_and_rows_that_cannot_be_used_are_left_out(recipe, tmp_path, caplog):
    folder = recipe.parent
    plan = click_recipe.ClickRecipe.read(recipe).model_copy(update={"out": tmp_path / "out", "tensorboard": False})
    absent = tmp_path / "absent.csv"
    absent.write_text("image,mask,object,split\n" + f"{folder / '0.png'},,spleen,train\n")
    with pytest.raises(DataError, match="no mask is left to learn from"):
        click_recipe.train(plan.model_copy(update={"data": (absent,), "licence_class": ""}))
    rows = ["image,mask,object,split,patient,label"]
    rows += [f"{folder / '0.png'},{folder / '0_mask.png'},{'x' * 300},Training,p0,"]
    rows += [f"{folder / '0.png'},{folder / '0_mask.png'},ring,Training,p0,none"]
    rows += [f"{folder / f'{number}.png'},{folder / f'{number}_mask.png'},disc,Training,p0," for number in range(2)]
    (tmp_path / "mixed.csv").write_text("\n".join(rows))
    images = TrainingImages.of(read_training_cases([tmp_path / "mixed.csv"], ""))
    assert [row.object for row in images.rows] == ["disc", "disc"]
    assert "row 2: an object's name has 300 characters" in caplog.text
    assert "row 3" in caplog.text
    click_recipe.train(plan.model_copy(update={"data": (tmp_path / "mixed.csv",), "licence_class": "", "states": 4}))
    assert "no patient is held out" in caplog.text


def test_the_nano_recipe_runs_goes_on_and_refuses_another(recipe, tmp_path, capsys):
    plan = tmp_path / "nano.toml"
    lines = [f'data = "{recipe.parent}"', f'out = "{tmp_path / "run"}"', f'cache = "{recipe.parent / "run"}"']
    plan.write_text(
        "\n".join([*lines, "backbone_examples = 16", "batch_size = 2", "examples = 4", "eval_every = 2", "seed = 3"])
    )
    assert app(["train", "nano", str(plan), "--json"], standalone_mode=False) is None
    model = json.loads(capsys.readouterr().out)["model"]
    [reply] = load_policy(model, device="cpu", dtype="float32", max_new_tokens=3).respond(
        [Observation("one", disc_case(0).image, "Segment the disc.")]
    )
    assert reply.text
    seen = []
    nano_recipe.train(nano_recipe.NanoRecipe.read(plan), lambda done, losses, metrics: seen.append(done))
    assert not seen  # all was done before
    with pytest.raises(ConfigError, match="another run \\(learning_rate was"):
        nano_recipe.train(nano_recipe.NanoRecipe.read(plan).model_copy(update={"learning_rate": 0.5}))
    other = nano_recipe.NanoRecipe.read(plan).model_copy(update={"out": tmp_path / "other", "learning_rate": 1e-9})
    further = nano_recipe.train(other.model_copy(update={"start": Path(model), "examples": 2}))
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (model, further))
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)  # hardly a step away
    assert Path(further, "tokenizer_config.json").read_text() == Path(model, "tokenizer_config.json").read_text()
    with pytest.raises(ConfigError, match="no ibis-nano to start from"):
        nano_recipe.train(other.model_copy(update={"start": tmp_path, "out": tmp_path / "none"}))
    own = nano_recipe.train(other.model_copy(update={"start": Path(model), "on_policy": True, "out": tmp_path / "own"}))
    histories = [load_policy(str(one), dtype="float32").history for one in (model, own)]
    assert histories == ["none", "actions"]
    assert "vision.comparison.fine.weight" in load_file(Path(own) / "model.safetensors")
    with pytest.raises(ConfigError, match="on_policy: set start"):
        nano_recipe.NanoRecipe.read(plan, ["on_policy=true"])
