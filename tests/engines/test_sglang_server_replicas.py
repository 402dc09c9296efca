"""Where trajectories go: sticky, spread evenly, and away from replicas that fail."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from agentloop.config import validate
from agentloop.engines.sglang_server import SGLangServerConfig
from agentloop.engines.sglang_server.flights import Call
from agentloop.engines.sglang_server.replicas import Flight, Replica, Replicas
from agentloop.errors import ConfigError

URLS = ["http://a:1", "http://b:1", "http://c:1"]


def up(count: int, failures_to_eject: int = 3) -> Replicas:
    replicas = Replicas(URLS[:count], failures_to_eject)
    for replica in replicas.all:
        replicas.returned(replica)
    return replicas


def fly(replica: Replica, rid: str) -> Flight:
    loop = asyncio.get_running_loop()
    answer: asyncio.Task[Any] = asyncio.create_task(asyncio.sleep(0))
    flight = replica.flights[rid] = Flight(rid, replica, answer, loop.create_future(), replica.workers)
    return flight


def test_two_hundred_at_once_are_spread_evenly_and_stay_where_they_are() -> None:
    replicas = up(3)
    homes = {f"t{i}": replicas.place(f"t{i}") for i in range(200)}
    assert sorted(replica.trajectories for replica in replicas.all) == [66, 67, 67]
    for _ in range(4):
        assert all(replicas.place(name) is home for name, home in homes.items())
    for name in homes:
        replicas.forget(name)
    assert [replica.trajectories for replica in replicas.all] == [0, 0, 0]


async def test_two_hundred_that_come_and_go_keep_the_replicas_within_a_few_of_each_other() -> None:
    """Turns of random length, tool calls between them, ends at random: what a rollout looks like from here."""
    replicas, rng = up(3), random.Random(0)
    live: dict[str, tuple[int, bool]] = {}  # trajectory -> turns left, generating
    homes: dict[str, Replica] = {}
    widest, started = 0, 0
    while live or started < 200:
        while started < 200 and len(live) < 48:
            live[f"t{started}"] = (rng.randint(1, 8), False)
            started += 1
        name = rng.choice(sorted(live))
        turns, generating = live[name]
        if generating:
            del homes[name].flights[name]
            if turns == 1:
                replicas.forget(name)
                del live[name]
                continue
            live[name] = (turns - 1, False)
        else:
            home = replicas.place(name)
            assert home is not None
            assert homes.setdefault(name, home) is home
            fly(home, name)
            live[name] = (turns, True)
        if started > 48:
            loads = [replica.load for replica in replicas.all]
            widest = max(widest, max(loads) - min(loads))
    assert widest <= 16  # of about 48 trajectories, which count up to twice: 24 on average
    assert max(replica.placed for replica in replicas.all) <= 200 // 3 * 1.25


def test_what_lived_on_a_lost_replica_moves_once_and_new_ones_go_to_it_when_it_is_back() -> None:
    replicas = up(2, failures_to_eject=1)
    homes = {f"t{i}": replicas.place(f"t{i}") for i in range(20)}
    lost, other = replicas.all
    replicas.failed(lost, "no answer")
    assert {replicas.place(name) for name in homes} == {other}
    assert (lost.trajectories, other.trajectories) == (0, 20)
    replicas.returned(lost)
    assert {replicas.place(name) for name in homes} == {other}, "it has their tokens now"
    assert {replicas.place(f"new{i}") for i in range(20)} == {lost}
    assert (lost.trajectories, other.trajectories) == (20, 20)


def test_failures_eject_when_they_come_in_a_row_and_a_refused_connection_at_once() -> None:
    replicas = up(2)
    first, second = replicas.all
    for _ in range(5):
        replicas.failed(first, "lost")
        replicas.failed(first, "lost")
        replicas.succeeded(first)
    assert first.up
    replicas.failed(second, "refused", decisive=True)
    assert not second.up
    for _ in range(3):
        replicas.failed(first, "lost")
    assert replicas.place("t") is None
    assert replicas.errors() == "http://a:1 (lost); http://b:1 (refused)"


async def test_ejecting_tells_the_requests_and_whoever_waits() -> None:
    replicas = up(1, failures_to_eject=1)
    flight = fly(replicas.all[0], "r")
    waiting = replicas.bell.next()
    replicas.failed(replicas.all[0], "hung")
    assert flight.lost.result() == "hung"
    assert waiting.done()
    assert not Call("t").aborted.done()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "key 'urls' is missing"),
        ({"urls": []}, "urls"),
        ({"urls": "localhost:30000"}, "'localhost:30000' is not an address such as http://host:30000"),
        ({"urls": ["http://a:1", "http://a:1/"]}, "'http://a:1' is named twice"),
        ({"url": "http://a:1"}, "did you mean 'urls'?"),
        ({"urls": "http://a:1", "connect_timeout": 3}, "did you mean 'connect_timeout_s'?"),
        ({"urls": "http://a:1", "update_mode": "inplace"}, "update_mode"),
        ({"urls": "http://a:1", "resends": -1}, "resends"),
    ],
)
def test_wrong_settings_are_one_sentence(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=r"^sglang_server: ") as caught:
        validate(SGLangServerConfig, settings, "sglang_server")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_keys_do_not_show() -> None:
    config = SGLangServerConfig(urls="http://a:1/", api_key="open sesame")  # type: ignore[arg-type]
    assert config.urls == ("http://a:1",)
    assert "sesame" not in repr(config)
