"""What the rollout worker reads of verl's names, and how ranks become engines."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.verl.rollout_worker_engine import meeting_point, node_command, start_node, stop_node, tensors_of
from agentloop.verl.rollout_worker_places import DISABLE, ENABLE, Place, engine_environment, seat
from agentloop.verl.rollout_worker_settings import check_world, read_worker_settings
from tests.verl.assets import QUICKSTART
from tests.verl.support import verl_config


def read(model: dict[str, Any] | None = None, **rollout: Any) -> Any:
    return read_worker_settings({"rollout": {"name": "sglang", **rollout}, "model": {"path": str(QUICKSTART), **(model or {})}})


def test_verls_own_names_become_sglangs() -> None:
    settings = read(
        tensor_model_parallel_size=4,
        data_parallel_size=4,
        expert_parallel_size=16,
        gpu_memory_utilization=0.7,
        dtype="float16",
        enforce_eager=True,
        load_format="auto",
        max_num_seqs=64,
        max_model_len=4096,
        free_cache_engine=False,
        engine_kwargs={"sglang": {"enable_dp_attention": True, "attention_backend": "triton", "nnodes": 2}},
    )
    assert settings.group == 16
    assert settings.nodes == 2
    assert not settings.random_weights
    assert settings.arguments == {
        "tp_size": 16,
        "dp_size": 4,
        "ep_size": 16,
        "mem_fraction_static": 0.7,
        "dtype": "float16",
        "disable_cuda_graph": True,
        "load_format": "auto",
        "max_running_requests": 64,
        "context_length": 4096,
        "skip_tokenizer_init": True,
        "enable_memory_saver": False,
        "enable_return_routed_experts": False,
        "enable_deterministic_inference": False,
        "trust_remote_code": False,
        "enable_dp_attention": True,
        "attention_backend": "triton",
    }
    assert settings.sglang().settings == settings.arguments


def test_verls_composed_configuration_is_taken_whole_and_in_part() -> None:
    composed = verl_config(
        **{
            "actor_rollout_ref.model.path": str(QUICKSTART),
            "actor_rollout_ref.rollout.name": "sglang",
            "actor_rollout_ref.rollout.tensor_model_parallel_size": 2,
        }
    )
    whole, part = read_worker_settings(composed), read_worker_settings(composed.actor_rollout_ref)
    assert whole.arguments == part.arguments
    assert (whole.group, whole.random_weights) == (2, True)
    assert whole.rollout.prompt_length == 64


@pytest.mark.parametrize(
    ("rollout", "sentence"),
    [
        ({"tp_size": 2}, "unknown key 'tp_size'; did you mean 'tensor_model_parallel_size'?"),
        ({"gpu_memory_utilisation": 0.5}, "did you mean 'gpu_memory_utilization'?"),
        (
            {"multi_turn": {"tool_config": "x"}},
            "rollout.multi_turn: unknown key 'tool_config'; did you mean 'tool_config_path'?",
        ),
        ({"engine_kwargs": {"sglng": {}}}, "unknown key 'sglng'; did you mean 'sglang'?"),
        ({"name": "sglangs"}, "hosts no 'sglangs'; did you mean 'sglang'?"),
        ({"tensor_model_parallel_size": "two"}, "key 'tensor_model_parallel_size': "),
        ({"gpu_memory_utilization": 1.5}, "key 'gpu_memory_utilization': "),
        ({"pipeline_model_parallel_size": 2}, "without pipeline stages"),
        ({"data_parallel_size": 2}, "data_parallel_size=2 and engine_kwargs.sglang.enable_dp_attention=False contradict"),
        ({"engine_kwargs": {"sglang": {"enable_dp_attention": True}}}, "data_parallel_size=1 and .*=True contradict"),
        ({"expert_parallel_size": 3}, "expert_parallel_size is 3; it must be 1, or .* \\(2\\)"),
        (
            {"engine_kwargs": {"sglang": {"tp_size": 8}}},
            "'tp_size' is 8, and .* says 2; set .*tensor_model_parallel_size instead",
        ),
        ({"engine_kwargs": {"sglang": {"mem_fraction_static": 0.8}}}, "set actor_rollout_ref.rollout.gpu_memory_utilization"),
        ({"engine_kwargs": {"sglang": {"node_rank": 1}}}, "'node_rank' cannot be set here"),
        ({"engine_kwargs": {"sglang": {"nnodes": 3}}}, "3 nodes do not divide the 2 ranks"),
        ({"quantization": "fp8"}, "set engine_kwargs.sglang.quantization"),
        ({"disaggregation": {"enabled": True}}, "use verl's replicas"),
    ],
)
def test_what_is_wrong_is_named(rollout: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        read(**rollout)
    assert "\n" not in str(caught.value)


def test_ranks_that_make_no_whole_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"6 ranks do not make whole engines of 4 .*; take 4 ranks"):
        check_world(read(tensor_model_parallel_size=4), 6)
    check_world(read(tensor_model_parallel_size=4), 8)


def places(*nodes: str, per_node: int = 8) -> list[Place]:
    return [
        Place(rank, f"id-{node}", f"10.0.0.{node}", 30_000 + rank, str(rank % per_node), 100 + rank)
        for rank, node in enumerate(nodes)
    ]


def test_ranks_in_a_row_are_an_engine_on_their_own_devices() -> None:
    eight = places(*"11111111")
    seats = [seat(rank, 2, eight) for rank in range(8)]
    assert [s.replica for s in seats] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [s.leads for s in seats] == [True, False] * 4
    assert seats[5].devices == ("4", "5")
    assert all(s.nodes == 1 and s.node_rank == 0 for s in seats)


def test_an_engine_over_two_nodes_is_started_on_each_and_led_by_one() -> None:
    sixteen = places(*"1111111122222222")
    seats = [seat(rank, 16, sixteen) for rank in range(16)]
    assert [rank for rank, s in enumerate(seats) if s.leads] == [0]
    assert [rank for rank, s in enumerate(seats) if s.starts] == [0, 8]
    assert [s.node_rank for s in seats] == [0] * 8 + [1] * 8
    assert seats[8].devices == tuple("01234567")
    settings = read(tensor_model_parallel_size=16, engine_kwargs={"sglang": {"attention_backend": "triton"}})
    meet = meeting_point(settings, sixteen, seats[8])
    assert meet == "10.0.0.1:30000"
    command = node_command(settings, seats[8], meet=meet, port=40_000)
    told = dict(pairwise(command))
    assert told["--nnodes"] == "2"
    assert told["--node-rank"] == "1"
    assert told["--dist-init-addr"] == meet
    assert told["--tp-size"] == "16"
    assert told["--attention-backend"] == "triton"
    assert "--disable-cuda-graph" not in command
    given = read(tensor_model_parallel_size=16, engine_kwargs={"sglang": {"dist_init_addr": "head:5000"}})
    assert meeting_point(given, sixteen, seats[8]) == "head:5000"


def test_groups_that_cannot_be_an_engine_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ranks 0 to 3 .* spread unevenly over nodes: 3 on 10.0.0.1, 1 on 10.0.0.2"):
        seat(0, 4, places(*"1112"))
    shared = [replace(place, device="0") for place in places(*"11")]
    with pytest.raises(ConfigError, match="share a GPU"):
        seat(0, 2, shared)


def test_the_check_of_unequal_memory_is_off_unless_the_user_says_otherwise() -> None:
    assert engine_environment(("1", "0"), {}) == {ENABLE: "0", DISABLE: None, "CUDA_VISIBLE_DEVICES": "1,0"}
    for said, check in (
        ({ENABLE: "1"}, "1"),
        ({ENABLE: "false"}, "0"),
        ({DISABLE: "true"}, "0"),
        ({DISABLE: "0"}, "1"),
        ({ENABLE: "0", DISABLE: "1"}, "0"),
    ):
        assert engine_environment((), said) == {ENABLE: check, DISABLE: None}, said


def test_an_sglang_that_reads_the_older_name_gets_that_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "sglang" / "srt" / "environ.py"
    source.parent.mkdir(parents=True)
    (tmp_path / "sglang" / "__init__.py").write_text("raise AssertionError('it must not be imported')")
    source.write_text("flag = get_bool_env_var('SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sglang", raising=False)
    assert engine_environment((), {}) == {ENABLE: None, DISABLE: "1"}
    assert engine_environment((), {ENABLE: "1"}) == {ENABLE: None, DISABLE: "0"}
    source.write_text("SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK = EnvBool(True)")
    assert engine_environment((), {}) == {ENABLE: "0", DISABLE: None}


@pytest.mark.parametrize("said", [{}, {DISABLE: "1"}, {ENABLE: "0"}, {ENABLE: "0", DISABLE: "1"}])
def test_what_takes_effect_in_sglang(said: dict[str, str]) -> None:
    """SGLang's own reading of the environment, in a process of its own."""
    if find_spec("sglang") is None:
        pytest.skip("SGLang is not installed")
    ask = "from sglang.srt.environ import envs; print(envs.SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK.get())"
    wanted = {**os.environ, **said, **engine_environment((), said)}
    env = {name: value for name, value in wanted.items() if value is not None}
    told = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, timeout=120)
    assert told.stdout.strip().endswith("False"), told.stderr


@pytest.mark.slow
def test_a_nodes_process_has_the_environment_and_ends_with_its_parent(tmp_path: Path) -> None:
    """The real process, with a stand-in module for SGLang's launcher, which tells what it sees and waits."""
    package = tmp_path / "sglang"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "launch_server.py").write_text(
        "import os, sys, time\n"
        f"names = [{ENABLE!r}, {DISABLE!r}, 'CUDA_VISIBLE_DEVICES']\n"
        f"open({str(tmp_path / 'seen.part')!r}, 'w').write(' '.join(os.environ.get(name, '-') for name in names))\n"
        f"os.rename({str(tmp_path / 'seen.part')!r}, {str(tmp_path / 'seen')!r})\n"
        "time.sleep(120)\n"
    )
    parent = (
        "import os, sys, time\n"
        "from tests.verl.test_rollout_worker_settings import places, read\n"
        "from agentloop.verl.rollout_worker_engine import start_node\n"
        "from agentloop.verl.rollout_worker_places import seat\n"
        "here = seat(2, 4, places(*'1122', per_node=2))\n"
        "process = start_node(read(tensor_model_parallel_size=4), here, meet='h:1', port=1)\n"
        f"while not os.path.exists({str(tmp_path / 'seen')!r}): time.sleep(0.05)\n"
        "print(process.pid, flush=True)\n"
        "os._exit(1)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    told = subprocess.run([sys.executable, "-c", parent], env=env, capture_output=True, text=True, timeout=120)
    assert told.returncode == 1, told.stderr
    assert (tmp_path / "seen").read_text() == "0 - 0,1"
    pid = int(told.stdout.split()[-1])
    for _ in range(200):
        if not _runs(pid):
            return
        subprocess.run(["sleep", "0.05"], check=True)
    raise AssertionError(f"process {pid} outlived its parent")


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_stopping_a_node_ends_its_process() -> None:
    settings = read(tensor_model_parallel_size=4)
    process = start_node(settings, seat(0, 4, places(*"1122", per_node=2)), meet="h:1", port=1)
    stop_node(process)  # whether or not it got as far as finding that SGLang is not installed here
    assert process.returncode is not None


def test_a_checkpoint_is_read_tensor_by_tensor() -> None:
    names = dict(tensors_of(str(QUICKSTART)))
    assert names["model.embed_tokens.weight"].shape == (687, 128)
