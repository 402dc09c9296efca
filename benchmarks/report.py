"""How every benchmark reports: one JSON object on the last line, also written to `benchmarks/results/NAME.json`."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Aim:
    """A figure that the project set out to reach."""

    name: str
    value: float
    aim: str
    """In words with the number, such as «at least 3»."""
    holds: bool


def machine() -> dict[str, Any]:
    """Processor, cores, memory (GiB), Python and torch: what the figures depend on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0] if names else model
    facts: dict[str, Any] = {"processor": model, "cores": os.cpu_count(), "python": platform.python_version()}
    facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    try:
        import torch

        facts["torch"] = torch.__version__
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name(0)
    except ImportError:
        pass
    return facts


def commit() -> str:
    """The short commit, with `+` if the tree differs from it; `unknown` outside a checkout."""
    try:
        here = Path(__file__).parent
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ":/*.py"], cwd=here, check=False).returncode
        return name.stdout.strip() + ("+" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save(name: str, figures: Mapping[str, Any], aims: Sequence[Aim], folder: Path = RESULTS) -> dict[str, Any]:
    """Write the result to `folder/NAME.json`, also one that is still growing; what was written."""
    result = {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": machine(),
        "commit": commit(),
        "figures": dict(figures),
        "aims": [asdict(aim) for aim in aims],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def report(name: str, figures: Mapping[str, Any], aims: Sequence[Aim], folder: Path = RESULTS) -> None:
    """Print and write the result. A missed aim is reported as missed; it is no error."""
    print(json.dumps(save(name, figures, aims, folder)))
