"""What agentloop reads from verl's configuration.

Our own keys stand in a section `agentloop` at the top, added on the command line: `+agentloop.tools=tools.yaml`. Whatever
verl has a name for is read from there, and is the default of ours.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from agentloop.config import LoopConfig, Strict, validate
from agentloop.consistency.judge import Thresholds
from agentloop.engines.base import Sampling
from agentloop.errors import ConfigError

logger = logging.getLogger(__name__)

AGENT_NAMES = ("agentloop", "tool_agent", "single_turn_agent")
"""Values of a row's `agent_name` that our loop stands in for: its own, and those of verl's two loops."""

_NOT_READ = ("max_user_turns", "max_tool_response_length", "tool_response_truncate_side")
"""Keys of `rollout.multi_turn` that mean nothing here: a tool's answer is bounded in tokens, by the tool's own policy."""


class Section(Strict):
    """The section `agentloop` of verl's configuration."""

    tools: str | None = None
    """The tools file. Default: `rollout.multi_turn.tool_config_path`."""
    loop: dict[str, Any] = Field(default_factory=dict)
    """Fields of `LoopConfig`. Its lengths, turn limit and parallel calls default to verl's (see `read_settings`)."""
    run_dir: str | None = None
    """The journal's folder. Default: `runs/<trainer.experiment_name>`."""
    journal: bool = True
    train_side: bool = False
    """Write down what the trainer computes for each trajectory too (`agentloop.verl.train_side`)."""
    consistency: Thresholds = Thresholds()
    """How far trainer and rollout may be apart, and what happens beyond that (`docs/consistency.md`)."""
    seed: int | None = None
    """What the request seeds derive from. Default: `data.seed`, else 0."""
    parser: str | None = None
    """The tool-call format. Default: `rollout.multi_turn.format`."""
    renderer: str | None = None
    """The renderer's name. Default: chosen by the model's chat template."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, over `data.apply_chat_template_kwargs`."""
    system_prompt: str | None = None
    """For rows that bring none."""
    max_concurrency: int = Field(256, ge=1)
    """Trajectories of one worker at a time."""
    oversample_siblings: float = Field(1.0, ge=1, le=8)
    """Siblings asked over siblings kept, in training: the first `rollout.n` to end make the group, the others are aborted."""
    progress: bool = True
    """A line on what the rollout does, now and then."""


class RolloutSettings(Strict):
    """All that a worker needs to know, plain and picklable."""

    loop: LoopConfig
    train: Sampling
    val: Sampling
    n: int
    """Siblings of a group."""
    val_n: int
    prompt_length: int
    response_length: int
    tools: str | None
    function_tools: str | None
    parser: str
    renderer: str | None
    template_kwargs: dict[str, Any]
    system_prompt: str | None
    seed: int
    run_dir: str
    """Absolute."""
    journal: bool
    train_side: bool
    consistency: Thresholds
    max_concurrency: int
    oversample_siblings: float
    progress: bool
    num_workers: int
    model_path: str


def read_settings(config: Any) -> RolloutSettings:
    """From verl's whole configuration (a `DictConfig`, or a mapping of the same shape).

    - `loop.max_prompt_tokens` and `max_response_tokens`: `rollout.prompt_length` and `response_length`, and never more.
    - `loop.max_turns`: `rollout.multi_turn.max_assistant_turns`, if set.
    - `loop.max_parallel_calls`: `rollout.multi_turn.max_parallel_calls`, if it is not verl's default of 1, which in verl
      drops all but the first call of a turn.
    - sampling: `rollout.{temperature,top_p,top_k,calculate_log_probs}`, for validation `rollout.val_kwargs`.

    Raises `ConfigError`, naming the key.
    """
    plain = _plain(config)
    rollout = plain["actor_rollout_ref"]["rollout"]
    multi_turn = rollout.get("multi_turn") or {}
    section = validate(Section, plain.get("agentloop") or {}, "agentloop")
    model_path = str(plain["actor_rollout_ref"]["model"]["path"])
    refuse_multimodal(model_path)
    _warn_of_unread(multi_turn)
    trainer, data = plain.get("trainer") or {}, plain.get("data") or {}
    val = rollout.get("val_kwargs") or {}
    run_dir = section.run_dir or f"runs/{trainer.get('experiment_name') or 'run'}"
    seed = section.seed if section.seed is not None else data.get("seed")
    if section.train_side and not section.journal:
        raise ConfigError("agentloop: key 'train_side' is true and 'journal' false, and it is written beside the journal")
    if section.consistency.limits:
        _refuse_nothing_to_compare(config, rollout)
    return RolloutSettings(
        loop=_loop(section.loop, rollout, multi_turn),
        train=_sampling(rollout, rollout),
        val=_sampling(val, rollout),
        n=int(rollout.get("n", 1)),
        val_n=int(val.get("n", 1)),
        prompt_length=int(rollout["prompt_length"]),
        response_length=int(rollout["response_length"]),
        tools=section.tools or multi_turn.get("tool_config_path"),
        function_tools=multi_turn.get("function_tool_path"),
        parser=section.parser or multi_turn.get("format") or "hermes",
        renderer=section.renderer,
        template_kwargs={**(data.get("apply_chat_template_kwargs") or {}), **section.template_kwargs},
        system_prompt=section.system_prompt,
        seed=0 if seed is None else int(seed),
        run_dir=str(Path(run_dir).expanduser().absolute()),
        journal=section.journal,
        train_side=section.train_side,
        consistency=section.consistency,
        max_concurrency=section.max_concurrency,
        oversample_siblings=section.oversample_siblings,
        progress=section.progress,
        num_workers=int((rollout.get("agent") or {}).get("num_workers", 1)),
        model_path=model_path,
    )


def refuse_multimodal(model_path: str) -> None:
    """`ConfigError` if the model's `config.json` has a vision or an audio part. Of a name on the hub nothing is known yet."""
    path = Path(model_path) / "config.json"
    if not path.is_file():
        return
    try:
        model = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    parts = [name for name in ("vision_config", "audio_config") if model.get(name)]
    if parts:
        raise ConfigError(f"{path}: the model takes images or audio ({parts[0]}), which agentloop does not support")


def refuse_agent_names(names: list[str]) -> None:
    """`ConfigError` for rows that ask for an agent loop that is neither ours nor one that ours stands in for."""
    for name in sorted(set(names) - set(AGENT_NAMES)):
        raise ConfigError(
            f"dataset column 'agent_name': '{name}' is an agent loop of verl's registry, and agentloop.verl.AgentLoopManager "
            "runs its own loop alone; drop the column, or drop agent_loop_manager_class and use agent_loop_config_path"
        )


def _refuse_nothing_to_compare(config: Any, rollout: Mapping[str, Any]) -> None:
    """`ConfigError`: thresholds on how far trainer and rollout are apart need both sides."""
    if not rollout.get("calculate_log_probs", False):
        raise ConfigError(
            "agentloop.consistency: thresholds need the rollout's log-probabilities; set "
            "actor_rollout_ref.rollout.calculate_log_probs=true"
        )
    whole = config if OmegaConf.is_config(config) else OmegaConf.create(dict(config))
    if OmegaConf.select(whole, "algorithm.rollout_correction.bypass_mode", default=False):
        raise ConfigError(
            "agentloop.consistency: with algorithm.rollout_correction.bypass_mode=true the trainer takes the rollout's "
            "log-probabilities as its own, so there is nothing to hold thresholds against; set one of them off"
        )


def _plain(config: Any) -> dict[str, Any]:
    if not OmegaConf.is_config(config):
        return dict(config)
    # A part that our settings never read may hold an interpolation that cannot be resolved here.
    parts: dict[str, Any] = {}
    for name in ("actor_rollout_ref", "data", "trainer", "agentloop"):
        if OmegaConf.select(config, name) is None:
            continue
        try:
            parts[name] = OmegaConf.to_container(config[name], resolve=True)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    return parts


def _loop(given: Mapping[str, Any], rollout: Mapping[str, Any], multi_turn: Mapping[str, Any]) -> LoopConfig:
    defaults: dict[str, Any] = {
        "max_prompt_tokens": rollout["prompt_length"],
        "max_response_tokens": rollout["response_length"],
    }
    if multi_turn.get("max_assistant_turns"):
        defaults["max_turns"] = multi_turn["max_assistant_turns"]
    if (multi_turn.get("max_parallel_calls") or 1) > 1:
        defaults["max_parallel_calls"] = multi_turn["max_parallel_calls"]
    loop = validate(LoopConfig, {**defaults, **given}, "agentloop.loop")
    for ours, verls in (("max_prompt_tokens", "prompt_length"), ("max_response_tokens", "response_length")):
        if getattr(loop, ours) > rollout[verls]:
            raise ConfigError(
                f"agentloop.loop: key '{ours}' is {getattr(loop, ours)}, more than "
                f"actor_rollout_ref.rollout.{verls} ({rollout[verls]}), for which verl makes room"
            )
    return loop


def _sampling(given: Mapping[str, Any], rollout: Mapping[str, Any]) -> Sampling:
    return Sampling(
        max_tokens=int(rollout["response_length"]),
        temperature=float(given.get("temperature", 1.0)),
        top_p=float(given.get("top_p", 1.0)),
        top_k=int(given.get("top_k", -1)),
        log_probs=bool(rollout.get("calculate_log_probs", False)),
    )


def _warn_of_unread(multi_turn: Mapping[str, Any]) -> None:
    usual = {"max_user_turns": None, "max_tool_response_length": 256, "tool_response_truncate_side": "middle"}
    for key in _NOT_READ:
        if multi_turn.get(key, usual[key]) != usual[key]:
            logger.warning("actor_rollout_ref.rollout.multi_turn.%s is not read by agentloop; see docs/verl.md", key)
