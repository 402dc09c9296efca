"""What SGLang 0.5.12 answers, in the shapes that its tokenizer manager builds, and what is made of it."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from agentloop.engines import sglang_protocol as protocol
from agentloop.engines.base import Sampling
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import StopReason


def answer(ids: list[int], finish: dict[str, Any] | None, **meta: Any) -> dict[str, Any]:
    """`_handle_batch_output`'s shape of a finished request."""
    return {
        "text": "…",
        "output_ids": ids,
        "meta_info": {
            "id": "0" * 32,
            "finish_reason": finish,
            "prompt_tokens": 5,
            "weight_version": "3",
            "num_retractions": 0,
            "input_token_logprobs": [],
            "output_token_logprobs": [(-0.5 * (i + 1), token, None) for i, token in enumerate(ids)],
            "output_token_logprobs_length": len(ids),
            "reasoning_tokens": 0,
            "completion_tokens": len(ids),
            "cached_tokens": 4,
            "e2e_latency": 0.1,
            **meta,
        },
    }


def test_a_finished_answer() -> None:
    stop = {"type": "stop", "matched": 9}
    made = protocol.generation(answer([7, 8, 9], stop), log_probs=True, began_version=2, queue_s=0.25)
    assert (made.ids, made.log_probs, made.stop_reason) == ([7, 8, 9], [-0.5, -1.0, -1.5], StopReason.STOP)
    assert (made.weight_version, made.min_weight_version, made.cached_tokens, made.queue_s) == (3, 2, 4, 0.25)
    assert made.data is None
    length = protocol.generation(answer([7], {"type": "length", "length": 1}), log_probs=False)
    assert (length.log_probs, length.stop_reason, length.min_weight_version) == (None, StopReason.LENGTH, 3)


def test_the_same_answer_as_json() -> None:
    as_json = answer([7], {"type": "length", "length": 1}, output_token_logprobs=[[-0.5, 7, None]])
    assert protocol.generation(as_json, log_probs=True).log_probs == [-0.5]


def test_an_abort_keeps_the_tokens_so_far() -> None:
    finish = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    running = protocol.generation(answer([7, 8], finish), log_probs=True)
    assert (running.ids, running.log_probs, running.stop_reason) == ([7, 8], [-0.5, -1.0], StopReason.ABORTED)
    # `_handle_abort_req`'s shape: it had not begun
    queued = answer([], {"type": "abort", "message": "Abort in waiting queue"})
    del queued["meta_info"]["cached_tokens"]
    waiting = protocol.generation(queued, log_probs=True)
    assert (waiting.ids, waiting.log_probs, waiting.stop_reason) == ([], [], StopReason.ABORTED)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (answer([], {"type": "abort", "message": "Input length (9 tokens) exceeds", "status_code": 400}), "exceeds"),
        (answer([7], {"type": "abort", "message": "Out of memory", "status_code": 500}), "Out of memory"),
        (answer([7], {"type": "stop", "matched": "NaN happened"}), "not finite"),
        (answer([], {"type": "stop", "matched": 9}), "no token"),
        (answer([7], None), "no finish reason"),
        (answer([7], {"type": "stop"}, output_token_logprobs=[]), "1 tokens and 0 log-probabilities"),
        (answer([7], {"type": "stop"}, output_token_logprobs=[(-1.0, 6, None)]), "token 6 where token 7"),
        (answer([7], {"type": "stop"}, output_token_logprobs=[(float("nan"), 7, None)]), "not finite"),
    ],
)
def test_what_is_no_answer_is_an_engine_error(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        protocol.generation(wrong, log_probs=True)


def test_weight_versions_that_are_no_number_are_none() -> None:
    made = protocol.generation(answer([7], {"type": "stop"}, weight_version="default"), log_probs=True)
    assert (made.weight_version, made.min_weight_version) == (None, None)


def test_routed_experts_get_their_shape() -> None:
    experts = np.arange(5 * 3 * 2, dtype=np.int32).reshape(5, 3, 2)
    encoded = base64.b64encode(experts.tobytes()).decode()
    made = protocol.generation(answer([7], {"type": "stop"}, routed_experts=encoded), log_probs=True, experts_shape=(3, 2))
    assert made.data["routed_experts"].dtype == np.int16
    assert (made.data["routed_experts"] == experts).all()
    with pytest.raises(EngineError, match="30 routed experts"):
        protocol.routed_experts(encoded, (4, 2))


def test_scores_leave_out_the_first_token() -> None:
    meta = {"input_token_logprobs": [(None, 4, None), (-1.0, 5, None), (-2.0, 6, None)]}
    finish = {"type": "length", "length": 0}
    assert protocol.scores(answer([], finish, **meta), [4, 5, 6]) == [-1.0, -2.0]
    with pytest.raises(EngineError, match="3 input log-probabilities for 2 tokens"):
        protocol.scores(answer([], finish, **meta), [4, 5])
    with pytest.raises(EngineError, match="aborted"):
        protocol.scores(answer([], {"type": "abort", "message": "Aborted"}, **meta), [4, 5, 6])


def test_what_is_asked() -> None:
    sampling = Sampling(30, temperature=0.7, top_p=0.9, top_k=5, stop_token_ids=(9,), stop=("</x>",), seed=(1 << 64) - 1)
    request = protocol.generate_request([1, 2], sampling, rid="r", room=20, ignore_eos=True, cache_key="3")
    assert request["sampling_params"] == {
        "max_new_tokens": 20,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "skip_special_tokens": False,
        "no_stop_trim": True,
        "stop_token_ids": [9],  # and so no `ignore_eos`, which would turn them off
        "stop": ["</x>"],
        "sampling_seed": (1 << 63) - 1,
    }
    assert (request["rid"], request["input_ids"], request["return_logprob"], request["extra_key"]) == ("r", [1, 2], True, "3")
    assert "logprob_start_len" not in request  # it would cap the reuse of the prefix cache
    assert protocol.generate_request([1], Sampling(3), rid="r", ignore_eos=True)["sampling_params"]["ignore_eos"] is True
    scoring = protocol.score_request([1, 2], rid="r")
    assert (scoring["logprob_start_len"], scoring["sampling_params"]["max_new_tokens"]) == (0, 0)


def test_request_ids_have_one_length() -> None:
    """SGLang aborts every request whose id begins with the one that it is told."""
    assert {len(protocol.new_request_id()) for _ in range(100)} == {32}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "empty"),
        ([1.5], "not a sequence"),
        ([1, -1], "token -1"),
        ([1, 50], "token 50; the model knows 0 to 49"),
        ([1] * 9, "9"),
    ],
)
def test_inputs_that_sglang_must_not_see(ids: list[Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        protocol.check_input(ids, max_input=8, vocabulary=50)
    assert protocol.check_input((1, 49), max_input=8, vocabulary=50) == [1, 49]


def test_scoring_is_at_temperature_one_only() -> None:
    protocol.check_score_temperature(1.0)
    with pytest.raises(EngineError, match="only 1 can be scored"):
        protocol.check_score_temperature(0.7)


@pytest.mark.parametrize("value", ["1", "true", "yes"])
def test_the_environment_must_not_change_what_log_probs_mean(value: str) -> None:
    with pytest.raises(ConfigError, match="unset it"):
        protocol.check_environment({"SGLANG_RETURN_ORIGINAL_LOGPROB": value})
    protocol.check_environment({"SGLANG_RETURN_ORIGINAL_LOGPROB": "false"})
    protocol.check_environment({})
