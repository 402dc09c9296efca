"""Inspect's own checks of sandboxes, against every kind of ours (`constraints/inspect.txt` says how it is installed)."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

pytest.importorskip("inspect_ai", reason="Inspect is not installed: pip install --no-deps -r constraints/inspect.txt")

from inspect_ai.util._sandbox import self_check

from tests.conformance.inspect_adapter import LIMITS, SessionEnvironment
from tests.conformance.sandboxes import KINDS, Ahead, asked_for, available

pytestmark = pytest.mark.asyncio(loop_scope="module")

UNFIT = {
    "test_exec_as_user": "it makes a user as root and becomes that user: a session has one user without any right, on purpose",
}
"""Checks that do not fit our interface, and why."""


def test_there_are_as_many_checks_as_we_know_of() -> None:
    assert len(self_check.__all__) == 44
    assert set(UNFIT) <= set(self_check.__all__)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=KINDS)
async def checks(request: pytest.FixtureRequest) -> AsyncIterator[Ahead[None]]:
    async with available(request.param).start() as sandbox:

        async def carry_out(check: str) -> None:
            async with sandbox.session(LIMITS) as session:
                await getattr(self_check, check)(SessionEnvironment(session))

        ahead = Ahead([name for name in asked_for(request, "check") if name not in UNFIT], carry_out, several=6)
        yield ahead
        await ahead.close()


@pytest.mark.parametrize("check", self_check.__all__)
async def test_check(checks: Ahead[None], check: str) -> None:
    if reason := UNFIT.get(check):
        pytest.skip(reason)
    await checks.get(check)
