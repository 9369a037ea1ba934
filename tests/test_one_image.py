"""One image through everything: file, case, loop, reward, store, record, replay. Read this first."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import ibisagent


def test_one_image(tmp_path: Path) -> None:
    # An image with one bright disc, and its mask, as files of a data set.
    rows, columns = np.mgrid[:121, :163]
    ground_truth = (columns - 100) ** 2 + (rows - 48) ** 2 <= 30**2
    pixels = np.where(ground_truth[..., None], (210, 180, 160), (60, 40, 30)).astype(np.uint8)
    for folder in ("Phantom/val", "Phantom/val_mask"):
        (tmp_path / folder).mkdir(parents=True)
    ibisagent.write_png(pixels, tmp_path / "Phantom/val/p1_fundus_retinal.png")
    ibisagent.write_mask_png(ground_truth, tmp_path / "Phantom/val_mask/p1_fundus_retinal_optic+disc.png")

    # It is read as a case: a question with its ground truth.
    (case,) = ibisagent.read_cases(tmp_path, split="val")
    assert (case.query, case.meta["modality"]) == ("Segment the optic disc.", "fundus")

    # A policy looks at it and writes text, the environment asks the segmenter: that is the loop.
    policy = ibisagent.load_policy("oracle", cases=[case])
    segmenter = ibisagent.load_segmenter("region")
    env = ibisagent.SegmentationEnv(case, segmenter, dialect=policy.dialect)
    (episode,) = ibisagent.rollout(policy, [env])
    assert episode.stop == "stopped"
    assert ibisagent.iou(episode.masks["optic disc"], ground_truth) >= 0.9
    assert ibisagent.score(episode, case).total > 1.3

    # The episode goes to disk in two ways and comes back; its mask can be made again without the policy.
    store = ibisagent.EpisodeStore(tmp_path / "episodes")
    store.append([episode])
    ibisagent.write_record(episode, tmp_path / "record.json")
    for again in (*store.read(), ibisagent.read_record(tmp_path / "record.json")):
        masks = ibisagent.replay(again, ibisagent.read_image(again.image_source), segmenter)
        assert np.array_equal(masks["optic disc"], episode.masks["optic disc"])
