"""Write the datasets: `python -m examples.quickstart.make_data FOLDER`.

`train.parquet` and `val.parquet` have verl's columns (`docs/data.md`); `val` is the held-out set.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from examples.quickstart.conversation import messages
from examples.quickstart.task import STORIES, Problem, Split, distinct, problems

TRAIN_ROWS = 4096
HELD_OUT_ROWS = 256
HELD_OUT_SEED = 0
"""The held-out set is the same for every run, so that runs can be compared."""


OTHERS_KEPT = 0.4
"""Of the train problems other than stories with two calls or more: each story then comes often enough to be learnt, and
fewer problems are so easy that all siblings solve them, from which nothing is learnt."""


def train_problems(count: int, seed: int) -> list[Problem]:
    """`count` train problems with different questions, half of them stories (of the held-out ones three in ten)."""
    draw = random.Random(f"{seed}/kept")
    kept: Iterator[Problem] = (
        problem
        for problem in problems(seed, "train")
        if (problem.form in STORIES and problem.depth > 1) or draw.random() < OTHERS_KEPT
    )
    return distinct(count, kept)


def row(problem: Problem, index: int, split: Split) -> dict[str, Any]:
    return {
        "data_source": "quickstart",
        "prompt": messages(problem.question),
        "reward_model": {"style": "rule", "ground_truth": str(problem.answer)},
        "extra_info": {
            "index": index,
            "split": split,
            "depth": problem.depth,
            "form": problem.form,
            "question": problem.question,
            "expression": problem.expression,
        },
    }


def held_out(count: int = HELD_OUT_ROWS) -> list[Problem]:
    """The first `count` held-out problems: always the same ones."""
    return distinct(count, problems(HELD_OUT_SEED, "held_out"))


def write(folder: Path, *, seed: int, train_rows: int = TRAIN_ROWS, held_out_rows: int = HELD_OUT_ROWS) -> tuple[Path, Path]:
    """Write both files and return their paths. Raises `ValueError` if they share a question or an expression."""
    train, held = train_problems(train_rows, seed), held_out(held_out_rows)
    check_disjoint(train, held)
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.parquet", folder / "val.parquet")
    pd.DataFrame([row(problem, index, "train") for index, problem in enumerate(train)]).to_parquet(paths[0])
    pd.DataFrame([row(problem, index, "held_out") for index, problem in enumerate(held)]).to_parquet(paths[1])
    return paths


def check_disjoint(train: Sequence[Any], held: Sequence[Any], by: Sequence[str] = ("question", "expression")) -> None:
    """`ValueError` if a train problem equals a held-out one in one of the attributes `by`."""
    for what in by:
        shared = {getattr(problem, what) for problem in train} & {getattr(problem, what) for problem in held}
        if shared:
            raise ValueError(f"train and held-out problems share {len(shared)} {what}s, such as '{min(shared)}'")


def positive(text: str) -> int:
    """A command-line argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got '{text}'")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write train.parquet and val.parquet of the quickstart's task.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1, help="of the train problems")
    parser.add_argument("--train-rows", type=positive, default=TRAIN_ROWS)
    parser.add_argument("--held-out-rows", type=positive, default=HELD_OUT_ROWS)
    args = parser.parse_args()
    for path in write(args.folder, seed=args.seed, train_rows=args.train_rows, held_out_rows=args.held_out_rows):
        print(path)


if __name__ == "__main__":
    main()
