"""What one GPU does: seconds a turn of a 7B policy, tokens a second against the roofline, training of our own models.

    python benchmarks/gpu.py [--minutes 8] [--json]

Needs no weights and no data: the policy has the shape of Qwen2.5-VL-7B and random bfloat16 weights: what it writes is
nonsense, but takes as long; ibis-nano and ibis-click train on images that are drawn here. Whatever does not fit into
the time is left out and told. Without a GPU it says so and ends.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import line
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

from ibisagent.imaging.images import write_mask_png, write_png
from ibisagent.policies import NANO_FOLDER
from ibisagent.policies.sizes import PROMPT_TOKENS, QWEN_7B, REPLY_TOKENS, known_gpu, need, size_of
from ibisagent.training.click import trainer as click
from ibisagent.training.nano import trainer as nano

BATCHES = (1, 2, 4, 8, 16, 32)
SIDE = 504  # pixels: what the processor makes of 512, in patches of 14
PAIRS = 48
EXAMPLES = 4_000  # to learn from, for either of our models
IDS = {"image_token_id": 151_655, "video_token_id": 151_656, "vision_start_token_id": 151_652}


def turns_of_a_policy(
    config: Qwen2_5_VLConfig, device: str, left: Callable[[], float], side: int = SIDE
) -> dict[str, Any]:
    """Seconds of a turn and tokens a second by batch size, the largest batches as far as memory and time go."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    size, sheet = size_of(config), known_gpu(torch.cuda.get_device_name(0)) if device == "cuda" else None
    results: dict[str, Any] = {}
    for batch in BATCHES:
        if left() < 60:
            results[f"batch_{batch}"] = "left out: no time"
            continue
        try:
            prompt = _prompt(config, batch, side, device, dtype)
            _timed(model, prompt, 2)  # warms up
            first, whole = _timed(model, prompt, 1), _timed(model, prompt, REPLY_TOKENS)
        except torch.OutOfMemoryError:
            results[f"batch_{batch}"] = "left out: no memory"
            continue
        written = batch * (REPLY_TOKENS - 1) / (whole - first)
        results |= {f"batch_{batch}_seconds_a_turn": whole / batch, f"batch_{batch}_first_token_seconds": first}
        results[f"batch_{batch}_tokens_a_second"] = written
        bound = need(size, gpu=sheet, batch=batch, turns=1).seconds
        if bound is not None:
            results[f"batch_{batch}_share_of_roofline"] = bound * batch / whole
    if device == "cuda":
        results["policy_peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return results


def _prompt(
    config: Qwen2_5_VLConfig, batch: int, side: int, device: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    vision = config.vision_config
    patches = side // vision.patch_size
    shown = [config.image_token_id] * (patches // vision.spatial_merge_size) ** 2
    ids = [config.vision_start_token_id, *shown, *([5] * PROMPT_TOKENS)]
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    row = torch.tensor(ids, device=device)
    return {
        "input_ids": row.repeat(batch, 1),
        "attention_mask": torch.ones(batch, len(ids), dtype=torch.long, device=device),
        "mm_token_type_ids": (row == config.image_token_id).int().repeat(batch, 1),
        "pixel_values": torch.randn(batch * patches**2, values, device=device, dtype=dtype),
        "image_grid_thw": torch.tensor([[1, patches, patches]] * batch, device=device),
    }


def _timed(model: Any, prompt: Mapping[str, torch.Tensor], tokens: int) -> float:
    """Seconds that the model takes to write exactly so many tokens."""
    done = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    done()
    started = time.perf_counter()
    model.generate(**prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    done()
    return time.perf_counter() - started


def draw(folder: Path) -> Path:
    """Image-mask pairs in BiomedParse's layout: a bright ellipse each, of another place and size."""
    rows, columns = np.mgrid[:256, :256]
    for name in ("train", "train_mask"):
        (folder / "Ellipses" / name).mkdir(parents=True)
    for number in range(PAIRS):
        random = np.random.default_rng(number)
        x, y, a, b = *random.integers(60, 196, 2), *random.integers(15, 50, 2)
        inside = ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1
        level = np.clip(80 + random.normal(0, 12, inside.shape) + 70 * inside, 0, 255)
        write_png(
            np.repeat(level[..., None], 3, axis=2).astype(np.uint8),
            folder / "Ellipses" / "train" / f"{number}_CT_abdomen.png",
        )
        write_mask_png(inside, folder / "Ellipses" / "train_mask" / f"{number}_CT_abdomen_liver.png")
    return folder


def training(folder: Path, examples: int, left: Callable[[], float]) -> dict[str, Any]:
    """Examples a second of both trainers, from the first report to the last."""
    data = draw(folder / "data")
    results: dict[str, Any] = {}
    runs: dict[str, Callable[[Callable[..., None]], object]] = {
        "ibis_click_states_a_second": lambda report: click.train(
            click.ClickRecipe(data=data, out=folder / "click", states=examples, rounds=1, tensorboard=False), report
        ),
        "ibis_nano_examples_a_second": lambda report: nano.train(
            nano.NanoRecipe(data=(data,), out=folder / "nano", start=NANO_FOLDER, examples=examples), report
        ),
    }
    for name, run in runs.items():
        if left() < 90:
            results[name] = "left out: no time"
            continue
        heard: list[tuple[float, int]] = []
        run(lambda done, *_rest, heard=heard: heard.append((time.perf_counter(), done)))
        (started, before), (ended, after) = heard[0], heard[-1]
        results[name] = (after - before) / max(ended - started, 1e-9)
    return results


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="what is not begun by then is left out")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: benchmarks/gpu.py measures one, and makes nothing up without it")
    ends = time.monotonic() + 60 * options.minutes

    def left() -> float:
        return ends - time.monotonic()

    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(0), "torch": torch.__version__}
    results |= turns_of_a_policy(Qwen2_5_VLConfig(**QWEN_7B, **IDS), "cuda", left)
    torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        results |= training(Path(folder), EXAMPLES, left)
    if options.json:
        sys.stdout.write(json.dumps(results, indent=1) + "\n")
    else:
        sys.stdout.write("".join(line(name, value) + "\n" for name, value in results.items()))


if __name__ == "__main__":
    main()
