"""Write the datasets: `python -m examples.code_math.make_data FOLDER`."""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import pandas as pd

from examples.code_math.conversation import messages
from examples.code_math.task import OTHER, Problem, problems
from examples.quickstart.make_data import HELD_OUT_ROWS, HELD_OUT_SEED, TRAIN_ROWS, check_disjoint
from examples.quickstart.task import Split, distinct

PLAIN_KEPT = 0.4
"""Of the train problems that are asked in the `PLAIN` way: the model gets most of them right from the start, and where all
siblings are right nothing is learnt."""


def train_problems(count: int, seed: int) -> list[Problem]:
    """`count` train problems with different questions, of which more are asked in the `OTHER` way than of the held-out ones."""
    draw = random.Random(f"{seed}/kept")
    return distinct(count, (one for one in problems(seed, "train") if one.phrase == OTHER or draw.random() < PLAIN_KEPT))


def held_out(count: int = HELD_OUT_ROWS) -> list[Problem]:
    """The first `count` held-out problems: always the same ones."""
    return distinct(count, problems(HELD_OUT_SEED, "held_out"))


def row(problem: Problem, index: int, split: Split) -> dict[str, Any]:
    return {
        "data_source": "code_math",
        "prompt": messages(problem.question),
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
        "extra_info": {
            "index": index,
            "split": split,
            "lines": problem.depth,
            "kind": problem.kind,
            "phrase": problem.phrase,
            "code": problem.code,
        },
    }


def write(folder: Path, seed: int, train_rows: int = TRAIN_ROWS, held_out_rows: int = HELD_OUT_ROWS) -> tuple[Path, Path]:
    """Write both files and return their paths. Raises `ValueError` if they share a question or a program."""
    train, held = train_problems(train_rows, seed), held_out(held_out_rows)
    check_disjoint(train, held, ("question", "code"))
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.parquet", folder / "val.parquet")
    pd.DataFrame([row(problem, index, "train") for index, problem in enumerate(train)]).to_parquet(paths[0])
    pd.DataFrame([row(problem, index, "held_out") for index, problem in enumerate(held)]).to_parquet(paths[1])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.parquet and val.parquet of the code_math task.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="of the train problems")
    args = parser.parse_args()
    for path in write(args.folder, args.seed):
        print(path)


if __name__ == "__main__":
    main()
