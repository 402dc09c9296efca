"""Tensor by tensor: what was sent against what an engine tells of the weights that it serves."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from agentloop.weights.checksum import differing

LAYER = re.compile(r"\blayers\.(\d+)\.")
EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight$")
TIED = ("model.embed_tokens.weight", "lm_head.weight")
SHOWN = 4
"""Tensors that a message names; a report holds all."""
FUSED = (
    (re.compile(r"\.[qkv]_proj\."), ".qkv_proj."),
    (re.compile(r"\.(gate|up)_proj\."), ".gate_up_proj."),
    (re.compile(r"\.(q_a_proj|kv_a_proj_with_mqa)\."), ".fused_qkv_a_proj_with_mqa."),
    (re.compile(r"\.experts\.\d+\.(gate|up)_proj\.weight$"), ".experts.w13_weight"),
    (re.compile(r"\.experts\.\d+\.down_proj\.weight$"), ".experts.w2_weight"),
    (re.compile(r"\.experts\.\d+\.(gate|up)_proj\.weight$"), ".experts.gate_up_proj"),
    (re.compile(r"\.experts\.\d+\.down_proj\.weight$"), ".experts.down_proj"),
)
"""What an engine may keep a published tensor in: SGLang 0.5.12 (`models/{qwen2,qwen3_moe,deepseek_v2}.py`,
`layers/moe/fused_moe_triton/layer.py`), and transformers 5."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What was found; each name is in one list. None: false."""

    differ: tuple[str, ...] = ()
    """Served with other values than were sent."""
    absent: tuple[str, ...] = ()
    """Sent, but the engine has nothing of that name."""
    unsent: tuple[str, ...] = ()
    """Served, but not sent."""
    stale: tuple[str, ...] = ()
    """Sent with new values, but what the engine keeps them in did not change."""
    touched: tuple[str, ...] = ()
    """Sent with the values that they had, but what the engine keeps them in changed."""

    @property
    def all(self) -> tuple[str, ...]:
        return self.differ + self.absent + self.unsent + self.stale + self.touched

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def layer(self) -> int | None:
        """The lowest with a fault; `None`: only tensors outside of the layers."""
        return min(self._layers(), default=None)

    def _layers(self) -> list[int]:
        return sorted({int(match[1]) for name in self.all if (match := LAYER.search(name))})

    def __str__(self) -> str:
        """Layers and tensors in half a sentence, a few of them by name."""
        layers = self._layers()
        if not layers:
            place = "outside of the layers"
        elif len(layers) == 1:
            place = f"in layer {layers[0]}"
        elif layers == list(range(layers[0], layers[-1] + 1)):
            place = f"in layers {layers[0]} to {layers[-1]}"
        else:
            place = f"in layers {', '.join(map(str, layers[:SHOWN]))}{', …' if len(layers) > SHOWN else ''}"
        parts = []
        for names, one, many in (
            (self.differ, "tensor differs from what was sent", "tensors differ from what was sent"),
            (self.absent, "tensor was sent that the engine does not know", "tensors were sent that the engine does not know"),
            (self.unsent, "tensor serves that was not sent", "tensors serve that were not sent"),
            (self.stale, "tensor was sent anew and did not change", "tensors were sent anew and did not change"),
            (self.touched, "tensor changed though it was sent as it was", "tensors changed though they were sent as they were"),
        ):
            if names:
                shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
                parts.append(f"{len(names)} {one if len(names) == 1 else many} ({shown})")
        return f"{place} {' and '.join(parts)}"


def compare(sent: Mapping[str, int], served: Mapping[str, int], *, whole: bool = True) -> Faults:
    """Of two sets of checksums, by name. `whole`: all that serves should have been sent; what came under another name (experts
    that transformers fuses, tied tensors) is not missed."""
    absent = tuple(name for name in sent if name not in served)
    unsent = tuple(name for name in served if name not in sent and not _covered(name, sent, served)) if whole else ()
    return Faults(tuple(differing(sent, served)), absent, unsent)


def _covered(name: str, sent: Mapping[str, int], served: Mapping[str, int]) -> bool:
    if match := EXPERT.match(name):
        return f"{match[1]}.{'down_proj' if match[2] == 'down' else 'gate_up_proj'}" in sent
    return name in TIED and any(other in sent and served.get(other) == served[name] for other in TIED)


def changes(
    sent_before: Mapping[str, int],
    sent: Mapping[str, int],
    kept_before: Mapping[str, str],
    kept: Mapping[str, str],
) -> tuple[Faults, int]:
    """What should have changed in an engine against what did, and how many tensors of `sent` that could be asked of.

    `kept` are an engine's fingerprints (`Engine.weight_fingerprints`), `sent` the checksums of what it was sent; both also of
    an earlier time at which they fitted. Less than `compare` tells: which of several tensors in one kept tensor is old is seen
    only if none of them is new, and a tensor that changed may have changed to anything.
    """
    parts: dict[str, list[str]] = {}
    for name in sent:
        if name in sent_before and (home := next((one for one in _homes(name) if one in kept and one in kept_before), None)):
            parts.setdefault(home, []).append(name)
    stale: list[str] = []
    touched: list[str] = []
    for home, names in parts.items():
        new = [name for name in names if sent[name] != sent_before[name]]
        if new and kept_before[home] in (kept[home], *kept[home].split(",")):
            stale += new
        elif not new and kept[home] != kept_before[home]:
            touched += names
    return Faults(stale=tuple(stale), touched=tuple(touched)), sum(map(len, parts.values()))


def _homes(name: str) -> Iterator[str]:
    """Names under which an engine may keep a published tensor."""
    yield name
    for pattern, fused in FUSED:
        if pattern.search(name):
            yield pattern.sub(fused, name)
