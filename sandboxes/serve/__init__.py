"""`agentloop sandbox serve`: a sandbox of this machine for others, over HTTP."""

from agentloop.sandboxes.serve.config import ServeConfig
from agentloop.sandboxes.serve.server import serve_forever

__all__ = ["ServeConfig", "serve_forever"]
