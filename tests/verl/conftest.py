"""Fixtures of the verl tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from agentloop.trajectory import Trajectory
from tests.verl.support import conversation


@pytest.fixture
def build() -> Callable[..., Trajectory]:
    """Builds ledgers by hand, see `conversation`."""
    return conversation
