"""`SGLangRolloutWorker` with SGLang: real Ray actors under verl's worker group, on one GPU or several.

`python -m benchmarks.gpu.rollout_worker [--gpus 2] [--tensor 2]`, about two minutes on H200s, most of it SGLang starting.

The quickstart's model is served by `gpus / tensor` engines. Told are: decode log-probabilities against `compute_log_prob` and
against transformers on the same tokens, an update of the weights and back, sleep and wake, what the schedulers have in
their environment, and that nothing is left after `shutdown`. Exits with 3 where SGLang or a GPU is missing. `--engine local`
runs the same on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from agentloop.verl.rollout_worker_places import DEVICES, IMBALANCE
from benchmarks.gpu.engine_support import MODEL, SETTINGS, Result, arguments, command, refused, summary
from benchmarks.report import Aim

PROMPT, RESPONSE, ROWS = 160, 48, 64


def config(args: argparse.Namespace) -> dict[str, Any]:
    settings = {name: value for name, value in SETTINGS.items() if name != "mem_fraction_static"}
    engine = {"sglang": settings | {"enable_weights_cpu_backup": True}, "agentloop_local": {"threads": 1}}
    name = "sglang" if args.engine == "sglang" else "agentloop_local"
    rollout = {
        "name": name,
        "tensor_model_parallel_size": args.tensor,
        "gpu_memory_utilization": 0.3,
        "dtype": "bfloat16" if args.engine == "sglang" else "float32",
        "load_format": "auto",
        "prompt_length": PROMPT,
        "response_length": RESPONSE,
        "calculate_log_probs": True,
        "engine_kwargs": {name: engine[name]},
    }
    model = {"path": str(MODEL), "_target_": "verl.workers.config.HFModelConfig"}
    return {"actor_rollout_ref": {"model": model, "rollout": rollout}}


def start(args: argparse.Namespace) -> Any:
    import ray
    from verl.single_controller.ray import RayClassWithInitArgs, RayWorkerGroup, ResourcePoolManager

    from agentloop.verl.rollout_worker import SGLangRolloutWorker

    logical = {} if args.engine == "sglang" else {"num_gpus": args.gpus}
    ray.init(address="local", num_cpus=4 * args.gpus, include_dashboard=False, log_to_driver=args.engine == "sglang", **logical)
    pools = ResourcePoolManager({"rollout": [args.gpus]}, {0: "rollout"}, max_colocate_count=1)
    pools.create_resource_pool()
    worker = RayClassWithInitArgs(ray.remote(SGLangRolloutWorker), config(args))
    return RayWorkerGroup(pools.get_resource_pool(0), worker, device_name="cuda" if args.engine == "sglang" else "cpu")


def prompts() -> Any:
    from verl.protocol import DataProto

    raw: Any = np.empty(ROWS, dtype=object)
    raw[:] = [[{"role": "user", "content": f"{a} + {a * 7 % 50}?"}] for a in range(ROWS)]
    return DataProto.from_dict(non_tensors={"raw_prompt": raw, "index": np.arange(ROWS)})


def by_transformers(output: Any) -> list[float]:
    """Absolute differences of the rollout's log-probabilities to those of transformers in float32 on the CPU."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    found: list[float] = []
    for row in range(len(output)):
        mask = output.batch["attention_mask"][row].bool()
        ids, length = output.batch["input_ids"][row][mask], int(mask[PROMPT:].sum())
        with torch.inference_mode():
            table = torch.log_softmax(model(ids[None]).logits[0].float(), dim=-1)[-length - 1 : -1]
        own = table.gather(1, ids[-length:, None])[:, 0]
        found += (own - output.batch["rollout_log_probs"][row, :length]).abs().tolist()
    return found


def apart(output: Any, scored: Any) -> list[float]:
    mask = output.batch["response_mask"].bool()
    differences = (output.batch["rollout_log_probs"] - scored.batch["log_probs"]).abs()[mask]
    return [float(value) for value in differences]


def engine_processes(pids: Sequence[int]) -> dict[int, dict[str, str | None]]:
    """The processes under the ranks' own, with what their environment was when they started."""
    import psutil

    found: dict[int, dict[str, str | None]] = {}
    for pid in pids:
        for child in psutil.Process(pid).children(recursive=True):
            try:
                environment = child.environ()
            except psutil.Error:  # it has ended meanwhile
                continue
            found[child.pid] = {name: environment.get(name) for name in (*IMBALANCE, DEVICES)}
    return found


def difference(some: Any, others: Any) -> dict[str, float]:
    """Of the scores of all real tokens."""
    return summary((some.batch["log_probs"] - others.batch["log_probs"]).abs().flatten().tolist())


def measure(args: argparse.Namespace, result: Result) -> None:
    import psutil
    import ray
    from safetensors.torch import load_file

    began = perf_counter()
    group = start(args)
    try:
        pids = [place.pid for place in group.where()]
        result.say(f"{args.gpus} ranks: {pids}")
        group.init_model()
        children = engine_processes(pids)
        result.note(
            start_s=round(perf_counter() - began, 1),
            environments=[dict(told) for told in {tuple(sorted(c.items())) for c in children.values()}],
        )
        began = perf_counter()
        output = group.generate_sequences(prompts())
        result.note(generate_s=round(perf_counter() - began, 2))
        scored = group.compute_log_prob(output)
        result.note(decode_against_compute_log_prob=summary(apart(output, scored)))
        with result.step("transformers"):
            result.note(decode_against_transformers_float32=summary(by_transformers(output)))

        weights = load_file(str(MODEL / "model.safetensors"))
        other = {name: tensor.roll(1, 0).contiguous() for name, tensor in weights.items()}
        with result.step("update"):
            began = perf_counter()
            version = group.update_weights(other, 1)
            result.note(version_after_update=version, update_s=round(perf_counter() - began, 3))
            moved = difference(group.compute_log_prob(output), scored)
            version = group.update_weights(str(MODEL), 2)
            back = difference(group.compute_log_prob(output), scored)
            result.note(version_after_update_back=version, scores_moved=moved, scores_back=back)
        with result.step("sleep and wake"):
            began = perf_counter()
            group.sleep()
            group.wake()
            took = round(perf_counter() - began, 3)
            version = group.update_weights(weights, 3)
            again = difference(group.compute_log_prob(output), scored)
            result.note(sleep_and_wake_s=took, version_after_wake=version, scores_after_wake=again)
        group.shutdown()
        late = time.monotonic() + 60
        while left := [pid for pid in (*pids, *children) if psutil.pid_exists(pid)]:
            if time.monotonic() > late:
                break
            time.sleep(0.2)
        result.note(processes_left=len(left))
    finally:
        ray.shutdown()


def aims(figures: Mapping[str, Any]) -> list[Aim]:
    found = []
    if "decode_against_compute_log_prob" in figures:
        noise = figures["decode_against_compute_log_prob"]["mean"]
        found.append(Aim("decode against compute_log_prob, mean", noise, "at most 0.02 in bfloat16", noise <= 0.02))
    if "scores_back" in figures:
        back, moved = figures["scores_back"]["mean"], figures["scores_moved"]["mean"]
        found.append(
            Aim(
                "scores after an update and back, over how far they moved, means",
                round(back / moved, 6),
                "at most 0.02",
                back <= 0.02 * moved,
            )
        )
    if "processes_left" in figures:
        left = figures["processes_left"]
        found.append(Aim("processes left after shutdown", left, "0", left == 0))
    if figures["engine"] == "sglang" and "environments" in figures:
        wrong = sum([told[name] for name in IMBALANCE] != ["0", None] for told in figures["environments"])
        found.append(Aim("processes of SGLang that check for unequal memory", wrong, "0", wrong == 0))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The rollout worker with SGLang.")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=1, help="GPUs of one engine")
    args = arguments(parser, "rollout_worker", argv)
    if refused(args):
        return 3
    if args.engine == "local":
        os.environ.update(VERL_PLATFORM="cpu", VERL_USE_EXTERNAL_MODULES="agentloop.verl.plugin")
    result = Result(
        args.name + (f"_tp{args.tensor}" if args.tensor > 1 else ""),
        aims,
        args.results,
        command=command("rollout_worker"),
        engine=args.engine,
        ranks=args.gpus,
        replicas=args.gpus // args.tensor,
    )
    with result.step("all"):
        measure(args, result)
    result.report()
    return 1 if "all" in result.figures["not_run"] else 0


if __name__ == "__main__":
    sys.exit(main())
