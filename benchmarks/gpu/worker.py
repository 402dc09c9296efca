"""One worker process of the throughput benchmark: `python -m benchmarks.gpu.worker SETUP_JSON`; the benchmark starts them."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from agentloop.engines.base import Engine
from benchmarks.gpu.sides import Side, agentloop_side, verl_side
from benchmarks.gpu.wire import work_for


def import_all(kind: str) -> None:
    """What takes long and needs no engine."""
    import transformers  # noqa: F401

    if kind == "verl":
        import verl.experimental.agent_loop.tool_agent_loop  # noqa: F401


def main() -> None:
    setup: dict[str, Any] = json.loads(sys.argv[1])
    model = Path(setup["model"])

    def make(engine: Engine) -> Side:
        if setup["kind"] == "verl":
            return verl_side(engine, model, setup["response_length"])
        return agentloop_side(engine, model, Path(setup["journal"]), setup["response_length"])

    import_all(setup["kind"])
    while not Path(setup["socket"]).exists():  # the engine is starting
        time.sleep(0.1)
    asyncio.run(work_for(Path(setup["socket"]), setup["kind"], make))


if __name__ == "__main__":
    main()
