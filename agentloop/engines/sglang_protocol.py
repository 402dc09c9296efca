"""What SGLang 0.5.12 is asked and what it answers, mapped onto ours: pure functions, for both SGLang engines.

Requests are dicts with the names of `GenerateReqInput`, which are also those of the JSON body of `POST /generate`. Answers are
dicts with `output_ids` and `meta_info`, whether they come from `Engine.async_generate` or as JSON.

What is relied on (places are in `sglang/srt`, version 0.5.12):

- Decode log-probabilities are after temperature and before top-p and top-k (`layers/sampler.py`), greedy ones at temperature 1;
  the environment variable SGLANG_RETURN_ORIGINAL_LOGPROB changes that. Those of the input ignore the temperature.
- `logprob_start_len` of 0 or more caps the reuse of the prefix cache (`managers/schedule_batch.py`, `init_next_round_input`),
  so only `score_request` sets it.
- `output_ids` keep the stop token and the tokens of a stop string; only the text is trimmed (`output_ids_through_stop`).
- An abort matches every request whose id *begins* with the given one (`managers/scheduler.py`, `abort_request`): ids must all
  have one length (`new_request_id`).
- A seed counts only under `--enable-deterministic-inference` (`sampling/sampling_batch_info.py`) and is ignored otherwise.
- No id of the input is checked against the vocabulary, and one outside of it ends the server: `check_input`.
- An input must be shorter than the scheduler's `max_req_input_len`, which is the context less 6 or less
  (`managers/tp_worker.py`), and input and `max_new_tokens` together must fit into the context
  (`managers/tokenizer_manager.py`, `_validate_one_request`).
"""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentloop.engines.base import Generation, Sampling, check_ids
from agentloop.engines.base import check_sampling as check_sampling
from agentloop.errors import ConfigError, EngineError
from agentloop.trajectory import StopReason

ORIGINAL_LOGPROB = "SGLANG_RETURN_ORIGINAL_LOGPROB"
FALSE = ("", "0", "false", "no", "n", "f", "off")
NAN = "NaN happened"
"""What `finish_reason.matched` says when the sampled id was outside of the vocabulary, which broken logits give."""
SEED_BITS = 63
"""SGLang keeps seeds as signed 64-bit integers."""


# -- asking -------------------------------------------------------------------------------------------------------------------


def check_environment(environment: Mapping[str, str]) -> None:
    """Raise `ConfigError` if the environment changes what log-probabilities mean."""
    value = environment.get(ORIGINAL_LOGPROB)
    if value is not None and value.strip().lower() not in FALSE:
        raise ConfigError(
            f"the environment sets {ORIGINAL_LOGPROB}={value}, with which SGLang reports log-probabilities before temperature; "
            "unset it"
        )


def check_input(ids: Sequence[int], *, max_input: int | None, vocabulary: int | None) -> list[int]:
    """`ids` as a list of ints that SGLang can take. Raises `EngineError` as `check_ids`, and for more than `max_input` tokens;
    `None` skips a check."""
    own = check_ids(ids, vocabulary)
    if max_input is not None and len(own) > max_input:
        raise EngineError(f"the input has {len(own)} tokens; SGLang takes at most {max_input} here")
    return own


def new_request_id() -> str:
    """A request id: 32 characters, always."""
    return uuid.uuid4().hex


def sampling_params(sampling: Sampling, *, room: int | None = None, ignore_eos: bool = False) -> dict[str, Any]:
    """SGLang's `sampling_params`. `room`: tokens that still fit into the context; SGLang refuses to be asked for more.

    Beside `sampling.stop_token_ids` the model's own end-of-sequence tokens always end a generation. `ignore_eos` turns them
    off, and in SGLang with them every stop token, so it only takes effect where `sampling` names none.
    """
    params: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens if room is None else min(sampling.max_tokens, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "skip_special_tokens": False,
        "no_stop_trim": True,
    }
    if sampling.stop_token_ids:
        params["stop_token_ids"] = list(sampling.stop_token_ids)
    elif ignore_eos:
        params["ignore_eos"] = True
    if sampling.stop:
        params["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed & ((1 << SEED_BITS) - 1)
    return params


def generate_request(
    ids: list[int],
    sampling: Sampling,
    *,
    rid: str,
    room: int | None = None,
    ignore_eos: bool = False,
    routed_experts: bool = False,
    cache_key: str | None = None,
) -> dict[str, Any]:
    """A request for one generation. `cache_key`: the prefix cache is only shared among requests with the same one."""
    request: dict[str, Any] = {
        "rid": rid,
        "input_ids": ids,
        "sampling_params": sampling_params(sampling, room=room, ignore_eos=ignore_eos),
        "return_logprob": sampling.log_probs,
    }
    if routed_experts:
        request["return_routed_experts"] = True
    if cache_key is not None:
        request["extra_key"] = cache_key
    return request


def score_request(ids: list[int], *, rid: str) -> dict[str, Any]:
    """A request for the log-probabilities of `ids`, at temperature 1: one prefill without the prefix cache."""
    return {
        "rid": rid,
        "input_ids": ids,
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        "logprob_start_len": 0,
    }


def check_score_temperature(temperature: float) -> None:
    if temperature != 1.0:
        raise EngineError(
            f"temperature is {temperature}; SGLang's log-probabilities of an input ignore it, so only 1 can be scored"
        )


# -- answered -----------------------------------------------------------------------------------------------------------------


def generation(
    answer: Mapping[str, Any],
    *,
    log_probs: bool,
    began_version: int | None = None,
    queue_s: float = 0.0,
    experts_shape: tuple[int, int] | None = None,
) -> Generation:
    """SGLang's answer as a `Generation`.

    `log_probs`: whether they were asked for. `began_version`: the weights when the request was sent; SGLang itself tells only
    those of the moment at which it built the answer. `experts_shape`: (layers, experts a token) of the model, to give
    `data["routed_experts"]` the shape [tokens - 1, layers, experts a token] where SGLang recorded them (int16; over input and
    output; the last token was sampled and not yet routed).

    Raises `EngineError` for a failure that SGLang reports as an answer, and for one that cannot be trusted: logits that were
    not finite, or log-probabilities that are missing, not finite or of other tokens.
    """
    meta = answer["meta_info"]
    reason = _stop_reason(meta.get("finish_reason"))
    ids = [int(token) for token in answer.get("output_ids") or ()]
    if not ids and reason is not StopReason.ABORTED:
        raise EngineError(f"SGLang answered no token (finish reason {meta.get('finish_reason')})")
    version = weight_version(meta)
    data = None
    if meta.get("routed_experts") is not None:
        data = {"routed_experts": routed_experts(meta["routed_experts"], experts_shape)}
    return Generation(
        ids=ids,
        log_probs=_output_log_probs(meta, ids) if log_probs else None,
        stop_reason=reason,
        weight_version=version,
        min_weight_version=version if began_version is None else began_version,
        cached_tokens=int(meta.get("cached_tokens") or 0),
        queue_s=queue_s,
        data=data,
    )


def scores(answer: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
    """The log-probabilities of `ids[1:]` from the answer to `score_request(ids)`. Raises `EngineError` like `generation`."""
    meta = answer["meta_info"]
    if _stop_reason(meta.get("finish_reason")) is StopReason.ABORTED:
        raise EngineError("the scoring was aborted")
    entries = meta.get("input_token_logprobs")
    if entries is None or len(entries) != len(ids):
        raise EngineError(f"SGLang answered {len(entries or ())} input log-probabilities for {len(ids)} tokens")
    # SGLang 0.5.12 names the vocabulary's last id 0 here (scheduler_output_processor_mixin.py); the value is the right one.
    named = [(value, token if said == 0 else said, *rest) for (value, said, *rest), token in zip(entries, ids, strict=True)]
    return _values(named[1:], ids[1:])


def weight_version(meta: Mapping[str, Any]) -> int | None:
    """The version in `meta_info`, or `None` where it is no number (SGLang's own is «default»)."""
    try:
        return int(meta["weight_version"])
    except (KeyError, TypeError, ValueError):
        return None


def routed_experts(encoded: str, shape: tuple[int, int] | None) -> NDArray[np.int16] | NDArray[np.int32]:
    """Decode `meta_info["routed_experts"]`: base64 of 32-bit integers, [tokens, layers, experts a token]. Without `shape`
    (layers, experts a token) they stay flat."""
    flat = np.frombuffer(base64.b64decode(encoded), dtype=np.int32)
    if shape is None:
        return flat
    layers, top_k = shape
    if flat.size % (layers * top_k):
        raise EngineError(f"SGLang answered {flat.size} routed experts, which {layers} layers of {top_k} do not divide")
    return flat.reshape(-1, layers, top_k).astype(np.int16)


def _stop_reason(finish: Any) -> StopReason:
    if not isinstance(finish, Mapping):
        raise EngineError(f"SGLang's answer has no finish reason, but {finish!r}")
    kind = finish.get("type")
    if kind == "length":
        return StopReason.LENGTH
    if kind == "stop":
        if finish.get("matched") == NAN:
            raise EngineError("the model's logits are not finite")
        return StopReason.STOP
    if kind == "abort":
        if finish.get("status_code") is not None:  # SGLang's own doing: a wrong request, no memory, a full queue
            raise EngineError(f"SGLang gave the request up: {finish.get('message')}")
        return StopReason.ABORTED
    raise EngineError(f"SGLang's answer has an unknown finish reason: {dict(finish)}")


def _output_log_probs(meta: Mapping[str, Any], ids: Sequence[int]) -> list[float]:
    entries = meta.get("output_token_logprobs") or ()
    if len(entries) < len(ids):
        raise EngineError(f"SGLang answered {len(ids)} tokens and {len(entries)} log-probabilities")
    return _values(entries[: len(ids)], ids)


def _values(entries: Sequence[Sequence[Any]], ids: Sequence[int]) -> list[float]:
    """The numbers of `(log-probability, token id, text)` entries, which must be of `ids`."""
    values = []
    for entry, token in zip(entries, ids, strict=True):
        value = entry[0]
        if entry[1] != token:
            raise EngineError(f"SGLang answered the log-probability of token {entry[1]} where token {token} was sampled")
        if value is None or not math.isfinite(value):
            raise EngineError("the model's logits are not finite" if value is not None else "SGLang left out a log-probability")
        values.append(float(value))
    return values


NO_CHECKSUMS = (
    "SGLang 0.5.12 tells no checksums of weights under their published names: its own are of fused and cut tensors, of the "
    "first rank of tensor parallelism"
)
"""`get_weights_by_name` knows the models of llama, granite, opt and exaone4 only, and gives their first rows
(`models/llama.py`, «only used for unit test»)."""


def fingerprints(ranks: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Of SGLang's weight checker (`srt/utils/weight_checker.py`, action «checksum»): its parameters and buffers under its own
    names, quantised ones by what they stand for. `ranks`: the payloads, one for each data-parallel copy, of its first rank of
    tensor parallelism; where copies differ, the different ones side by side. Raises `EngineError` for an answer that holds
    none."""
    found: dict[str, set[str]] = {}
    for payload in ranks:
        for name, value in payload["checksums"].items():
            found.setdefault(name, set()).add(str(value))
    if not found:
        raise EngineError("SGLang's weight checker told no checksums")
    return {name: ",".join(sorted(values)) for name, values in found.items()}
