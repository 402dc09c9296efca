"""A `cpu` platform for verl, which ships only nvidia, huawei and rocm. Importing this module registers it."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry


def _peak_rss(*_: Any, **__: Any) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _device_module() -> ModuleType:
    """`torch.cpu` plus the calls that verl makes on `torch.cuda` (grep for `get_torch_device()` in verl).

    The peak of «allocated» memory is the process's peak resident set in bytes, so verl's `perf/max_memory_allocated_gb`
    says something true."""
    module = ModuleType("agentloop.verl.platform.torch_cpu")

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def zero(*_: Any, **__: Any) -> int:
        return 0

    module.__dict__.update(
        __getattr__=lambda name: getattr(torch.cpu, name),
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        is_available=lambda: True,
        empty_cache=nothing,
        ipc_collect=nothing,
        set_device=nothing,
        synchronize=nothing,
        reset_peak_memory_stats=nothing,
        reset_accumulated_memory_stats=nothing,
        set_per_process_memory_fraction=nothing,
        memory_allocated=zero,
        memory_reserved=zero,
        max_memory_allocated=_peak_rss,
        max_memory_reserved=_peak_rss,
        mem_get_info=lambda *_, **__: (0, 0),
        get_device_name=lambda *_, **__: "CPU",
        get_device_properties=lambda *_, **__: SimpleNamespace(name="CPU", total_memory=0),
        get_rng_state=torch.get_rng_state,
        set_rng_state=torch.set_rng_state,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
    )
    return module


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):  # type: ignore[misc]
    """One CPU as if it were one accelerator."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"  # never wins the auto-detection

    def current_device(self) -> torch.device:
        # verl hands this to `.to()` and `torch.tensor(device=…)`, where the index 0 would mean cuda:0.
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None:
        return None

    def synchronize(self, device_index: int | None = None) -> None:
        return None

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        return None

    def empty_cache(self) -> None:
        return None

    def get_device_capability(self, device_index: int = 0) -> tuple[int | None, int | None]:
        return None, None

    def communication_backend_name(self) -> str:
        # verl/utils/distributed.py:89 builds the backend "cpu:gloo,{device}:{this}", which torch refuses because it names
        # the cpu twice. The string is built just before `if not torch.distributed.is_initialized()`, so a worker that has
        # the rendezvous variables starts the group here and verl finds it running.
        dist = torch.distributed
        if not dist.is_initialized() and all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR")):
            dist.init_process_group(
                "cpu:gloo",
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                init_method=os.environ.get("DIST_INIT_METHOD"),
            )
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        yield

    def profiler_start(self) -> None:
        return None

    def profiler_stop(self) -> None:
        return None

    def ray_resource_name(self) -> str:
        # verl's resource pools ask Ray for "GPU"; a machine without one gives out logical ones (ray_init.num_gpus).
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> Any:
        return None
