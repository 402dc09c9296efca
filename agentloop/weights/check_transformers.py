"""The trainer's side of a canary where the trainer holds a transformers model, and what such a model tells of its routing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from agentloop.weights.check import LogProbs, Sequences

if TYPE_CHECKING:
    import torch


def reference(model: Any) -> Callable[[Sequences], LogProbs]:
    """Log-probabilities by `model` as it is when asked, at temperature 1, one sequence a forward; the softmax in float32."""
    import torch

    def score(sequences: Sequences) -> LogProbs:
        was_training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                return [_scores(model, list(ids)) for ids in sequences]
        finally:
            model.train(was_training)

    return score


def _scores(model: Any, ids: list[int]) -> list[float]:
    import torch

    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    chosen: list[float] = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return chosen


def published(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights under the names of checkpoints, which engines take: transformers 5's fused experts one by one. Views."""
    for name, tensor in model.state_dict().items():
        start, _, kind = name.rpartition(".")
        if tensor.dim() != 3 or not start.endswith(".experts"):
            yield name, tensor
            continue
        for number, expert in enumerate(tensor):
            if kind == "down_proj":
                yield f"{start}.{number}.down_proj.weight", expert
            else:
                gate, up = expert.chunk(2)
                yield f"{start}.{number}.gate_proj.weight", gate
                yield f"{start}.{number}.up_proj.weight", up


def routed(model: Any, sequences: Sequences) -> list[torch.Tensor]:
    """For each sequence the experts that its tokens are routed to, [tokens, mixture layers, experts a token]."""
    import torch

    taken: list[torch.Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: taken.append(args[1].reshape(-1, args[1].shape[-1])))
        for name, module in model.named_modules()
        if name.endswith(".experts")
    ]
    found = []
    try:
        with torch.inference_mode():
            for ids in sequences:
                taken.clear()
                model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
                found.append(torch.stack(taken, dim=1).cpu() if taken else torch.empty(len(ids), 0, 0, dtype=torch.long))
    finally:
        for hook in hooks:
            hook.remove()
    return found
