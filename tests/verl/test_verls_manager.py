"""Our loop in verl's own manager: real Ray actors of verl's, a real TransferQueue, around a scripted client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from agentloop.journal import Run
from agentloop.verl.server import ROLLOUT_NAME
from tests.verl.support import verl_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOOPS = "- name: agentloop\n  _target_: agentloop.verl.agent_loop.AgentloopAgentLoop\n"


class Answers:
    """A client that closes every turn at once."""

    def __init__(self, end: int) -> None:
        self.end = end

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any) -> Any:
        return SimpleNamespace(token_ids=[self.end], log_probs=[-0.5], stop_reason="stop", extra_fields={"global_steps": 1})


@pytest.fixture
def queue() -> Iterator[Any]:
    import ray
    import transfer_queue

    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=128 << 20, log_to_driver=False)
    transfer_queue.init()
    yield transfer_queue
    transfer_queue.close()
    ray.shutdown()


def submit(queue: Any, manager: Any, uids: list[str], step: int, validate: bool) -> None:
    """As verl's trainer does it; comes back when all groups have ended."""
    from verl.utils import tensordict_utils as tu

    raw: Any = np.empty(len(uids), dtype=object)
    raw[:] = [[{"role": "user", "content": f"go {uid}"}] for uid in uids]
    columns = {"raw_prompt": raw, "index": np.arange(len(uids)), "uid": np.array(uids, dtype=object)}
    batch = tu.get_tensordict(columns)
    tu.assign_non_tensor_data(batch, "global_steps", step)
    if validate:
        tu.assign_non_tensor_data(batch, "validate", True)
    partition = "val" if validate else "train"
    tags = [{"is_prompt": True, "status": "pending", "global_steps": step}] * len(uids)
    queue.kv_batch_put(keys=uids, partition_id=partition, tags=tags)
    manager.generate_sequences(batch)
    found: dict[str, str] = {}
    for _ in range(600):
        listed = queue.kv_list(partition)[partition]
        found = {uid: listed[uid]["status"] for uid in uids}
        if set(found.values()) == {"finished"}:
            return
        time.sleep(0.1)
    raise AssertionError(found)


def test_every_worker_process_of_verls_writes_to_one_journal(queue: Any, tokenizer: Any, tmp_path: Path) -> None:
    from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopManagerTQ

    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}')
    (tmp_path / "loops.yaml").write_text(LOOPS)
    config = verl_config(
        **{
            "actor_rollout_ref.model.path": tmp_path / "model",
            "actor_rollout_ref.rollout.agent.num_workers": 2,
            "actor_rollout_ref.rollout.agent.agent_loop_config_path": tmp_path / "loops.yaml",
            "actor_rollout_ref.rollout.agent.default_agent_loop": "agentloop",
            "actor_rollout_ref.rollout.name": ROLLOUT_NAME,
            "actor_rollout_ref.rollout.n": 2,
            "agentloop.run_dir": tmp_path / "run",
        }
    )
    client = Answers(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    manager = AgentLoopManagerTQ.create(config=config, llm_client=client)
    submit(queue, manager, ["a0", "a1", "a2", "a3"], 7, False)
    submit(queue, manager, ["v0", "v1"], 7, True)

    run = Run(tmp_path / "run")
    trained, validated = list(run.trajectories("train", 7)), list(run.trajectories("val", 7))
    assert sorted(row.id for row in trained) == [f"a{i}_{j}" for i in range(4) for j in range(2)]
    assert sorted(row.id for row in validated) == ["v0_0", "v1_0"]
    assert all(row.complete and row.generation == 1 and row.end_reason == "final_answer" for row in trained + validated)
    assert len({row.writer for row in trained}) == 2
    assert run.verify() == []
    assert run.meta["generation"] == 1 and run.meta["start"]
