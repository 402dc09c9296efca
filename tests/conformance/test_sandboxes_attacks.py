"""Every attack of the catalogue against every kind of sandbox, and against plain `subprocess`: there it must succeed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.conformance.attacks import ATTACKS, Attack, Host, carry_out
from tests.conformance.attacks.baseline import Plain
from tests.conformance.sandboxes import KINDS, Ahead, Kind, SandboxTarget, asked_for, available

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(os.geteuid() != 0, reason="attacks are tried as root, which they are most dangerous as"),
]
SUCCEEDED: dict[str, str | None] = {}
"""What the attacks that were tried against plain `subprocess` in this run achieved."""


async def succeeds_against_plain(name: str) -> str | None:
    if name not in SUCCEEDED:
        plain = Plain()
        with Host() as host:
            try:
                SUCCEEDED[name], _ = await carry_out(plain, ATTACKS[name], host)
            finally:
                plain.clean()
    return SUCCEEDED[name]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def against_plain(request: pytest.FixtureRequest) -> AsyncIterator[Ahead[str | None]]:
    ahead = Ahead(asked_for(request, "name"), succeeds_against_plain, several=2)
    yield ahead
    await ahead.close()


@pytest.mark.parametrize("name", ATTACKS)
async def test_attack_succeeds_against_plain_subprocess(against_plain: Ahead[str | None], name: str) -> None:
    achieved = await against_plain.get(name)
    if not achieved and not ATTACKS[name].everywhere:
        pytest.skip("it does not succeed on this machine: its kernel has not what it attacks")
    assert achieved


@pytest.fixture(scope="module", params=KINDS)
def kind_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def attacks(
    request: pytest.FixtureRequest, kind_name: str, against_plain: Ahead[str | None]
) -> AsyncIterator[Ahead[None]]:
    async with available(kind_name).start() as sandbox:
        target = SandboxTarget(kind_name, sandbox)

        async def stopped_every_way(name: str) -> None:
            if not await against_plain.get(name):
                pytest.skip("it does not succeed against plain subprocess here, so it does not count")
            if reason := await excused(KINDS[kind_name], target, ATTACKS[name]):
                pytest.skip(reason)
            ways = (False, True) if ATTACKS[name].lasting else (False,)
            await asyncio.gather(*(stopped(target, ATTACKS[name], lasting=lasting) for lasting in ways))

        ahead = Ahead(asked_for(request, "name", kind_name=kind_name), stopped_every_way, several=3)
        yield ahead
        await ahead.close()


async def excused(kind: Kind, target: SandboxTarget, attack: Attack) -> str | None:
    """The sentence in which the kind's own probe says that what stops this attack is missing here."""
    if kind.stops_all or not attack.layer:
        return None
    missing = [layer for layer in await target.sandbox.layers() if not layer.active and attack.layer in layer.name]
    return f"{missing[0].name} is missing: {missing[0].detail}" if missing else None


async def stopped(target: SandboxTarget, attack: Attack, *, lasting: bool) -> None:
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
async def test_attack_is_stopped(attacks: Ahead[None], name: str) -> None:
    """As a run, and, of those that last, in a session, which must be usable afterwards."""
    await attacks.get(name)
