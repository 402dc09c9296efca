"""Weights between Megatron and Hugging Face: from checkpoints on disk and from live shards, in buckets, and back.

`mapping` says which tensor holds what; `export` walks it; `checkpoint`, `shards` and `gather` are what it reads from,
`folder` and `megatron_folder` what it writes. `sync` keeps engines at a trainer's weights, in one of several ways
(`sync_plans`).
"""

from __future__ import annotations

from agentloop.weights.checkpoint import CheckpointSource, MegatronCheckpoint
from agentloop.weights.convert import hf_config, to_hugging_face, to_megatron
from agentloop.weights.export import Bucket, Fp8Error, export
from agentloop.weights.folder import HfFolder, HfTensors, HfWeights, write_folder
from agentloop.weights.gather import GatheredSource
from agentloop.weights.layout import Coordinates, Layout
from agentloop.weights.mapping import Item, plan
from agentloop.weights.megatron_folder import write_checkpoint
from agentloop.weights.shape import ModelShape, read_shape, shape_of
from agentloop.weights.shards import Shard, ShardSource, to_shard
from agentloop.weights.source import Source
from agentloop.weights.sync import Check, CheckReport, MegatronSGLangShardingManager, SyncReport
from agentloop.weights.sync_distributed import DistributedPlan
from agentloop.weights.sync_guard import GuardedEngine, SyncFailed, WeightsRefused
from agentloop.weights.sync_plans import DiskPlan, RestartPlan, SendPlan, TensorsPlan

__all__ = [
    "Bucket",
    "Check",
    "CheckReport",
    "CheckpointSource",
    "Coordinates",
    "DiskPlan",
    "DistributedPlan",
    "Fp8Error",
    "GatheredSource",
    "GuardedEngine",
    "HfFolder",
    "HfTensors",
    "HfWeights",
    "Item",
    "Layout",
    "MegatronCheckpoint",
    "MegatronSGLangShardingManager",
    "ModelShape",
    "RestartPlan",
    "SendPlan",
    "Shard",
    "ShardSource",
    "Source",
    "SyncFailed",
    "SyncReport",
    "TensorsPlan",
    "WeightsRefused",
    "export",
    "hf_config",
    "plan",
    "read_shape",
    "shape_of",
    "to_hugging_face",
    "to_megatron",
    "to_shard",
    "write_checkpoint",
    "write_folder",
]
