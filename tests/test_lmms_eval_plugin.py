"""The task for lmms-eval, and, where that is installed, our agent run by the harness itself."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from ibisagent.datasets import read_cases
from ibisagent.errors import DataError
from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.imaging.masks import encode_rle, iou
from ibisagent.integrations import lmms_eval as plugin
from ibisagent.integrations.lmms_eval.__main__ import main

SIZE = (61, 83)


def ground_truth(number: int) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    inside: np.ndarray = (columns - 41) ** 2 + (rows - 30) ** 2 <= (10 + number) ** 2
    return inside


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    lines = ["image,mask,object"]
    for number in range(3):
        write_png((40 + 140 * ground_truth(number)).astype(np.uint8), folder / f"{number}.png")
        write_mask_png(ground_truth(number), folder / f"{number}_mask.png")
        lines.append(f"{number}.png,{number}_mask.png,liver")
    (folder / "index.csv").write_text("\n".join([*lines, "0.png,,spleen"]) + "\n")
    return folder


def docs(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "cases.jsonl").read_text().splitlines()]


def test_the_task_holds_all_masks(data: Path, tmp_path: Path) -> None:
    main(data, tmp_path / "task")
    listed = docs(tmp_path / "task")
    assert [doc["query"] for doc in listed[:3]] == ["Segment the liver."] * 3
    assert len(listed) == 4  # an absent object wants an empty mask
    (image,) = plugin.doc_to_visual(listed[0])
    assert image.size == (83, 61)
    assert "[61, 83]" in plugin.doc_to_text(listed[0], {})

    class Loader(yaml.SafeLoader):
        """Knows the harness's tag."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((tmp_path / "task" / f"{plugin.TASK}.yaml").read_text(), Loader)
    assert task["task"] == plugin.TASK
    assert Path(task["dataset_kwargs"]["data_files"]["test"]) == tmp_path / "task" / "cases.jsonl"
    assert [metric["metric"] for metric in task["metric_list"]] == list(plugin.METRICS)
    for name in (task["doc_to_visual"], task["process_results"], task["metric_list"][0]["aggregation"]):
        assert callable(getattr(plugin, name.removeprefix("ibisagent.integrations.lmms_eval.")))


def test_answers_are_scored(data: Path, tmp_path: Path) -> None:
    main(data, tmp_path / "task", limit=1)
    (doc,) = docs(tmp_path / "task")

    def score(text: str) -> tuple[float, float, float]:
        found = plugin.process_results(doc, [text])
        return found["iou"], found["dice"], found["readable"]

    assert score(json.dumps(encode_rle(ground_truth(0)))) == (1, 1, 1)
    assert score(f"Here: {json.dumps(encode_rle(ground_truth(2)))}.")[0] == pytest.approx(
        iou(ground_truth(0), ground_truth(2))
    )
    for text in (
        "",
        "no",
        "{}",
        "{" * 9,
        json.dumps(encode_rle(ground_truth(0).T.copy())),
        '{"size": [61, 83], "counts": "x"}',
    ):
        assert score(text) == (0, 0, 0), text
    assert plugin.mean([0.5, 1.0]) == 0.75


def test_nothing_to_score(data: Path, tmp_path: Path) -> None:
    (data / "index.csv").write_text("image,mask,object,query,answer\n0.png,,,Is there a liver?,yes\n")
    with pytest.raises(DataError, match="no case has a mask"):
        plugin.write_task(read_cases(data), tmp_path)


def test_the_agent_answers_the_harness(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    from ibisagent.integrations.lmms_eval.model import IbisAgent

    assert plugin.model_manifest().model_id == "ibisagent"
    main(data, tmp_path / "task")
    listed = docs(tmp_path / "task")[:3]
    agent = IbisAgent(policy="centre-click", segmenter="region", batch_size=2)
    agent.task_dict = {plugin.TASK: {"test": listed}}
    requests = [
        SimpleNamespace(args=(plugin.doc_to_text(doc), {}, plugin.doc_to_visual, number, plugin.TASK, "test"))
        for number, doc in enumerate(listed)
    ]
    answers = agent.generate_until(requests)
    reached = [plugin.process_results(doc, [text])["iou"] for doc, text in zip(listed, answers, strict=True)]
    assert min(reached) > 0.75
