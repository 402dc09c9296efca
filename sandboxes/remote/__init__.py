"""Sandboxes on other machines, over HTTP: agentloop's own service or one that speaks SandboxFusion's `/run_code`."""

from agentloop.sandboxes.remote.config import RemoteConfig
from agentloop.sandboxes.remote.sandbox import RemoteSandbox

__all__ = ["RemoteConfig", "RemoteSandbox"]
