"""Batches of any kind, read for the audit: verl's `DataProto`, a `TensorDict`, a mapping of arrays, rows of V1, files."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.audit.padded import NEEDED, OVER_RESPONSE, Batch
from agentloop.audit.report import Finding
from agentloop.errors import ConfigError, nearest

_ZIP = b"PK\x03\x04"
KINDS = (".pkl", ".pickle", ".pt", ".pth", ".npz")


def to_batch(source: Any, *, where: str = "the batch", pad_token_id: int | None = None) -> Batch:
    """`source`: a `DataProto`, a `TensorDict` or mapping of tensors or arrays of two axes, a `Batch`, or a sequence of rows as
    `agentloop.batch.to_rows` makes them (fields, or pairs of fields and tag). Raises `ConfigError` for anything else."""
    if isinstance(source, Batch):
        return source
    if isinstance(source, Sequence) and not isinstance(source, str | bytes):
        return _of_rows(source, where, pad_token_id)
    tensors, columns = source, {}
    if hasattr(source, "non_tensor_batch"):
        tensors, columns = source.batch, dict(source.non_tensor_batch)
    if tensors is None or not hasattr(tensors, "keys"):
        raise ConfigError(
            f"{where}: expected a DataProto, a TensorDict, a mapping of arrays or rows, got {type(source).__name__}"
        )
    arrays: dict[str, NDArray[Any]] = {}
    for name in tensors.keys():  # noqa: SIM118  a TensorDict iterates over rows
        value = tensors[name]
        array = _array(value)
        if array is not None and array.ndim >= 2 and array.dtype.kind in "iufb":
            arrays[str(name)] = array
        elif array is not None and array.ndim == 1:
            columns.setdefault(str(name), array)
        elif isinstance(value, list):
            columns.setdefault(str(name), value)
    missing = [name for name in NEEDED if name not in arrays]
    if missing:
        hint = nearest(missing[0], arrays) if arrays else "it has no tensors"
        raise ConfigError(f"{where}: no tensor '{missing[0]}' of two axes; {hint}")
    rows = {len(arrays[name]) for name in NEEDED}
    if len(rows) > 1 or any(arrays[name].ndim != 2 for name in NEEDED):
        shapes = ", ".join(f"{name} {arrays[name].shape}" for name in NEEDED)
        raise ConfigError(f"{where}: {shapes}: these need two axes and the same number of rows")
    return Batch(arrays, columns, pad_token_id)


def _array(value: Any) -> NDArray[Any] | None:
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "detach") and not getattr(value, "is_nested", False):
        value = value.detach().cpu()
        array: NDArray[Any] = (value.float() if value.is_floating_point() else value).numpy()
        return array
    return None


def _of_rows(source: Sequence[Any], where: str, pad_token_id: int | None) -> Batch:
    """Unpadded rows of verl's V1 contract, padded here."""
    rows, tags, found = [], [], []
    for number, item in enumerate(source):
        fields, tag = item if isinstance(item, tuple) and len(item) == 2 else (item, {})
        if not isinstance(fields, Mapping) or not {"prompts", "responses"} <= fields.keys():
            raise ConfigError(f"{where}: row {number} has no 'prompts' and 'responses'")
        rows.append(fields)
        tags.append(tag)
    if not rows:
        raise ConfigError(f"{where}: there are no rows")
    arrays = [
        {name: array for name, value in row.items() if (array := _array(value)) is not None and array.ndim == 1} for row in rows
    ]
    width, room = (max(len(row[name]) for row in arrays) for name in ("prompts", "responses"))
    pad = 0 if pad_token_id is None else pad_token_id
    count = len(rows)
    tensors: dict[str, NDArray[Any]] = {
        "prompts": np.full((count, width), pad, np.int64),
        "responses": np.full((count, room), pad, np.int64),
        "attention_mask": np.zeros((count, width + room), np.int64),
    }
    for number, (row, tag) in enumerate(zip(arrays, tags, strict=True)):
        prompt, response = row["prompts"], row["responses"]
        tensors["prompts"][number, width - len(prompt) :] = prompt
        tensors["responses"][number, : len(response)] = response
        tensors["attention_mask"][number, width - len(prompt) : width + len(response)] = 1
        for name in OVER_RESPONSE:
            if name not in row:
                continue
            if len(row[name]) != len(response):
                message = f"it has {len(row[name])} numbers for {len(response)} tokens of the response"
                found.append(Finding("shape", message, row=number, column=name, place=min(len(row[name]), len(response))))
            values = tensors.setdefault(name, np.zeros((count, room), row[name].dtype))
            values[number, : len(response)] = np.resize(row[name], len(response)) if len(row[name]) else 0
        found += _whole(number, row, tag)
    columns: dict[str, Any] = {}
    for name in ("uid", "session_id", "raw_prompt"):
        if all(name in row for row in rows):
            columns[name] = [row[name] for row in rows]
    if all("num_turns" in row for row in rows):
        columns["__num_turns__"] = [row["num_turns"] for row in rows]
    if all("session_id" in row and "uid" in row for row in rows):
        columns["agentloop_row"] = [f"{row['uid']}_{row['session_id']}_0" for row in rows]
    for name in ("end_reason", "min_global_steps", "max_global_steps", "reward_extra_info"):
        extras = [row.get("extra_fields") or {} for row in rows]
        if all(name in extra for extra in extras):
            columns[name] = [extra[name] for extra in extras]
    return Batch(tensors, columns, pad_token_id, found)


def _whole(number: int, row: Mapping[str, NDArray[Any]], tag: Mapping[str, Any]) -> Iterable[Finding]:
    """What a row says of its whole sequence."""
    both = np.concatenate([row["prompts"], row["responses"]])
    lengths = {"prompt_len": len(row["prompts"]), "response_len": len(row["responses"]), "seq_len": len(both)}
    for name, expected in (("input_ids", both), ("position_ids", np.arange(len(both)))):
        own = row.get(name)
        if own is not None and not np.array_equal(own, expected):
            n = min(len(own), len(expected))
            place = next(iter(np.flatnonzero(own[:n] != expected[:n]).tolist()), n)
            invariant = "shape" if name == "input_ids" else "positions"
            wanted = str(int(expected[place])) if place < len(expected) else "its end"
            yield Finding(
                invariant,
                "it does not fit prompts and responses",
                row=number,
                column=name,
                place=place,
                token=place,
                expected=wanted,
            )
    mask, loss = row.get("response_mask"), row.get("loss_mask")
    if mask is not None and loss is not None and mask.shape == loss.shape and (mask != loss).any():
        place = int((mask != loss).argmax())
        yield Finding(
            "mask",
            "loss_mask is not response_mask",
            row=number,
            column="loss_mask",
            place=place,
            token=len(row["prompts"]) + place,
        )
    for name, length in lengths.items():
        if name in tag and tag[name] != length:
            yield Finding("lengths", f"the tag says {name} {tag[name]}", row=number, column=name, expected=str(length))


def read_batch(path: str | Path, *, pad_token_id: int | None = None) -> Batch:
    """A batch from a file: what `DataProto.save_to_disk` wrote (a pickle), what `torch.save` wrote, or an `.npz`.

    The first two run code when they are loaded: only files of your own. Raises `ConfigError` if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=True) as file:
                return to_batch({name: file[name] for name in file.files}, where=str(path), pad_token_id=pad_token_id)
        with path.open("rb") as stream:
            begins = stream.read(4)
        if begins == _ZIP:  # torch.save
            import torch

            loaded = torch.load(path, map_location="cpu", weights_only=False)
        else:
            with path.open("rb") as stream:
                loaded = pickle.load(stream)
    except ConfigError:
        raise
    except Exception as error:  # whatever a pickle may raise
        raise ConfigError(f"{path}: not readable as a batch ({', '.join(KINDS)}): {type(error).__name__}: {error}") from error
    return to_batch(loaded, where=str(path), pad_token_id=pad_token_id)
