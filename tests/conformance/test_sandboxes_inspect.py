"""Inspect's own checks of sandboxes, against every kind of ours (`constraints/inspect.txt` says how it is installed)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

pytest.importorskip("inspect_ai", reason="Inspect is not installed: pip install --no-deps -r constraints/inspect.txt")

from inspect_ai.util._sandbox import self_check
from inspect_ai.util._sandbox.self_check import *  # noqa: F403

from agentloop.sandboxes.base import Sandbox
from tests.conformance.inspect_adapter import LIMITS, SessionEnvironment
from tests.conformance.sandboxes import KINDS, available

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNFIT = {
    "test_exec_as_user": "it makes a user as root and becomes that user: a session has one user without any right, on purpose",
}
"""Checks that do not fit our interface, and why."""


def test_there_are_as_many_checks_as_we_know_of() -> None:
    assert len(self_check.__all__) == 44
    assert set(UNFIT) <= set(self_check.__all__)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def sandbox(request: pytest.FixtureRequest) -> AsyncIterator[Sandbox]:
    async with available(request.param).start() as sandbox:
        yield sandbox


@pytest_asyncio.fixture(loop_scope="module")
async def sandbox_env(request: pytest.FixtureRequest, sandbox: Sandbox) -> AsyncIterator[SessionEnvironment]:
    if reason := UNFIT.get(request.node.originalname):
        pytest.skip(reason)
    async with sandbox.session(LIMITS) as session:
        yield SessionEnvironment(session)
