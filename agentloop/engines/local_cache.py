"""Keys and values of many sequences of different length, for transformers' `past_key_values`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "agentloop_grouped_sdpa"
"""Name under which `grouped_attention` is registered with transformers."""
SMALLEST_LENGTH = 256


class SlotCache(Cache):  # type: ignore[misc]
    """A fixed number of rows ("slots") in one tensor `[layers, 2, slots, kv_heads, length, head_dim]`.

    The scheduler keeps the rows of one forward next to each other, so that attention reads a view and nothing is copied
    at a decode step but the new keys and values. The tensor grows, by doubling, in slots and in length, as it is needed.

    `begin` says what the next forward is about; transformers then calls `update` once a layer.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        *,
        max_slots: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self._shape = (layers, 2, kv_heads, head_dim)
        self._max_slots = max_slots
        self._max_len = max_len
        self._dtype = dtype
        self._device = device
        self._store: torch.Tensor | None = None
        self._rows = slice(0, 0)
        self._seen = 0
        self._write: tuple[torch.Tensor, torch.Tensor] | None = None
        self._take: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def slots(self) -> int:
        """Slots that exist now; more come with `reserve`."""
        return 0 if self._store is None else self._store.shape[2]

    def bytes_per_token(self) -> int:
        layers, two, heads, dim = self._shape
        return int(layers * two * heads * dim * self._dtype.itemsize)

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` rows of `length` tokens, keeping what is there. New room is zero: attention multiplies
        masked values by 0, which only works for finite ones."""
        have_slots, have_length = (0, 0) if self._store is None else (self._store.shape[2], self._store.shape[4])
        if slots <= have_slots and length <= have_length:
            return
        if slots > have_slots:
            slots = min(max(slots, 2 * have_slots), self._max_slots)
        if length > have_length:
            length = min(max(length, 2 * have_length, SMALLEST_LENGTH), self._max_len)
        layers, two, heads, dim = self._shape
        room = (layers, two, max(slots, have_slots), heads, max(length, have_length), dim)
        store = torch.zeros(room, dtype=self._dtype, device=self._device)
        if self._store is not None:
            store[:, :, :have_slots, :, :have_length] = self._store
        self._store = store

    def move(self, sources: list[int], targets: list[int], length: int) -> None:
        """Row `sources[i]` becomes row `targets[i]`, all at once; only the first `length` tokens of them matter."""
        assert self._store is not None
        view = self._store[:, :, :, :, :length]
        view[:, :, targets] = view[:, :, sources]

    def clean(self, slot: int) -> None:
        """Zero a row that may hold values which are not finite."""
        if self._store is not None and slot < self._store.shape[2]:
            self._store[:, :, slot] = 0

    def free(self) -> None:
        """Give the memory back; the next `reserve` starts anew."""
        self._store = None

    def begin(self, first: int, lengths: list[int], counts: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next forward has one row for each slot from `first` on: row `i` brings `counts[i]` new tokens, at the right
        end of its `width` columns, after the `lengths[i]` that it has.

        Returns position ids `[rows, width]` and the additive mask `[rows, 1, width, seen]`.
        """
        device = self._device
        rows = len(lengths)
        ends = [length + count for length, count in zip(lengths, counts, strict=True)]
        self._seen = max(ends)
        self._rows = slice(first, first + rows)
        self.reserve(first + rows, self._seen)
        slots = torch.arange(first, first + rows, device=device)
        end = torch.tensor(ends, device=device)
        positions = end[:, None] + torch.arange(-width, 0, device=device)[None, :]
        if width == 1:
            self._take = None
            self._write = (slots, positions[:, 0])
        else:
            # Columns left of a row's new tokens are padding: they write nothing, and see one token so that no softmax
            # is over nothing.
            real = positions >= torch.tensor(lengths, device=device)[:, None]
            row, column = real.nonzero(as_tuple=True)
            self._take = (row, column)
            self._write = (slots[row], positions[row, column])
            positions = positions.clamp(min=0)
        hidden = torch.arange(self._seen, device=device)[None, None, :] > positions[:, :, None]
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=device).masked_fill_(hidden, float("-inf"))
        return positions, mask[:, None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[rows, kv_heads, width, head_dim]`; returns views `[rows, kv_heads, seen, head_dim]`."""
        assert self._store is not None
        assert self._write is not None
        slots, positions = self._write
        keys, values = self._store[layer_idx, 0], self._store[layer_idx, 1]
        if self._take is None:
            keys[slots, :, positions] = key_states[:, :, 0]
            values[slots, :, positions] = value_states[:, :, 0]
        else:
            row, column = self._take
            keys[slots, :, positions] = key_states[row, :, column]
            values[slots, :, positions] = value_states[row, :, column]
        return keys[self._rows, :, : self._seen], values[self._rows, :, : self._seen]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen, 0


def grouped_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' sdpa, but one query a row is attended without repeating keys and values for each query head: the heads
    that share a key become the query's length. At decode steps the repeat would copy the whole cache."""
    rows, heads, width, dim = query.shape
    if width != 1 or attention_mask is None or key.shape[1] == heads:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return output, None
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    output = torch.nn.functional.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, value.shape[-1]), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
