"""Our loop as one of verl's agent loops, called by verl's own worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from agentloop.chat.load import load_renderer
from tests.verl.support import verl_config, verl_worker

ROW = {
    "raw_prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "uid": "g0",
    "session_id": 1,
    "global_steps": 2,
    "index": 0,
    "data_source": "tests",
    "reward_model": {"ground_truth": "7"},
}


class Client:
    """Answers as verl's `LLMServerClient`, from a list of token lists; `None` is a server that fails."""

    def __init__(self, answers: list[list[int] | None]) -> None:
        self.answers = answers
        self.prompts: list[list[int]] = []

    async def generate(self, request_id: str, *, prompt_ids: list[int], sampling_params: dict[str, Any]) -> Any:
        from ray.exceptions import RayError
        from verl.workers.rollout.replica import TokenOutput

        self.prompts.append(prompt_ids)
        answer = self.answers[len(self.prompts) - 1]
        if answer is None:
            raise RayError("the server is gone")
        fields = {"global_steps": 1, "min_global_steps": 1, "max_global_steps": 1}
        return TokenOutput(token_ids=answer, log_probs=[-0.5] * len(answer), stop_reason="completed", extra_fields=fields)


@pytest.fixture
def worker(tokenizer: Any) -> Any:
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
        }
    )
    made.hf_model_type, made.dataset_cls, made.tools = None, SimpleNamespace, []
    return made


async def run(worker: Any, client: Client) -> Any:
    worker.llm_client = client
    params = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "logprobs": True}
    info = {"step": 2, "sample_index": 0, "rollout_n": 1, "validate": False}
    return await worker._run_agent_loop(params, info, agent_name="agentloop", trace=False, **ROW)


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
