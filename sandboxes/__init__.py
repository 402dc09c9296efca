"""Sandboxes: where untrusted code runs."""

from agentloop.sandboxes.base import Layer, Limits, Result, Sandbox, SandboxError, Session, Status
from agentloop.sandboxes.load import load_sandbox

__all__ = ["Layer", "Limits", "Result", "Sandbox", "SandboxError", "Session", "Status", "load_sandbox"]
