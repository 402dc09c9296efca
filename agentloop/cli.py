"""The command line. Every command lives in `agentloop/commands/`; a wrong input is one sentence and exit status 2."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any

import typer

from agentloop.errors import ConfigError

_GROUPS = {"tools": "agentloop.commands.tools", "data": "agentloop.commands.data"}
"""Commands with subcommands: the module's `app`."""
_COMMANDS = {
    "train": ("agentloop.commands.train", "train"),
    "ls": ("agentloop.commands.journal", "ls"),
    "show": ("agentloop.commands.journal", "show"),
    "stats": ("agentloop.commands.journal", "stats"),
    "export": ("agentloop.commands.journal", "export"),
}
_CONTEXT = {"train": {"allow_extra_args": True, "ignore_unknown_options": True}}


def build(only: str | None = None) -> typer.Typer:
    """The command line; with `only`, just that command is imported, which keeps the others' imports out of its start."""
    app = typer.Typer(
        name="agentloop",
        help="Multi-turn rollouts with tools for reinforcement learning, recorded token by token.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    wanted = [only] if only in _GROUPS or only in _COMMANDS else [*_GROUPS, *_COMMANDS]
    for name in wanted:
        if name in _GROUPS:
            app.add_typer(import_module(_GROUPS[name]).app, name=name)
        else:
            module, function = _COMMANDS[name]
            context: dict[str, Any] = dict(_CONTEXT.get(name, {}))
            app.command(name, context_settings=context)(getattr(import_module(module), function))

    @app.callback()
    def options(
        version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True, callback=_version),
    ) -> None:
        del version

    return app


def _version(wanted: bool) -> None:
    if wanted:
        from agentloop import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point of the `agentloop` command."""
    argument = sys.argv[1] if len(sys.argv) > 1 else None
    if os.getcwd() not in sys.path:  # as `python -m` does: the user's own tools and rewards are modules there
        sys.path.insert(0, os.getcwd())
    try:
        build(argument)()
    except ConfigError as error:
        print(f"agentloop: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
