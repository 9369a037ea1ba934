"""The adapter to verl: a path through its agent loop as it will be trained on, and settings that its trainer accepts.

What needs verl is skipped where it is not installed (it pins older libraries, so it has an environment of its own:
docs/reference/rewards.md); what needs GPUs is not tested.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import replies

from ibisagent.datasets import read_cases
from ibisagent.domain import Box, Case, Click, Completion, Episode, Image, Reply, Stop, Turn
from ibisagent.errors import ConfigError, DataError, PolicyError
from ibisagent.generation.config import FactoryConfig, read_table
from ibisagent.generation.stages import Plan, build
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.integrations.verl.reward import compute_score, episode_reward
from ibisagent.rewards import RewardWeights

ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes" / "verl"
SIZE = (61, 83)
DISC = (np.mgrid[: SIZE[0], : SIZE[1]][1] - 30) ** 2 + (np.mgrid[: SIZE[0], : SIZE[1]][0] - 25) ** 2 <= 144
needs_verl = pytest.mark.skipif(
    find_spec("verl") is None, reason="verl is not installed: see recipes/verl/requirements.txt"
)


def test_the_reward_comes_with_its_terms() -> None:
    case = Case("a", Image(np.zeros((*SIZE, 3), dtype=np.uint8)), "Segment the spleen.", {"spleen": DISC})
    click, stop = Reply("", (Click(30, 25, True, "spleen"),)), Reply("", (Stop(),))
    masks = {"spleen": DISC}
    turns = (Turn(Completion(""), click, {}, masks), Turn(Completion(""), stop, masks, masks))
    episode = Episode("a", case.query, SIZE, "", "", {}, turns, "stopped", {})
    reward, facts = episode_reward(episode, case, RewardWeights(turns=0.5))
    assert reward == facts["score"] == pytest.approx(1.3)
    assert (facts["iou"], facts["episode_turns"], facts["answer"], facts["turns"]) == (1, 2, 3, -1)
    assert all(isinstance(value, float) for value in facts.values())


def test_text_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="default_agent_loop=ibisagent"):
        compute_score("ibisagent/x", "<action>stop</action>", "{}", {})


def test_the_package_does_not_need_verl() -> None:
    code = "import sys, ibisagent, ibisagent.integrations.verl.reward, ibisagent.cli; sys.exit('verl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_requirements_beside_verl_are_ours() -> None:
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    wanted = [line for line in (RECIPES / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert wanted == [name for name in ours if not name.startswith(("torch", "transformers"))]


def test_the_launch_script_says_what_it_lacks(tmp_path: Path) -> None:
    script = RECIPES / "run.sh"
    told = subprocess.run([script], capture_output=True, text=True)
    assert (told.returncode, "usage" in told.stderr) == (2, True)
    told = subprocess.run([script, tmp_path, "model"], capture_output=True, text=True)
    assert told.returncode == 2
    assert "holds no train-*.parquet" in told.stderr


def test_the_launch_script_hands_over_the_files(tmp_path: Path) -> None:
    (tmp_path / "verl").mkdir()
    for name in ("train-000000", "train-000001", "val-000000"):
        (tmp_path / "verl" / f"{name}.parquet").touch()
    told = subprocess.run(
        [RECIPES / "run.sh", tmp_path, "start", "trainer.nnodes=2"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": "echo"},
    )
    assert told.returncode == 0, told.stderr
    folder = tmp_path.resolve() / "verl"
    said = told.stdout.split()
    assert f"data.train_files=[{folder}/train-000000.parquet,{folder}/train-000001.parquet]" in said
    assert f"data.val_files=[{folder}/val-000000.parquet]" in said
    assert "actor_rollout_ref.model.path=start" in said
    assert said[-1] == "trainer.nnodes=2"


# ------------------------------------------------------------------------------------------------------- inside verl


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One exported record of each family, by family."""
    folder = tmp_path_factory.mktemp("verl")
    lines = ["image,mask,object,modality,split"]
    for number in range(2):
        level = np.where(DISC, 200, 50 + 20 * number).astype(np.uint8)
        write_png(np.repeat(level[..., None], 3, axis=2), folder / f"{number}.png")
        write_mask_png(DISC, folder / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,spleen,CT,train")
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    build(Plan(read_cases(folder / "data.csv"), folder / "out", FactoryConfig(segmenter="region", formats=("verl",))))
    paths = sorted((folder / "out" / "export" / "verl").glob("train-*"))
    return {record["ability"]: record for path in paths for record in read_table(path).to_pylist()}


class Server:
    """Stands for verl's servers: writes the scripted replies and keeps what it was asked."""

    def __init__(self, tokenizer: Any, replies: Sequence[str], logprobs: bool) -> None:
        self._tokenizer, self._replies, self._logprobs = tokenizer, list(replies), logprobs
        self.asked: list[dict[str, Any]] = []

    async def generate(self, **request: Any) -> Any:
        self.asked.append({**request, "image_data": list(request["image_data"])})
        tokens = self._tokenizer.encode(self._replies.pop(0), add_special_tokens=False)
        tokens.append(self._tokenizer.eos_token_id)
        step = len(self.asked)
        return SimpleNamespace(
            token_ids=tokens,
            log_probs=[-0.5] * len(tokens) if self._logprobs else None,
            num_preempted=None,
            extra_fields={"min_global_steps": step, "max_global_steps": step},
        )


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """That of a Qwen2.5-VL, with one token a byte."""
    from test_policies import tiny_qwen
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("qwen")
    tiny_qwen(folder)
    return AutoProcessor.from_pretrained(folder)


def play(
    processor: Any,
    record: Mapping[str, Any],
    replies: Sequence[str],
    *,
    length: int = 4096,
    logprobs: bool = True,
    **options: Any,
) -> tuple[Any, Server]:
    """(what the agent loop hands to verl, the server that it asked)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # verl and what it imports
        from hydra.utils import instantiate
        from omegaconf import OmegaConf
        from verl.experimental.agent_loop.agent_loop import DictConfigWrap, ToolListWrap

        (settings,) = OmegaConf.load(RECIPES / "agent_loop.yaml")
        settings = OmegaConf.merge(settings, {"segmenter": "region", **options})
        config = OmegaConf.create(
            {
                "actor_rollout_ref": {"rollout": {"prompt_length": 4096, "response_length": length}},
                "data": {"mm_processor_kwargs": {}},
            }
        )
        server = Server(processor.tokenizer, replies, logprobs)

        async def run() -> Any:
            loop = instantiate(
                config=settings,
                trainer_config=DictConfigWrap(config=config),
                server_manager=server,
                tokenizer=processor.tokenizer,
                processor=processor,
                hf_model_type="qwen2_5_vl",
                dataset_cls=None,
                data_config=DictConfigWrap(config.data),
                tools=ToolListWrap([]),
            )
            return await loop.run({"temperature": 1.0, "logprobs": logprobs}, priority=3, raw_prompt=[], **record)

        return asyncio.run(run()), server


text = partial(replies.text, thought="I look.")
BOX, MISS = text(Box(18, 13, 43, 38, "spleen")), text(Click(80, 58, True, "spleen"))
STOP = text(Stop("The spleen is segmented."))


@needs_verl
def test_a_path_is_one_stream_of_tokens_with_a_new_image_each_turn(records: Any, processor: Any) -> None:
    output, server = play(processor, records["referring"], [MISS, "nonsense", STOP])
    ids = output.prompt_ids + output.response_ids
    assert len(server.asked) == 3
    assert [len(request["image_data"]) for request in server.asked] == [1, 2, 3]
    assert len({request["request_id"] for request in server.asked}) == 1
    for request in server.asked:  # each continues the one before it, and the last is a prefix of the whole
        assert ids[: len(request["prompt_ids"])] == request["prompt_ids"]
        assert request["sampling_params"]["logit_bias"] == dict.fromkeys(range(4), -100.0)
        assert request["sampling_params"]["max_tokens"] == 256
    assert server.asked[0]["prompt_ids"] == output.prompt_ids
    tokenizer = processor.tokenizer
    learned = [token for token, mask in zip(output.response_ids, output.response_mask, strict=True) if mask]
    assert tokenizer.decode(learned) == "".join(reply + "<|im_end|>" for reply in (MISS, "nonsense", STOP))
    assert not any(token < 4 for token in learned)
    assert len(output.response_logprobs) == len(output.response_ids)
    assert {p for p, mask in zip(output.response_logprobs, output.response_mask, strict=True) if mask} == {-0.5}
    assert {p for p, mask in zip(output.response_logprobs, output.response_mask, strict=True) if not mask} == {0.0}
    assert output.num_turns == 6
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (1, 3)


@needs_verl
def test_the_stream_is_what_the_template_makes_of_the_whole_conversation(records: Any, processor: Any) -> None:
    output, _ = play(processor, records["referring"], [MISS, BOX, STOP])
    tokenizer = processor.tokenizer
    ids = output.prompt_ids + output.response_ids
    said = re.sub(r"(<\|image_pad\|>)+", r"\1", tokenizer.decode(ids))
    again = processor(text=[said], images=output.multi_modal_data["images"])["input_ids"][0]
    assert list(again) == ids  # every image has its own places
    turns = said.split("<|im_start|>")[1:]
    assert [turn.split("\n")[0] for turn in turns] == ["system", *["user", "assistant"] * 3]
    assert all(turn.rstrip("\n").endswith("<|im_end|>") for turn in turns)
    assert [turn.count("<|image_pad|>") for turn in turns] == [0, 1, 0, 1, 0, 1, 0]


@needs_verl
def test_verl_makes_training_inputs_of_a_path(records: Any, processor: Any, tmp_path: Path) -> None:
    """The worker's own steps after a path: pixels, places of every token, the reward on the last one."""
    output, _ = play(processor, records["referring"], [MISS, STOP])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        from test_policies import tiny_qwen
        from verl.experimental.agent_loop.agent_loop import AgentLoopWorker
        from verl.utils.tokenizer import hf_processor

        tiny_qwen(tmp_path)
        worker = object.__new__(AgentLoopWorker)
        worker.processor, worker.tokenizer, worker.mm_processor_kwargs = hf_processor(tmp_path), processor.tokenizer, {}
        ids = torch.tensor([output.prompt_ids + output.response_ids])
        inputs = worker._compute_multi_modal_inputs(output, ids)
        places = worker._compute_position_ids(ids, torch.ones_like(ids), inputs)
    assert len(inputs["image_grid_thw"]) == 2
    assert inputs["image_grid_thw"].prod(dim=1).sum() // 4 == (ids == 0).sum()
    assert places.shape == (1, 4, ids.shape[1])
    rewards = output.as_dict()["rm_scores"]
    assert rewards[-1] == pytest.approx(output.reward_score)
    assert not rewards[:-1].any()


@needs_verl
def test_the_reward_is_that_of_the_turns(records: Any, processor: Any) -> None:
    good, _ = play(processor, records["referring"], [text(Click(30, 25, True, "spleen")), STOP])
    assert good.reward_score == pytest.approx(1.4)
    facts = good.extra_fields["reward_extra_info"]
    assert (facts["answer"], facts["click"]) == (3, 1)
    assert 0.8 < facts["iou"] < 1
    bad, _ = play(processor, records["referring"], [MISS, STOP], rewards={"click": 0, "turns": 0.1})
    assert bad.extra_fields["reward_extra_info"].keys() - facts.keys() == {"turns"}
    assert bad.reward_score == pytest.approx((0 + 1 + 0 + 1 - 0.1) / 5)
    closed = records["vqa"]
    answer = json.loads(closed["reward_model"]["ground_truth"])["answer"]
    output, server = play(processor, closed, [text(Stop(answer))])
    assert output.reward_score == pytest.approx(1.0)
    assert len(server.asked) == 1


@needs_verl
def test_given_masks_are_shown_and_large_images_shrunk(records: Any, processor: Any) -> None:
    record = records["refinement"]
    _, server = play(processor, record, [STOP], max_pixels=900)
    image = server.asked[0]["image_data"][0]
    assert image.width * image.height <= 900
    plain = np.asarray(image, dtype=int)
    assert np.ptp(plain, axis=2).max() > 20  # the mask's colour on a grey image


@needs_verl
def test_a_path_ends_where_no_reply_would_fit_any_more(records: Any, processor: Any) -> None:
    output, server = play(processor, records["referring"], [MISS, BOX, STOP], length=420, max_turn_tokens=200)
    assert len(server.asked) == 2
    assert len(output.response_ids) <= 420
    assert output.response_mask[-1] == 1  # it ends with a reply, so no image is cut
    assert output.reward_score is not None
    with pytest.raises(Exception, match="max_turn_tokens is 700"):
        play(processor, records["referring"], [STOP], length=420, max_turn_tokens=700)


@needs_verl
def test_without_logprobs_none_are_made_up(records: Any, processor: Any) -> None:
    assert play(processor, records["referring"], [MISS, STOP], logprobs=False)[0].response_logprobs is None


@needs_verl
def test_machinery_that_fails_raises(records: Any, processor: Any) -> None:
    with pytest.raises(PolicyError, match="must obey logit_bias"):
        play(processor, records["referring"], ["<|image_pad|>"])
    record = records["referring"]
    with pytest.raises(DataError, match="holds no ground truth"):
        play(processor, {**record, "reward_model": {"ground_truth": "{}"}}, [STOP])


@needs_verl
def test_the_settings_are_verls() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from hydra import compose, initialize_config_dir
        from omegaconf import OmegaConf
        from verl.utils.config import validate_config
        from verl.utils.import_utils import load_extern_object

        overrides = [
            "data.train_files=[a.parquet]",
            "data.val_files=[b.parquet]",
            "actor_rollout_ref.model.path=model",
            f"actor_rollout_ref.rollout.agent.agent_loop_config_path={RECIPES / 'agent_loop.yaml'}",
        ]
        with initialize_config_dir(config_dir=str(RECIPES), version_base=None):
            config = compose("grpo", overrides=overrides)
        OmegaConf.resolve(config)
        validate_config(config, use_reference_policy=False, use_critic=False)
        function = config.reward.custom_reward_function
        assert load_extern_object(function.path, function.name) is compute_score
    (settings,) = OmegaConf.load(RECIPES / "agent_loop.yaml")
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == settings.name
    assert config.actor_rollout_ref.rollout.limit_images == settings.max_turns + 1
    assert (config.actor_rollout_ref.rollout.n, config.algorithm.adv_estimator) == (4, "grpo")
    assert not config.actor_rollout_ref.actor.use_kl_loss
