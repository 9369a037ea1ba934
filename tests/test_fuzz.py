"""A few of the requests that `benchmarks/fuzz.py` makes by the thousand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))


@pytest.mark.filterwarnings("ignore")  # schemathesis and hypothesis, not ours
def test_no_request_breaks_the_server(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from fuzz import fuzz

    statuses = fuzz(60, 0, tmp_path / "data")
    assert sum(statuses.values()) >= 40
    assert "422" in statuses
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_bytes_that_are_nearly_http_break_nothing(tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from fuzz import malformed

    ends = malformed(60, 0, tmp_path / "data")
    assert sum(ends.values()) == 60
    assert any(status.startswith("4") for status in ends)
