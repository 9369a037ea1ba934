"""Both fine-tuning stages, in miniature: the packaged ibis-nano and a shrunken Qwen2.5-VL go through one code path."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ibisagent
from loopback import free_port
from small_models import small_qwen
from transformers import Qwen2_5_VLConfig

from ibisagent.cli import app
from ibisagent.datasets import read_cases
from ibisagent.domain import Observation, Stop
from ibisagent.errors import ConfigError, DataError, SegmenterError
from ibisagent.generation.config import FactoryConfig
from ibisagent.generation.exports import read_trl
from ibisagent.generation.stages import Plan, build
from ibisagent.generation.trajectories import TrajectoryConfig, generate
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.policies import load_policy
from ibisagent.policies.nano import IbisNanoForConditionalGeneration, LikelyPlaces
from ibisagent.policies.one_by_one import TAKEN_BACK
from ibisagent.policies.sizes import QWEN_7B, size_of, size_of_folder
from ibisagent.protocol import parse, render
from ibisagent.query import target_of
from ibisagent.rewards import PAPER, RewardWeights
from ibisagent.segmenters import load_segmenter
from ibisagent.store import EpisodeStore
from ibisagent.training.finetune import rl, sft
from ibisagent.training.finetune.common import ScoredReplies, load_student, without_library_warnings
from ibisagent.training.finetune.memory import rollout_tokens, trained_parameters, training_memory
from ibisagent.training.nano.curriculum import plainly

RECIPES = Path(__file__).parent.parent / "recipes"

SIZE = (61, 83)


def write_discs(folder: Path, count: int, split: str = "train") -> Path:
    """Images in BiomedParse's layout: a bright disc each ("spleen"), on every other one a dark one ("kidney")."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for name in (split, f"{split}_mask"):
        (folder / "Discs" / name).mkdir(parents=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        x, y = draw.integers(20, 50), draw.integers(20, 40)
        disc = (columns - x) ** 2 + (rows - y) ** 2 <= draw.integers(8, 14) ** 2
        dark = (columns - 72) ** 2 + (rows - 30) ** 2 <= 49 * (number % 2)
        level = 80 + draw.integers(0, 20, SIZE) + 120 * disc - 70 * dark
        pixels = np.repeat(level[..., None], 3, axis=2).astype(np.uint8)
        write_png(pixels, folder / "Discs" / split / f"{split}{number}_CT_abdomen.png")
        write_mask_png(disc, folder / "Discs" / f"{split}_mask" / f"{split}{number}_CT_abdomen_spleen.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_discs(tmp_path_factory.mktemp("discs"), 4)


@pytest.fixture(scope="module")
def episodes(data, tmp_path_factory):
    """Expert episodes with mistakes that are undone."""
    folder = tmp_path_factory.mktemp("episodes")
    generate(read_cases(data), load_segmenter("region"), folder, TrajectoryConfig(mistakes=0.9, seed=1, max_clicks=3))
    return folder


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return small_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module", params=["nano", "qwen"])
def start(request):
    return "ibis-nano" if request.param == "nano" else str(request.getfixturevalue("qwen"))


@pytest.fixture(scope="module")
def player(data, start, tmp_path_factory):
    """A trainer that plays greedily, three turns at most and three rollouts at once, and the model in it."""
    trainer, student = rl.make_trainer(rl_recipe(data, start, tmp_path_factory.mktemp("player"), rollouts_at_once=3))
    trainer.generation_config.update(do_sample=False)
    trainer.generation_kwargs["do_sample"] = False
    return trainer, student


def sft_recipe(episodes, start, out, **changes):
    settings = {
        "data": episodes,
        "out": out,
        "policy": start,
        "history": "full",
        "batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
    }
    return sft.SftRecipe(**{**settings, "device": "cpu", "save_steps": 1, "max_length": 20_000, **changes})


def rl_recipe(data, start, out, **changes):
    settings = {
        "data": data,
        "out": out,
        "policy": start,
        "batch_size": 4,
        "num_generations": 2,
        "max_steps": 2,
        "learning_rate": 1e-4,
    }
    settings |= {
        "rewards": RewardWeights(optimal_turns=2),
        "segmenter": "region",
        "max_turns": 3,
        "reply_tokens": 20,
        "device": "cpu",
        "save_steps": 1,
    }
    return rl.RlRecipe(**{**settings, **changes})


# --------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("sft-*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_sft_are_valid(path):
    sft.SftRecipe.read(path)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("rl-*.toml")), ids=lambda path: path.stem)
def test_the_recipes_of_rl_are_valid(path):
    rewards = rl.RlRecipe.read(path).rewards
    assert rewards == (replace(PAPER, length=0, optimal_turns=2) if "nano" in path.stem else PAPER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "oracle"}, "needs the ground truth"),
        ({"policy": "centre-click"}, "cannot be trained"),
        ({"data": Path("nowhere")}, "no such folder"),
        ({"side_tasks": {"regions": 1.0}}, "unknown side task 'regions'; there are: region"),
        ({"dialect": "paper"}, "holds episodes in dialect ibis, ibis-nano writes paper"),
        ({"report_to": ("trackio",)}, "pip install trackio"),
        ({"max_length": 16}, "does not fit max_length 16"),
    ],
)
def test_what_does_not_fit_is_one_line(episodes, tmp_path, changes, message):
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        sft.train(sft_recipe(episodes, "ibis-nano", tmp_path, **changes))
    assert "\n" not in str(caught.value)


LARGE = [(path, *line) for path in sorted(RECIPES.glob("*-7b*.toml"))
         for line in re.findall(r"# memory: train (\w+), (\d+) shards?: (\d+) GB", path.read_text())]  # fmt: skip


@pytest.mark.parametrize(("path", "train", "shards", "stated"), LARGE, ids=lambda one: getattr(one, "stem", one))
def test_recipes_state_the_memory_that_they_need(path, train, shards, stated):
    recipe = (rl.RlRecipe if path.stem.startswith("rl") else sft.SftRecipe).read(path, in_numbers_of(train))
    needed = training_memory(recipe, size_of(Qwen2_5_VLConfig(**QWEN_7B)), shards=int(shards))
    assert round(needed.peak / 1e9) == int(stated)
    assert {path for path, *_ in LARGE} == {*RECIPES.glob("*-7b*.toml")}


def in_numbers_of(train):
    return [f"train={train}", *(["dtype=float32", "autocast=bfloat16"] if train == "full" else [])]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_memory_is_counted_as_it_is(data, qwen, tmp_path, train):
    recipe = rl_recipe(
        data, str(qwen), tmp_path, train=train, dtype="float32", rollouts_at_once=3, gradient_accumulation_steps=2
    )
    trainer, _ = rl.make_trainer(recipe)
    size = size_of_folder(qwen)
    learned = sum(one.numel() for one in trainer.model.parameters() if one.requires_grad)
    assert trained_parameters(recipe, size) == learned
    needed = training_memory(recipe, size)
    assert needed.moments == 2 * needed.gradients == 8 * learned
    assert needed.cache == 3 * size.cache_bytes(rollout_tokens(recipe, size), bytes_each=4)
    assert training_memory(recipe.model_copy(update={"rollouts_at_once": 0}), size).cache == 8 * needed.cache / 3
    assert training_memory(recipe, size, shards=8).learning < needed.learning


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*-7b*.toml")), ids=lambda path: path.stem)
def test_recipes_of_the_large_model_start_with_a_small_one(data, episodes, qwen, tmp_path, path):
    """The very same file; only what is a size is another."""
    sizes = [
        f"policy={qwen}",
        f"out={tmp_path}",
        "max_steps=1",
        "device=cpu",
        "gradient_accumulation_steps=1",
        "batch_size=4",
        "report_to=[]",
        "dataloader_num_workers=0",
    ]
    if path.stem.startswith("sft"):
        sft.train(sft.SftRecipe.read(path, [*sizes, f"data={episodes}", "max_length=20000", "max_pixels=3136"]))
    else:
        sizes += [f"data={data}", "segmenter=region", "max_pixels=3136", "reply_tokens=8", "max_completion_length=9000"]
        sizes += ["rollouts_at_once=2", "max_turns=6", "episodes_every=1"]
        recipe = rl.RlRecipe.read(path)
        updates = (
            recipe.steps_per_generation or recipe.gradient_accumulation_steps
        ) // recipe.gradient_accumulation_steps
        rl.train(rl.RlRecipe.read(path, [*sizes, *([f"steps_per_generation={updates}"] if updates > 1 else [])]))
        assert len(EpisodeStore(tmp_path / "episodes").open()) == 4 * updates
    assert (tmp_path / "policy" / "config.json").is_file()


def test_a_reward_that_cannot_vary_is_refused(data, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(f'data = "{data}"\nout = "{tmp_path}"\nmax_turns = 4')
    with pytest.raises(ConfigError, match="reward of length the same for every rollout"):
        rl.RlRecipe.read(path)
    assert rl.RlRecipe.read(path, ["rewards.length=0"]).max_turns == 4


def test_paths_must_fill_a_batch(data, tmp_path):
    with pytest.raises(ConfigError, match=r"GRPOConfig refuses the recipe: .*\(3\)"):
        rl.train(rl_recipe(data, "ibis-nano", tmp_path, batch_size=3))


def test_a_table_goes_to_trl_as_it_is(data, episodes, tmp_path):
    recipe = rl_recipe(data, "ibis-nano", tmp_path / "rl", trainer={"mask_truncated_completions": True})
    trainer, _ = rl.make_trainer(recipe)
    assert trainer.args.mask_truncated_completions
    trainer, _ = sft.make_trainer(sft_recipe(episodes, "ibis-nano", tmp_path / "sft", trainer={"adam_beta2": 0.98}))
    assert trainer.args.adam_beta2 == 0.98


@pytest.mark.parametrize(
    ("table", "part"),
    [
        ({"learning_rate": 1.0}, "trainer.learning_rate: is set by this package"),
        ({"lr": 1.0}, "trainer.lr: there is no such setting of SFTConfig"),
        ({"optim": "none"}, "SFTConfig refuses the recipe: .*none"),
    ],
)
def test_a_table_that_trl_cannot_use(table, part, episodes, tmp_path):
    with pytest.raises(ConfigError, match=part):
        sft.make_trainer(sft_recipe(episodes, "ibis-nano", tmp_path, trainer=table))


# ------------------------------------------------------------------------------------------------------------- sft


def test_loss_falls_on_right_replies_alone(episodes, start, tmp_path):
    """The tokens with a label are, one for one, those of the replies that nobody took back, each with its end."""
    recipe = sft_recipe(episodes, start, tmp_path)
    student = load_student(recipe, "full")
    tokenizer = student.processor.tokenizer
    examples = sft.read_examples(episodes, "", student)
    stored = EpisodeStore(episodes).open()
    assert any(episode.undone_turns for episode in stored)
    for example, episode in zip(examples, stored, strict=True):
        batch = sft.Collator(student, recipe.max_length)([example])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        wrong = episode.undone_turns
        right = [turn.completion.text for k, turn in enumerate(episode.turns) if k not in wrong]
        wanted = [student.processor(text=[text + tokenizer.eos_token])["input_ids"][0] for text in right]
        assert labels[labels != sft.UNLEARNED].tolist() == [token for reply in wanted for token in reply]
        assert (labels == ids)[labels != sft.UNLEARNED].all()
        image_token = student.model.config.image_token_id
        assert (ids == image_token).any()
        assert not (labels == image_token).any()
        images = sum(part["type"] == "image" for message in example.messages for part in message["content"])
        assert images == len(episode.turns) == len(example.objects)


def test_a_reply_is_learned_after_exactly_what_the_policy_will_see(episodes, start, tmp_path):
    """What comes before a learned reply is, token for token and pixel for pixel, the input of generation."""
    student = load_student(sft_recipe(episodes, start, tmp_path), "full")
    episode = EpisodeStore(episodes).open()[0]
    example = sft.read_examples(episodes, "", student)[0]
    batch = sft.Collator(student, 20_000)([example])
    case = next(case for case in read_cases(Path(episode.image_source).parents[2]) if case.id == episode.case_id)
    seen = Observation(case.id, case.image, episode.query, episode.turns[-1].before, episode.turns[:-1])
    messages = render(seen, dialect=student.dialect, history="full", style=student.style)
    asked = student.processor.apply_chat_template(
        [messages], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    length = asked["input_ids"].shape[1]
    assert batch["input_ids"][0, :length].tolist() == asked["input_ids"][0].tolist()
    assert batch["labels"][0, length] != sft.UNLEARNED
    torch.testing.assert_close(batch["pixel_values"], asked["pixel_values"])


def test_a_policy_without_history_learns_one_turn_at_a_time(episodes, tmp_path):
    recipe = sft_recipe(episodes, "ibis-nano", tmp_path)
    assert load_student(recipe, None).history == load_policy("ibis-nano").history  # as the policy prefers
    student = load_student(recipe, "none")
    examples = sft.read_examples(episodes, "", student)
    stored = EpisodeStore(episodes).open()
    assert len(examples) == sum(len(episode.turns) - len(episode.undone_turns) for episode in stored)
    assert all(len(example.messages) == 2 and len(example.objects) == 1 for example in examples)


def test_plain_examples_do_the_same_in_fewer_words(episodes, tmp_path):
    def done(reply):
        return [replace(action, answer="") if isinstance(action, Stop) else action for action in reply.actions]

    student = load_student(sft_recipe(episodes, "ibis-nano", tmp_path), "full")
    undone = 0
    for episode in EpisodeStore(episodes).open():
        for before, after in zip(episode.turns, plainly(episode).turns, strict=True):
            read = parse(after.completion.text, episode.size, dialect="ibis", default_target=target_of(episode.query))
            assert done(read) == done(before.reply)
            undone += read.thought == TAKEN_BACK
    assert undone
    whole, plain = (sft.read_examples(episodes, "train", student, plain=plain) for plain in (False, True))
    written = [[part["text"] for message in examples[0].messages if message["role"] == "assistant"
                for part in message["content"]] for examples in (whole, plain)]  # fmt: skip
    assert "I look for the" in written[1][0]
    assert len("".join(written[1])) < len("".join(written[0]))


def test_a_long_conversation_is_cut_after_a_reply(episodes, tmp_path):
    student = load_student(sft_recipe(episodes, "ibis-nano", tmp_path), "full")
    example = max(sft.read_examples(episodes, "", student), key=lambda example: len(example.objects))
    tasks = {"region": sft.RegionMap()}
    whole = sft.Collator(student, 20_000, tasks)([example])
    cut = sft.Collator(student, whole["input_ids"].shape[1] - 1, tasks)([example])
    length = cut["input_ids"].shape[1]
    assert length < whole["input_ids"].shape[1]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:, :length])
    assert cut["labels"][0, -1] == student.processor.tokenizer.eos_token_id
    assert len(cut["pixel_values"]) == len(cut["side_region"]) < len(whole["pixel_values"])


def test_the_map_of_the_object_is_learned_beside_the_words():
    wanted = np.zeros(SIZE, bool)
    wanted[10:40, 20:50] = True
    task = sft.RegionMap()
    targets = task.targets(sft.Example([], [wanted, None]))
    assert targets.shape[0] == 2
    assert (targets[1] == -1).all()
    assert float(targets[0].mean()) == pytest.approx(wanted.mean(), abs=0.01)
    right = ScoredReplies(region_logits=torch.where(targets > 0.5, 8.0, -8.0))
    blank = ScoredReplies(region_logits=torch.zeros_like(targets))
    assert task.loss(right, targets) < 0.2 < task.loss(blank, targets)
    assert task.loss(blank, targets[1:].expand(2, -1, -1)) == 0
    with pytest.raises(ConfigError, match="no map of the object"):
        task.loss(ScoredReplies(), targets)


def test_sft_learns_from_episodes_and_writes_a_policy(episodes, start, tmp_path):
    """Two updates from a recipe, whose result is a policy; its folder takes no other recipe."""
    logs = []
    nano = start == "ibis-nano"
    recipe = sft_recipe(episodes, start, tmp_path, side_tasks={"region": 1.0} if nano else {}, freeze_vision=not nano)
    folder = sft.train(recipe, lambda step, steps, told: logs.append((step, told)))
    losses = [told["loss"] for _, told in logs if "loss" in told]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    assert any("side/region" in told for _, told in logs) == nano
    policy = load_policy(f"mllm:{folder}", device="cpu", dtype="float32", max_new_tokens=4)
    assert (policy.history, policy.dialect) == ("full", "ibis")
    before, _ = load_policy(start, device="cpu", dtype="float32").parts
    after, _ = policy.parts
    changed = {
        name for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True)
        if not torch.equal(old.float(), new.float())
    }  # fmt: skip
    assert changed
    assert any("vis" in name for name in changed) == nano  # the vision tower is frozen on request
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert (written["stage"], written["recipe"]["learning_rate"]) == ("sft", 1e-3)
    assert list((tmp_path / "trainer").glob("runs/*/events*"))
    assert not list(folder.glob("*.bin"))
    with pytest.raises(ConfigError, match=r"another run \(learning_rate was"):
        sft.train(recipe.model_copy(update={"learning_rate": 1.0}))


def test_a_run_goes_on_from_its_last_checkpoint(episodes, qwen, tmp_path):
    steps = []
    recipe = sft_recipe(episodes, str(qwen), tmp_path)
    sft.train(recipe)
    (tmp_path / "trainer" / "checkpoint-2").rename(tmp_path / "lost")
    sft.train(recipe, lambda step, all_steps, told: steps.append(step) if "loss" in told else None)
    assert steps == [2]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_lora_changes_the_language_model_alone_and_is_merged(episodes, qwen, tmp_path):
    """An adapter on the language model alone, and the whole policy with it."""
    recipe = sft_recipe(episodes, str(qwen), tmp_path, train="lora", max_steps=1, activation_checkpointing=True)
    folder = sft.train(recipe)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["r"] == 8
    adapted = load_policy(f"mllm:{qwen}", device="cpu", adapter=tmp_path / "adapter").parts[0].state_dict()
    merged = load_policy(f"mllm:{folder}", device="cpu").parts[0].state_dict()
    plain = load_policy(f"mllm:{qwen}", device="cpu").parts[0].state_dict()
    changed = {name for name in plain if not torch.equal(plain[name], merged[name])}
    assert changed
    assert all("language_model" in name for name in changed)
    for name, weight in adapted.items():
        torch.testing.assert_close(merged[name], weight)


# -------------------------------------------------------------------------------------------------------------- rl


def test_rl_learns_from_rollouts_and_logs_every_reward(data, start, tmp_path):
    """Two updates from a recipe; every term of the reward is logged, and the episodes are what the paths were."""
    logs = []
    recipe = rl_recipe(data, start, tmp_path, episodes_every=1)
    folder = rl.train(recipe, lambda step, steps, told: logs.append(told))
    played = [told for told in logs if "reward" in told]
    assert len(played) == 2
    terms = {"answer", "format", "click", "progress", "length", "total"}
    assert {f"score/{term}" for term in terms} <= played[0].keys()
    for told in played:
        assert told["score/total"] == pytest.approx(told["reward"], abs=1e-4)
        assert told["rollout/truncated"] == told["rollout/failed"] == told["tools/failure_frequency"] == 0
        assert told["rollout/turns"] > 1
    episodes = list(EpisodeStore(tmp_path / "episodes").read())
    assert len(episodes) == 8
    assert all(episode.stop != "open" for episode in episodes)
    assert load_policy(f"mllm:{folder}", device="cpu").history == "full"


class Breaking:
    """A segmenter that fails."""

    name = "breaking"

    def open(self, image):
        raise SegmenterError("no answer")

    def describe(self):
        return {}


def play(trainer, cases=(0, 1)):
    rows = [trainer.train_dataset[case] for case in cases for _ in range(trainer.num_generations)]
    trainer.model.train()
    with without_library_warnings():
        return trainer._generate_and_score_completions(rows)


def test_paths_are_multiple_turns_and_what_was_written_is_what_is_learned(player):
    """Greedy: each written token is the one chosen after the training pass over the whole path, images included."""
    trainer, student = player
    batch = play(trainer)
    assert all(count > 1 for count in batch["num_images"])
    whole = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    extra = {key: batch[key] for key in ("pixel_values", "image_grid_thw", "mm_token_type_ids") if key in batch}
    with torch.no_grad():
        logits = student.model(input_ids=whole, attention_mask=mask, **extra).logits
    completion = batch["completion_ids"]
    predicted = logits[:, batch["prompt_ids"].shape[1] - 1 : -1]
    forbidden = student.model.generation_config.suppress_tokens
    predicted[..., forbidden] = -torch.inf
    if isinstance(student.model, IbisNanoForConditionalGeneration):
        choose, start = LikelyPlaces(student.model.word_count), batch["prompt_ids"].shape[1]
        scored = torch.zeros_like(whole, dtype=torch.bool)
        scored[:, start - 1 : -1] = True
        ruled = student.model.readable.along(whole, scored, predicted.flatten(0, 1))
        predicted = choose(whole, ruled).view_as(predicted)
    learned = (batch["completion_mask"] * batch["tool_mask"]).bool()
    assert torch.equal(predicted.argmax(dim=-1)[learned], completion[learned])
    assert not torch.isin(completion[learned], torch.tensor(forbidden)).any()
    shown = (batch["completion_mask"] * (1 - batch["tool_mask"])).bool()
    assert (completion[shown] == student.model.config.image_token_id).any()
    for tool, ids, wrote, images in zip(trainer.environments, completion, learned, batch["num_images"], strict=True):
        turns = tool.rollout.episode().turns
        assert len(turns) == images <= 3  # nothing is shown or written after the turn that ends the episode
        runs = ids[wrote].tensor_split(torch.diff(wrote.nonzero()[:, 0]).ne(1).nonzero()[:, 0] + 1)
        texts = [student.processor.tokenizer.decode(run, skip_special_tokens=True) for run in runs]
        assert texts == [turn.completion.text for turn in turns]
        assert int((ids[wrote] == student.processor.tokenizer.eos_token_id).sum()) <= len(turns)


def test_what_the_machinery_fails_at_is_left_out(data, tmp_path):
    student = load_student(rl_recipe(data, "ibis-nano", tmp_path), "full")
    cases = list(read_cases(data))
    logged = []
    judge = rl.judge(PAPER, lambda episodes: None)
    tools = [
        rl.SegmentationTool(cases.__getitem__, segmenter, student, 3)
        for segmenter in (load_segmenter("region"), Breaking())
    ]
    for tool in tools:
        tool.reset(case=0)
        tool.act("<think>There.</think><action>click + (0.5, 0.5) spleen</action><|end|>")
    assert [turn.reply.problem for turn in tools[0].rollout.observation.turns] == [None]
    rewards = judge([[], []], tools, lambda name, value: logged.append((name, value)))
    assert rewards[0] is not None
    assert rewards[1] is None
    assert ("rollout/truncated", 1.0) in logged
    assert ("rollout/failed", 1.0) in logged
    assert judge([[]], tools[1:], lambda name, value: None) == [None]
    judge([[]], tools[1:], lambda name, value: None)
    with pytest.raises(SegmenterError, match="every rollout fails, the last one: no answer"):
        judge([[]], tools[1:], lambda name, value: None)


def test_a_case_that_cannot_be_read_any_more_is_reported_once_and_left_out(data, caplog):
    class Vanishing(list):
        gone = set()

        def __getitem__(self, index):
            if index in self.gone:
                raise DataError(f"{index}.png: no such file")
            return super().__getitem__(index)

    cases = Vanishing(read_cases(data))
    played = rl.PlayableCases(cases)
    first, second = played[0], played[1]
    Vanishing.gone = {len(cases) - 1}
    assert played[len(cases) - 1].id == first.id
    Vanishing.gone |= {0}
    assert played[0] is first  # the rollouts of a case all play the same
    assert rl.PlayableCases(cases)[0].id == second.id
    caplog.clear()
    fresh = rl.PlayableCases(cases)
    assert {fresh[len(cases) - 1].id, fresh[0].id} == {second.id}
    assert sorted(record.message.split(":")[0] for record in caplog.records) == ["0.png", f"{len(cases) - 1}.png"]
    Vanishing.gone = set(range(len(cases)))
    with pytest.raises(DataError, match="none of"):
        rl.PlayableCases(cases)[0]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_a_group_teaches_only_where_its_rewards_differ(count):
    """Of TRL's advantages, which rounding keeps from 0 where all rewards are the same."""
    constant = torch.linspace(0.05, 2.3, 40)[:, None].expand(40, count).contiguous()
    differing = constant.clone()
    differing[:, 0] += 1e-3
    for rewards, expected in ((constant, []), (differing, list(range(40)))):
        mean, deviation = rewards.mean(dim=1, keepdim=True), rewards.std(dim=1, keepdim=True)
        advantages = ((rewards - mean) / (deviation + 1e-4)).view(-1)
        assert rl.groups_that_teach(advantages, count) == expected


def test_a_batch_whose_paths_all_end_with_their_first_turn_is_learned_from(data, start, tmp_path):
    recipe = rl_recipe(data, start, tmp_path, max_turns=1, rewards=RewardWeights(length=0), max_steps=1, report_to=[])
    logs = []
    rl.train(recipe, lambda step, steps, told: logs.append(told))
    assert [told["rollout/turns"] for told in logs if "reward" in told] == [1]


TWO_PROCESSES = """
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ibisagent.rewards import RewardWeights
from ibisagent.training.finetune import rl

data, policy, out = (Path(name) for name in sys.argv[1:])
other = os.fork()  # rather than two starts: what is imported takes longer than what is tested
rank = int(other == 0)
signal.alarm(170)  # ends either, also where the other is killed
os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
dist.init_process_group("gloo", timeout=timedelta(seconds=150))
recipe = rl.RlRecipe(
    data=data, out=out, policy=str(policy), batch_size=2, num_generations=2, max_steps=2, segmenter="region",
    device="cpu", save_steps=9, rollouts_at_once=1,
    max_turns=(1, 2)[rank], reply_tokens=8, rewards=RewardWeights(length=0), report_to=[], max_completion_length=4000,
)
trainer, student = rl.make_trainer(recipe)
generate, written = student.model.generate, 0

def collective(*args, **options):
    global written
    written += 1
    dist.all_reduce(torch.ones(1))  # as ZeRO-3, FSDP and a vLLM server do in one way or another
    return generate(*args, **options)

student.model.generate = collective
trainer.train()
counts = [None, None]
dist.all_gather_object(counts, (written, trainer.state.global_step))
assert counts == [(8, 2), (8, 2)], counts  # 2 steps of 2 turns, in 2 parts each
dist.destroy_process_group()
status = os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) if other else 0
os._exit(status)  # the end of an interpreter aborts on gloo's threads now and then
"""


def test_processes_whose_paths_are_of_different_lengths_stay_in_step(data, qwen, tmp_path):
    """One turn a path on the first process, two on the second, and a collective operation in each generation."""
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = subprocess.run(
        [sys.executable, script, data, qwen, tmp_path / "out"],
        env={**os.environ, **group},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_groups_of_different_batches_join():
    def batch(prompt, completion, first):
        rows = 4
        return {
            "prompt_ids": torch.full((rows, prompt), first), "prompt_mask": torch.ones(rows, prompt),
            "completion_ids": torch.full((rows, completion), first + 1),
            "completion_mask": torch.ones(rows, completion),
            "tool_mask": torch.ones(rows, completion), "advantages": torch.arange(rows) + 10 * first,
            "num_items_in_batch": torch.tensor(99), "num_images": [1] * rows,
            "pixel_values": [torch.full((1, 4), first)] * rows,
            "mm_token_type_ids": torch.ones(rows, prompt + completion),
        }  # fmt: skip

    joined = rl.join_groups([batch(3, 5, 1), batch(4, 2, 2)], [(1, 0), (0, 1)], 2, pad_token_id=0)
    assert joined["prompt_ids"].tolist() == [[2] * 4] * 2 + [[0, 1, 1, 1]] * 2
    assert joined["completion_ids"].tolist() == [[3, 3, 0, 0, 0]] * 2 + [[2] * 5] * 2
    assert joined["advantages"].tolist() == [20, 21, 12, 13]
    assert joined["mm_token_type_ids"].tolist() == [[1] * 6 + [0] * 3] * 2 + [[0] + [1] * 8] * 2
    assert joined["pixel_values"][:, 0].tolist() == [2, 2, 1, 1]
    assert joined["num_items_in_batch"] == 2 * 2 + 2 * 5


def test_groups_without_variance_are_replaced(data, qwen, tmp_path):
    """The paths of the first batch all earn the same, those of the second do not."""
    rewards = RewardWeights(length=0)
    trainer, _ = rl.make_trainer(rl_recipe(data, str(qwen), tmp_path, dynamic_sampling=3, max_turns=1, rewards=rewards))
    earned = iter([[1.0, 1.0, 2.0, 2.0], [0.0, 1.0, 3.0, 3.0], [5.0, 5.0, 0.0, 1.0]])
    trainer.reward_funcs[0] = lambda environments, **_: next(earned)
    batch = play(trainer)
    assert (batch["advantages"] != 0).all()
    assert trainer._metrics["train"]["sampling/batches"] == [3.0]
    assert len(batch["pixel_values"]) == int(batch["image_grid_thw"].prod(dim=1).sum())


def test_what_build_data_made_is_learned_and_played(qwen, tmp_path):
    images, made = write_discs(tmp_path, 3), tmp_path / "made"
    write_discs(images, 1, "val")
    build(Plan(read_cases(images), made, FactoryConfig(segmenter="region")))
    cases = rl.read_training_cases(rl.RlRecipe(data=made, out=tmp_path / "out"))
    families = {case.meta["family"]: case for case in cases}
    assert {"referring", "existence", "refinement", "vqa"} <= families.keys()
    assert families["referring"].targets
    assert families["refinement"].start
    assert families["vqa"].answer
    assert families["vqa"].targets is None
    student = load_student(sft_recipe(made, "ibis-nano", tmp_path), "full")
    train, val = (sft.read_examples(made, split, student) for split in ("train", "val"))
    told = EpisodeStore(made / "filter").open()
    assert 0 < len(val) < len(train) == len(told) - len(val)
    families = Counter(one.family for one in read_trl(made / "export"))
    assert families["vqa"]
    assert len(sft.read_examples(made, "train", student, ["vqa"])) == len(train) - families["vqa"]
    with pytest.raises(ConfigError, match="give the folder of 'ibisagent data build' itself"):
        sft.read_examples(made / "export", "train", student)
    large = load_student(sft_recipe(made, str(qwen), tmp_path), "full")
    exported = sft.read_examples(made / "export", "train", large)
    assert sorted(len(example.messages) for example in exported) == sorted(
        len(example.messages) for example in sft.read_examples(made, "train", large)
    )
    logs = []
    recipe = sft_recipe(made, str(qwen), tmp_path / "run", eval_split="val", max_steps=1, batch_size=1)
    sft.train(recipe, lambda step, steps, told: logs.append(told))
    assert any("eval_loss" in told for told in logs)


def test_the_command_trains_and_refuses_unknown_settings(episodes, qwen, tmp_path, capsys):
    path = tmp_path / "recipe.toml"
    lines = [f'data = "{episodes}"', f'out = "{tmp_path / "run"}"', 'device = "cpu"', "max_steps = 1", "batch_size = 1"]
    path.write_text("\n".join([*lines, f'policy = "{qwen}"', 'history = "full"', "report_to = []"]))
    assert app(["train", "sft", str(path), "--set", "max_steps=2", "--json"], standalone_mode=False) is None
    assert json.loads((tmp_path / "run/recipe.json").read_bytes())["recipe"]["max_steps"] == 2
    folder = Path(json.loads(capsys.readouterr().out)["policy"])
    assert (folder / "model.safetensors").is_file()
    path.write_text(path.read_text() + "\npath = 4")
    with pytest.raises(SystemExit) as caught:
        app(["train", "rl", str(path)])
    assert caught.value.code == 2
    assert "there is no such setting" in capsys.readouterr().err


def calls_of(script: Path, *arguments: Path, folder: Path, **environment: str) -> list[list[str]]:
    """The arguments of each `ibisagent` that a shell script runs, in its order; it has to stop where one fails.

    They then run in this process: a start of each of them takes as long as what it does here.
    """
    program, log = folder / "bin" / "ibisagent", folder / "calls"
    program.parent.mkdir()
    places = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", **environment}
    for status in (3, 0):
        log.write_text("")
        program.write_text(
            f"#!/bin/sh\nfor one; do printf '%s\\n' \"$one\"; done >> '{log}'\necho >> '{log}'\nexit {status}\n"
        )
        program.chmod(0o755)
        ran = subprocess.run(["bash", script, *arguments], env={**os.environ, **places}, check=False)
        assert ran.returncode == status
        calls = [call.splitlines() for call in log.read_text().removesuffix("\n\n").split("\n\n")]
        assert len(calls) == 1 or not status
    return calls


def test_from_pairs_to_metrics_in_one_command(tmp_path):
    recipes, images, out = tmp_path / "recipes", write_discs(tmp_path / "discs", 3), tmp_path / "out"
    write_discs(images, 1, "val")
    shutil.copytree(RECIPES, recipes)
    small = {"ibis-nano.toml": {"examples": 4, "backbone_examples": 16}, "ibis-nano-on-policy.toml": {"examples": 4}}
    for name, settings in small.items():
        text = (recipes / name).read_text()
        for setting, value in settings.items():
            text, found = re.subn(rf"(?m)^{setting} = [^#\n]*", f"{setting} = {value} ", text)
            assert found == 1, f"{name} does not say {setting}"
        (recipes / name).write_text(text)
    calls = calls_of(recipes / "nano.sh", out, images, folder=tmp_path, LICENCE="", SEED="5")
    weights = []
    for _ in range(2):  # the second time all is there
        for call in calls:
            done = ibisagent(*call)
            assert done.exit_code == 0, done.output
        weights.append((out / "on-policy" / "ibis-nano" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    judged = json.loads((out / "val-discs/evaluation.json").read_bytes())
    assert judged["made_by"]["policy"] == f"mllm:{out}/on-policy/ibis-nano"
    assert judged["summaries"]["all"]["cases"] == 1
