"""Functions that the tests give to a pool of workers."""

from __future__ import annotations

import os
import time
from typing import Any


def work(payload: Any) -> Any:
    kind, value = payload if isinstance(payload, list) else ("echo", payload)
    if kind == "bomb":
        return 9**9**value  # in C, with the interpreter's lock held
    if kind == "sleep":
        time.sleep(value)
    if kind == "memory":
        return len(bytearray(value * 2**20))
    if kind == "exit":
        os._exit(value)
    if kind == "raise":
        raise KeyError(value)
    if kind == "pid":
        return os.getpid()
    if kind == "status":
        with open("/proc/self/status", encoding="ascii") as status:
            return {name: text.strip() for name, _, text in (line.partition(":") for line in status)}
    return value
