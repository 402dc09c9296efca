"""Real notebook servers for the tests: JupyterLab, Notebook and marimo, each with folders of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
START_S = 60


def need(*modules: str) -> None:
    """Skip the test, saying so, where one of them is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")


@dataclass
class Server:
    """A running one."""

    url: str
    folder: Path
    """What it serves."""

    def api(self, path: str, method: str = "GET", body: Any = None) -> Any:
        """Jupyter's REST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api/{path}", data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            content = answer.read()
        return json.loads(content) if content else None


@contextmanager
def jupyter(folder: Path, app: str = "lab", *, save_widget_state: bool = False) -> Iterator[Server]:
    """JupyterLab (`lab`) or Notebook (`notebook`) over `folder`, which also gets its settings."""
    need("jupyterlab" if app == "lab" else "notebook", "ipykernel", "anywidget")
    own = folder / ".jupyter"
    for plugin, values in {
        "@jupyter-widgets/jupyterlab-manager/plugin": {"saveState": save_widget_state},
        "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/docmanager-extension/plugin": {"autosave": False},
    }.items():
        path = own / "settings" / f"{plugin}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    environment = {name: str(own / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR")}
    environment |= {"IPYTHONDIR": str(own / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(own / "settings")}
    port = _free_port()
    command = [
        *(sys.executable, "-m", "jupyter", app, "--allow-root", "--no-browser", "--ip=127.0.0.1", f"--port={port}"),
        *("--IdentityProvider.token=", f"--ServerApp.root_dir={folder}", "--ServerApp.disable_check_xsrf=True"),
        *("--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"),
    ]
    with _running(command, f"http://127.0.0.1:{port}", "/api", folder, environment) as server:
        yield server


@contextmanager
def marimo(notebook: Path) -> Iterator[Server]:
    """marimo, editing one notebook."""
    need("marimo", "anywidget")
    port = _free_port()
    command = [sys.executable, "-m", "marimo", "--quiet", "edit", str(notebook), "--headless", "--no-token", f"--port={port}"]
    command += ["--host=127.0.0.1", "--skip-update-check"]
    environment = {"XDG_CONFIG_HOME": str(notebook.parent / ".config"), "MARIMO_SKIP_UPDATE_CHECK": "1"}
    with _running(command, f"http://127.0.0.1:{port}", "/health", notebook.parent, environment) as server:
        yield server


@contextmanager
def _running(command: Sequence[str], url: str, probe: str, folder: Path, more: dict[str, str]) -> Iterator[Server]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "PATH": binaries, **more}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(url + probe, timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "server.log").read_text(errors="replace")[-3000:]) from None
                time.sleep(0.2)
        yield Server(url, folder)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_notebook(path: Path, cells: Sequence[str]) -> None:
    """A notebook of code cells that have not been run."""
    made: list[dict[str, object]] = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "source": source, "outputs": [], "execution_count": None}
        for i, source in enumerate(cells)
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": made}))


def cells_of(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
