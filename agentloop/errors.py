"""What can go wrong, as types.

The doctrine:

- **The user's input is wrong** (a file, a key, a value): `ConfigError`, one sentence that names the file, the key and the
  nearest valid spelling, raised before a model is loaded. The command line prints that sentence and exits with status 2.
- **Our own invariant is broken** (log-probabilities on a tool's tokens, a prefix that differs): `LedgerError` at once. It is
  never caught and turned into data: a batch that was built from a broken ledger would train on something else than the
  model saw.
- **The world failed during a rollout** (an engine died, a tool raised): `EngineError` or `ToolError`. The loop catches these
  and turns them into an end reason or an observation, with a policy: a bad rollout is data, not a crash.
- **Everything else is a bug** and travels up unharmed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AgentloopError(Exception):
    """Base of every error that agentloop raises on purpose."""


class ConfigError(AgentloopError):
    """The user's input is wrong. The message is one sentence that the user can act on."""


class RendererRefused(ConfigError):
    """A chat template cannot be rendered append-only; the message names the first piece that differs."""


class LedgerError(AgentloopError):
    """An illegal append to a trajectory, or a prefix that differs. A bug, never data."""


class EngineError(AgentloopError):
    """The engine could not answer. The trajectory ends as `engine_failure`; its siblings go on."""


class ToolError(AgentloopError):
    """A tool failed in a way that the model may be told about; the message becomes the observation."""


class ToolInfraError(ToolError):
    """The machinery behind a tool failed (a sandbox is down, a service is unreachable): not the model's doing."""


def nearest(word: str, known: Iterable[str]) -> str:
    """«did you mean 'x'?» with the nearest known spelling, or a list of what is known.

    >>> nearest("max_turn", ["max_turns", "deadline_s"])
    "did you mean 'max_turns'?"
    """
    options = sorted(set(known))
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known are: {', '.join(options)}" if options else "nothing is known here"
