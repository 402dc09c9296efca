"""A real Docker engine for tests: the one that answers, or one of our own for the time of the test run."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "docker-engine"
SKIP = "no Docker engine answers at DOCKER_HOST or the usual place: start one, or run `.ci/with-sandboxes make test`"


def docker_host() -> str:
    """Address of an engine that has our image. Skips the test where there is none and none can be started."""
    host, why = _engine()
    if host is None:
        pytest.skip(why)
    return host


@functools.cache
def _engine() -> tuple[str | None, str]:
    pytest.importorskip("docker", reason="the docker package is not installed: pip install 'agentloop[docker]'")
    host = os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"
    if not _answers(host):
        if os.environ.get("DOCKER_HOST") or os.geteuid() != 0 or shutil.which("dockerd") is None:
            return None, SKIP
        folder = tempfile.mkdtemp(prefix="agentloop-engine.", dir="/tmp")
        atexit.register(subprocess.run, [SCRIPT, "stop", folder], check=False)
        started = subprocess.run([SCRIPT, "start", folder], check=False, capture_output=True, text=True)
        if started.returncode != 0:
            return None, f"the Docker engine does not start here: {started.stderr[-500:]}"
        host = f"unix://{folder}/docker.sock"
    from agentloop.sandboxes.docker.image import make

    make(host, "agentloop-sandbox:latest")
    return host, ""


def _answers(host: str) -> bool:
    import docker  # type: ignore[import-untyped]

    try:
        client = docker.APIClient(host, version="auto", timeout=5)
        client.close()
    except docker.errors.DockerException:
        return False
    return True
