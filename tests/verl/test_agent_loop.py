"""Our loop as one of verl's agent loops, called by verl's own worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentloop.chat.load import load_renderer
from agentloop.journal import Run
from tests.verl.support import verl_config, verl_worker

ROW = {
    "raw_prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "uid": "g0",
    "session_id": 1,
    "global_steps": 2,
    "index": 0,
    "data_source": "tests",
    "reward_model": {"ground_truth": "7"},
    "extra_info": {"index": 3},
}


class Client:
    """Answers as verl's `LLMServerClient`, from a list of token lists; `None` is a server that fails."""

    def __init__(self, answers: list[list[int] | None]) -> None:
        self.answers = answers
        self.prompts: list[list[int]] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        await asyncio.sleep(0)
        from ray.exceptions import RayError
        from verl.workers.rollout.replica import TokenOutput

        self.prompts.append(prompt_ids)
        answer = self.answers[len(self.prompts) - 1]
        if answer is None:
            raise RayError("the server is gone")
        fields = {"global_steps": 1, "min_global_steps": 1, "max_global_steps": 1}
        return TokenOutput(token_ids=answer, log_probs=[-0.5] * len(answer), stop_reason="completed", extra_fields=fields)


@pytest.fixture
def worker(tokenizer: Any, tmp_path: Path) -> Any:
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry

    _agent_loop_registry["agentloop"] = OmegaConf.create(
        {"name": "agentloop", "_target_": "agentloop.verl.agent_loop.AgentloopAgentLoop"}
    )
    made = verl_worker(tokenizer, 1024, 512)
    made.config = verl_config(
        **{
            "data.max_prompt_length": 1024,
            "data.max_response_length": 512,
            "actor_rollout_ref.rollout.multi_turn.function_tool_path": "tests/verl/adder.py",
            "agentloop.run_dir": tmp_path / "run",
        }
    )
    made.hf_model_type, made.dataset_cls, made.tools = None, SimpleNamespace, []
    return made


async def run(worker: Any, client: Client, *, validate: bool = False, **row: Any) -> Any:
    worker.llm_client = client
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
    info = {"step": 2, "sample_index": 0, "rollout_n": 1, "validate": validate}
    columns = {name: value for name, value in {**ROW, **row}.items() if value is not None}
    return await worker._run_agent_loop(params, info, agent_name="agentloop", trace=False, **columns)


def answer(tokenizer: Any, text: str = "It is 7.") -> list[int]:
    return [*tokenizer.encode(text), load_renderer(tokenizer).stop_token_ids[0]]


async def test_two_turns_with_a_tool_through_verls_worker(worker: Any, tokenizer: Any) -> None:
    end = load_renderer(tokenizer).stop_token_ids[0]
    call = [*tokenizer.encode('<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'), end]
    answer = [*tokenizer.encode("It is 7."), end]
    client = Client([call, answer])
    row = await run(worker, client)
    assert client.prompts[1][: len(client.prompts[0]) + len(call)] == client.prompts[0] + call
    assert row.num_turns == 4
    assert int(row.response_mask.sum()) == len(call) + len(answer)
    assert row.extra_fields["end_reason"] == "final_answer"
    told = tokenizer.decode(client.prompts[1][len(client.prompts[0]) + len(call) :])
    assert "<tool_response>\n7\n</tool_response>" in told


async def test_a_failed_trajectory_does_not_raise_so_its_group_lives(worker: Any) -> None:
    row = await run(worker, Client([None]))
    assert int(row.response_mask.sum()) == 0
    assert int(row.attention_mask[:, 1024:].sum()) == 1
    assert row.reward_score == 0.0
    assert row.extra_fields["end_reason"] == "engine_failure"


async def test_the_journal_has_what_verls_worker_ran_and_validation_apart(
    worker: Any, tokenizer: Any, handle: Any, tmp_path: Path
) -> None:
    worker.reward_loop_worker_handles = [handle]
    client = Client([answer(tokenizer), answer(tokenizer, "7"), None])
    trained = await run(worker, client)
    validated = await run(worker, client, validate=True, uid="g1")
    await run(worker, client, uid="g2")
    record = Run(tmp_path / "run")
    rows = {(row.partition, row.step, row.id): row for row in record.trajectories()}
    assert list(rows) == [("train", 2, "g0_1"), ("train", 2, "g2_1"), ("val", 2, "g1_1")]
    assert all(row.complete and row.generation == 1 for row in rows.values())
    assert [row.end_reason for row in rows.values()] == ["final_answer", "engine_failure", "final_answer"]
    assert rows["train", 2, "g0_1"].reward == trained.reward_score == 0.08
    assert rows["val", 2, "g1_1"].reward == validated.reward_score == 0.01
    assert rows["train", 2, "g0_1"].components["acc"] == 1.0
    assert trained.extra_fields["reward_extra_info"]["truth"] == "7"
    assert record.load("g0_1").input_ids[-len(answer(tokenizer)) :] == answer(tokenizer)
    assert record.meta["model"] == "no-model" and record.meta["tools"][0]["function"]["name"] == "add"


async def test_a_masked_row_fits_into_the_padded_batch_of_its_siblings(worker: Any, tokenizer: Any, handle: Any) -> None:
    worker.reward_loop_worker_handles = [handle]
    client = Client([None, answer(tokenizer), answer(tokenizer)])
    legacy: dict[str, Any] = {"session_id": None, "global_steps": None}
    masked, *healthy = await asyncio.gather(*(run(worker, client, **legacy) for _ in range(3)))
    for rows in ([masked, *healthy], [*healthy, masked]):
        batch = worker._postprocess(rows)
        scores = {round(value, 2) for value in batch.batch["rm_scores"].sum(dim=1).tolist()}
        assert scores == {0.0, 0.08}
        assert sorted(batch.non_tensor_batch["truth"].tolist()) == ["", "7", "7"]
        assert {"acc", "truth"} <= set(batch.meta_info["reward_extra_keys"])


async def test_without_a_journal_nothing_is_written(worker: Any, tokenizer: Any, tmp_path: Path) -> None:
    OmegaConf.update(worker.config, "agentloop.journal", False, force_add=True)
    await run(worker, Client([answer(tokenizer)]))
    assert not (tmp_path / "run").exists()
