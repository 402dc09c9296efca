"""One container with its driver."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

from agentloop.sandboxes.base import Layer, Limits, SandboxError
from agentloop.sandboxes.docker.channel import Channel, Gone, checked
from agentloop.sandboxes.docker.config import DockerConfig
from agentloop.sandboxes.docker.engine import DRIVER_FILES, Engine

logger = logging.getLogger(__name__)

DRIVER = Path(__file__).parent.parent / "repl_driver.py"
_CHUNK = 1 << 18


class Container:
    """Made, started and greeted by `make`; gone after `remove`."""

    def __init__(self, engine: Engine, limits: Limits, name: str, channel: Channel, inside: dict[str, Any]) -> None:
        self._engine, self.limits, self.name = engine, limits, name
        self.channel = channel
        self.inside = inside
        """What the driver found in there: see `inside` in repl_driver.py."""
        self.oom_before = False
        """Something in it was killed for memory, and it lived on."""

    @staticmethod
    async def make(engine: Engine, config: DockerConfig, limits: Limits) -> Container:
        """A running container whose driver has answered. Raises `SandboxError` and leaves nothing if that fails."""
        name, channel = "", None
        try:
            async with asyncio.timeout(config.start_timeout_s):
                command = [config.python, "-I", "-X", "utf8", "-c", DRIVER.read_text(encoding="utf-8")]
                name = await _created(engine, engine.create(limits, command))
                if await engine.is_podman():  # it attaches to nothing that does not run
                    await engine.start(name)
                    channel = Channel(*await engine.attach(name))
                else:
                    channel = Channel(*await engine.attach(name))
                    await engine.start(name)
                inside, _ = await channel.ask("hello", preload=list(config.preload), open_files=limits.open_files)
                if "error" in inside:
                    raise SandboxError(f"docker: the driver in image '{config.image}' cannot start: {inside['error']}")
                return Container(engine, limits, name, channel, inside)
        except BaseException as error:
            complaint = channel.complaint if channel is not None else ""
            await asyncio.shield(_discard(engine, name, channel))
            if isinstance(error, TimeoutError):
                raise SandboxError(f"docker: no container within {config.start_timeout_s:g} s") from error
            if isinstance(error, Gone):
                why = complaint or f"is there a `{config.python}` in it?"
                raise SandboxError(f"docker: the driver does not start in image '{config.image}': {why}") from error
            raise

    @property
    def alive(self) -> bool:
        return self.channel.alive

    async def put(self, path: str, data: bytes) -> None:
        """Raises `OSError` as the file system in there does, `Gone`."""
        parts = [data[at : at + _CHUNK] for at in range(0, len(data), _CHUNK)] or [b""]
        for number, part in enumerate(parts):
            first, last = number == 0, number == len(parts) - 1
            answer, _ = await self.channel.ask("put", part, path=path, first=first, last=last)
            checked(answer)

    async def get(self, path: str, max_bytes: int) -> bytes:
        """Raises `OSError` as the file system in there does, with `EFBIG` if it is larger than `max_bytes`, and `Gone`."""
        return await self.channel.stream("get", path=path, max_bytes=max_bytes)

    async def why_gone(self) -> tuple[bool, str]:
        """Of a container that has ended: whether it was for memory, and a sentence."""
        try:
            state = await self._engine.state(self.name)
        except SandboxError as error:
            return False, str(error)
        # Also true of a container in which a child was killed for memory long ago.
        if state.get("OOMKilled") and not self.oom_before:
            return True, f"it needed more memory than the {self.limits.memory_mb} MiB that it may have"
        said = self.channel.complaint
        if not state:
            return False, "docker: its container was removed by someone else"
        return False, f"docker: its container ended with status {state.get('ExitCode')}{': ' + said if said else ''}"

    async def remove(self) -> None:
        """End everything in it, and remove it. Never raises."""
        await _discard(self._engine, self.name, self.channel)

    def layers(self, config: DockerConfig) -> list[Layer]:
        return _layers(self.inside, config, self.limits)


async def _created(engine: Engine, creating: Any) -> str:
    """Await the creation of a container; cancelled meanwhile, wait for it all the same and remove what was made."""
    task = asyncio.ensure_future(creating)
    try:
        return str(await asyncio.shield(task))
    except asyncio.CancelledError:
        made = await asyncio.gather(task, return_exceptions=True)
        if isinstance(made[0], str):
            await _discard(engine, made[0], None)
        raise


async def _discard(engine: Engine, name: str, channel: Channel | None) -> None:
    if channel is not None:
        channel.hang_up()
    try:
        if name:
            await engine.remove(name)
    except SandboxError as error:
        logger.warning("container %s may be left behind: %s", name[:12], error)
    if channel is not None:
        await channel.close()


def _layers(inside: dict[str, Any], config: DockerConfig, limits: Limits) -> list[Layer]:
    def number(name: str) -> int:
        return int(inside[name]) if str(inside[name]).isdigit() else 2**63

    others = [name for name in inside["interfaces"] if name != "lo"]
    profile = "our profile" if config.seccomp == "agentloop" else "the engine's profile"
    quota = str(inside["quota"]).split()[0] if inside["quota"] else ""
    return [
        Layer("process namespace", inside["pid"] == 1, "seeing, tracing and killing other processes"),
        Layer("network namespace", not others, "reaching the network, the host's loopback", ", ".join(others)),
        Layer("read-only image", inside["read_only"], "writing outside the working folder"),
        Layer("own user", inside["uid"] != 0, "what root may do", f"uid {inside['uid']}"),
        Layer("no capabilities", inside["capabilities"] == 0, "what root may do", f"{inside['capabilities']:#x}"),
        Layer("no new privileges", inside["no_new_privs"], "gaining rights from setuid programs"),
        Layer("seccomp", inside["seccomp"], "io_uring, keyctl, ptrace, nested namespaces, vsock", profile),
        Layer("cgroup memory", number("memory") <= limits.memory_mb * 2**20, "memory in one and in many processes"),
        Layer("cgroup pids", number("pids") <= limits.processes + 1, "fork bombs"),
        Layer("cgroup cpu", quota.isdigit(), "taking all CPUs", f"{config.cpus:g} CPUs"),
        Layer("disk", inside["disk_bytes"] <= limits.disk_mb * 2**20, "filling the disk", f"{limits.disk_mb} MiB in memory"),
        Layer("inodes", 0 < inside["files"] <= limits.files, "filling the disk with empty files", f"{limits.files} files"),
        Layer("open files", inside["open_files"] <= limits.open_files + DRIVER_FILES, "using up file handles"),
        Layer("memory events", inside["counts_oom"], "mistaking a kill for memory for another", "read from the cgroup"),
        Layer("CPU time", inside["counts_cpu"], "using more CPU time than `cpu_s`", "read from the cgroup"),
    ]
