"""`python -m benchmarks.figures`: write every result of `benchmarks/results/` into `docs/performance.md`, between its marks."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
BY_STEP = ("logprobs_by_turn", "logprobs_sampled_by")
BEGIN, END = "<!-- results: begin -->\n", "<!-- results: end -->\n"


def command(result: dict[str, Any]) -> str:
    name = str(result["benchmark"])
    if "command" in result["figures"]:
        return str(result["figures"]["command"])
    if name.startswith("gpu_quickstart_"):
        return f"python -m benchmarks.gpu.quickstart {name.removeprefix('gpu_quickstart_')}"
    if name.startswith("quickstart_seed"):
        return f"make quickstart SEED={name.removeprefix('quickstart_seed')}"
    if (ROOT / "benchmarks" / "gpu" / f"{name.removeprefix('gpu_')}.py").exists():
        return f"python -m benchmarks.gpu.{name.removeprefix('gpu_')}"
    return f"python -m benchmarks.{name}"


def machine(facts: dict[str, Any]) -> str:
    """In words; what is known differs from result to result."""
    gpus = facts.get("gpus", 1)
    parts = [f"{gpus} × {facts['gpu']}" if "gpu" in facts else "", facts.get("processor", "")]
    parts += [f"{facts['cores']} cores" if "cores" in facts else ""]
    names = {"python": "Python", "torch": "torch", "sglang": "SGLang", "verl": "verl"}
    parts += [f"{words} {facts[key]}" for key, words in names.items() if key in facts]
    return ", ".join(part for part in parts if part)


def date(result: dict[str, Any], path: Path) -> str:
    """Of the run; of its commit for a result that does not tell."""
    if "date" in result:
        return str(result["date"])
    log = subprocess.run(["git", "log", "-1", "--format=%as", "--", str(path)], cwd=ROOT, capture_output=True, text=True)
    return log.stdout.strip() or "unknown"


def flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of all figures; of a list of numbers, such as one a training step, its first, last and largest."""
    if isinstance(value, dict):
        keys = list(value)
        if name in BY_STEP:  # by step: the first and the last, else the page would be nothing else
            keys = [*keys[:1], *keys[1:][-1:]]
        for key in keys:
            inside = value[key]
            yield from flat(inside, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        yield name, f"{value[0]:g} first, {value[-1]:g} last, {max(value):g} at most ({len(value)})"
    elif isinstance(value, list):
        for number, inside in enumerate(value, 1):
            yield from flat(inside, f"{name} #{number}")
    elif value is not None and name != "command":
        yield name, f"{value:g}" if isinstance(value, float) else str(value)


def section(result: dict[str, Any], path: Path) -> str:
    where = machine(result["machine"])
    lines = [
        f"### {result['benchmark']}",
        "",
        f"`{command(result)}` on {where}; {date(result, path)}, commit {result['commit']}, "
        f"[all of it](../benchmarks/results/{path.name}).",
        "",
    ]
    if result["aims"]:
        lines += ["| figure | value | aim | holds |", "|---|---|---|---|"]
        lines += [
            f"| {a['name']} | {a['value']:g} | {a['aim']} | {'yes' if a['holds'] else '**no**'} |" for a in result["aims"]
        ]
        lines.append("")
    figures = "; ".join(f"{name} **{value}**" for name, value in flat(result["figures"]))
    lines += ["<details><summary>Every figure</summary>", "", f"{figures}.", "", "</details>"]
    return "\n".join(lines) + "\n"


def written(page: str, folder: Path) -> str:
    """The page with the results of a folder between its marks."""
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    paths = sorted(folder.glob("*.json"))
    sections = "\n".join(section(json.loads(path.read_text()), path) for path in paths)
    return f"{before}{BEGIN}\n{sections}\n{END}{after}"


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(), RESULTS))


if __name__ == "__main__":
    main()
