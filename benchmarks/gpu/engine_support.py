"""What the engine benchmarks share: the start, the sentence where there can be none, and a result that grows."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.report import RESULTS, Aim, report, save

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


def arguments(parser: argparse.ArgumentParser, name: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """What `parser` knows, and `engine` and `results`, as every benchmark has them that also runs on a CPU; `name`, of the
    result, is `gpu_NAME` or `NAME_local`."""
    parser.add_argument("--engine", choices=["sglang", "local"], default="sglang")
    parser.add_argument("--results", type=Path, help=f"default: benchmarks/results; with --engine local runs/{name}")
    args = parser.parse_args(argv)
    local = args.engine == "local"
    args.name = f"{name}_local" if local else f"gpu_{name}"
    if args.results is None:
        args.results = Path("runs") / name if local else RESULTS
    return args


def refused(args: argparse.Namespace) -> bool:
    """Whether SGLang was asked for and cannot be had; said in one sentence, for a benchmark that then ends with status 3."""
    why = missing() if args.engine == "sglang" else None
    if why:
        print(f"{why}: nothing was measured", file=sys.stderr)
    return why is not None


def command(module: str) -> str:
    """As it was typed."""
    return f"python -m benchmarks.gpu.{module} {' '.join(sys.argv[1:])}".strip()


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


class Result:
    """A benchmark's figures, written after every step, so that one that is cut short has told what it knew."""

    def __init__(self, name: str, aims: Callable[[Mapping[str, Any]], list[Aim]], folder: Path, **figures: Any) -> None:
        self.name, self.aims, self.folder = name, aims, folder
        self.figures: dict[str, Any] = {**figures, "not_run": {}}
        self.began = perf_counter()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return perf_counter() - self.began

    def note(self, **figures: Any) -> None:
        self.figures.update(figures)
        self.say(figures)

    def under(self, key: str, place: str, **figures: Any) -> None:
        """Into the mapping `place` of the mapping `key`."""
        self.figures.setdefault(key, {}).setdefault(place, {}).update(figures)
        self.say({place: figures})

    def refuse(self, step: str, why: str) -> None:
        self.figures["not_run"][step] = why
        self.say({"not run": {step: why}})

    def say(self, told: Any) -> None:
        print(f"[{self.seconds:6.1f} s] {told}", flush=True)
        save(self.name, self.figures, self.aims(self.figures), self.folder)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """What goes wrong in it is told under `not_run`, and what follows runs."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.refuse(name, failure(error))

    def report(self) -> None:
        report(self.name, self.figures, self.aims(self.figures), self.folder)


def failure(error: BaseException) -> str:
    """What refused, and why: the error, and the last line of ours that led to it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if f"{os.sep}benchmarks{os.sep}" in frame.filename]
    where = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}{where}"
