"""SGLang over HTTP: one or several running servers or routers (`SGLangServerEngine`, settings in `SGLangServerConfig`)."""

from agentloop.errors import ConfigError

try:
    import aiohttp as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ConfigError("the engine sglang_server needs aiohttp: pip install 'agentloop[sglang-server]'") from error

from agentloop.engines.sglang_server.config import SGLangServerConfig
from agentloop.engines.sglang_server.engine import SGLangServerEngine

__all__ = ["SGLangServerConfig", "SGLangServerEngine"]
