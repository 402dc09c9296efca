"""Random good rollouts, by the real loop, writer and batch assembly: nothing is found."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from agentloop.audit import audit_batch, audit_run, audit_trajectories
from agentloop.batch import to_dataproto, to_rows
from agentloop.journal import JournalWriter, Run, token_bytes
from agentloop.trajectory import EndReason, StopReason, Trajectory
from tests.audit.rollouts import NAMES, Maker, renderer_of


def rollouts(seed: int, folder: Path) -> list[Trajectory]:
    """One run of one template: groups of several sizes, in several steps, some of them for validation."""
    rng = random.Random(seed)
    name = NAMES[seed % len(NAMES)]
    tokenizer, _ = renderer_of(name)
    told: list[Trajectory] = []
    with JournalWriter(folder, decode=token_bytes(tokenizer) if seed % 7 else None, meta={"seed": seed}) as writer:
        for step in range(1, rng.choice([2, 3])):
            maker = Maker(
                name, seed, writer, tokens=rng.choice([60, 300, 900, 2000]), plain=seed % 4 == 0, log_probs=seed % 6 != 5
            )
            for g in range(rng.randint(1, 5)):
                told += maker.group(f"s{step}g{g}", rng.choice([1, 2, 4, 8]), step=step, validate=rng.random() < 0.1)
    return told


def check(seed: int, folder: Path) -> list[Trajectory]:
    told = rollouts(seed, folder)
    name = NAMES[seed % len(NAMES)]
    tokenizer, renderer = renderer_of(name)
    audit_run(folder, renderer=renderer if seed % 10 == 3 else None).raise_if_any()
    audit_trajectories(told, decode=token_bytes(tokenizer) if seed % 2 else None).raise_if_any()
    for step in sorted({t.step for t in told}):
        trajectories = [t for t in told if t.step == step and not t.validate]
        real = [t for t in trajectories if not t.masked]
        if not real:
            continue
        longest = max(t.response_len for t in real)
        pad = (0, tokenizer.eos_token_id, 399)[seed % 3]
        widths = {"prompt_length": max(t.prompt_len for t in real) + seed % 5, "response_length": longest + seed % 7}
        batch = to_dataproto(trajectories, **widths, pad_token_id=pad)
        _advantages(batch, seed)
        audit_batch(batch).raise_if_any()
        audit_batch(batch, trajectories, pad_token_id=pad).raise_if_any()
        audit_batch([to_rows(t) for t in real], real).raise_if_any()
        batch.reorder(torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed)))
        audit_batch(batch, Run(folder), step=step).raise_if_any()
    return told


def _advantages(batch: object, seed: int) -> None:
    """Those of one of verl's estimators, if the batch is scored."""
    from verl.trainer.ppo import core_algos

    tensors = batch.batch  # type: ignore[attr-defined]
    if "rm_scores" not in tensors.keys():  # noqa: SIM118
        return
    scores, mask, uids = tensors["rm_scores"].clone(), tensors["response_mask"], batch.non_tensor_batch["uid"]  # type: ignore[attr-defined]
    if seed % 4 == 0:
        advantages, _ = core_algos.compute_rloo_outcome_advantage(scores, mask, uids)
    elif seed % 4 == 1:  # another number for each token
        advantages = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)) * mask
    else:
        by_std = seed % 4 == 2
        advantages, _ = core_algos.compute_grpo_outcome_advantage(scores, mask, uids, norm_adv_by_std_in_grpo=by_std)
    tensors["advantages"] = advantages


def _roll(folder: Path, count: int, first: int) -> Counter[str]:
    logging.disable(logging.CRITICAL)  # tools fail by plan here
    seen: Counter[str] = Counter()
    try:
        seed = first
        while seen["trajectories"] < count:
            for t in check(seed, folder / str(seed)):
                seen["trajectories"] += 1
                seen[str(t.end_reason)] += 1
                seen["resampled"] += t.attempt > 0
                seen["masked"] += t.masked
                seen["cut turns"] += any(turn.stop_reason is StopReason.LENGTH for turn in t.turns)
                seen["mixed versions"] += any(len(turn.versions) > 1 for turn in t.turns)
                seen["malformed"] += any(turn.parse_errors for turn in t.turns)
            seed += 1
    finally:
        logging.disable(logging.NOTSET)
    return seen


def _varied(seen: Counter[str]) -> None:
    """The good ones are not good because nothing happens in them."""
    for what in ("resampled", "masked", "cut turns", "mixed versions", "malformed"):
        assert seen[what] > 0, seen
    assert {str(reason) for reason in EndReason} - seen.keys() <= {"aborted", "deadline"}, seen


def test_300_good_trajectories(tmp_path: Path) -> None:
    _varied(_roll(tmp_path, 300, 0))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10_000_good_trajectories(tmp_path: Path) -> None:
    _varied(_roll(tmp_path, 10_000, 1000))
