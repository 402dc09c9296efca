"""What generates tokens, as the loop sees it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import AsyncIterable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agentloop.errors import EngineError
from agentloop.trajectory import StopReason, VersionRuns

if TYPE_CHECKING:
    import torch

Weights = Iterable[tuple[str, "torch.Tensor"]] | AsyncIterable[tuple[str, "torch.Tensor"]]
"""Names and tensors, from an iterable of either kind; `agentloop.iterate.each` goes through both."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample one generation."""

    max_tokens: int
    """Hard limit of new tokens; at least 1."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 is off."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the generation; the one that did is the last of `Generation.ids`."""
    stop: tuple[str, ...] = ()
    """Strings that end the generation; the ids are kept as sampled, the matched string included."""
    seed: int | None = None
    log_probs: bool = True


def check_sampling(sampling: Sampling) -> None:
    """Raise `EngineError` for values that mean nothing."""
    if sampling.max_tokens < 1:
        raise EngineError(f"max_tokens is {sampling.max_tokens}; it must be at least 1")
    if not 0 <= sampling.temperature < float("inf"):
        raise EngineError(f"temperature is {sampling.temperature}; it must be 0 (greedy) or positive")
    if not 0 < sampling.top_p <= 1:
        raise EngineError(f"top_p is {sampling.top_p}; it must be above 0 and at most 1")
    if sampling.top_k < -1 or sampling.top_k == 0:
        raise EngineError(f"top_k is {sampling.top_k}; it must be at least 1, or -1 for off")


def check_ids(ids: Sequence[int], vocabulary: int | None) -> list[int]:
    """`ids` as a list of ints. Raises `EngineError` for what is no token id, an empty input, and ids outside of
    `[0, vocabulary)`; `None` leaves the upper end unchecked."""
    try:
        own = array("q", ids).tolist()
    except (TypeError, OverflowError) as error:
        raise EngineError(f"the input is not a sequence of token ids: {error}") from error
    if not own:
        raise EngineError("the input is empty")
    low, high = min(own), max(own)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        known = "0 and above" if vocabulary is None else f"0 to {vocabulary - 1}"
        raise EngineError(f"the input holds the token {low if low < 0 else high}; the model knows {known}")
    return own


@dataclass(frozen=True, slots=True)
class Generation:
    """What the engine answered."""

    ids: list[int]
    """As sampled, the stop token included."""
    log_probs: list[float] | None
    """One a token: of the sampled token under the distribution after temperature and before top-p and top-k (the
    convention of SGLang's decode log-probabilities); greedy sampling reports them at temperature 1."""
    stop_reason: StopReason
    weight_version: int | None = None
    """Version when the generation ended."""
    min_weight_version: int | None = None
    """Version when it began; `None` means the same as `weight_version`."""
    cached_tokens: int = 0
    """Tokens of the input whose keys and values were reused."""
    queue_s: float = 0.0
    data: Any = None
    """What the engine adds and the loop hands on unread (routed experts)."""
    version_runs: VersionRuns = ()
    """Of the tokens one by one, where the engine knows more than the two versions tell."""
    entropies: Sequence[float] | None = None
    """One a token: of the distribution that its log-probability is of, in nats. `None`: the engine does not tell."""


class Engine(ABC):
    """Generates, scores, and takes new weights.

    Every method may raise `EngineError`; nothing else is turned into data by the loop. Cancelling a `generate` leaves no
    request decoding.
    """

    @property
    def weight_version(self) -> int | None:
        """Version of the weights that serve now; `None` if the engine cannot tell."""
        return None

    @abstractmethod
    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        """Continue `ids`. `trajectory_id` is sticky: the next turn of the same trajectory comes with the same one, and
        its input starts with this input and this output, so that keys and values can be reused."""

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        """Log-probability of `ids[1:]`, each given all before it, under the weights that serve now; length
        `len(ids) - 1`."""
        raise EngineError(f"{type(self).__name__} cannot score")

    async def release(self, trajectory_id: str) -> None:
        """The trajectory has ended: what was kept for it may go. Never raises for an unknown one."""
        return

    async def update_weights(self, weights: Weights, version: int) -> None:
        """Copy named tensors into the model in place; afterwards every answer carries `version`. Kept keys and values are
        dropped. Unknown names or wrong shapes raise `EngineError` and leave the old version."""
        raise EngineError(f"{type(self).__name__} takes no weights")

    async def weight_checksums(self, names: Sequence[str] | None = None) -> dict[str, int]:
        """`agentloop.weights.checksum.checksum` of the weights that serve now, read from where they serve, under Hugging Face
        names; only of those in `names`, if given, leaving out what the engine has not. Raises `EngineError` where it cannot
        tell, and says why."""
        raise EngineError(f"{type(self).__name__} cannot tell checksums of its weights")

    async def weight_fingerprints(self) -> dict[str, str]:
        """Of each tensor as the engine itself keeps and names it (fused, cut, converted) a text that changes when its values
        do. Only to be compared with earlier answers of the same engine: for those that cannot tell `weight_checksums`. Raises
        `EngineError` where it cannot tell."""
        raise EngineError(f"{type(self).__name__} cannot tell fingerprints of its weights")

    async def abort_all(self) -> None:
        """End every running and waiting request with `StopReason.ABORTED` and the tokens so far."""
        return

    async def pause(self) -> None:
        """Start no new generation until `resume`."""
        return

    async def resume(self) -> None:
        return None

    async def sleep(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        """Free what `tags` name; `generate` then raises until `wake`."""
        return

    async def wake(self, tags: Sequence[str] = ("weights", "kv_cache")) -> None:
        return None

    async def close(self) -> None:
        """Stop for good. Idempotent."""
        return
