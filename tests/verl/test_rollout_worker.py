"""Four ranks as two engines of two: real Ray actors under verl's worker group, with the quickstart's model on a CPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from agentloop.errors import ConfigError, EngineError
from agentloop.journal import Run
from tests.verl.assets import QUICKSTART

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT, RESPONSE = 160, 24
QUESTIONS = ["2 + 3?", "What is 12 * 4?", "7 - 9", "Add 5 and 6.", "100 / 4"]


def config(agentloop: dict[str, Any] | None = None, **rollout: Any) -> dict[str, Any]:
    return {
        **({} if agentloop is None else {"agentloop": agentloop}),
        "actor_rollout_ref": {
            "model": {"path": str(QUICKSTART), "_target_": "verl.workers.config.HFModelConfig"},
            "rollout": {
                "name": "agentloop_local",
                "tensor_model_parallel_size": 2,
                "dtype": "float32",
                "prompt_length": PROMPT,
                "response_length": RESPONSE,
                "calculate_log_probs": True,
                "engine_kwargs": {"agentloop_local": {"threads": 1, "max_slots": 8}},
                **rollout,
            },
        },
    }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Ray with six logical GPUs, and verl on its CPU platform here and in the actors."""
    import ray
    from verl.plugin.platform import platform_manager

    from agentloop.verl.platform import PlatformCPU

    before, platform_manager._current_platform = platform_manager._current_platform, PlatformCPU()
    env = {"VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": "agentloop.verl.plugin", "OMP_NUM_THREADS": "1"}
    ray.init(
        address="local", num_cpus=16, num_gpus=6, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False,
        runtime_env={"env_vars": env},
    )  # fmt: skip
    yield ray
    ray.shutdown()
    platform_manager._current_platform = before


@pytest.fixture(scope="module")
def start(cluster: Any) -> Iterator[Callable[..., Any]]:
    from verl.single_controller.ray import RayClassWithInitArgs, RayResourcePool, RayWorkerGroup, ResourcePoolManager
    from verl.single_controller.ray.base import create_colocated_worker_cls

    from agentloop.verl.rollout_worker import SGLangRolloutWorker

    started: list[Any] = []

    def make(ranks: int, shared: bool = False, **rollout: Any) -> Any:
        """A worker group; `shared`: in actors of verl's that hold several kinds of workers."""
        pools = ResourcePoolManager({"rollout": [ranks]}, {0: "rollout"}, max_colocate_count=1)
        pools.create_resource_pool()
        pool = pools.get_resource_pool(0)
        assert isinstance(pool, RayResourcePool)
        worker = RayClassWithInitArgs(cluster.remote(SGLangRolloutWorker), config(**rollout))
        if shared:
            worker = create_colocated_worker_cls({"rollout": worker})
        group = RayWorkerGroup(pool, worker, device_name="cpu")
        if shared:
            group = group.spawn({"rollout"})["rollout"]
        started.append(SimpleNamespace(group=group, pool=pool))
        return group

    def free() -> None:
        for one in started:
            for actor in one.group.workers:
                with suppress(Exception):
                    cluster.kill(actor)
            for placement in one.pool.get_placement_groups():
                cluster.util.remove_placement_group(placement)
        started.clear()

    make.free = free  # type: ignore[attr-defined]
    yield make
    free()


def set_key(worker: Any, old: str, new: str) -> None:
    rollout = worker.config["actor_rollout_ref"]["rollout"]
    rollout[new] = rollout.pop(old)


@pytest.fixture(scope="module")
def group(start: Any, cluster: Any) -> Any:
    group = start(4)
    with pytest.raises(EngineError, match="call init_model first"):
        group.generate_sequences(conversations())
    wrong, right = "tensor_parallel_size", "tensor_model_parallel_size"
    cluster.get(group.workers[3].__ray_call__.remote(set_key, right, wrong))
    with pytest.raises(ConfigError) as caught:
        group.init_model()
    assert str(caught.value) == f"actor_rollout_ref.rollout: unknown key '{wrong}'; did you mean '{right}'?"
    cluster.get(group.workers[3].__ray_call__.remote(set_key, wrong, right))
    group.init_model()
    return group


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(QUICKSTART, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def words() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QUICKSTART)


def conversations(questions: list[str] = QUESTIONS, **meta: Any) -> Any:
    from verl.protocol import DataProto

    raw: Any = np.empty(len(questions), dtype=object)
    raw[:] = [[{"role": "user", "content": question}] for question in questions]
    return DataProto.from_dict(non_tensors={"raw_prompt": raw, "index": np.arange(len(questions))}, meta_info=meta)


def shown(output: Any, row: int) -> tuple[list[int], list[int]]:
    """Prompt and response of a row, without padding."""
    mask = output.batch["attention_mask"][row].bool()
    ids = output.batch["input_ids"][row]
    return ids[:PROMPT][mask[:PROMPT]].tolist(), ids[PROMPT:][mask[PROMPT:]].tolist()


def expected(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response])).logits[0] / temperature
    table = torch.log_softmax(logits.float(), dim=-1)[len(prompt) - 1 : -1]
    return table.gather(1, torch.tensor(response)[:, None])[:, 0]


def test_rows_come_back_in_order_from_both_engines_with_transformers_log_probs(group: Any, model: Any, words: Any) -> None:
    output = group.generate_sequences(conversations())  # five rows over two engines: nothing is padded
    assert len(output) == len(QUESTIONS)
    for row, question in enumerate(QUESTIONS):
        prompt, response = shown(output, row)
        assert question in words.decode(prompt)
        found = output.batch["rollout_log_probs"][row, : len(response)]
        torch.testing.assert_close(found, expected(model, prompt, response), atol=1e-4, rtol=0)
    assert output.meta_info["timing"]["generate_sequences"] > 0
    assert "rm_scores" not in output.batch

    scored = group.compute_log_prob(output)
    assert scored.meta_info == {"temperature": 1.0, "weight_version": 0}
    assert scored.batch["log_probs"].shape == (len(QUESTIONS), RESPONSE)
    for row in range(len(QUESTIONS)):
        prompt, response = shown(output, row)
        found = scored.batch["log_probs"][row]
        torch.testing.assert_close(found[: len(response)], expected(model, prompt, response), atol=1e-4, rtol=0)
        assert not found[len(response) :].any()
    output.meta_info = {"temperature": 0.7}
    hot = group.compute_log_prob(output)
    assert hot.meta_info["temperature"] == 0.7
    prompt, response = shown(output, 3)
    torch.testing.assert_close(
        hot.batch["log_probs"][3, : len(response)], expected(model, prompt, response, 0.7), atol=1e-4, rtol=0
    )


def test_fewer_rows_than_engines_and_prompts_that_are_tokens_already(group: Any, words: Any) -> None:
    from verl.protocol import DataProto

    one = group.generate_sequences(conversations(QUESTIONS[:1], do_sample=False))
    prompt, response = shown(one, 0)
    ids = torch.tensor([[0] * (PROMPT - len(prompt)) + prompt] * 3)
    batch = DataProto.from_dict({"input_ids": ids, "attention_mask": (ids != 0).long()}, meta_info={"do_sample": False})
    batch.batch["attention_mask"][:, -len(prompt) :] = 1
    output = group.generate_sequences(batch)
    assert [shown(output, row) for row in range(3)] == [(prompt, shown(output, 0)[1])] * 3
    both = min(len(response), len(shown(output, 0)[1]))
    assert shown(output, 0)[1][:both] == response[:both]


def test_siblings_on_two_engines_differ_and_a_step_repeats(group: Any) -> None:
    def batch() -> Any:
        made = conversations([QUESTIONS[0]] * 4, global_steps=3)
        made.non_tensor_batch["index"] = np.zeros(4, dtype=int)
        made.non_tensor_batch["uid"] = np.array(["a"] * 4, dtype=object)
        return made

    first, second = group.generate_sequences(batch()), group.generate_sequences(batch())
    assert torch.equal(first.batch["input_ids"], second.batch["input_ids"])
    assert len({tuple(shown(first, row)[1]) for row in range(4)}) > 1


def test_weights_land_on_all_engines_and_raise_the_version_once(group: Any, model: Any, tmp_path: Path) -> None:
    output = group.generate_sequences(conversations(do_sample=False))
    hosts = [rank for rank, version in enumerate(group.weight_version()) if version is not None]
    assert hosts == [0, 2]
    before = max(version for version in group.weight_version() if version is not None)
    changed = {name: tensor * 1.05 for name, tensor in model.state_dict().items()}
    assert group.update_weights(changed, before + 1) == before + 1
    assert [group.weight_version()[rank] for rank in hosts] == [before + 1] * 2
    scored = group.compute_log_prob(output)
    assert scored.meta_info["weight_version"] == before + 1
    fresh = group.generate_sequences(conversations(do_sample=False))
    assert {*fresh.non_tensor_batch["min_global_steps"], *fresh.non_tensor_batch["max_global_steps"]} == {before + 1}

    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(changed)
    for row in range(len(QUESTIONS)):  # the rows of either engine
        prompt, response = shown(output, row)
        found = scored.batch["log_probs"][row, : len(response)]
        torch.testing.assert_close(found, expected(model, prompt, response), atol=1e-4, rtol=0)
    model.load_state_dict(original)

    with pytest.raises(EngineError, match=f"would not raise; version {before + 1} goes on serving"):
        group.update_weights(changed, before + 1)
    with pytest.raises(EngineError, match=r"the model has no weight 'nothing'.*version \d+ goes on serving"):
        group.update_weights([("nothing", torch.zeros(2))])
    with pytest.raises(EngineError, match="no checkpoint in safetensors"):
        group.update_weights(tmp_path)
    group.compute_log_prob(output)  # the old version serves
    assert group.update_weights(QUICKSTART) == before + 2  # from a folder, which is the model as it was
    again = group.compute_log_prob(output)
    prompt, response = shown(output, 4)
    torch.testing.assert_close(
        again.batch["log_probs"][4, : len(response)], expected(model, prompt, response), atol=1e-4, rtol=0
    )


def test_weights_that_land_on_one_engine_only_are_served_by_none(group: Any, model: Any, cluster: Any) -> None:
    """The other one is made to have fallen asleep for good while it took them, which is how an engine that dies looks."""

    def fail_next(worker: Any) -> None:
        engine = worker._engine
        real = engine.update_weights

        async def failing(weights: Any, version: int) -> None:
            engine.update_weights = real
            raise OSError(28, "No space left on device")

        engine.update_weights = failing

    before = group.weight_version()[0]
    cluster.get(group.workers[2].__ray_call__.remote(fail_next))
    with pytest.raises(EngineError, match=r"landed on replica 0 only \(replica 1: .*No space left.*no engine answers"):
        group.update_weights(model.state_dict())
    with pytest.raises(EngineError, match="does not answer: an update of its weights to version"):
        group.generate_sequences(conversations())
    assert group.update_weights(model.state_dict(), before + 2) == before + 2
    assert len(group.generate_sequences(conversations())) == len(QUESTIONS)


def test_sleep_and_wake(group: Any) -> None:
    group.sleep()
    with pytest.raises(EngineError, match=r"the engine failed all .* sleeps"):
        group.generate_sequences(conversations())
    group.wake()
    assert len(group.generate_sequences(conversations())) == len(QUESTIONS)


def test_processes_that_the_engine_starts_get_the_groups_devices_and_no_memory_check(group: Any, cluster: Any) -> None:
    def children_see(worker: Any) -> list[dict[str, str | None]]:
        """What a child sees that is spawned while an engine starts, as SGLang spawns its schedulers, and one spawned later."""
        import multiprocessing

        from agentloop.verl.rollout_worker_places import DEVICES, IMBALANCE, engine_environment, environment

        names = [*IMBALANCE, DEVICES]
        context = multiprocessing.get_context("spawn")

        def look() -> dict[str, str | None]:
            with context.Pool(1) as pool:
                return dict(zip(names, pool.map(os.getenv, names), strict=True))

        with environment(engine_environment(("2", "3"), os.environ)):
            inside = look()
        return [inside, look()]

    inside, later = cluster.get(group.workers[2].__ray_call__.remote(children_see))
    assert inside == {
        "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK": "0",
        "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK": None,
        "CUDA_VISIBLE_DEVICES": "2,3",
    }
    assert later["SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"] is None
    assert later["CUDA_VISIBLE_DEVICES"] != "2,3"


def test_a_dead_rank_is_one_sentence_and_shutdown_leaves_no_process(group: Any, start: Any) -> None:
    pids = [place.pid for place in group.where()]
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    os.kill(pids[2], 9)
    doomed: list[Callable[[], Any]] = [
        lambda: group.generate_sequences(conversations()),
        lambda: group.update_weights(QUICKSTART),
    ]
    for call in doomed:
        with pytest.raises(EngineError, match="rollout rank 2 of 4 is dead") as caught:
            call()
        assert "\n" not in str(caught.value)
    group.shutdown()
    group.shutdown()
    late = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < late:
        time.sleep(0.1)
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    start.free()


def test_tools_make_it_multi_turn_in_actors_that_are_shared_and_a_run_is_recorded(start: Any, tmp_path: Path) -> None:
    tools = str(QUICKSTART.parent / "tools.yaml")
    multi_turn = {"tool_config_path": tools, "max_assistant_turns": 3}
    section = {"run_dir": str(tmp_path / "run")}
    group = start(1, True, agentloop=section, tensor_model_parallel_size=1, response_length=96, multi_turn=multi_turn)
    group.init_model()
    output = group.generate_sequences(conversations(do_sample=False))
    turns = output.non_tensor_batch["__num_turns__"]
    assert max(turns) > 2  # prompt, call, answer
    row = int(np.argmax(turns))
    mask = output.batch["response_mask"][row]
    length = int(output.batch["attention_mask"][row, PROMPT:].sum())
    assert 0 < int(mask.sum()) < length  # the tool's answer is in the response, and is not the model's
    group.shutdown()
    assert group.where()[0].pid  # the actor lives: other workers may live in it
    assert len([*Run(tmp_path / "run").trajectories(step=0)]) == len(QUESTIONS)
    start.free()
