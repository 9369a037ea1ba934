"""What tests of more than one file share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How fast an example is drawn and run says how busy the machine is, and nothing of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

BROWSERS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
BROWSER = os.environ.get("IBIS_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)


@pytest.fixture(scope="module")  # not longer: while Playwright's driver is there, asyncio.run refuses to work
def browser() -> Iterator[Any]:
    """A headless Chromium, driven by Playwright; skips where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip(f"no browser is here: none of {', '.join(BROWSERS)} (or IBIS_BROWSER)")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()
