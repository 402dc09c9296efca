from __future__ import annotations

import pytest

from tests.replay.runs import Recorded, record_run


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    """A run with everything in it; not to be changed."""
    return record_run(tmp_path_factory.mktemp("runs") / "mini")
