"""The parts of a recorded run, from what its `run.json` says of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agentloop.cassette.tape import Cassette, cassette_of
from agentloop.cassette.tools import RecordedTools
from agentloop.config import LoopConfig, validate
from agentloop.engines.base import Engine
from agentloop.errors import ConfigError, nearest
from agentloop.journal.meta import read_run
from agentloop.journal.reader import Run
from agentloop.loop import AgentLoop
from agentloop.rewards.base import RewardFunction
from agentloop.tools.session import ToolSessions

ENGINES = ("cassette", "local", "scripted", "sglang_server")
"""What `load_engine` knows."""
RECORDED = "recorded"
"""As `tools`: what `run.json` says of them, without loading them."""


def loop_of(
    run: Cassette | Run | str | Path,
    engine: Engine | None = None,
    *,
    model: str | Path | None = None,
    tokenizer: Any = None,
    tools: str | Path | ToolSessions | None = None,
    parser: str | None = None,
    reward: RewardFunction | None = None,
    loop: Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> AgentLoop:
    """The loop that made a run, with `engine` (default: the run's own cassette).

    Everything is read from `run.json` (`model`, `seed`, `loop`, `setup`, as docs/cassettes.md lists them) unless it is given:
    `model`, a folder or hub name with a tokenizer, or the `tokenizer` itself; `tools`, a tools file, a registry, or
    `"recorded"` for the schemas alone; `parser` by name; `loop`, fields of `LoopConfig` over the recorded ones; `reward`, which
    is not read (`reward_of` does).

    Raises `ConfigError` for what cannot be loaded and for a run that does not say what it needs.
    """
    cassette = cassette_of(run)
    meta = read_run(cassette.run.path)
    setup: Mapping[str, Any] = meta.get("setup") or {}
    where = str(cassette.run.path / "run.json")
    from agentloop.chat.load import load_parser, load_renderer

    if tokenizer is None:
        tokenizer = tokenizer_of(cassette.run, model)
    template_kwargs = setup.get("template_kwargs") or {}

    def renderer(own: Mapping[str, Any]) -> Any:
        return load_renderer(
            tokenizer,
            chat_template=setup.get("chat_template"),
            template_kwargs={**template_kwargs, **own},
            kind=setup.get("renderer") or "auto",
        )

    first = renderer({})
    sessions = _tools(tools, meta, setup, where)
    bind = getattr(sessions, "bind", None)
    if bind is not None:
        bind(first)
    if engine is None:
        from agentloop.engines.cassette import CassetteEngine

        engine = CassetteEngine(cassette, decode=first.decode)
    return AgentLoop(
        engine,
        renderer,
        load_parser(parser or setup.get("parser") or "hermes", first),
        tools=sessions,
        reward=reward,
        config=validate(LoopConfig, {**(meta.get("loop") or {}), **(loop or {})}, f"{where}: loop"),
        seed=int(meta.get("seed") or 0) if seed is None else seed,
    )


def reward_of(run: Run | str | Path) -> RewardFunction | None:
    """The reward that a run's `setup` names, `None` if it names none. Raises `ConfigError` if it cannot be loaded."""
    from agentloop.rewards.function import load_reward

    path = run.path if isinstance(run, Run) else Path(run)
    told = (read_run(path).get("setup") or {}).get("reward")
    if not told:
        return None
    return load_reward(told["reward"], told.get("kwargs") or {})


def tokenizer_of(run: Run | str | Path, model: str | Path | None = None) -> Any:
    """The tokenizer of `model`, by default of the model that `run.json` names. Raises `ConfigError` if there is none."""
    path = run.path if isinstance(run, Run) else Path(run)
    name = str(model) if model is not None else read_run(path).get("model")
    if not name:
        raise ConfigError(f"{path / 'run.json'}: key 'model' is missing, which names the tokenizer; give the model")
    if not Path(name).is_dir() and (name.count("/") != 1 or Path(name).parent.is_dir()):  # no name on the hub either
        raise ConfigError(f"the model '{name}' is no folder here; give the model")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"the tokenizer of the model '{name}' cannot be loaded: {line}; give the model") from error


def _tools(
    given: str | Path | ToolSessions | None, meta: Mapping[str, Any], setup: Mapping[str, Any], where: str
) -> ToolSessions | None:
    if isinstance(given, ToolSessions):
        return given
    schemas = meta.get("tools") or []
    if given == RECORDED:
        return RecordedTools(schemas, setup.get("final_tools") or ()) if schemas else None
    file, functions = (given, None) if given is not None else (setup.get("tools"), setup.get("function_tools"))
    if file or functions:
        from agentloop.tools import ToolRegistry

        return ToolRegistry.load(file, functions)
    if schemas:
        raise ConfigError(f"{where}: the run had tools, and key 'setup.tools' does not name their file; give the tools")
    return None


def load_engine(
    name: str,
    *,
    run: Cassette | Run | str | Path,
    model: str | Path | None = None,
    url: str | Sequence[str] | None = None,
    script: str | Path | None = None,
    tokenizer: Any = None,
) -> Engine:
    """An engine by name: `cassette` plays the run back, `local` loads `model` (default: the run's), `sglang_server` asks the
    servers at `url`, `scripted` plays a JSON file, a list of what the model writes from turn to turn (for which it needs the
    `tokenizer`). `ConfigError` for what is missing or cannot be loaded."""
    if name not in ENGINES:
        raise ConfigError(f"no engine '{name}'; {nearest(name, ENGINES)}")
    cassette = cassette_of(run)
    if name == "cassette":
        from agentloop.engines.cassette import CassetteEngine

        return CassetteEngine(cassette, decode=None if tokenizer is None else tokenizer.decode)
    if name == "local":
        from agentloop.engines.local import LocalEngine

        path = str(model) if model is not None else read_run(cassette.run.path).get("model")
        if not path:
            raise ConfigError("engine local: it needs a model")
        return LocalEngine.load(path)
    if name == "sglang_server":
        if not url:
            raise ConfigError("engine sglang_server: it needs the URL of a server")
        from agentloop.engines.sglang_server import SGLangServerEngine

        return SGLangServerEngine({"urls": url if isinstance(url, str) else list(url)})
    return _scripted(script, tokenizer)


def _scripted(script: str | Path | None, tokenizer: Any) -> Engine:
    from agentloop.engines.scripted import ScriptedEngine

    if script is None:
        raise ConfigError("engine scripted: it needs a script, a JSON file with a list of texts")
    try:
        texts = json.loads(Path(script).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{script}: not readable as JSON: {error}") from error
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{script}: expected a list of texts, what the model writes from turn to turn")
    return ScriptedEngine(texts, encode=lambda text: list(tokenizer.encode(text, add_special_tokens=False)))
