"""What sources are tested on: one event loop in each run, since the loop is little of their business."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def anyio_backend(request: pytest.FixtureRequest) -> object:
    return "asyncio", {"use_uvloop": request.config.getoption("sources_on") == "uvloop"}
