"""Mathematical answers a second, beside math-verify's own, and what bombs cost.

`python -m benchmarks.math_rewards [--answers 3000] [--math-verify 400] [--pairs FOLDER]`

Both graders run in the same pool of two killable workers with 64 callers, and get the same texts: solutions of about a thousand
characters that end in a box, of the kinds that mathematics datasets have, half of them wrong. math-verify gets as long as it
likes; its `parse` and `verify` are called as its documentation says. With the folder of pair sets (`../shared/data/pairs` of
the repository by default, if it is there) the wrong verdicts of both are counted too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from agentloop.rewards.math import Grader
from agentloop.sandboxes.killable import WorkerPool
from benchmarks.report import Aim, report

CALLERS = 64
WORKERS = 2
ROOT = Path(__file__).parents[1]


def texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(solution, ground truth), half of them wrong."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        gold, same = rng.choice(
            [
                (str(a * b), str(a * b)),
                (f"\\frac{{{a}}}{{{b}}}", f"\\dfrac{{{a * 2}}}{{{b * 2}}}"),
                (f"{a}.5", f"\\frac{{{2 * a + 1}}}{{2}}"),
                (f"{a}\\sqrt{{{b}}}", f"\\sqrt{{{a * a * b}}}"),
                (f"(x+{a})(x-{b})", f"x^2+{a - b}x-{a * b}".replace("+-", "-")),
                (f"({a},{b})", f"\\left( {a}, {b} \\right)"),
                (f"[{a},{a + b}]", f"{a} \\le x \\le {a + b}"),
                (f"\\{{{a},{b + 100}\\}}", f"\\{{{b + 100}, {a}\\}}"),
                (f"{a}\\pi", f"{a} \\pi"),
                (f"{a * 1000 + c}", f"{a},{c:03d}"),
            ]
        )
        answer = same if index % 2 else f"{c + 1000}"
        work = " ".join(f"We have ${rng.randint(1, 99)} + {rng.randint(1, 99)}x$ in step {step}." for step in range(25))
        found.append((f"{work}\n\nSo the answer is $\\boxed{{{answer}}}$.", gold))
    return found


def math_verify_one(payload: dict[str, str]) -> bool:
    """What a worker of the other pool does."""
    from math_verify import parse, verify  # type: ignore[import-not-found, import-untyped, unused-ignore]

    return bool(verify(parse(f"${payload['gold']}$"), parse(payload["text"])))


async def rate(one: Any, items: list[tuple[str, str]]) -> tuple[float, int]:
    """Answers a second with `CALLERS` callers, and how many were right."""
    left = iter(items)
    right = 0

    async def caller() -> None:
        nonlocal right
        for text, gold in left:
            verdict = bool(await one(text, gold))
            right += verdict

    start = perf_counter()
    await asyncio.gather(*(caller() for _ in range(CALLERS)))
    return len(items) / (perf_counter() - start), right


async def stall(stop: asyncio.Event) -> tuple[float, float]:
    """The longest pause of this event loop in milliseconds, by the wall clock and in its own CPU time."""
    wall = cpu = 0.0
    while not stop.is_set():
        before, before_cpu = perf_counter(), thread_time()
        await asyncio.sleep(0.001)
        wall, cpu = max(wall, perf_counter() - before - 0.001), max(cpu, thread_time() - before_cpu)
    return wall * 1e3, cpu * 1e3


def bombs(count: int) -> list[str]:
    kinds: list[Callable[[int], str]] = [
        lambda n: f"9^{{9^{{9^{{{n}}}}}}}",
        lambda n: f"{n + 10}!!!",
        lambda n: "\\frac{1}{" * (25 * n) + "1" + "}" * (25 * n),
        lambda n: "(" * (500 * n) + "1" + ")" * (500 * n),
        lambda n: "1" * (5000 * n),
        lambda n: f"(x+1)^{{10^{{{n}}}}}",
        lambda n: "*".join(f"\\sin({k}x)" for k in range(n)),
        lambda n: ",".join(f"\\sqrt{{{k}}}" for k in range(2 * n)),
        lambda n: "\\begin{pmatrix}a&b\\\\c&d\\end{pmatrix}" * n,
        lambda n: "\\pm 1" * n,
    ]
    return [f"\\boxed{{{kinds[n % len(kinds)](n)}}}" for n in range(1, count + 1)]


async def main_async(answers: int, theirs: int, pair_sets: dict[str, list[dict[str, Any]]]) -> None:
    figures: dict[str, Any] = {"callers": CALLERS, "workers": WORKERS}
    grader = Grader(WORKERS, 2.0, 512, "process")
    items = texts(answers)

    async def ours_one(text: str, gold: str) -> float:
        return (await grader.grade(text, gold)).value

    await ours_one(*items[0])
    figures["answers_per_s"], right = await rate(ours_one, items)
    figures["right_of"] = [right, len(items), sum(index % 2 for index in range(len(items)))]

    stop = asyncio.Event()
    watching = asyncio.create_task(stall(stop))
    longest = 0.0
    verdicts: dict[str, int] = {}
    for bomb in bombs(200):
        start = perf_counter()
        reward = await grader.grade(bomb, "123456")
        longest = max(longest, perf_counter() - start)
        verdict = reward.info["verdict"]
        verdicts[verdict] = verdicts.get(verdict, 0) + 1
    stop.set()
    wall_ms, cpu_ms = await watching
    figures["bombs"] = {"count": 200, "longest_s": longest, "stall_ms": wall_ms, "stall_cpu_ms": cpu_ms, "verdicts": verdicts}

    pool = WorkerPool(
        "benchmarks.math_rewards:math_verify_one",
        workers=WORKERS,
        limit_s=60,
        memory_mb=2048,
        warm_up={"text": "\\boxed{1}", "gold": "1"},
        scope="process",
        paths=[str(ROOT)],
    )

    async def theirs_one(text: str, gold: str) -> bool:
        return bool(await pool.call({"text": text, "gold": gold}))

    await theirs_one(*items[0])
    figures["math_verify_per_s"], right = await rate(theirs_one, texts(theirs, seed=1))
    figures["math_verify_right_of"] = [right, theirs, theirs // 2]

    sets: dict[str, dict[str, int]] = {}
    for name, pairs in pair_sets.items():
        wrong = {"pairs": len(pairs), "ours": 0, "math_verify": 0}
        for pair in pairs:
            wrong["ours"] += bool(await ours_one(pair["pred"], pair["gold"])) != bool(pair["exp"])
            wrong["math_verify"] += (await theirs_one(pair["pred"], pair["gold"].strip("$"))) != bool(pair["exp"])
        sets[name] = wrong
    figures["wrong_verdicts"] = sets
    await pool.close()
    await grader.close()
    aims = [
        Aim("answers a second", figures["answers_per_s"], "at least 300", figures["answers_per_s"] >= 300),
        Aim("longest stall of the event loop by 200 bombs, CPU ms", cpu_ms, "at most 20", cpu_ms <= 20),
    ]
    for name, wrong in sets.items():
        ours, fewer_than = wrong["ours"], wrong["math_verify"]
        aims.append(Aim(f"wrong verdicts on {name}", ours, f"fewer than {fewer_than}", ours < fewer_than))
    report("math_rewards", figures, aims)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=3000)
    parser.add_argument("--math-verify", type=int, default=400)
    parser.add_argument("--pairs", type=Path, default=ROOT.parent / "shared" / "data" / "pairs")
    arguments = parser.parse_args()
    pair_sets = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(arguments.pairs.glob("*.json"))}
    asyncio.run(main_async(arguments.answers, arguments.math_verify, pair_sets))


if __name__ == "__main__":
    main()
