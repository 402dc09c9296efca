"""No cheat gets reward, and each of them is one: it gets full reward from a grader that runs in the candidate's process."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agentloop.rewards.code import CodeReward
from agentloop.sandboxes import Sandbox, SandboxError
from agentloop.trajectory import Reward, Sample, Trajectory
from tests.conformance.sandboxes import available
from tests.rewards.cheats import FORGERIES, FUNCTION, FUNCTION_CHEATS, PROGRAM, PROGRAM_CHEATS
from tests.rewards.plain_sandbox import PlainSandbox

CHEATS = {**{name: (code, FUNCTION) for name, code in FUNCTION_CHEATS.items()},
          **{name: (code, PROGRAM) for name, code in PROGRAM_CHEATS.items()}}  # fmt: skip
OURS = {**CHEATS, **{name: (code, FUNCTION if "def f" in code else PROGRAM) for name, code in FORGERIES.items()}}

SOLVED: dict[str, tuple[str, dict[str, Any]]] = {
    "function": ("def f(n, xs):\n    return [7919, 'x'] if n == 3 else [6, 'y']", FUNCTION),
    "program": ("print({'3': 7919, '4': 6}[input()])", PROGRAM),
}


async def naively(code: str, truth: dict[str, Any], folder: Path) -> bool:
    """Whether the naive grader pays."""
    (folder / "task.json").write_text(json.dumps({"source": code, "fn": truth.get("fn"), "tests": truth["tests"]}))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("naive_grader.py")),
        "task.json",
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(20):
        out, _ = await process.communicate()
    return process.returncode == 0 and b'"failed": 0' in (out.splitlines() or [b'"failed": 0'])[-1]


async def paid(code: str, truth: Any, sandbox: Sandbox) -> Reward:
    sample = Sample([{"role": "user", "content": "q"}], ground_truth=truth)
    reward = CodeReward(sandbox=sandbox, timeout_s=5.0, score="fraction")
    return await reward(Trajectory(sample), sample, f"```python\n{code}\n```")


def test_there_are_enough() -> None:
    assert len(CHEATS) >= 50


@pytest.mark.parametrize("name", CHEATS)
async def test_it_is_a_cheat_and_gets_nothing_here(name: str, tmp_path: Path) -> None:
    code, truth = CHEATS[name]
    assert await naively(code, truth, tmp_path), "the naive grader does not pay for it, so it proves nothing"
    reward = await paid(code, truth, PlainSandbox())
    assert reward.value == 0.0, reward.info


@pytest.mark.parametrize("name", FORGERIES)
async def test_a_forged_frame_gets_nothing(name: str) -> None:
    code, truth = OURS[name]
    reward = await paid(code, truth, PlainSandbox())
    assert reward.value == 0.0, reward.info


@pytest.mark.parametrize("name", SOLVED)
async def test_what_solves_the_task_is_paid_by_both(name: str, tmp_path: Path) -> None:
    code, truth = SOLVED[name]
    assert await naively(code, truth, tmp_path)
    assert (await paid(code, truth, PlainSandbox())).value == 1.0


async def test_the_sandbox_never_sees_what_is_expected() -> None:
    sandbox = PlainSandbox()
    await paid("def f(n, xs):\n    return None", FUNCTION, sandbox)
    await paid("input()", PROGRAM, sandbox)
    assert len(sandbox.codes) == 4
    assert not any("7919" in code or '"y"' in code for code in sandbox.codes)


@pytest.mark.parametrize("kind", ["process", "docker", "remote"])
async def test_none_is_paid_in_a_sandbox(kind: str) -> None:
    several = asyncio.Semaphore(3)
    cases: dict[str, tuple[str, dict[str, Any]]] = {**SOLVED, **OURS}
    if kind == "docker":  # a container a test takes its time
        cases = {name: case for at, (name, case) in enumerate(cases.items()) if at % 3 == 0 or name in (*SOLVED, *FORGERIES)}

    async def pays(name: str, sandbox: Sandbox) -> str:
        code, truth = cases[name]
        async with several:
            try:
                reward = await paid(code, truth, sandbox)
            except SandboxError as error:
                return f"{name}: {error}"
        right = 1.0 if name in SOLVED else 0.0
        return "" if reward.value == right else f"{name}: {reward}"

    async with available(kind).start() as sandbox:
        wrong = await asyncio.gather(*(pays(name, sandbox) for name in cases))
    assert [sentence for sentence in wrong if sentence] == []
