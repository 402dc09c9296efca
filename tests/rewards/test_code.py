"""The reward for code: what passes, what fails and why, and what is no verdict at all."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.rewards.code import CodeReward, last_block
from agentloop.rewards.code_tests import read_tests, same_output, same_value
from agentloop.sandboxes import SandboxError, load_sandbox
from agentloop.trajectory import CallRecord, CallStatus, EndReason, Reward, Sample, StopReason, ToolCall, Trajectory, Turn
from tests.rewards.plain_sandbox import DownSandbox, PlainSandbox

ADD = {"fn": "add", "tests": [{"args": [1, 2], "expected": 3}, {"args": [-1], "kwargs": {"b": 1}, "expected": 0}]}
ECHO = {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 5\n", "stdout": "10\n"}]}


def fenced(code: str) -> str:
    return f"Here it is:\n```python\n{code}\n```\nDone."


async def grade(code: str, truth: Any, *, text: str | None = None, **settings: Any) -> Reward:
    reward = CodeReward(sandbox=PlainSandbox(), **settings)
    sample = Sample([{"role": "user", "content": "q"}], ground_truth=truth)
    return await reward(Trajectory(sample), sample, fenced(code) if text is None else text)


async def verdict(code: str, truth: Any, **settings: Any) -> str:
    reward = await grade(code, truth, **settings)
    assert reward.value == float(reward.info["verdict"] == "passed")
    return str(reward.info["verdict"])


RIGHT_FUNCTIONS = [
    "def add(a, b):\n    return a + b",
    "add = lambda a, b: a + b",
    "class Solution:\n    def add(self, a, b):\n        print('working')\n        return a + b",
    "import functools\n@functools.cache\ndef add(a, b):\n    return a + b\nif __name__ == '__main__':\n    add()",
    "import dataclasses\n@dataclasses.dataclass\nclass N:\n    x: int\ndef add(a, b):\n    return N(a).x + N(b).x",
    "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n"
    "    with ThreadPoolExecutor(2) as pool:\n        return sum(pool.map(int, (a, b)))",
]

RIGHT_PROGRAMS = [
    "a, b = map(int, input().split())\nprint(a + b)",
    "import sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\n"
    "if __name__ == '__main__':\n    main()\n    sys.exit(0)",
    "import os\nprint(sum(map(int, os.read(0, 99).split())), end='')\nexit()",
    "import threading\ndef main():\n    print(sum(map(int, input().split())))\nthreading.Thread(target=main).start()",
    "import sys, atexit, io\nout = io.StringIO()\nsys.stdout, real = out, sys.stdout\n"
    "atexit.register(lambda: (real.write(out.getvalue()), real.flush()))\nprint(sum(map(int, input().split())))",
]


@pytest.mark.parametrize("code", RIGHT_FUNCTIONS)
async def test_a_right_function_passes(code: str) -> None:
    assert await verdict(code, ADD) == "passed"


@pytest.mark.parametrize("code", RIGHT_PROGRAMS)
async def test_a_right_program_passes(code: str) -> None:
    assert await verdict(code, ECHO) == "passed"


async def test_what_is_right_passes_in_the_process_sandbox() -> None:
    sandbox = load_sandbox("process")
    try:
        await sandbox.start()
    except SandboxError as error:
        pytest.skip(f"no process sandbox here: {error}")
    async with sandbox:
        reward = CodeReward(sandbox=sandbox)
        for truth, codes in ((ADD, RIGHT_FUNCTIONS), (ECHO, RIGHT_PROGRAMS)):
            sample = Sample([], ground_truth=truth)
            for code in codes:
                assert (await reward(Trajectory(sample), sample, fenced(code))).info == {"verdict": "passed", "detail": ""}, (
                    code
                )


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def add(a, b):\n    return a - b", "wrong_answer"),
        ("def plus(a, b):\n    return a + b", "missing"),
        ("def add(a, b):\n    return undefined", "raised"),
        ("def add(a, b:\n", "raised"),
        ("def add(a, b):\n    raise SystemExit(0)", "exited"),
        ("def add(a, b):\n    return add(a, b)", "raised"),
        ("def add(a, b):\n    while True: pass", "timeout"),
        ("def add(a, b):\n    import os; os.kill(os.getpid(), 9)", "error"),
        ("def add(a, b):\n    return {a + b}", "not_plain"),
        ("def add(a, b):\n    return 'x' * 10**6", "too_long"),
        ("def add(a, b):\n    print('x' * 10**6)\n    return a + b", "output_limit"),
        ("def add(a, b):\n    x = []\n    for _ in range(200): x = [x]\n    return x", "not_plain"),
        ("import threading, time\ndef add(a, b):\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n"
         "    return a + b", "threads"),
        ("def add(a, b):\n    input()\n    return a + b", "raised"),
        ("def add(a, b):\n    return '\ud800'", "raised"),
        ("x = 1\0", "raised"),
        ("x = " + "(" * 5_000, "raised"),
        ("   ", "no_code"),
        ("x = 1\n" * 20_000, "too_long"),
    ],
)  # fmt: skip
async def test_a_wrong_function_fails_and_says_why(code: str, expected: str) -> None:
    assert await verdict(code, ADD, timeout_s=1.5) == expected


async def test_output_after_a_program_or_a_broken_end_is_no_answer() -> None:
    right = "print(sum(map(int, input().split())))"
    assert await verdict(f"{right}\nraise ValueError('late')", ECHO) == "raised"
    assert await verdict(f"{right}\nimport sys\nsys.exit(1)", ECHO) == "exited"
    assert await verdict(f"{right}\nimport sys, os\nsys.stdout.flush()\nos._exit(0)", ECHO) == "no_result"
    assert await verdict(f"{right}\nprint('x' * 10**6)", ECHO) == "output_limit"


async def test_all_or_a_fraction() -> None:
    half = "def add(a, b):\n    return 3"
    assert (await grade(half, ADD)).value == 0.0
    reward = await grade(half, ADD, score="fraction")
    assert (reward.value, reward.components) == (0.5, {"passed": 0.5, "all_passed": 0.0})
    assert reward.info == {"verdict": "wrong_answer", "detail": "test 1: 3"}


async def test_a_preamble_runs_before_the_candidate() -> None:
    code = "from __future__ import annotations\ndef add(a: Optional[int], b):\n    return sum(List([a, b]))"
    assert await verdict(code, ADD) == "raised"
    assert await verdict(code, ADD, preamble="from typing import Optional\nList = list") == "passed"


async def test_with_all_nothing_runs_after_the_first_failure() -> None:
    sandbox = PlainSandbox()
    sample = Sample([], ground_truth={**ADD, "tests": ADD["tests"] * 4})  # type: ignore[operator]
    await CodeReward(sandbox=sandbox, parallel=2)(Trajectory(sample), sample, fenced("def add(a, b):\n    return 7"))
    assert len(sandbox.codes) == 2


async def test_the_total_time_ends_it() -> None:
    slow = "import time\ndef add(a, b):\n    time.sleep(0.3)\n    return a + b"
    assert await verdict(slow, ADD, parallel=1, total_timeout_s=0.6) in ("timeout", "total_timeout")


async def test_a_failing_sandbox_raises() -> None:
    sample = Sample([], ground_truth=ADD)
    with pytest.raises(SandboxError, match="no place to run"):
        await CodeReward(sandbox=DownSandbox())(Trajectory(sample), sample, fenced("def add(a, b): return a + b"))


@pytest.mark.parametrize(
    "truth",
    [None, "", "[]", "{", {}, {"tests": []}, {"fn": "f", "tests": [{"args": [1]}]}, {"inputs": ["1"], "outputs": []},
     {"inputs": [], "outputs": []}, {"tests": [{"expected": 1}]}, {"fn": "f", "tests": [3]},
     {"fn": "f", "tests": [{"arg": [1], "expected": 1}]}],
)  # fmt: skip
async def test_a_row_without_usable_tests_raises(truth: Any) -> None:
    with pytest.raises(ValueError, match=r"ground truth|test 0"):
        await grade("def f(): return 1", truth)


async def test_rows_as_datasets_write_them() -> None:
    right = "def add(a, b):\n    return a + b"
    program = "print(sum(map(int, input().split())))"
    columns = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}
    for truth in (columns, json.dumps(columns), {"fn_name": "add", "inputs": ["1\n2"], "outputs": ["3"]}):
        assert await verdict(right, truth) == "passed"
    numpy = {"fn": "add", "tests": np.array([{"args": np.array([1, 2]), "expected": np.int64(3)}], dtype=object)}
    assert await verdict(right, numpy) == "passed"
    assert await verdict(program, {"inputs": ["1 2"], "outputs": ["3"]}) == "passed"
    assert [test.stdin for test in read_tests({"inputs": [["1", "2"]], "outputs": ["3"]})] == ["1\n2"]


def test_values_are_compared_as_plain_json() -> None:
    def same(got: Any, expected: Any, tolerance: float = 1e-9, exact: bool = False) -> bool:
        return same_value(got, expected, tolerance=tolerance, exact_types=exact)

    nan, inf = float("nan"), float("inf")
    for got, expected in [(1, 1), (1.0, 1), (1, 1.0), (0.1 + 0.2, 0.3), (nan, nan), (inf, inf), ([1, [2]], [1, [2]]),
                          ({"a": None}, {"a": None}), (True, True), ("x", "x"), (10**30, 10**30), (1e-17, 0.0)]:  # fmt: skip
        assert same(got, expected)
    for got, expected in [(True, 1), (1, True), (False, 0), ("1", 1), (1, "1"), (None, 0), (0, None), (nan, 1.0), (1.0, nan),
                          (inf, -inf), (1e300, inf), (10**30 + 1, 10**30), (1e9 + 0.1, 10**9), ([1], [1, 2]), ([1, 2], [1]),
                          ([2, 1], [1, 2]), ({"a": 1, "b": 2}, {"a": 1}), ({}, []), ("", None), (10**400, 1.0), (0.30001, 0.3),
                          (1000000007, 1000000008), ([True], [1])]:  # fmt: skip
        assert not same(got, expected)
    assert not same(0.1 + 0.2, 0.3, tolerance=0.0)
    assert not same(1.0, 1, exact=True) and not same(1, 1.0, exact=True)


def test_outputs_are_compared_by_tokens_or_exactly() -> None:
    assert same_output("1  2\n3\n\n", "1 2 3", compare="tokens", tolerance=0)
    assert not same_output("12 3", "1 2 3", compare="tokens", tolerance=0)
    assert not same_output("1.0", "1.00", compare="tokens", tolerance=0)
    assert same_output("1.0", "1.00", compare="tokens", tolerance=1e-6)
    assert same_output("1e-1", "0.1000000001", compare="tokens", tolerance=1e-6)
    assert not same_output("2.0000001", "2", compare="tokens", tolerance=1e-3)
    assert not same_output("nan", "0.5", compare="tokens", tolerance=1e9)
    assert same_output("a\r\nb\n", "a\nb", compare="exact", tolerance=0)
    assert not same_output("a  b", "a b", compare="exact", tolerance=0)


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("```python\na\n```\ntext\n```py\nb\n```", "b\n"),
        ("```python\na\n```\n```bash\nls\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("````python\n```\nx\n```\n````", "```\nx\n```\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("```python\na\n```\nand\n```python\nb", None),
        ("```python\na", None),
        ("no code", None),
        ("`a`", None),
        ("```python\n```", ""),
    ],
)
def test_the_last_block_is_the_answer(text: str, block: str | None) -> None:
    assert last_block(text, ("python", "py", "")) == block


@pytest.mark.parametrize("text", ["```" * 50_000, "```python\n" * 20_000, "`" * 200_000, "```\n" * 50_001])
def test_hostile_fences_take_linear_time(text: str) -> None:
    last_block(text, ("python",))


async def test_a_submitted_answer_comes_first() -> None:
    sample = Sample([], ground_truth=ADD)
    trajectory = Trajectory(sample)
    trajectory.append_prompt([1])
    turn = Turn(0, 1, 2, StopReason.STOP)
    trajectory.append_sampled([2], None, turn)
    right, wrong = "def add(a, b):\n    return a + b", "def add(a, b):\n    return 0"
    reward = CodeReward(sandbox=PlainSandbox())

    async def value(*calls: tuple[dict[str, Any], CallStatus]) -> float:
        turn.calls[:] = [CallRecord(ToolCall("submit", arguments), status, "ok") for arguments, status in calls]
        return (await reward(trajectory, sample, fenced(wrong))).value

    assert await value(({"answer": right}, CallStatus.OK)) == 1.0
    assert await value(({"answer": fenced(right)}, CallStatus.OK)) == 1.0
    assert await value(({"answer": wrong}, CallStatus.OK), ({"code": right}, CallStatus.OK)) == 1.0
    assert await value(({"answer": right}, CallStatus.ERROR)) == 0.0
    trajectory.end_reason = EndReason.TOKEN_LIMIT
    assert await value(({"answer": right}, CallStatus.OK)) == 1.0


async def test_a_cut_off_trajectory_has_no_answer() -> None:
    sample = Sample([], ground_truth=ADD)
    trajectory = Trajectory(sample)
    trajectory.end_reason = EndReason.TOKEN_LIMIT
    reward = await CodeReward(sandbox=PlainSandbox())(trajectory, sample, fenced("def add(a, b): return a + b"))
    assert (reward.value, reward.info["verdict"]) == (0.0, "truncated")


def test_settings_are_checked() -> None:
    assert load_reward("agentloop.rewards.code:CodeReward", {"sandbox": PlainSandbox(), "score": "fraction"})
    for settings, message in [
        ({"scores": "all"}, "reward code: unknown key 'scores'; did you mean 'score'?"),
        ({"score": "most"}, "reward code: key 'score'"),
        ({"timeout_s": 0}, "reward code: key 'timeout_s'"),
    ]:
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
            CodeReward(sandbox=PlainSandbox(), **settings)
    with pytest.raises(ConfigError, match="reward code: sandbox: there is no sandbox of kind 'proces'"):
        CodeReward(sandbox="proces")
