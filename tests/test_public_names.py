"""The public names are there, and cost nothing until they are used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ibisagent

HEAVY = ("torch", "transformers", "numpy", "cv2", "pyarrow", "PIL", "openvino")


@pytest.mark.parametrize("name", ibisagent.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(ibisagent, name) is not None
    assert name in dir(ibisagent)


def test_public_names_are_those_of_the_stub() -> None:
    """What type checkers see is what there is."""
    stub = ast.parse(Path(ibisagent.__file__).with_suffix(".pyi").read_text())
    names = [alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(names, key=str) == sorted(ibisagent.__all__)
    assert {"Case", "Episode", "IbisError", "load_policy", "load_segmenter", "read_cases", "rollout", "score"} <= set(
        names
    )


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        ibisagent.no_such_name  # noqa: B018


def loaded_by(code: str) -> set[str]:
    """Top-level packages that a fresh interpreter has loaded after `code`."""
    command = [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"]
    modules = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return {name.split(".")[0] for name in modules}


def test_importing_the_package_loads_next_to_nothing() -> None:
    assert not loaded_by("import ibisagent").intersection(HEAVY)


@pytest.mark.parametrize(
    "module",
    [
        "environment",
        "rewards",
        "store",
        "datasets",
        "policies",
        "segmenters",
        "generation.trajectories",
        "inference.api",
    ],
)
def test_importing_a_module_loads_no_torch(module: str) -> None:
    loaded = loaded_by(f"import ibisagent.{module}")
    assert "numpy" in loaded  # the check can see what is loaded
    assert not loaded & {"torch", "transformers", "openvino", "openai"}


def test_the_loop_runs_without_torch() -> None:
    code = (
        "import ibisagent, numpy as np\n"
        "mask = np.zeros((61, 83), bool); mask[20:40, 30:60] = True\n"
        "image = ibisagent.Image((mask[..., None] * np.ones(3) * 200).astype(np.uint8))\n"
        "case = ibisagent.Case('x', image, 'spleen', {'spleen': mask})\n"
        "policy = ibisagent.load_policy('oracle', cases=[case])\n"
        "env = ibisagent.SegmentationEnv(case, ibisagent.load_segmenter('region'), dialect='ibis')\n"
        "assert ibisagent.rollout(policy, [env])[0].stop == 'stopped'\n"
    )
    assert not loaded_by(code) & {"torch", "transformers"}
