"""Which replica takes which trajectory, and which replicas take none. Bookkeeping only: no request is made here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)

MOST_ORPHANS = 4096
"""Request ids that are remembered for a replica that went away."""


class Bell:
    """Wakes everyone who waits for it."""

    def __init__(self) -> None:
        self._next: asyncio.Future[None] | None = None

    def ring(self) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result(None)
        self._next = None

    def next(self) -> asyncio.Future[None]:
        """Done at the next ring. Shared: wait for it with `asyncio.wait`, which does not cancel it."""
        if self._next is None:
            self._next = asyncio.get_running_loop().create_future()
        return self._next


@dataclass(eq=False, slots=True)
class Flight:
    """One request on its way."""

    rid: str
    replica: Replica
    answer: asyncio.Task[Any]
    lost: asyncio.Future[str]
    """Set to the reason when the replica is ejected."""
    workers: tuple[str, ...]
    """Who may be decoding it."""


@dataclass(eq=False, slots=True)
class Replica:
    """One address that takes requests: a server, or a router with its workers."""

    url: str
    workers: tuple[str, ...] = ()
    """Addresses of the servers behind it, which take what a router does not pass on; a server's own address."""
    is_router: bool | None = None
    """`None`: not asked yet."""
    up: bool = False
    """It takes requests. Every replica has to answer a health check first."""
    seen: bool = False
    """It was up before."""
    failures: int = 0
    """In a row."""
    error: str = ""
    """The last failure."""
    flights: dict[str, Flight] = field(default_factory=dict)
    trajectories: int = 0
    """Trajectories that live here, between turns or in one."""
    placed: int = 0
    """Trajectories that were ever placed here."""
    version: str | None = None
    """The last weight version that it told."""
    orphans: list[str] = field(default_factory=list)
    """Ids of requests that may still be decoding there, although nobody waits for them."""

    def __post_init__(self) -> None:
        self.workers = self.workers or (self.url,)

    @property
    def load(self) -> int:
        """A trajectory that is generating counts twice: one that waits for its tools comes back."""
        return self.trajectories + len(self.flights)

    def orphan(self, rid: str) -> None:
        self.orphans.append(rid)
        del self.orphans[:-MOST_ORPHANS]


class Replicas:
    """All replicas, and where each trajectory lives.

    A trajectory stays with its replica, whose prefix cache holds its tokens, until it is forgotten or the replica cannot
    take it; then it moves for good. A new one goes to the replica with the least load.
    """

    def __init__(self, urls: Iterable[str], failures_to_eject: int) -> None:
        self.all = [Replica(url) for url in urls]
        self._failures_to_eject = failures_to_eject
        self._homes: dict[str, Replica] = {}
        self.bell = Bell()
        """Rings when a replica goes away or comes back."""

    def place(self, trajectory_id: str, avoid: Collection[Replica] = ()) -> Replica | None:
        """Where the next turn of this trajectory goes; `None` if no replica is up. Those in `avoid` are taken only when there
        is no other."""
        usable = [replica for replica in self.all if replica.up]
        better = [replica for replica in usable if replica not in avoid] or usable
        if not better:
            return None
        home = self._homes.get(trajectory_id)
        if home is not None and home in better:
            return home
        chosen = min(better, key=lambda replica: (replica.load, replica.placed))
        self.forget(trajectory_id)
        self._homes[trajectory_id] = chosen
        chosen.trajectories += 1
        chosen.placed += 1
        return chosen

    def forget(self, trajectory_id: str) -> None:
        home = self._homes.pop(trajectory_id, None)
        if home is not None:
            home.trajectories -= 1

    def succeeded(self, replica: Replica) -> None:
        replica.failures = 0

    def failed(self, replica: Replica, why: str, *, decisive: bool = False) -> None:
        """Count a failure; eject the replica after too many in a row, or at once if nothing listens there."""
        replica.failures += 1
        replica.error = why
        if replica.up and (decisive or replica.failures >= self._failures_to_eject):
            self.eject(replica)

    def eject(self, replica: Replica) -> None:
        """No more requests go there, and those that are there count as lost."""
        logger.warning("%s gets no more requests, %d are sent elsewhere: %s", replica.url, len(replica.flights), replica.error)
        replica.up = False
        for flight in replica.flights.values():
            if not flight.lost.done():
                flight.lost.set_result(replica.error)
        self.bell.ring()

    def returned(self, replica: Replica) -> None:
        if replica.seen:
            logger.warning("%s is back and gets requests again", replica.url)
        replica.up = replica.seen = True
        replica.failures = 0
        self.bell.ring()

    def errors(self) -> str:
        """Each address and why it takes nothing, for a sentence."""
        return "; ".join(f"{replica.url} ({replica.error or 'no answer yet'})" for replica in self.all)
