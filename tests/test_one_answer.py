"""One scripted episode, and every face of the package: all hand out the same mask.

Its best-scored mask is taken back, and its last one is worse than the one before: three masks, of which one is right.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import phantoms
import PIL.Image
import pytest
from loopback import serving
from replies import text
from volume_phantoms import GRIDS

from ibisagent import evaluation
from ibisagent.datasets import read_cases
from ibisagent.domain import Case, Click, Image, Mask, MaskSelection, Prompt, Stop, Undo
from ibisagent.environment import SegmentationEnv, rollout
from ibisagent.errors import ConfigError
from ibisagent.evaluation.reliability import Reviewer
from ibisagent.imaging.images import read_masks, write_mask_png, write_png
from ibisagent.imaging.masks import decode_rle
from ibisagent.inference.image import export, run_case
from ibisagent.inference.session import Session
from ibisagent.inference.volume import run_volume
from ibisagent.inference.volume_files import VolumeWriter
from ibisagent.policies.scripted import ScriptedPolicy
from ibisagent.rewards import score
from ibisagent.segmenters import Prediction
from ibisagent.server.app import create_app, standard_mounts
from ibisagent.server.client import Client
from ibisagent.server.service import Limits, Service
from ibisagent.store import read_record
from ibisagent.volumes import SliceView, Volume

SIZE = (61, 83)
QUERY = "Segment the band."
GOOD, UNDONE, WORSE = 10, 40, 25
SCORES = {GOOD: 0.6, UNDONE: 0.9, WORSE: 0.3}


def band(width: int) -> Mask:
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, :width] = True
    return mask


@dataclass
class BandSegmenter:
    """Its mask reaches from the left to the last click, whose column says what score it gets."""

    name: str = "band"

    def open(self, image: Image) -> BandSegmenter:
        return self

    def describe(self) -> dict[str, str]:
        return {"segmenter": self.name}

    def predict(self, prompts: Sequence[Prompt], prior: np.ndarray | None = None) -> Prediction:
        [*_, last] = (prompt for prompt in prompts if isinstance(prompt, Click))
        return Prediction(band(last.x), SCORES.get(last.x, 0.5), np.zeros(1))


def click(x: int) -> Click:
    return Click(x, 30, True, "band")


REPLIES = [text(click(GOOD)), text(click(UNDONE)), text(Undo()), text(click(WORSE)), text(Stop("Done."))]


def image() -> Image:
    return Image(np.random.default_rng(0).integers(0, 255, (*SIZE, 3), dtype=np.uint8), source="eye.png")


def case(**more: Any) -> Case:
    return Case("eye.png", image(), QUERY, **more)


def png() -> bytes:
    return phantoms.png(image().pixels)


def policy() -> ScriptedPolicy:
    return ScriptedPolicy(REPLIES)


def is_good(mask: Mask) -> bool:
    return np.array_equal(mask, band(GOOD))


# ------------------------------------------------------------------------------------------ in this process


def test_the_phantom_tells_the_three_apart() -> None:
    episode = run_case(case(), policy(), BandSegmenter())
    assert [turn.segmenter_score for turn in episode.turns] == [0.6, 0.9, 0.6, 0.3, None]
    assert np.array_equal(episode.masks["band"], band(WORSE))


@pytest.mark.parametrize(("selection", "width"), [("best", GOOD), ("last", WORSE)])
def test_python_and_files(tmp_path: Path, selection: MaskSelection, width: int) -> None:
    episode = run_case(case(), policy(), BandSegmenter(), mask_selection=selection)
    assert np.array_equal(episode.answer_masks["band"], band(width))
    outputs = export(episode, image(), tmp_path, "eye")
    assert np.array_equal(read_masks(outputs.masks["band"])["mask"], band(width))
    assert np.array_equal(read_record(outputs.record).answer_masks["band"], band(width))


def test_environment_and_session(tmp_path: Path) -> None:
    [episode] = rollout(policy(), [SegmentationEnv(case(), BandSegmenter(), dialect="ibis")])
    assert is_good(episode.answer_masks["band"])
    it = Session(case(), BandSegmenter(), policy(), folder=tmp_path / "session")
    assert it.run() == "stopped"
    assert is_good(it.masks["band"])
    assert is_good(it.fork(5).masks["band"])
    assert is_good(Session.load(tmp_path / "session", BandSegmenter()).masks["band"])
    assert is_good(read_masks(it.export(tmp_path, "eye").masks["band"])["mask"])
    it.request("Segment the stripe.")
    assert is_good(it.episodes()[-1].start["band"])  # what the next round refines


def test_a_user_has_the_last_word() -> None:
    it = Session(case(), BandSegmenter(), policy())
    it.run()
    it.click(50, 30)
    assert np.array_equal(it.masks["band"], band(50))
    it.undo()
    assert is_good(it.masks["band"])  # as it was before the click
    it.redo()
    assert np.array_equal(it.masks["band"], band(50))
    it.undo()
    it.undo()
    assert is_good(it.masks["band"])
    it.undo()
    assert not it.masks
    alone = Session(case(start={"band": band(70)}), BandSegmenter())
    for width in (UNDONE, WORSE):
        alone.click(width, 30)
        assert np.array_equal(alone.masks["band"], band(width))
    alone.undo()
    alone.undo()
    assert np.array_equal(alone.masks["band"], band(70))


def test_evaluation_reward_and_review(tmp_path: Path) -> None:
    labelled = case(targets={"band": band(GOOD)})
    episode = run_case(labelled, policy(), BandSegmenter())
    judged = score(episode, labelled)
    assert (judged.iou, judged.answer) == (1.0, 3.0)
    assert Reviewer(policy(), BandSegmenter()).signals(episode, labelled)["quality"] == 0.6
    write_png(image().pixels, tmp_path / "eye.png")
    write_mask_png(band(GOOD), tmp_path / "mask.png")
    (tmp_path / "index.csv").write_text("image,mask,object\neye.png,mask.png,band\n")
    cases = read_cases(tmp_path)
    [result] = evaluation.evaluate(cases, policy(), BandSegmenter(), oracle=False).results
    assert (result.measures["iou"], result.quality) == (1.0, 0.6)


def test_a_volume_gets_the_best_mask_of_each_slice(tmp_path: Path) -> None:
    volume = Volume(np.zeros((*SIZE[::-1], 3), dtype=np.int16), GRIDS["LPS-even"], "phantom")
    view = SliceView(volume, "axial")
    assert view.size == SIZE
    with VolumeWriter(tmp_path, "phantom", ["nifti"]) as files:
        found = run_volume(view, QUERY, policy(), BandSegmenter(), keys=range(3), recheck=0, on_episode=files.episode)
    for index in range(3):
        assert is_good(view.read_mask(found.masks["band"], index))
    last = run_volume(view, QUERY, policy(), BandSegmenter(), keys=range(3), recheck=0, mask_selection="last")
    assert np.array_equal(view.read_mask(last.masks["band"], 1), band(WORSE))


class Brief(ScriptedPolicy):
    """Wants two turns, and would go on for ever."""

    max_turns = 2

    def __init__(self) -> None:
        super().__init__([text(click(x)) for x in range(1, 30)])


def test_a_policys_own_turn_limit_holds_everywhere(tmp_path: Path) -> None:
    assert len(run_case(case(), Brief(), BandSegmenter()).turns) == 2
    assert len(run_case(case(), Brief(), BandSegmenter(), max_turns=3).turns) == 3
    it = Session(case(), BandSegmenter(), Brief())
    assert (it.run(), len(it.steps)) == ("max_turns", 2)
    service = Service(Brief(), BandSegmenter(), tmp_path / "data")
    strict = Service(Brief(), BandSegmenter(), tmp_path / "strict", limits=Limits(turns=1))
    try:
        assert len(service.segment(image(), QUERY).steps) == 2
        assert service.submit([("eye.png", png())], QUERY).max_turns == 2
        assert len(strict.segment(image(), QUERY).steps) == 1  # no more than the server gives
        with pytest.raises(ConfigError, match="give 1 to 1"):
            strict.segment(image(), QUERY, 2)
    finally:
        service.close()
        strict.close()
    view = SliceView(Volume(np.zeros((*SIZE[::-1], 3), dtype=np.int16), GRIDS["LPS-even"], "phantom"), "axial")
    found = run_volume(view, QUERY, Brief(), BandSegmenter(), keys=range(3), recheck=0)
    assert (found.max_turns, [asked.turns for asked in found.asked]) == (2, [2, 2, 2])
    write_png(image().pixels, tmp_path / "eye.png")
    write_mask_png(band(GOOD), tmp_path / "mask.png")
    (tmp_path / "index.csv").write_text("image,mask,object\neye.png,mask.png,band\n")
    judged = evaluation.evaluate(read_cases(tmp_path), Brief(), BandSegmenter(), oracle=False)
    assert (judged.results[0].measures["turns"], judged.provenance["max_turns"]) == (2, "2")


def test_lmms_eval() -> None:
    pytest.importorskip("lmms_eval")
    from ibisagent.integrations.lmms_eval.model import IbisAgent

    agent = IbisAgent(policy="centre-click", segmenter="region")
    agent.policy, agent.segmenter, agent.max_turns = policy(), BandSegmenter(), 20
    agent.task_dict = {"task": {"test": ["doc"]}}
    pillow = PIL.Image.fromarray(image().pixels)
    [answer] = agent.generate_until([SimpleNamespace(args=(QUERY, {}, lambda _: [pillow], 0, "task", "test"))])
    assert is_good(decode_rle(json.loads(answer)))


# ----------------------------------------------------------------------------------------------- on the server


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    service = Service(policy(), BandSegmenter(), tmp_path_factory.mktemp("data"))
    with serving(create_app(service, mounts=standard_mounts(page=False))) as address:
        yield address


def test_http_hands_out_the_best_mask(url: str) -> None:
    with Client(url, token="") as client:
        assert is_good(client.segment(png(), QUERY)["band"])
        it = client.open(png(), QUERY)
        it.run()
        assert is_good(it.masks()["band"])
        job = client.wait(client.submit([png()], QUERY)["id"])
        with zipfile.ZipFile(io.BytesIO(client.results(job["id"]))) as results:
            [file] = (name for name in results.namelist() if "_mask_" in name)
            assert is_good(np.array(PIL.Image.open(results.open(file))) > 0)


def test_monai_label_hands_out_the_best_mask(url: str) -> None:
    answer = httpx.post(
        f"{url}/infer/ibisagent?image=&output=image",
        files={"params": (None, json.dumps({"query": QUERY})), "file": ("eye.png", png())},
    )
    assert is_good(np.array(PIL.Image.open(io.BytesIO(answer.content))) > 0)


def test_mcp_hands_out_the_best_mask(url: str) -> None:
    from mcp import Client as McpClient

    async def masks() -> dict[str, Any]:
        async with McpClient(f"{url}/mcp") as client:
            image = base64.b64encode(png()).decode()
            found = await client.call_tool("segment", {"image": image, "query": QUERY})
            return dict(found.structured_content["masks"])

    assert is_good(decode_rle(asyncio.run(masks())["band"]))
