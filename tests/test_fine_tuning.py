"""Both fine-tuning stages, in miniature: the packaged ibis-nano and a shrunken Qwen2.5-VL go through one code path."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from ibisagent.datasets import read_cases
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.images import write_mask_png, write_png
from ibisagent.policies import load_policy
from ibisagent.segmenters import load_segmenter
from ibisagent.store import EpisodeStore
from ibisagent.training import rl, sft
from ibisagent.training.stage import load_student

SIZE = (61, 83)


def write_discs(folder: Path, count: int) -> Path:
    """Pictures with a bright disc each, in BiomedParse's layout."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    for name in ("train", "train_mask"):
        (folder / "Discs" / name).mkdir(parents=True)
    for number in range(count):
        draw = np.random.default_rng(number)
        x, y = draw.integers(20, 60), draw.integers(20, 40)
        disc = (columns - x) ** 2 + (rows - y) ** 2 <= draw.integers(8, 14) ** 2
        level = 60 + draw.integers(0, 20, SIZE) + 120 * disc
        pixels = np.repeat(level[..., None], 3, axis=2).astype(np.uint8)
        write_png(pixels, folder / "Discs" / "train" / f"p{number}_CT_abdomen.png")
        write_mask_png(disc, folder / "Discs" / "train_mask" / f"p{number}_CT_abdomen_spleen.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_discs(tmp_path_factory.mktemp("discs"), 4)


@pytest.fixture(scope="module")
def episodes(data, tmp_path_factory):
    """Expert episodes with mistakes that are undone."""
    cases = list(read_cases(data))
    policy = load_policy("oracle", cases=cases)
    folder = tmp_path_factory.mktemp("episodes")
    from ibisagent.trajectories import TrajectoryConfig, generate

    generate(read_cases(data), load_segmenter("region"), folder, TrajectoryConfig(mistakes=0.6, seed=1, max_clicks=4))
    return folder


QWEN_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
               "<|video_pad|>")  # fmt: skip


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Qwen2.5-VL with random weights, two layers, and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: k for k, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in QWEN_TOKENS])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(QWEN_TOKENS),
    )  # fmt: skip
    ids = dict(zip(QWEN_TOKENS, tokens.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], "bos_token_id": None,
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [1], "window_size": 56,
        },
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("qwen")
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size), tokens, Qwen2VLVideoProcessor(), chat_template="{{ messages }}"
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(params=["nano", "qwen"])
def start(request):
    return "ibis-nano" if request.param == "nano" else str(request.getfixturevalue("qwen"))


def sft_recipe(episodes, start, out, **changes):
    settings = {"data": episodes, "out": out, "policy": start, "history": "full", "batch": 2, "steps": 2, "rate": 1e-3}
    return sft.SftRecipe(**{**settings, "device": "cpu", "save_every": 1, **changes})


def rl_recipe(data, start, out, **changes):
    settings = {"data": data, "out": out, "policy": start, "batch": 4, "paths": 2, "steps": 2, "rate": 1e-4}
    settings |= {"segmenter": "region", "max_turns": 3, "reply_tokens": 24, "device": "cpu", "save_every": 1}
    return rl.RlRecipe(**{**settings, **changes})


def test_sft(episodes, start, tmp_path):
    logs = []
    folder = sft.train(sft_recipe(episodes, start, tmp_path), lambda step, steps, told: logs.append(told))
    assert all(np.isfinite(log["loss"]) for log in logs if "loss" in log)
    policy = load_policy(f"mllm:{folder}", device="cpu", max_new_tokens=8)
    assert policy.history == "full"


def test_rl(data, start, tmp_path):
    logs = []
    folder = rl.train(rl_recipe(data, start, tmp_path), lambda step, steps, told: logs.append(told))
    print(logs)
    policy = load_policy(f"mllm:{folder}", device="cpu", max_new_tokens=8)
    assert policy.history == "full"
