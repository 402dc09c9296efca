"""A small DeepSeek-V3 with random weights: its shape in three sizes, the model as a trainer has it, its checkpoint, and its
forward with experts that somebody else chose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.engine_support import MODEL

Named = tuple[str, Any]
SHARD_BYTES = 4 << 30
STACKED = (".experts.gate_up_proj", ".experts.down_proj")
"""transformers 5 keeps the experts of a layer in one tensor each; checkpoints and SGLang have one for each expert."""


@dataclass(frozen=True)
class Shape:
    """What differs between the sizes. The rest is DeepSeek-V3's own, with an eighth of its heads, a third of its queries'
    latent and the quickstart's vocabulary."""

    layers: int
    experts: int
    width: int
    """Of an expert."""
    hidden: int = 2048
    chosen: int = 8
    groups: int = 8
    heads: int = 16

    def config(self, dtype: str) -> Any:
        from transformers import DeepseekV3Config

        tiny = self.hidden < 512
        latent = (
            {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
            if tiny
            else {"kv_lora_rank": 512, "q_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
        )
        return DeepseekV3Config(
            architectures=["DeepseekV3ForCausalLM"],
            vocab_size=687,
            hidden_size=self.hidden,
            intermediate_size=2 * self.hidden,
            moe_intermediate_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            n_routed_experts=self.experts,
            n_shared_experts=1,
            num_experts_per_tok=self.chosen,
            n_group=self.groups,
            topk_group=self.groups // 2,
            first_k_dense_replace=1,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            eos_token_id=682,
            dtype=dtype,
            **latent,
        )


SHAPES = {
    "1": Shape(layers=4, experts=64, width=384),
    "8": Shape(layers=8, experts=64, width=1408),
    "30": Shape(layers=10, experts=128, width=2048),
}
"""By about how many 10⁹ bytes their weights have in bfloat16: few layers, so that the engine starts soon."""
TINY = Shape(layers=3, experts=8, width=32, hidden=64, chosen=2, groups=4, heads=2)
"""For a CPU, to see that all of it runs."""


def write_folder(folder: Path, config: Any) -> None:
    """`config.json` and the quickstart's tokenizer, without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(MODEL / name, folder / name)
    path = folder / "config.json"
    # transformers 5 leaves these out, and SGLang 0.5.12 reads them.
    path.write_text(json.dumps({"moe_layer_freq": 1, "topk_method": "noaux_tc", **json.loads(path.read_text())}))


def trainer(config: Any, device: str, seed: int = 0) -> Any:
    """A transformers model on `device`, each layer's output about as large as its input, so that every part counts."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", experts_implementation="eager")
    model = model.to(device).eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            tensor.normal_(1.0, 0.1, generator=generator)
        elif name.endswith("e_score_correction_bias"):
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.normal_(0.0, 1.0 if "embed" in name else tensor.shape[-1] ** -0.5, generator=generator)
    return model


def shift(model: Any, by: int) -> None:
    """Other weights, as if trained: every tensor is turned by `by` places along its first dimension. Exact, and undone by
    `-by`. Experts are turned twice as far as their router, with which they would be the same model again."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensor.roll(2 * by if name.endswith(STACKED) else by, 0))


def per_expert(tensors: Iterable[Named]) -> Iterator[Named]:
    """Names and tensors as in a checkpoint: views of each expert in place of the stacked ones."""
    for name, tensor in tensors:
        if not name.endswith(STACKED):
            yield name, tensor
            continue
        stem = name.rpartition(".")[0]
        for number in range(len(tensor)):
            if name.endswith("gate_up_proj"):
                gate, up = tensor[number].chunk(2, dim=0)
                yield f"{stem}.{number}.gate_proj.weight", gate
                yield f"{stem}.{number}.up_proj.weight", up
            else:
                yield f"{stem}.{number}.down_proj.weight", tensor[number]


def write_checkpoint(folder: Path, tensors: Iterable[Named]) -> None:
    """safetensors files of about `SHARD_BYTES`, with their index."""
    from safetensors.torch import save_file

    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    index: dict[str, str] = {}
    shard: dict[str, Any] = {}
    size = total = 0

    def write() -> None:
        name = f"model-{len(set(index.values())) + 1:05}.safetensors"
        save_file(shard, str(folder / name), metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors:
        shard[name] = tensor.cpu().contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
        if size >= SHARD_BYTES:
            write()
            size = 0
    if shard:
        write()
    told = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(told))


def read_checkpoint(folder: Path) -> Iterator[Named]:
    """Names and tensors in main memory, layer by layer: what SGLang must get together stays together."""
    from safetensors import safe_open

    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for name, file in index.items():
            if file not in files:
                opened: Any = safe_open(str(folder / file), framework="pt")
                files[file] = stack.enter_context(opened)
            yield name, files[file].get_tensor(name)


# -- log-probabilities and routing --------------------------------------------------------------------------------------------


def log_probs(model: Any, ids: list[int], start: int = 1) -> list[float]:
    """Of `ids[start:]`, in one forward of all but the last token."""
    import torch

    with torch.inference_mode():
        tokens = torch.tensor([ids], device=model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0, start - 1 :].float()
        return [float(value) for value in torch.log_softmax(logits, dim=-1).gather(1, tokens[0, start:, None])[:, 0]]


@contextmanager
def _routed(model: Any, choose: Callable[[int, Any], Any]) -> Iterator[None]:
    """`choose(layer, own)` gives the experts [tokens, experts a token] in place of the router's own; their weights are computed
    from the model's own router logits, as DeepSeek-V3 does (sigmoid, made to add up to 1, scaled)."""
    patched: list[Any] = []

    def patch(layer: int, block: Any) -> None:
        own = block.route_tokens_to_experts

        def route(logits: Any) -> tuple[Any, Any]:
            indices = choose(layer, own(logits)[0])
            weights = logits.sigmoid().gather(1, indices)
            if block.norm_topk_prob:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return indices, weights * block.routed_scaling_factor

        block.route_tokens_to_experts = route
        patched.append(block)

    try:
        for layer, module in enumerate(model.model.layers):
            if hasattr(module.mlp, "route_tokens_to_experts"):
                patch(layer, module.mlp)
        yield
    finally:
        for block in patched:
            del block.route_tokens_to_experts


@contextmanager
def recorded(model: Any) -> Iterator[dict[int, Any]]:
    """The experts that the model chooses, by layer, [tokens, experts a token], of the last forward."""
    found: dict[int, Any] = {}

    def note(layer: int, own: Any) -> Any:
        found[layer] = own.detach().cpu()
        return own

    with _routed(model, note):
        yield found


@contextmanager
def replayed(model: Any, experts: Any) -> Iterator[None]:
    """Forwards with `experts` [tokens, layers, experts a token] in place of the model's own choice. Raises `ValueError` for
    experts of another number of tokens, and for an expert twice."""
    import torch

    given = torch.as_tensor(experts, dtype=torch.int64)

    def choose(layer: int, own: Any) -> Any:
        chosen = given[:, layer].to(own.device)
        if chosen.shape != own.shape:
            raise ValueError(f"layer {layer}: experts {list(chosen.shape)} were recorded for a forward of {list(own.shape)}")
        if bool((chosen.sort(dim=-1).values.diff(dim=-1) == 0).any()):
            raise ValueError(f"layer {layer}: a token has an expert twice, so these are not recorded experts")
        return chosen

    with _routed(model, choose):
        yield
