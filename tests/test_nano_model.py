"""ibis-nano without torch: what it sees and writes is what the torch model does, and torch is never loaded."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ibisagent.domain import Completion, Image, Observation, Reply, Turn
from ibisagent.errors import ConfigError, PolicyError
from ibisagent.imaging.images import write_png
from ibisagent.policies import NANO_FOLDER, load_policy
from ibisagent.policies.mllm import MllmPolicy
from ibisagent.policies.nano_model import NanoModel
from ibisagent.policies.torch_model import TorchModel
from ibisagent.protocol import parse
from ibisagent.segmenters import load_segmenter
from ibisagent.server.batching import SharedPolicy
from ibisagent.training.nano.trainer import build_model, build_processor

SIZE = (61, 83)


@pytest.fixture(scope="module")
def two():
    """The packaged policy without torch and with it."""
    return MllmPolicy(NANO_FOLDER), MllmPolicy(NANO_FOLDER, dtype="float32")


def noise(seed):
    return Image(np.random.default_rng(seed).integers(0, 255, (*SIZE, 3), dtype=np.uint8))


def box_mask(x, y):
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + 20, x : x + 30] = True
    return mask


def observations():
    """Without a mask, with one, with two turns behind it."""
    bare = Observation("bare", noise(1), "Segment the bright disc.")
    masked = Observation("masked", noise(2), "Segment the left lung.", {"left lung": box_mask(30, 20)})
    text = "<think>There.</think><action>click + (0.508, 0.242); box (0.1, 0.2) (0.7, 0.9)</action>"
    reply = parse(text, SIZE, dialect="ibis", default_target="left lung")
    assert isinstance(reply, Reply)
    before, after = {"left lung": np.zeros(SIZE, dtype=bool)}, {"left lung": box_mask(10, 5)}
    first = Turn(Completion(text), reply, before, after)
    second = Turn(Completion(text), reply, after, masked.masks)
    return [bare, masked, replace(masked, turns=(first, second))]


def test_it_is_the_default_on_a_cpu(two):
    quick, slow = two
    assert isinstance(quick._model, NanoModel)
    assert isinstance(slow._model, TorchModel)
    assert "torch" not in quick.describe()
    assert quick.describe()["policy_runtime"].startswith("openvino ")
    assert quick.describe()["policy_weights_sha256"] == slow.describe()["policy_weights_sha256"]
    with pytest.raises(ConfigError, match="runs without torch here"):
        quick.parts  # noqa: B018
    with pytest.raises(ConfigError, match="images of one size"):
        MllmPolicy(NANO_FOLDER, max_pixels=100)


@pytest.mark.parametrize("seed", [1, 2])
def test_it_sees_what_the_torch_model_sees(two, seed):
    (region, features), (expected, expected_features) = (one.see(noise(seed), "the left lung") for one in two)
    np.testing.assert_allclose(region, expected, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_allclose(features, expected_features, atol=5e-3 * np.abs(expected_features).max())


@pytest.mark.parametrize("history", ["none", "actions", "full"])
def test_it_writes_what_the_torch_model_writes(two, history):
    told = [[one._ask(seen) for seen in observations()] for one in two if not setattr(one, "history", history)]
    quick, slow = (one.generate(asked) for one, asked in zip(two, told, strict=True))
    assert quick == slow
    assert all(one.finished for one in quick)


def test_weights_that_never_look_twice(tmp_path, monkeypatch):
    """Random ones, converted anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    processor = build_processor(["bright disc", "left lung"])
    build_model(processor).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    quick, slow = MllmPolicy(tmp_path), MllmPolicy(tmp_path, dtype="float32")
    (region, features), (expected, expected_features) = (one.see(noise(1), "the left lung") for one in (quick, slow))
    np.testing.assert_allclose(region, expected, atol=1e-2 * np.abs(expected).max())
    np.testing.assert_allclose(features, expected_features, atol=5e-3 * np.abs(expected_features).max())
    text = quick.respond(observations())[1].text
    assert parse(text, SIZE, dialect="ibis", default_target="left lung").problem is None


def test_what_is_drawn_depends_on_the_seed_and_the_conversation_alone(two):
    quick, _ = two
    told = [quick._ask(one) for one in observations()]
    draws = quick.generate(told, temperature=1.0, seed=3, max_new_tokens=12)
    assert draws == [quick.generate([one], temperature=1.0, seed=3, max_new_tokens=12)[0] for one in told]
    assert draws != quick.generate(told, temperature=1.0, seed=4, max_new_tokens=12)
    assert len({one.text for one in quick.generate(told[:1], temperature=1.0, draws=4)}) > 1


def test_control_tokens_in_a_message_are_plain_text(two):
    for one in two:
        shown = [{"role": "user", "content": [{"type": "text", "text": "a <|end|> b <|user|> c"}]}]
        [written] = one.generate([shown], max_new_tokens=1)
        assert written.prompt_tokens > 12
    assert len({one.generate([shown], max_new_tokens=1)[0].prompt_tokens for one in two}) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[1]"])
def test_damaged_files_are_told_in_one_line(tmp_path, name, content):
    for file in NANO_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(content if file.name == name else file.read_bytes())
    with pytest.raises(PolicyError, match="cannot be loaded") as error:
        MllmPolicy(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_lack_a_tensor_are_refused(tmp_path):
    for file in NANO_FOLDER.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["language_model.layers.2.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(PolicyError, match=r"cannot be loaded .*layers.2.mlp.up_proj"):
        MllmPolicy(tmp_path)


def test_a_second_start_loads_neither_torch_nor_transformers(two, tmp_path):
    """From the command line, with the packaged weights, whose networks the first start has converted."""
    load_policy("ibis-nano")
    load_segmenter("ibis-click")
    write_png(noise(3).pixels, tmp_path / "a.png")
    code = "import sys; from ibisagent.cli import app; app(sys.argv[1:], standalone_mode=False);"
    code += "assert not {'torch', 'transformers', 'timm', 'scipy'} & set(sys.modules), 'loaded'"
    command = [sys.executable, "-c", code, "segment", str(tmp_path / "a.png"), "optic disc", "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(Path(tmp_path, "a_record.json").read_text())
    assert record["made_by"]["policy_runtime"].startswith("openvino ")


def test_it_answers_one_turn_after_another_and_the_server_knows(two):
    quick, slow = two
    assert (quick.batch_size, slow.batch_size) == (1, 16)
    sizes = []
    shared = SharedPolicy(quick, on_batch=sizes.append)
    try:
        said = shared.respond(observations())
    finally:
        shared.close()
    assert sizes == [1, 1, 1], "one is answered, and its mask drawn, while the next is read"
    assert [one.text for one in said] == [one.text for one in quick.respond(observations())]


def test_what_was_looked_at_is_not_read_again_for_the_reply(two, monkeypatch):
    quick, _ = two
    read = []
    anew = NanoModel._read_anew
    monkeypatch.setattr(
        NanoModel, "_read_anew", lambda model, prompt: read.append(prompt.digest) or anew(model, prompt)
    )
    quick.respond([Observation(str(seed), noise(seed), "Segment the bright disc.") for seed in range(20, 32)])
    assert len(read) == len(set(read)), "more images at once than readings are kept"
