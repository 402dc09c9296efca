"""The `process` kind: a preloaded zygote in an empty mount, network and PID namespace; fast, for hosts where we are root."""

from agentloop.sandboxes.process.sandbox import PoolSession, ProcessConfig, ProcessSandbox

__all__ = ["PoolSession", "ProcessConfig", "ProcessSandbox"]
