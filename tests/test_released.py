"""The dialect `released` against the loop of the paper's public code, acted out again here from what it does."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from commands import ibisagent

from ibisagent.domain import Case, Completion, Image, Mask, Observation, Prompt, Wording
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.errors import ConfigError
from ibisagent.inference.replay import replay
from ibisagent.policies.wording import read_wording, wording_of_checkout
from ibisagent.protocol import render
from ibisagent.segmenters import Prediction

SIZE = (96, 128)
QUERY = "Can you find the lesion in this image?"
WORDS = Wording(
    system='You place points. Write {"like": "this"}.',
    first="<image>{query}",
    refine='<image>One more step for "{query}"; is {this} good?',
)
SCRIPTS = {
    "stops": ["Positive Point (0.5000, 0.5000)", "Negative Point (0.2500, 0.7500)", "Terminate"],
    "repeats": ["Positive Point (0.5000, 0.5000)"] * 5,
    "comes back": [
        "Positive Point (0.5000, 0.5000)",
        "Negative Point (0.2500, 0.7500)",
        "Positive Point (0.5000, 0.5000)",
        "Positive Point (0.5000, 0.5000)",
        "Negative Point (0.5000, 0.5000)",
        "Terminate",
    ],
    "mumbles": ["Positive Point (0.1000, 0.9000)", "somewhere on the left", "Terminate"],
    "talks in the action": ["I choose Positive Point (0.3000, 0.6000) now", "Terminate, as it fits"],
    "never stops": [f"Positive Point ({0.03 * n:.4f}, 0.4000)" for n in range(1, 30)],
}


def scan() -> Image:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return Image(np.dstack([rows * 2, columns, rows + columns]).astype(np.uint8), "scan.png")


class Drawn:
    """A segmenter of three masks for every prompt, as the public code asks for them; its prior moves them."""

    name = "drawn"

    def __init__(self, multimask: bool = False) -> None:
        self.multimask = multimask

    def with_multimask(self) -> Drawn:
        return Drawn(multimask=True)

    def describe(self) -> dict[str, str]:
        return {"segmenter": self.name, "runtime": "", "weights_sha256": "", "licence": ""}

    def open(self, image: Image) -> Drawn:
        return self

    def three(self, points: Sequence[tuple[int, int, bool]], prior: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
        logits = np.zeros((3, *SIZE), np.float32)
        for number, plane in enumerate(logits):
            for x, y, positive in points:
                plane += (1 if positive else -1) * (20.0 + 5 * number - np.hypot(rows - y, columns - x))
            if prior is not None:
                plane += prior / 2
        scores = np.array([0.3, 0.5, 0.4]) + 0.2 * (len(points) % 3 == np.arange(3))
        return logits, scores.astype(np.float32)

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        logits, scores = self.three([(p.x, p.y, p.positive) for p in prompts], prior)  # type: ignore[union-attr]
        best = int(scores.argmax()) if self.multimask or len(prompts) == 1 else 0
        return Prediction(logits[best] > 0, float(scores[best]), logits[best])


def written(action: str) -> str:
    answer = "<answer>It fits.</answer>" if "Terminate" in action else ""
    return f"<think>I look.</think><action>{action}</action>{answer}"


def acted_out(script: Sequence[str]) -> tuple[list[list[dict[str, Any]]], Mask]:
    """The public loop: the conversations that it asks with, images as PNG files hold them, and its last mask."""
    image, asked, actions, points = scan(), [], [], []
    shown, mask = PIL.Image.fromarray(image.pixels), np.zeros(SIZE, bool)
    prior, segmenter = None, Drawn()
    for turn, text in enumerate(script[:20]):
        request = (WORDS.first if turn == 0 else WORDS.refine).replace("{query}", QUERY)
        image_part = {"type": "image", "image": shown}
        user = {"role": "user", "content": [image_part, {"type": "text", "text": request}]}
        asked.append([{"role": "system", "content": [{"type": "text", "text": WORDS.system}]}, user])
        place = re.search(r"\(([\d.]+),\s*([\d.]+)\)", text)
        if "Terminate" in text or place is None:
            break
        actions.append(("Positive" in text, place.groups()))
        if len(actions) > 2 and actions[-1] == actions[-2] == actions[-3]:
            break
        points.append((int(float(place[1]) * SIZE[1]), int(float(place[2]) * SIZE[0]), "Positive" in text))
        logits, scores = segmenter.three(points, prior)
        prior = logits[scores.argmax()]
        mask = prior > 0
        pixels = image.pixels.astype(np.float32)
        tinted = np.where(mask[..., None], np.float32((34, 139, 34)), pixels)
        shown = PIL.Image.fromarray(np.clip(pixels * (1 - 0.4) + tinted * 0.4, 0, 255).astype(np.uint8))
    return asked, mask


class Listening:
    """Writes the lines of a script, and keeps what it was asked."""

    name, dialect = "listening", "released"

    def __init__(self, script: Sequence[str]) -> None:
        self.script, self.asked = list(script), []

    def respond(self, observations: Sequence[Observation]) -> list[Completion]:
        [seen] = observations
        self.asked.append(render(seen, dialect=self.dialect, wording=WORDS))
        return [Completion(written(self.script[len(self.asked) - 1]))]


def as_bytes(conversations: Sequence[Any]) -> str:
    def plain(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "text":
            return part
        file = io.BytesIO()
        part["image"].save(file, "PNG")
        return {"type": "image", "image": file.getvalue().hex()}

    return json.dumps(
        [[{**m, "content": [plain(part) for part in m["content"]]} for m in messages] for messages in conversations]
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_same_model_is_asked_the_same_in_both_loops(name: str) -> None:
    policy, segmenter, case = Listening(SCRIPTS[name]), Drawn(), Case("c", scan(), QUERY)
    [episode] = rollout(policy, [SegmentationEnv(case, segmenter, dialect="released")])
    asked, mask = acted_out(SCRIPTS[name])
    assert as_bytes(policy.asked) == as_bytes(asked)
    [handed_out] = episode.answer_masks.values()
    assert np.array_equal(handed_out, mask)
    ends = {"repeats": "repeated", "mumbles": "malformed", "never stops": "max_turns"}
    assert episode.stop == ends.get(name, "stopped")
    assert all(np.array_equal(again, mask) for again in replay(episode, case.image, segmenter).values())


def test_other_dialects_keep_their_own_ways() -> None:
    def play(dialect: str, action: str) -> Any:
        env = SegmentationEnv(Case("c", scan(), QUERY), Drawn(), dialect=dialect)
        while not env.done:
            env.step(Completion(written(action)))
        return env.episode()

    again = play("ibis", "click + (0.5, 0.5) lesion")
    assert (again.stop, len(again.turns), again.mask_selection) == ("repeated", 2, "best")
    assert len(play("ibis", "somewhere").turns) == 2
    assert len(play("released", "somewhere").turns) == 1


def test_the_wording_is_read_from_a_checkout_and_back_from_its_file(tmp_path: Path) -> None:
    code = tmp_path / "code" / "infer"
    code.mkdir(parents=True)
    (code / "multi_turn.py").write_text(
        "raise SystemExit('this is not run')\n"
        f"SYSTEM_PROMPT = (\n    {WORDS.system!r}\n)\n"
        "def main(args, first):\n    current_prompt = f'<image>{args.prompt}' if first else args.prompt\n"
    )
    (code / "mllm_engine.py").write_text(
        "class Engine:\n    def chat(self, said):\n"
        "        refinement_prompt = f'<image>One more step for \"{said}\"; is {{this}} good?'\n"
    )
    assert wording_of_checkout(tmp_path / "code") == WORDS
    file = tmp_path / "prompts.toml"
    result = ibisagent("data", "prompts", tmp_path / "code", "-o", file)
    assert result.exit_code == 0, result.output
    assert read_wording(file) == WORDS


def test_a_wording_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"multi_turn\.py.*give a checkout of"):
        wording_of_checkout(tmp_path)
    file = tmp_path / "prompts.toml"
    file.write_text('system = "a"\nrefine = "the query is missing"\n')
    with pytest.raises(ConfigError, match=r"refine.*\{query\}"):
        read_wording(file)
