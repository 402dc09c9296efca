"""Weights on their way from the trainer to a local server: a few large buckets instead of many small tensors."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agentloop.engines.base import Weights
from agentloop.iterate import each

BUCKETS = "agentloop_buckets"
"""The wire format (as verl calls it) of references to `WeightBucket`s in Ray's object store."""


@dataclass(frozen=True, slots=True)
class WeightBucket:
    """Named tensors in one flat byte array, which Ray moves without pickling or copying it."""

    entries: list[tuple[str, torch.dtype, tuple[int, ...], int]]
    """Name, dtype, shape and offset in bytes."""
    data: np.ndarray[Any, np.dtype[np.uint8]]

    @classmethod
    def pack(cls, named: list[tuple[str, torch.Tensor]]) -> WeightBucket:
        entries: list[tuple[str, torch.dtype, tuple[int, ...], int]] = []
        end = 0
        for name, tensor in named:
            entries.append((name, tensor.dtype, tuple(tensor.shape), end))
            end += -(-tensor.nbytes // 8) * 8  # aligned, so that any dtype may be viewed in place
        data: np.ndarray[Any, np.dtype[np.uint8]] = np.empty(end, dtype=np.uint8)
        for (_, _, _, offset), (_, tensor) in zip(entries, named, strict=True):
            flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            data[offset : offset + tensor.nbytes] = flat.numpy()
        return cls(entries, data)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Views into `data`; read-only where Ray mapped it from shared memory."""
        for name, dtype, shape, offset in self.entries:
            count = int(np.prod(shape, dtype=np.int64))
            if count == 0:
                yield name, torch.empty(shape, dtype=dtype)
                continue
            piece = self.data[offset : offset + count * dtype.itemsize]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # «not writable»: nobody writes
                yield name, torch.frombuffer(piece, dtype=dtype).reshape(shape)


async def buckets(weights: Weights, limit: int) -> AsyncIterator[WeightBucket]:
    """Buckets of at most `limit` bytes; a larger tensor gets one of its own."""
    named: list[tuple[str, torch.Tensor]] = []
    size = 0
    async for name, tensor in each(weights):
        if named and size + tensor.nbytes > limit:
            yield WeightBucket.pack(named)
            named, size = [], 0
        named.append((name, tensor))
        size += tensor.nbytes
    if named:
        yield WeightBucket.pack(named)


async def drain(weights: Weights) -> None:
    async for _ in each(weights):
        pass
