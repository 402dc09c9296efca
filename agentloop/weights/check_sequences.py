"""Which sequences a canary should score: those that between them touch all of the model, rare experts included.

Scores show nothing of an expert that no token of the canary is routed to, nor of a row of the embedding that none uses. So take
many candidates (texts of the kind that is trained on, and `random_sequences`, which reach further), record which experts they
are routed to (`check_transformers.routed`, or an engine that returns routed experts), and `pick`. What remains unseen says
`Coverage.unseen`: there, only checksums protect.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agentloop.errors import ConfigError


@dataclass(frozen=True)
class Coverage:
    """How often each expert is used."""

    counts: np.ndarray[Any, Any]
    """[mixture layers, experts]: tokens that are routed there."""

    @property
    def share(self) -> float:
        """Of all experts of all layers, those that some token uses; 1 for a model without experts."""
        return float((self.counts > 0).mean()) if self.counts.size else 1.0

    @property
    def unseen(self) -> list[tuple[int, int]]:
        """(which of the mixture layers, expert) of those that no token uses."""
        return [(int(layer), int(expert)) for layer, expert in np.argwhere(self.counts == 0)]

    @property
    def rarest(self) -> int:
        """Tokens that use the expert that the fewest use."""
        return int(self.counts.min()) if self.counts.size else 0


def random_sequences(vocabulary: int, count: int, length: int, *, seed: int = 0) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary; the same on every machine."""
    chance = random.Random(seed)
    return [[chance.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def coverage(routed: Sequence[Any], experts: int) -> Coverage:
    """`routed`: for each sequence an array of expert numbers, [tokens, mixture layers, experts a token]. Raises `ConfigError`
    for one outside of `[0, experts)`, and for arrays of other sizes."""
    tables = [_counts(array, experts) for array in routed]
    if not tables:
        raise ConfigError("the coverage of no sequence was asked for")
    return Coverage(np.sum(tables, axis=0))


def pick(routed: Sequence[Any], experts: int, count: int) -> list[int]:
    """Which `count` of the candidates to take, best first: each the one that adds most, where an expert used n times already
    counts 1 / (1 + n)², so that unseen ones come first and rare ones next. `routed` as in `coverage`, one a candidate."""
    if not 1 <= count <= len(routed):
        raise ConfigError(f"{count} sequences cannot be picked from {len(routed)}")
    tables = [_counts(array, experts) for array in routed]
    seen = np.zeros_like(tables[0])
    left = list(range(len(tables)))
    taken: list[int] = []
    while len(taken) < count:
        worth = 1.0 / (1.0 + seen) ** 2
        best = max(left, key=lambda index: (float((worth * (tables[index] > 0)).sum()), -index))
        left.remove(best)
        taken.append(best)
        seen = seen + tables[best]
    return taken


def _counts(array: Any, experts: int) -> np.ndarray[Any, Any]:
    numbers = np.asarray(array)
    if numbers.ndim != 3:
        raise ConfigError(
            f"routed experts are [tokens, layers, experts a token], and an array has the sizes {[*numbers.shape]}"
        )
    if numbers.size and not (numbers.min() >= 0 and numbers.max() < experts):
        raise ConfigError(f"routed experts hold the expert {numbers.max()}; the model has 0 to {experts - 1}")
    layers = numbers.shape[1]
    return (
        np.stack([np.bincount(numbers[:, layer].ravel(), minlength=experts) for layer in range(layers)])
        if layers
        else (np.zeros((0, experts), dtype=np.int64))
    )
