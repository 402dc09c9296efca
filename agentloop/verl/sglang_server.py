"""verl's SGLang server and replica with the additions of `sglang_parts.py`. Importing this module imports SGLang."""

from __future__ import annotations

import os
from typing import Any

import ray
import sglang  # type: ignore[import-not-found, unused-ignore]
from verl.workers.rollout.sglang_rollout.async_sglang_server import SGLangHttpServer, SGLangReplica

from agentloop.engines.sglang_protocol import check_environment
from agentloop.verl.sglang_parts import Additions, Tap, check_places


class AsyncSGLangServer(Additions, SGLangHttpServer):  # type: ignore[misc]
    """verl's server; the class that Ray runs."""

    async def launch_server(self, master_address: str | None = None, master_port: int | None = None) -> None:
        check_environment(os.environ)
        await super().launch_server(master_address=master_address, master_port=master_port)
        if self.node_rank != 0:
            return
        check_places(self.tokenizer_manager, sglang.__version__)
        shape = None
        if self.config.enable_rollout_routing_replay:
            model = self.model_config.hf_config
            shape = (int(model.num_hidden_layers), int(model.num_experts_per_tok))
        self.tokenizer_manager = Tap(self.tokenizer_manager, shape)


class AsyncSGLangReplica(SGLangReplica):  # type: ignore[misc]
    """verl's replica over our server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(AsyncSGLangServer)

    async def abort_all_requests(self, reject_request: bool = False) -> None:
        await self.servers[0].abort_all_requests.remote(reject_request)
