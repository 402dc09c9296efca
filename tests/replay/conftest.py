from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.replay.browser import browser
from tests.replay.runs import Recorded, record_run


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A run with everything in it; not to be changed."""
    with ThreadPoolExecutor(1) as elsewhere:  # a browser has an event loop of its own in this thread
        return elsewhere.submit(record_run, tmp_path_factory.mktemp("runs") / "mini").result()


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """A browser for all tests of a file; each opens a page of its own."""
    with browser() as context:
        yield context


@pytest.fixture(autouse=True)
def nothing_from_outside(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test's page asks for anything outside of the machine."""
    yield
    if "context" in request.fixturenames:
        assert request.getfixturevalue("context").refused == [], "something was asked for outside of the machine"
