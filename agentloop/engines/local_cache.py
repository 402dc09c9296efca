"""Keys and values of many sequences of different length, for transformers' `past_key_values`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention as attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "agentloop_slots"
"""Name under which `slot_attention` is registered with transformers."""
SMALLEST_LENGTH = 256


class Fill(NamedTuple):
    """`new` tokens of one slot, after the `start` that it has."""

    slot: int
    start: int
    new: int


class SlotCache(Cache):  # type: ignore[misc]
    """A fixed number of rows ("slots") in one tensor `[layers, 2, slots, kv_heads, length, head_dim]`. Where keys and values
    differ in width (latent attention), `head_dim` is the larger one, and the rest of the smaller ones' room stays zero.

    A forward has no padding: its tokens lie side by side, whichever slots they belong to. Slots that decode are the first
    ones, without gaps, so that attention reads a view of them and a decode step copies nothing but the new keys and values.
    The tensor grows, by doubling, in slots and in length, as it is needed.

    `begin` says what the next forward is about; in each layer transformers then calls `update` and `slot_attention`.
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
        self._seen = 0
        self._slots = self._positions = torch.empty(0, dtype=torch.long)
        self._decoding = 0
        self._decode_mask: torch.Tensor | None = None
        self._fills: list[tuple[Fill, int, torch.Tensor | None]] = []

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

    def begin(self, decoding: Sequence[int], filling: Sequence[Fill]) -> torch.Tensor:
        """The next forward takes, side by side in one row of columns: one new token for each of the slots from 0 on, which
        have `decoding[slot]` tokens already, and then the new tokens of each fill.

        Returns position ids `[1, columns]`.
        """
        device = self._device
        slots = list(range(len(decoding)))
        positions = list(decoding)
        for fill in filling:
            slots += [fill.slot] * fill.new
            positions += range(fill.start, fill.start + fill.new)
        self._seen = max(positions) + 1
        self.reserve(max(slots) + 1, self._seen)
        self._slots = torch.tensor(slots, device=device)
        self._positions = torch.tensor(positions, device=device)
        self._decoding = len(decoding)
        self._decode_mask = None
        if decoding:
            self._decode_mask = self._mask(self._positions[: len(decoding)], max(decoding) + 1)[:, None, None, :]
        self._fills = []
        first = len(decoding)
        for fill in filling:
            end = first + fill.new
            mask = None
            if fill.start and fill.new > 1:
                mask = self._mask(self._positions[first:end], fill.start + fill.new)
            self._fills.append((fill, first, mask))
            first = end
        return self._positions[None, :]

    def _mask(self, positions: torch.Tensor, seen: int) -> torch.Tensor:
        """Additive mask `[positions, seen]`: each position sees itself and all before it."""
        hidden = torch.arange(seen, device=self._device)[None, :] > positions[:, None]
        return torch.zeros(hidden.shape, dtype=self._dtype, device=self._device).masked_fill_(hidden, float("-inf"))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[1, kv_heads, columns, head_dim]`; returns the layer's whole store, `[slots, kv_heads, length, head_dim]`
        each, which `attend` picks from."""
        assert self._store is not None
        keys = self._store[layer_idx, 0, ..., : key_states.shape[-1]]
        values = self._store[layer_idx, 1, ..., : value_states.shape[-1]]
        keys[self._slots, :, self._positions] = key_states[0].transpose(0, 1)
        values[self._slots, :, self._positions] = value_states[0].transpose(0, 1)
        return keys, values

    def attend(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None) -> torch.Tensor:
        """Attention of `query` `[1, heads, columns, head_dim]`, each column over its own slot: `[1, columns, heads, width]`,
        as wide as the values are.

        Heads that share keys are taken as the query's length (decoding) or as a batch (filling), so that no keys are
        repeated: at decode steps that would copy the whole cache.
        """
        _, heads, columns, dim = query.shape
        shared = keys.shape[1]
        width = values.shape[-1]
        output = query.new_empty(columns, heads, width)
        count = self._decoding
        if count and self._decode_mask is not None:
            seen = self._decode_mask.shape[-1]
            grouped = query[0, :, :count].transpose(0, 1).reshape(count, shared, -1, dim)
            answer = attention(grouped, keys[:count, :, :seen], values[:count, :, :seen], self._decode_mask, scale=scaling)
            output[:count] = answer.reshape(count, heads, width)
        for fill, first, mask in self._fills:
            end = fill.start + fill.new
            grouped = query[0, :, first : first + fill.new].reshape(shared, -1, fill.new, dim).transpose(0, 1)
            shape = (grouped.shape[0], -1, -1, -1)
            own_keys, own_values = keys[fill.slot, :, :end].expand(shape), values[fill.slot, :, :end].expand(shape)
            causal = fill.start == 0 and fill.new > 1
            answer = attention(grouped, own_keys, own_values, mask, is_causal=causal, scale=scaling)
            output[first : first + fill.new] = answer.permute(2, 1, 0, 3).reshape(fill.new, heads, width)
        return output[None]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._seen, 0


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    slot_cache: SlotCache | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: `SlotCache.attend` in our forwards, its own sdpa in all others."""
    if slot_cache is not None:
        return slot_cache.attend(query, key, value, scaling), None
    output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return output, None


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
