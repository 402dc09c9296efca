"""Faults to plant between a sender of weights and an engine, to prove that a canary sees them.

`FaultyEngine` stands at the engine's door: what it is given it spoils and hands on to a real engine, which serves it and says
that all went well. `faults` lists those that a model's tensors allow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from agentloop.engines.base import Engine, Generation, Sampling, Weights
from agentloop.errors import EngineError
from agentloop.iterate import each

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]
LAYER = re.compile(r"^model\.layers\.(\d+)\.")
BIAS = "e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class Fault:
    """One way in which an update goes wrong."""

    name: str
    what: str
    """In a few words."""
    spoil: Callable[[Tensors, Tensors], Tensors]
    """`(new, old) -> what arrives`: `new` is the update as it was sent, `old` the one before; a name left out keeps its old
    value in the engine. Changes neither."""


class FaultyEngine(Engine):
    """An engine of which each update of weights suffers `fault`; with `None` all is well. Keeps the last update as it was sent,
    so it needs the model's size of memory once more."""

    def __init__(
        self,
        engine: Engine,
        fault: Fault | None = None,
        *,
        tells: Literal["checksums", "fingerprints", "nothing"] = "checksums",
    ) -> None:
        """`engine` stays its owner's: `close` leaves it open. `tells`: what it says of its weights, at most; SGLang only has
        fingerprints."""
        self.engine = engine
        self.fault = fault
        self._tells = tells
        self._last: Tensors = {}

    @property
    def weight_version(self) -> int | None:
        return self.engine.weight_version

    async def generate(self, ids: Sequence[int], sampling: Sampling, *, trajectory_id: str) -> Generation:
        return await self.engine.generate(ids, sampling, trajectory_id=trajectory_id)

    async def score(self, ids: Sequence[int], *, temperature: float = 1.0) -> list[float]:
        return await self.engine.score(ids, temperature=temperature)

    async def update_weights(self, weights: Weights, version: int) -> None:
        new = {name: tensor.detach().clone() async for name, tensor in each(weights)}
        arrives = new if self.fault is None else self.fault.spoil(new, self._last)
        self._last = {**self._last, **new}
        await self.engine.update_weights(arrives.items(), version)

    async def weight_checksums(self, names: Sequence[str] | None = None) -> dict[str, int]:
        if self._tells != "checksums":
            raise EngineError("this engine tells no checksums")
        return await self.engine.weight_checksums(names)

    async def weight_fingerprints(self) -> dict[str, str]:
        if self._tells == "nothing":
            raise EngineError("this engine tells no fingerprints")
        return await self.engine.weight_fingerprints()


def faults(tensors: Tensors) -> list[Fault]:
    """Those that a model with these tensors can suffer. Where one layer is spoilt it is the middle one of those that can be."""
    layers: dict[int, list[str]] = {}
    for name in tensors:
        if match := LAYER.match(name):
            layers.setdefault(int(match[1]), []).append(name)
    numbers = sorted(layers)
    middle = layers[numbers[len(numbers) // 2]]
    experts = [name for name in tensors if ".experts." in name]
    mixtures = [number for number in numbers if any(".experts." in name for name in layers[number])]
    matrices = [name for name in middle if tensors[name].dim() == 2 and name.endswith("proj.weight")]
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    tied = head in tensors and tensors[head].data_ptr() == tensors[embedding].data_ptr()
    norms = _pairs(middle, "input_layernorm", "post_attention_layernorm")
    found = [
        *_attention(tensors, middle),
        Fault("layer_stale", "one layer keeps its old weights", _stale(middle)),
        Fault("bucket_stale", "one bucket of twelve never arrived", _stale(_bucket(list(tensors)))),
        Fault("update_lost", "nothing of the update arrived", _stale(list(tensors))),
        Fault("delta_twice", "the step was added twice", _twice(list(tensors))),
        Fault("delta_twice_in_a_layer", "the step was added twice in one layer", _twice(middle)),
        Fault("requantised_twice", "one layer went through FP8 twice, and its first scales were lost", _requantised(matrices)),
        Fault("rounded_to_fp8", "one layer went through FP8, which nobody asked for", _rounded(matrices)),
        Fault("scale_inverted", "FP8 scales divide in one layer in place of multiplying", _inverted(matrices)),
        Fault(
            "embedding_permuted",
            "the rows of the embedding are one place off",
            _shifted([embedding, head] if tied else [embedding]),
        ),
        Fault("norms_exchanged", "a layer's two norms are exchanged", _exchange(norms)),
        Fault("gate_and_up_exchanged", "two halves of MLPs are exchanged", _exchange(_pairs(middle, "gate_proj", "up_proj"))),
        Fault("nan", "one element of a weight is no number", _nan(matrices[0])),
        Fault("one_element", "one element of a weight is off by a part in 64", _nudged(matrices[0])),
    ]
    twins = next(((a, b) for a in numbers for b in numbers if a < b and _alike(tensors, layers[a], layers[b])), None)
    if twins is not None:
        first, second = (f".layers.{number}." for number in twins)
        found.append(Fault("layers_exchanged", "two layers are exchanged", _exchange(_pairs(list(tensors), first, second))))
    if head in tensors and not tied:
        found.append(Fault("head_stale", "the output layer keeps its old weights", _stale([head])))
    if mixtures:
        layer = layers[mixtures[len(mixtures) // 2]]
        twins_of_experts = _pairs(layer, ".experts.0.", ".experts.1.")
        first_expert = [name for name in layer if ".experts.0." in name]
        router = [name for name in layer if name.endswith("mlp.gate.weight")]
        found += [
            Fault("experts_exchanged", "two experts of a layer are exchanged", _exchange(twins_of_experts)),
            Fault("expert_stale", "one expert of a layer keeps its old weights", _stale(first_expert)),
            Fault("experts_skipped", "all routed experts were skipped", _stale(experts)),
            Fault("router_stale", "one router keeps its old weights", _stale(router)),
        ]
    biases = [name for name in tensors if name.endswith(BIAS)]
    if biases:
        found.append(Fault("expert_bias_forgotten", "the expert biases keep their old values", _stale(biases)))
    return found


def _attention(tensors: Tensors, layer: list[str]) -> list[Fault]:
    queries = next(name for name in layer if name.endswith(("q_proj.weight", "q_b_proj.weight")))
    output = next(name for name in layer if name.endswith("o_proj.weight"))
    found = [
        Fault("shard_stale", "half of a query projection's rows (one rank of two) is old", _half(queries, 0, old=True)),
        Fault("shard_zero", "half of an output projection's columns (one rank of two) is zero", _half(output, 1, old=False)),
    ]
    pair = [name for name in layer if re.search(r"\.(q_a_proj|kv_a_proj_with_mqa)\.", name)]
    if len(pair) == 2:
        found.append(Fault("fused_pair_lost", "a fused pair came in two buckets and neither half was kept", _stale(pair)))
    square = next((n for n in layer if tensors[n].dim() == 2 and tensors[n].shape[0] == tensors[n].shape[1]), None)
    if square is not None:
        found.append(Fault("transposed", "a square matrix is transposed", _each([square], lambda new: new.t().contiguous())))
    norms = _pairs(layer, "q_norm", "k_norm")
    if norms:
        found.append(Fault("q_and_k_norm_exchanged", "a layer's norms of queries and keys are exchanged", _exchange(norms)))
    return found


def _alike(tensors: Tensors, one: list[str], other: list[str]) -> bool:
    """Whether two layers have the same tensors of the same sizes."""
    sizes = ({LAYER.sub("", name): tensors[name].shape for name in names} for names in (one, other))
    return next(sizes) == next(sizes)


def _bucket(names: list[str]) -> list[str]:
    size = max(len(names) // 12, 1)
    return names[5 * size : 6 * size]


def _pairs(names: list[str], first: str, second: str) -> list[tuple[str, str]]:
    """Those that `first` is in, with what they are called with `second` in its place."""
    return [(name, name.replace(first, second)) for name in names if first in name and name.replace(first, second) in names]


def _stale(names: Sequence[str]) -> Callable[[Tensors, Tensors], Tensors]:
    return lambda new, old: {name: tensor for name, tensor in new.items() if name not in names}


def _each(names: Sequence[str], change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Tensors], Tensors]:
    return lambda new, old: {name: change(tensor.clone()) if name in names else tensor for name, tensor in new.items()}


def _exchange(pairs: list[tuple[str, str]]) -> Callable[[Tensors, Tensors], Tensors]:
    other = dict(pairs) | {b: a for a, b in pairs}
    return lambda new, old: {name: new[other.get(name, name)] for name in new}


def _twice(names: Sequence[str]) -> Callable[[Tensors, Tensors], Tensors]:
    return lambda new, old: {
        name: tensor + (tensor - old[name]) if name in names and name in old else tensor for name, tensor in new.items()
    }


def _half(name: str, axis: int, *, old: bool) -> Callable[[Tensors, Tensors], Tensors]:
    def spoil(new: Tensors, last: Tensors) -> Tensors:
        whole = new[name].clone()
        half = whole.shape[axis] // 2
        part = whole.narrow(axis, half, whole.shape[axis] - half)
        if old:
            part.copy_(last[name].narrow(axis, half, whole.shape[axis] - half))
        else:
            part.zero_()
        return {**new, name: whole}

    return spoil


def _shifted(names: Sequence[str]) -> Callable[[Tensors, Tensors], Tensors]:
    return _each(names, lambda new: new.roll(1, 0))


def _requantised(names: Sequence[str]) -> Callable[[Tensors, Tensors], Tensors]:
    from agentloop.weights.fp8 import dequantise, quantise

    # The second run takes the stored float8 numbers for the weights, and overwrites the scales with its own.
    return _each(names, lambda new: dequantise(*quantise(quantise(new)[0].float())).to(new.dtype))


def _rounded(names: Sequence[str]) -> Callable[[Tensors, Tensors], Tensors]:
    from agentloop.weights.fp8 import dequantise, quantise

    return _each(names, lambda new: dequantise(*quantise(new)).to(new.dtype))


def _inverted(names: Sequence[str]) -> Callable[[Tensors, Tensors], Tensors]:
    from agentloop.weights.fp8 import dequantise, quantise

    def change(new: torch.Tensor) -> torch.Tensor:
        stored, scales = quantise(new)
        return dequantise(stored, 1 / scales).to(new.dtype)

    return _each(names, change)


def _nan(name: str) -> Callable[[Tensors, Tensors], Tensors]:
    return _each([name], lambda new: new.index_fill_(0, new.new_zeros(1).long(), float("nan")))


def _nudged(name: str) -> Callable[[Tensors, Tensors], Tensors]:
    def change(new: torch.Tensor) -> torch.Tensor:
        new.view(-1)[0] *= 1 + 1 / 64
        return new

    return _each([name], change)
