"""The command line. Every command lives in `agentloop/commands/`; a wrong input is one sentence and exit status 2."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from typing import Any, NoReturn

import typer

from agentloop.errors import ConfigError, nearest

_GROUPS = {
    "tools": "agentloop.commands.tools",
    "data": "agentloop.commands.data",
    "sandbox": "agentloop.commands.sandbox",
    "weights": "agentloop.commands.weights",
}
"""Commands with subcommands: the module's `app`."""
_COMMANDS = {
    "train": ("agentloop.commands.train", "train"),
    "ls": ("agentloop.commands.journal", "ls"),
    "show": ("agentloop.commands.journal", "show"),
    "view": ("agentloop.commands.view", "view"),
    "stats": ("agentloop.commands.journal", "stats"),
    "consistency": ("agentloop.commands.consistency", "report"),
    "audit": ("agentloop.commands.audit", "audit"),
    "export": ("agentloop.commands.convert", "export"),
    "import": ("agentloop.commands.convert", "import_"),
    "replay": ("agentloop.commands.replay", "replay"),
    "fork": ("agentloop.commands.fork", "fork"),
    "plan": ("agentloop.commands.plan", "plan"),
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
        status = build(argument)(standalone_mode=False)
    except ConfigError as error:
        _refuse(str(error))
    except _CommandLineError as error:
        _refuse(_sentence(error))
    else:
        raise SystemExit(status or 0)


_CommandLineError: Any = typer.BadParameter.__mro__[2]
"""ClickException, which typer does not export: by version it is click's or typer's own."""


def _sentence(error: Any) -> str:
    """What is wrong with the command line, with the nearest right spelling; empty if help was printed instead."""
    text = " ".join(error.format_message().split()).removesuffix(".")
    context = getattr(error, "ctx", None)
    if not text or context is None:
        return text[:1].lower() + text[1:]
    if hasattr(error, "possibilities"):
        options = [name for parameter in context.command.get_params(context) for name in parameter.opts if name[0] == "-"]
        text = f"unknown option '{error.option_name}'; {nearest(error.option_name, options)}"
    elif match := re.match(r"No such command '(.*?)'", text):
        text = f"unknown command '{match[1]}'; {nearest(match[1], context.command.commands)}"
    _, _, command = context.command_path.partition(" ")
    return f"{command}: {text[:1].lower()}{text[1:]}" if command else f"{text[:1].lower()}{text[1:]}"


def _refuse(sentence: str) -> NoReturn:
    if sentence:
        print(f"agentloop: {sentence}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
