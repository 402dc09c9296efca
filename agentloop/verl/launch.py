"""From one YAML file to a command line of verl: presets, checks, environment. Nothing here imports verl or Ray.

The file has three keys:

- `platform`: `auto` (what verl finds) or `cpu`, which brings the settings and the environment that verl needs there.
- `verl`: settings of verl's `ppo_trainer`, nested or dotted. A key that verl's YAML does not list is written `+key`.
- `agentloop`: our own settings (`agentloop.verl.settings.Section`).

On the command line `agentloop.…=value` and `platform=value` are ours and everything else is verl's, in Hydra's syntax. Later
wins: presets, then the file, then the command line.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from agentloop.config import LoopConfig, Strict, load_yaml, validate
from agentloop.errors import ConfigError
from agentloop.verl import sglang_parts
from agentloop.verl.server import ROLLOUT_NAME
from agentloop.verl.settings import Section, read_settings
from agentloop.verl.sglang_parts import SGLANG_ASYNC

MANAGER = "agentloop.verl.manager.AgentLoopManager"
_AGENT = "actor_rollout_ref.rollout.agent"

COMMON: dict[str, Any] = {f"{_AGENT}.agent_loop_manager_class": MANAGER}

CPU: dict[str, Any] = {
    "actor_rollout_ref.model.external_lib": "agentloop.verl.fsdp_cpu",
    "actor_rollout_ref.model.use_remove_padding": False,  # needs flash-attn
    "actor_rollout_ref.model.enable_gradient_checkpointing": False,
    "actor_rollout_ref.model.override_config.attn_implementation": "sdpa",
    "actor_rollout_ref.actor.strategy": "fsdp2",  # FSDP1 refuses a CPU
    "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.actor.fsdp_config.model_dtype": "float32",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
    "actor_rollout_ref.ref.fsdp_config.use_torch_compile": False,
    "actor_rollout_ref.ref.fsdp_config.model_dtype": "float32",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision.param_dtype": "fp32",
    "actor_rollout_ref.rollout.name": ROLLOUT_NAME,
    "actor_rollout_ref.rollout.dtype": "float32",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
    "actor_rollout_ref.rollout.free_cache_engine": False,  # trainer and rollout share main memory: nothing to free
    "actor_rollout_ref.rollout.calculate_log_probs": True,
    f"{_AGENT}.num_workers": 1,
    "reward.num_workers": 1,
    "data.dataloader_num_workers": 0,
    "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
    "trainer.device": "cpu",
    "trainer.n_gpus_per_node": 1,
    "trainer.nnodes": 1,
    "trainer.logger": ["console"],
    # verl's resource pools ask Ray for GPUs and CPUs; these are logical ones.
    "ray_kwargs.ray_init.address": "local",
    "ray_kwargs.ray_init.num_cpus": 8,
    "ray_kwargs.ray_init.num_gpus": 1,
    "ray_kwargs.ray_init.include_dashboard": False,
    "ray_kwargs.ray_init.object_store_memory": 512 << 20,
}

_ROLLOUT = "actor_rollout_ref.rollout"
_CHECKPOINT = f"{_ROLLOUT}.checkpoint_engine"
_RAY = "ray_kwargs.ray_init"

SEPARATE: dict[str, Any] = {
    "actor_rollout_ref.hybrid_engine": False,  # no replicas beside the trainer's own, which would share its cores
    f"{_ROLLOUT}.nnodes": 1,
    f"{_ROLLOUT}.n_gpus_per_node": 1,
    f"{_CHECKPOINT}.backend": "agentloop_ray",
    f"{_CHECKPOINT}.custom_backend_module": "agentloop.verl.checkpoint",
}
"""What `trainer.v1.trainer_mode=separate_async` needs on a CPU beside `CPU`."""

SGLANG: dict[str, Any] = {
    "actor_rollout_ref.model.external_lib": "agentloop.verl.replica_sglang",
    f"{_CHECKPOINT}.custom_backend_module": "agentloop.verl.replica_sglang",  # for replicas' workers, which load no model
}
"""What registers `rollout.name=sglang_async` in every process that looks it up."""

_SAMPLER = "trainer.v1.sampler.custom_sampler"
ABSENT = {
    f"{_AGENT}.agent_loop_manager_class",
    "ray_kwargs.ray_init",
    "actor_rollout_ref.rollout.engine_kwargs",
    "actor_rollout_ref.actor.fsdp_config.mixed_precision",
    "actor_rollout_ref.ref.fsdp_config.mixed_precision",
}
"""Settings that verl reads but its YAML does not list, and mappings that it hands on whole: keys at or under them are added."""

DEFAULT_ENV = {
    "HYDRA_FULL_ERROR": "1",
    "PYTHONWARNINGS": "ignore",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


class RunFile(Strict):
    """The file that `agentloop train` takes."""

    platform: Literal["auto", "cpu"] = "auto"
    agentloop: dict[str, Any] = Field(default_factory=dict)
    verl: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked run, ready to start."""

    command: list[str]
    env: dict[str, str]
    """What is set beside the environment that is there."""
    run_dir: Path
    total_steps: int | None


@dataclass(frozen=True, slots=True)
class _Setting:
    value: str
    """In Hydra's syntax."""
    added: bool
    """Written with a `+`."""
    where: str
    """For messages: where the user wrote it."""


def make_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read, merge and check everything that can be checked without loading a model. Raises `ConfigError`; writes nothing."""
    ours = [item for item in overrides if re.match(r"(agentloop\.|platform=)", item)]
    run = validate(RunFile, load_yaml(path, ours), str(path))
    section = validate(Section, run.agentloop, f"{path}: agentloop")
    validate(LoopConfig, section.loop, f"{path}: agentloop.loop")
    from omegaconf import OmegaConf

    from agentloop.verl.check import check_data, check_prompts

    settings = _settings(run, str(path), [item for item in overrides if item not in ours])
    deletions = [item for item in overrides if item.startswith("~")]
    arguments = _with_prefixes(settings) + deletions
    config = _compose(arguments, str(path))
    more = _more_presets(config, run)
    if more:
        settings = _over_presets(settings, more)
        arguments = _with_prefixes(settings) + deletions
        config = _compose(arguments, str(path))
    arguments += _sampler(config)
    _check(config, str(path), run)
    rollout = read_settings(config)
    registry = None
    if rollout.tools or rollout.function_tools:
        from agentloop.tools.registry import ToolRegistry

        registry = ToolRegistry.load(rollout.tools, rollout.function_tools)
    custom_dataset = bool(OmegaConf.select(config, "data.custom_cls.path"))
    for key in ("data.train_files", "data.val_files"):
        files = OmegaConf.select(config, key)
        check_data(files, f"{path}: verl.{key}", lint=not custom_dataset, tools=registry)
        if not custom_dataset:
            check_prompts(files, rollout, registry)
    run_dir = Path(rollout.run_dir)
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *arguments]
    if not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        command.append(f"hydra.run.dir={_hydra_value(str(run_dir / 'hydra'))}")
    steps = config["trainer"].get("total_training_steps")
    return Plan(command, _environment(run, config, run_dir), run_dir, int(steps) if steps else None)


# -- settings -----------------------------------------------------------------------------------------------------------


def _settings(run: RunFile, path: str, overrides: Sequence[str]) -> dict[str, _Setting]:
    """Every setting of verl by its dotted key, in the order in which Hydra is to see them."""
    merged: dict[str, _Setting] = {}

    def put(key: str, value: str, where: str, added: bool = False) -> None:
        merged.pop(key, None)
        merged[key] = _Setting(value, added, where)

    presets = {**COMMON, **CPU} if run.platform == "cpu" else COMMON
    for key, value in presets.items():
        put(key, _hydra_value(value), "preset")
    for key, value in _leaves(run.verl):
        put(key.replace("+", ""), _hydra_value(value), f"{path}: verl.{key}", "+" in key)
    for item in overrides:
        match = re.fullmatch(r"(\+{0,2})([\w@./:-]+)=(.*)", item, re.DOTALL)
        if match is not None:
            put(match[2], match[3], f"override '{item}'", bool(match[1]))
        elif not item.startswith("~"):
            raise ConfigError(f"override '{item}': expected key=value")
        else:
            merged.pop(item[1:].partition("=")[0], None)
    for key, value in _leaves({"agentloop": run.agentloop}):
        put(key, _hydra_value(value), path, added=True)
    return merged


def _more_presets(config: Any, run: RunFile) -> dict[str, Any]:
    """Presets that depend on the composed configuration."""
    from omegaconf import OmegaConf

    if OmegaConf.select(config, f"{_ROLLOUT}.name") == SGLANG_ASYNC:
        return SGLANG
    if run.platform == "cpu" and OmegaConf.select(config, "trainer.v1.trainer_mode") == "separate_async":
        return SEPARATE
    return {}


def _over_presets(settings: Mapping[str, _Setting], more: Mapping[str, Any]) -> dict[str, _Setting]:
    """`settings` over `more`. On the CPU Ray's logical resources grow by those of the replicas."""
    merged = {**{key: _Setting(_hydra_value(value), False, "preset") for key, value in more.items()}, **settings}
    if more is not SEPARATE:
        return merged
    sizes = [merged[f"{_ROLLOUT}.{key}"].value for key in ("nnodes", "n_gpus_per_node")]
    if all(size.isdecimal() for size in sizes):
        replicas = int(sizes[0]) * int(sizes[1])
        for key, each in (("num_gpus", 1), ("num_cpus", 2)):  # verl's bundle for a replica (replica.py:211)
            if merged[f"{_RAY}.{key}"].where == "preset":
                count = CPU[f"{_RAY}.{key}"] + each * replicas
                merged[f"{_RAY}.{key}"] = _Setting(str(count), False, "preset")
    return merged


def _sampler(config: Any) -> list[str]:
    """Our sampler as settings, where the composed config neither needs verl's nor names one."""
    from omegaconf import OmegaConf

    taken = (_SAMPLER + ".path", "algorithm.filter_groups.enable", "trainer.v1.sampler.sync_refill_failed_groups")
    if any(OmegaConf.select(config, key) for key in taken):
        return []
    name = "QuickReplayBuffer" if OmegaConf.select(config, "trainer.v1.trainer_mode") == "sync" else "QuickReplayBufferAsync"
    return [f"{_SAMPLER}.path={_hydra_value('pkg://agentloop.verl.sampler')}", f"{_SAMPLER}.name={name}"]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _hydra_value(value: Any) -> str:
    """In Hydra's override grammar (https://hydra.cc/docs/advanced/override_grammar/basic/)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_hydra_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_hydra_value(item) for item in value) + "]"
    text = str(value)
    if re.fullmatch(r"[A-Za-z_./][\w./-]*(://[\w./-]+)?", text) and text.lower() not in ("null", "true", "false", "nan", "inf"):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def _with_prefixes(settings: Mapping[str, _Setting]) -> list[str]:
    """`key=value`, with a `+` where the key is to be added. `ConfigError` for a key that verl does not know."""
    known = _known(*(f"{key}={setting.value}" for key, setting in settings.items() if "@" in key or key == "model_engine"))
    arguments = []
    for key, setting in settings.items():
        if "@" in key or key == "model_engine" or key.startswith("hydra."):
            arguments.append(f"{key}={setting.value}")
            continue
        missing, inside = _lookup(known, key)
        if missing is None:
            arguments.append(f"{key}={setting.value}")
        elif setting.added or not inside or _under_absent(key):
            arguments.append(f"+{key}={setting.value}")
        else:
            raise ConfigError(f"{setting.where}: verl has no setting '{key}'{_suggest(key, missing, inside, known)}")
    return arguments


def _under_absent(key: str) -> bool:
    return any(key == absent or key.startswith(absent + ".") for absent in ABSENT)


def _lookup(tree: Any, key: str) -> tuple[str | None, Mapping[str, Any]]:
    """The first part of `key` that is not there, dotted from the top, and the mapping in which it is missing. `None` if all
    is there. An empty or null parent comes back as an empty mapping: verl fills it with what it is given."""
    parts = key.split(".")
    for place, part in enumerate(parts):
        if isinstance(tree, list):
            return None, {}
        if not isinstance(tree, Mapping) or part not in tree:
            return ".".join(parts[: place + 1]), tree if isinstance(tree, Mapping) else {}
        tree = tree[part]
    return None, {}


def _suggest(key: str, missing: str, inside: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    parent, _, last = missing.rpartition(".")
    close = difflib.get_close_matches(last, list(inside), n=1)
    if close:
        found = f"{parent}.{close[0]}" if parent else close[0]
    else:
        same = [name for name, _ in _leaves(known) if name.rpartition(".")[2] == key.rpartition(".")[2]]
        elsewhere = same or difflib.get_close_matches(key, [name for name, _ in _leaves(known)], n=1)
        found = elsewhere[0] if elsewhere else ""
    hint = f"; did you mean '{found}'?" if found else ""
    return f"{hint or ';'} A key that verl's YAML does not list is written '+{key}'"


# -- verl's schema ------------------------------------------------------------------------------------------------------


def _compose(arguments: Sequence[str], where: str) -> Any:
    """verl's `ppo_trainer` config with `arguments`, as Hydra would make it."""
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("verl is not installed; pip install 'agentloop[verl]'")
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    folder = Path(next(iter(spec.submodule_search_locations))).resolve() / "trainer" / "config"
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base=None):
            return compose("ppo_trainer", overrides=[item for item in arguments if not item.startswith("hydra.")])
    except (HydraException, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split("\nSee http")[0].split())
        raise ConfigError(f"{where}: verl does not take these settings: {reason}") from error


@cache
def _known(*groups: str) -> dict[str, Any]:
    """verl's own settings, with the choices of config groups."""
    return _container(_compose(groups, ", ".join(groups)))


def _container(config: Any) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(config, resolve=False)  # type: ignore[return-value]


# -- checks -------------------------------------------------------------------------------------------------------------


def _check(config: Any, path: str, run: RunFile) -> None:
    from omegaconf import OmegaConf

    from agentloop.verl.check import check_model, check_reward
    from agentloop.verl.server import refuse_unsupported

    def at(key: str) -> Any:
        return OmegaConf.select(config, key)

    sys.path[:0] = [] if os.getcwd() in sys.path else [os.getcwd()]  # tools and rewards may live beside the user
    rollout, model = "actor_rollout_ref.rollout", "actor_rollout_ref.model"
    if OmegaConf.is_missing(config.actor_rollout_ref.rollout, "name"):
        raise ConfigError(
            f"{path}: verl.{rollout}.name is missing: {SGLANG_ASYNC}, sglang, vllm; with platform: cpu {ROLLOUT_NAME}"
        )
    if at(f"{rollout}.name") == ROLLOUT_NAME:
        refuse_unsupported(_container(at(rollout)), _container(at(model)), cpu=run.platform == "cpu")
    elif at(f"{rollout}.name") == SGLANG_ASYNC:
        sglang_parts.refuse_unsupported(_container(at(rollout)), cpu=run.platform == "cpu")
    check_model(at(f"{model}.path"), f"{path}: verl.{model}.path")
    check_reward(at("reward.custom_reward_function"), f"{path}: verl.reward.custom_reward_function")


# -- environment --------------------------------------------------------------------------------------------------------


def _environment(run: RunFile, config: Any, run_dir: Path) -> dict[str, str]:
    from omegaconf import OmegaConf

    import agentloop

    env = {name: value for name, value in DEFAULT_ENV.items() if name not in os.environ}
    modules = [name for name in os.environ.get("VERL_USE_EXTERNAL_MODULES", "").split(",") if name]
    env["VERL_USE_EXTERNAL_MODULES"] = ",".join(dict.fromkeys([*modules, "agentloop.verl.plugin"]))
    if run.platform == "cpu":
        env["VERL_PLATFORM"] = "cpu"
        # Hidden from CUDA, and as many as Ray is told of: it refuses an empty list when it is to count some.
        count = OmegaConf.select(config, "ray_kwargs.ray_init.num_gpus") or 1
        env["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * int(count))
        if "RAY_worker_niceness" not in os.environ:
            env["RAY_worker_niceness"] = "0"  # Ray takes 15, which yields to everything else on the machine
        if "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(min(os.cpu_count() or 1, 8))
    if "TENSORBOARD_DIR" not in os.environ:  # verl's name for it; else it writes where the command runs
        env["TENSORBOARD_DIR"] = str((run_dir / "tensorboard").absolute())
    if os.path.isdir(str(config.actor_rollout_ref.model.path)) and "HF_HUB_OFFLINE" not in os.environ:
        env["HF_HUB_OFFLINE"] = "1"
    package = str(Path(agentloop.__file__).resolve().parents[1])
    paths = [os.getcwd(), *([] if "site-packages" in package else [package])]
    paths += [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return env
