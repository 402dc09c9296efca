"""What the engine benchmarks share: the start, and the sentence where there can be none."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
SETTINGS: dict[str, Any] = {
    "attention_backend": "triton",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_piecewise_cuda_graph": True,
    "mem_fraction_static": 0.3,
}
"""SGLang without FlashAttention, and up in half a minute."""


def missing() -> str | None:
    """Why nothing can be measured here."""
    import torch

    if not torch.cuda.is_available():
        return "there is no GPU here"
    if importlib.util.find_spec("sglang") is None:
        return "SGLang is not installed here"
    return None


def or_exit() -> None:
    """End with status 3 and one sentence where SGLang or a GPU cannot be had."""
    if reason := missing():
        print(f"{reason}: nothing was measured", file=sys.stderr)
        raise SystemExit(3)


def summary(differences: Sequence[float]) -> dict[str, float]:
    """Of absolute differences: how many, and their mean, 99th percentile and maximum."""
    ordered = sorted(differences)
    if not ordered:
        return {"tokens": 0}
    return {
        "tokens": len(ordered),
        "mean": round(sum(ordered) / len(ordered), 6),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 6),
        "max": round(ordered[-1], 6),
    }
