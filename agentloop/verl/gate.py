"""Where requests wait while verl updates the weights behind a server."""

from __future__ import annotations

import asyncio


class Gate:
    """Open at first. Belongs to one event loop."""

    def __init__(self) -> None:
        self._shut: asyncio.Future[bool] | None = None
        """What waits for the gate to open: True when it does, False when requests are to be rejected until then."""

    async def passed(self) -> bool:
        """Wait until the gate is open; False at once for as long as requests are rejected."""
        while self._shut is not None:
            if not await asyncio.shield(self._shut):
                return False
        return True

    def shut(self, *, reject: bool = False) -> None:
        """Hold requests back, those that wait already included; with `reject` send them away."""
        if self._shut is None or (self._shut.done() and not reject):
            self._shut = asyncio.get_running_loop().create_future()
        if reject and not self._shut.done():
            self._shut.set_result(False)

    def open(self) -> None:
        shut, self._shut = self._shut, None
        if shut is not None and not shut.done():
            shut.set_result(True)
