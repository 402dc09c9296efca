"""A plan as a dictionary, and as text."""

from __future__ import annotations

from typing import Any

from agentloop.plan import rollout as rollouts
from agentloop.plan import sync as syncs
from agentloop.plan import trainer as trainers
from agentloop.plan.config import Question
from agentloop.plan.trainer import gib

STATE = ("weights", "gradients", "optimizer", "activations", "logits")


def make_plan(question: Question) -> dict[str, Any]:
    """The whole plan, ready for JSON. Memory is bytes of one GPU, time seconds."""
    trainer, rollout = trainers.choose(question), rollouts.choose(question)
    sync = syncs.plan_sync(question, trainer, rollout)
    changes = [told for told in _advice(question, trainer, rollout, sync) if told]
    shape, config = question.shape, question.config
    stage = trainer.stages[trainer.fullest] if trainer.impossible is None else None
    return {
        "fits": not changes,
        "changes": changes,
        "model": {
            "family": shape.family,
            "parameters": shape.parameters,
            "active_parameters": shape.active,
            "mtp_parameters": shape.mtp_parameters,
            "weights_bytes": {kind: shape.weight_bytes(kind) for kind in ("bfloat16", "fp8")},
            "attention": "mla" if shape.mla else "gqa",
            "kv_bytes_per_token": {kind: shape.kv_bytes_per_token(kind) for kind in ("bfloat16", "fp8")},
        },
        "cluster": {
            **config.cluster.model_dump(),
            "memory_bytes": question.memory,
            "usable_bytes": question.usable,
            "nvlink_bytes_per_s": question.nvlink,
            "network_bytes_per_s": question.network,
        },
        "lengths": config.lengths.model_dump(),
        "placement": config.placement,
        "trainer": {
            "gpus": question.trainer_gpus,
            "layout": {
                "tensor": trainer.tensor,
                "pipeline": trainer.pipeline,
                "expert": trainer.expert,
                "expert_tensor": trainer.plan.expert_tensor,
                "context": trainer.plan.context,
                "data": trainer.data,
                "expert_data": trainer.expert_data,
            },
            "micro_batch_tokens": trainer.tokens,
            "fullest_stage": None if stage is None else trainer.fullest,
            "stage_layers": None if stage is None else [len(trainer.stage_layers(n)) for n in range(trainer.pipeline)],
            "per_gpu": None if stage is None else {**stage, "total": trainers.TrainerLayout.total(stage)},
            "fits": trainer.impossible is None and trainer.fits,
        },
        "rollout": {
            "gpus": question.rollout_gpus,
            "layout": {
                "tensor": rollout.tensor,
                "data": rollout.data,
                "expert": rollout.expert,
                "engine_gpus": rollout.engine,
                "replicas": rollout.replicas,
            },
            "mem_fraction": round(rollout.mem_fraction, 3),
            "per_gpu": {
                "weights": rollout.weights,
                "kv_cache": max(0.0, rollout.cache),
                "kv_bytes_per_token": rollout.kv_bytes_per_token,
            },
            "cache_tokens_per_engine": rollout.tokens,
            "wanted_tokens_per_engine": rollout.wanted,
            "sequences_per_engine": rollout.tokens // question.sequence,
            "fits": rollout.impossible is None and rollout.fits,
        },
        "sync": {
            "bytes": sync.bytes,
            "gather_s": {"plain": sync.gather[0], "by_node": sync.gather[1]},
            "send_s": {"plain": sync.send[0], "by_node": sync.send[1]},
            "load_s": sync.load,
            "total_s": {"plain": sync.plain, "by_node": sync.by_node},
            "overlap": sync.overlap,
            "peak_bytes": sync.peak,
        },
        "assumptions": assumptions(question, trainer, rollout),
    }


def _advice(
    question: Question, trainer: trainers.TrainerLayout, rollout: rollouts.RolloutLayout, sync: syncs.SyncPlan
) -> list[str | None]:
    of_parts = [trainers.advice(trainer), rollouts.advice(rollout)]
    return of_parts if any(of_parts) else [syncs.advice(question, sync)]


def assumptions(question: Question, trainer: trainers.TrainerLayout, rollout: rollouts.RolloutLayout) -> list[str]:
    config = question.config
    bits = "bf16 weights, " + ("fp32" if trainer.plan.gradients == "float32" else "bf16") + " gradients"
    adam = "Adam's fp32 master weights and moments " + (
        "in the host's memory"
        if trainer.plan.optimizer_on_cpu
        else "cut over the ranks that hold the same parameters"
        if trainer.plan.distributed_optimizer
        else "on every rank"
    )
    told = [
        f"trainer: {bits}, {adam}; sequence parallelism, flash attention, recomputation '{trainer.plan.recompute}', 1F1B",
        "trainer: routed tokens are counted as spread evenly over the experts; a hot expert takes more activations",
        f"each GPU keeps {config.cluster.overhead_gib:g} GiB for CUDA, NCCL, graphs and fragments",
        f"rollout: an engine's cache must hold {config.rollout.sequences} sequences of {question.sequence:,} tokens at a time",
        f"sync: {question.nvlink / 1e9:g} GB/s over NVLink and {question.network / 1e9:g} GB/s a GPU between nodes, one way, "
        f"all of it used; an engine loads {config.cluster.load_gb_s:g} GB/s a GPU"
        + (f", and each expert's weight in {config.cluster.load_expert_ms:g} ms more" if question.shape.experts else ""),
    ]
    if question.shape.mtp_layers:
        kept = "trained" if trainer.plan.mtp else "left out of the trainer"
        told.append(f"the checkpoint's {question.shape.mtp_layers} MTP layer(s) are {kept}, and not sent to the engines")
    if config.placement == "colocated":
        away = "is in the host's memory" if config.trainer.offload else "stays on the GPU"
        told.append(f"trainer and rollout take turns; while the rollout runs, the trainer's state {away}")
    return told


def render(plan: dict[str, Any], name: str) -> str:
    model, trainer, rollout, sync = plan["model"], plan["trainer"], plan["rollout"], plan["sync"]
    cluster, usable = plan["cluster"], gib(plan["cluster"]["usable_bytes"])
    size, active = _billions(model["parameters"]), _billions(model["active_parameters"])
    weights = {kind: gigabytes(count) for kind, count in model["weights_bytes"].items()}
    lines = [
        f"{name}: {model['family']}, {size} parameters, {active} active",
        f"  weights     {weights['bfloat16']} in bf16, {weights['fp8']} in fp8",
        f"  KV cache    {model['kv_bytes_per_token']['bfloat16']:,} bytes a token in bf16 ({model['attention'].upper()})",
        f"{cluster['gpus']} x {cluster['gpu']}, {gib(cluster['memory_bytes'])} each, {usable} usable; {plan['placement']}",
        "",
        f"Trainer on {_gpus(trainer['gpus'])}: {_fits(trainer['fits'])}",
        "  " + ", ".join(f"{label} {trainer['layout'][key]}" for key, label in _TRAINER.items()),
    ]
    if trainer["per_gpu"] is not None:
        per = trainer["per_gpu"]
        lines.append(
            f"  fullest GPU: stage {trainer['fullest_stage']}, {per['layers']} layers, {per['parameters']:,} parameters"
        )
        lines += [f"  {part:<12}{gib(per[part]):>11}" for part in STATE]
        lines.append(f"  {'total':<12}{gib(per['total']):>11}  of {usable}")
    per = rollout["per_gpu"]
    lines += [
        "",
        f"Rollout on {_gpus(rollout['gpus'])}: {_fits(rollout['fits'])}",
        "  " + ", ".join(f"{label} {rollout['layout'][key]}" for key, label in _ROLLOUT.items()),
        f"  {'weights':<12}{gib(per['weights']):>11}",
        f"  {'KV cache':<12}{gib(per['kv_cache']):>11}  at gpu_memory_utilization={rollout['mem_fraction']:g}",
        f"  {rollout['cache_tokens_per_engine']:,} tokens an engine: {rollout['sequences_per_engine']:,} full sequences",
        "",
        f"Weight sync: {gigabytes(sync['bytes'])}, {_seconds(sync['total_s']['by_node'])} if each byte enters a node once, "
        f"{_seconds(sync['total_s']['plain'])} if every GPU receives all",
        f"  gather {_seconds(sync['gather_s']['by_node'])} to {_seconds(sync['gather_s']['plain'])}, "
        f"send {_seconds(sync['send_s']['by_node'])} to {_seconds(sync['send_s']['plain'])}, load {_seconds(sync['load_s'])}"
        f"{', at the same time' if sync['overlap'] else ''}",
        *([f"  {gib(sync['peak_bytes'])} of {usable} a GPU meanwhile"] if sync["peak_bytes"] else []),
        "",
    ]
    lines += [f"Change: {told}." for told in plan["changes"]] or ["Everything fits."]
    lines += ["", "Assumed:", *(f"- {told}" for told in plan["assumptions"])]
    return "\n".join(lines)


_TRAINER = {
    "tensor": "TP",
    "pipeline": "PP",
    "expert": "EP",
    "expert_tensor": "ETP",
    "context": "CP",
    "data": "DP",
    "expert_data": "expert DP",
}
_ROLLOUT = {"tensor": "TP", "data": "DP attention", "expert": "EP", "engine_gpus": "GPUs an engine", "replicas": "replicas"}


def _gpus(count: int) -> str:
    return "1 GPU" if count == 1 else f"{count} GPUs"


def _fits(fits: bool) -> str:
    return "fits" if fits else "does not fit"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _billions(count: int) -> str:
    return f"{count / 1e9:,.2f} billion" if count >= 1e8 else f"{count / 1e6:,.2f} million"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 0.01 or not value else f"{value * 1000:.2f} ms"
