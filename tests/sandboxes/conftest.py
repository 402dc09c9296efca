"""Fixtures of the sandboxes' tests."""

from __future__ import annotations

import pytest

from tests.sandboxes import docker_engine


@pytest.fixture(scope="session")
def docker_host() -> str:
    """Address of a real Docker engine with our image; skips where there is none."""
    return docker_engine.docker_host()
