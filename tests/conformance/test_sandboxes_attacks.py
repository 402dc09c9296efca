"""Every attack of the catalogue against every kind of sandbox, and against plain `subprocess`: there it must succeed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.conformance.attacks import ATTACKS, Attack, Host, carry_out
from tests.conformance.attacks.baseline import Plain, clean
from tests.conformance.sandboxes import KINDS, Kind, SandboxTarget, available

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(os.geteuid() != 0, reason="attacks are tried as root, which they are most dangerous as"),
]
SUCCEEDED: dict[str, str] = {}
"""Attacks that succeeded against plain `subprocess` in this run, and what they achieved."""
TRIED: set[str] = set()


async def succeeds_against_plain(attack: Attack) -> str | None:
    if attack.name not in TRIED:
        TRIED.add(attack.name)
        with Host() as host:
            try:
                achieved, _ = await carry_out(Plain(), attack, host)
            finally:
                clean()
        if achieved:
            SUCCEEDED[attack.name] = achieved
    return SUCCEEDED.get(attack.name)


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack_succeeds_against_plain_subprocess(name: str) -> None:
    achieved = await succeeds_against_plain(ATTACKS[name])
    if not achieved and not ATTACKS[name].everywhere:
        pytest.skip("it does not succeed on this machine: its kernel has not what it attacks")
    assert achieved


@pytest.fixture(scope="module", params=KINDS)
def kind_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target(kind_name: str) -> AsyncIterator[SandboxTarget]:
    kind = available(kind_name)
    async with kind.start() as sandbox:
        yield SandboxTarget(kind_name, sandbox)


async def excused(kind: Kind, target: SandboxTarget, attack: Attack) -> str | None:
    """The sentence in which the kind's own probe says that what stops this attack is missing here."""
    if kind.stops_all or not attack.layer:
        return None
    missing = [layer for layer in await target.sandbox.layers() if not layer.active and attack.layer in layer.name]
    return f"{missing[0].name} is missing: {missing[0].detail}" if missing else None


async def stopped(target: SandboxTarget, attack: Attack, *, lasting: bool) -> None:
    if not await succeeds_against_plain(attack):
        pytest.skip("it does not succeed against plain subprocess here, so it does not count")
    if reason := await excused(KINDS[target.name], target, attack):
        pytest.skip(reason)
    with Host() as host:
        achieved, outcome = await carry_out(target, attack, host, lasting=lasting)
    assert achieved is None, f"{attack.name}: {achieved}; {outcome.status} {outcome.error} {outcome.text[-800:]}"
    assert not outcome.raised
    assert outcome.status != "infra", f"the code's doing passed for the machinery's: {outcome.error}"
    assert not outcome.hung
    assert not outcome.survivors
    after = await target.sandbox.run("print('fine')")
    assert after.stdout == "fine\n", f"the sandbox was of no use afterwards: {after}"


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack_is_stopped(target: SandboxTarget, name: str) -> None:
    await stopped(target, ATTACKS[name], lasting=False)


@pytest.mark.parametrize("name", [attack.name for attack in ATTACKS.values() if attack.lasting])
async def test_attack_in_a_session_is_stopped(target: SandboxTarget, name: str) -> None:
    await stopped(target, ATTACKS[name], lasting=True)
