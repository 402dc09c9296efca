"""Which rank hosts which engine, on which devices, and in which environment the engine's processes start. Pure functions."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from agentloop.errors import ConfigError

ENABLE, DISABLE = IMBALANCE = ("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK", "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK")
"""SGLang compares the free memory of a group's GPUs while it starts, and gives up where one has less than nine tenths of
another. Beside a trainer on the same GPUs that is the usual case (the ranks hold shards of different sizes, rank 0 more than
the others) and no fault: the memory of the cache is computed from the smallest.

Versions before SGLang's change 15802 read the second name only, those after it the first only. They must not both be set:
0.5.12 copies the second's value over the first's when it is imported, as it is, so that `DISABLE=1` turns the check on. Both
count in the schedulers, which are processes of their own: whatever sets them after those have started sets nothing."""
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is."""

    rank: int
    node: str
    """Ray's id of the node."""
    address: str
    """The node's IP address."""
    port: int
    """Free on the node when this was asked: where an engine's nodes meet, if this rank leads it."""
    device: str | None
    """As `CUDA_VISIBLE_DEVICES` names it; `None` where there is no GPU."""
    pid: int
    generation: int | None = None
    """Of the journal, claimed by rank 0 for all."""


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's part in its engine."""

    replica: int
    """Number of the engine, which is the data-parallel rank."""
    leader: int
    """The rank that hosts the engine and answers for the group."""
    leads: bool
    node_rank: int
    nodes: int
    """Nodes that the engine spans."""
    starts: bool
    """The first rank of the group on its node: starts the engine's processes there."""
    devices: tuple[str, ...]
    """The group's devices on this node, by rank; empty where there are none."""


def seat(rank: int, group: int, places: Sequence[Place]) -> Seat:
    """The part of `rank` where `group` ranks in a row make an engine. Raises `ConfigError` for a group that cannot be one."""
    leader = rank - rank % group
    mates = places[leader : leader + group]
    nodes = list(dict.fromkeys(place.node for place in mates))
    here = [place for place in mates if place.node == places[rank].node]
    if len(here) * len(nodes) != group or [p.rank for p in here] != list(range(here[0].rank, here[0].rank + len(here))):
        told = ", ".join(f"{sum(place.node == node for place in mates)} on {_address(mates, node)}" for node in nodes)
        raise ConfigError(f"ranks {leader} to {leader + group - 1} make one engine and are spread unevenly over nodes: {told}")
    devices = [place.device for place in here if place.device is not None]
    if len(set(devices)) != len(devices):
        raise ConfigError(f"ranks {leader} to {leader + group - 1} make one engine and share a GPU: {', '.join(devices)}")
    return Seat(
        replica=leader // group,
        leader=leader,
        leads=rank == leader,
        node_rank=nodes.index(places[rank].node),
        nodes=len(nodes),
        starts=rank == here[0].rank,
        devices=tuple(devices),
    )


def _address(mates: Sequence[Place], node: str) -> str:
    return next(place.address for place in mates if place.node == node)


def engine_environment(devices: Sequence[str], present: Mapping[str, str]) -> dict[str, str | None]:
    """What the engine's processes need beside `present`, `None` for what they must not have: the group's devices, and the check
    of unequal memory turned off under the name that the installed SGLang reads. A user's own wish counts under either name."""
    check = False
    if DISABLE in present:
        check = not _yes(present[DISABLE])
    if ENABLE in present:
        check = _yes(present[ENABLE])
    found: dict[str, str | None] = {ENABLE: None, DISABLE: None}
    if _reads_enable():
        found[ENABLE] = "1" if check else "0"
    else:
        found[DISABLE] = "0" if check else "1"
    if devices:
        found[DEVICES] = ",".join(devices)
    return found


def _yes(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "yes", "y")


def _reads_enable() -> bool:
    """Asked of SGLang's source: its version number tells less, and importing it changes the environment. True where there is no
    SGLang."""
    found = find_spec("sglang")
    parts = [Path(folder) / "srt" for folder in (found.submodule_search_locations or ())] if found else []
    parts = [part for part in parts if part.is_dir()]
    files = [part / "environ.py" for part in parts]
    return not parts or any(file.is_file() and ENABLE in file.read_text(encoding="utf-8") for file in files)


@contextmanager
def environment(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Set them (`None`: unset) for this process and whatever it starts meanwhile; afterwards all is as before: a trainer may
    live in this process too, and its GPU is its own."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
