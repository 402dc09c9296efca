"""Containers of a Docker engine, or of Podman's Docker-compatible service: one for each session, run and thrown away."""

from agentloop.sandboxes.docker.config import DockerConfig
from agentloop.sandboxes.docker.sandbox import DockerSandbox

__all__ = ["DockerConfig", "DockerSandbox"]
