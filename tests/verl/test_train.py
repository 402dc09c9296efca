"""`agentloop train`: what becomes of the file and the overrides, and every bad input in one sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentloop.cli import main
from agentloop.errors import ConfigError
from agentloop.verl.launch import make_plan
from agentloop.verl.process import RUN_ID, parse_metrics, run
from tests.verl.assets import make_data, make_hollow_model, make_reward, run_file

Edit = Callable[[dict[str, Any], Path], None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_hollow_model(tmp_path / "model")
    make_data(tmp_path / "data.parquet")
    make_reward(tmp_path / "reward.py")
    return tmp_path


def write(folder: Path, edit: Edit | None = None) -> Path:
    content = run_file(folder)
    if edit is not None:
        edit(content, folder)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def arguments(plan: Any) -> dict[str, str]:
    return dict(item.split("=", 1) for item in plan.command[3:])


def put(*keys: str, to: Any) -> Edit:
    def edit(content: dict[str, Any], folder: Path) -> None:
        for key in keys[:-1]:
            content = content.setdefault(key, {})
        content[keys[-1]] = to(folder) if callable(to) else to

    return edit


def empty_data(folder: Path) -> str:
    (folder / "empty.jsonl").write_text("")
    return str(folder / "empty.jsonl")


def no_prompt(folder: Path) -> str:
    (folder / "bad.jsonl").write_text(json.dumps({"question": "?", "data_source": "a", "reward_model": {}}) + "\n")
    return str(folder / "bad.jsonl")


def unknown_tool(content: dict[str, Any], folder: Path) -> None:
    row: dict[str, Any] = {
        "prompt": [{"role": "user", "content": "?"}],
        "data_source": "a",
        "reward_model": {"ground_truth": "1"},
    }
    row["extra_info"] = {"tool_selection": ["no_such_tool"]}
    (folder / "tool.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "tools.yaml").write_text("tools: [{class_name: calculator}]")
    put(*TRAIN, to=str(folder / "tool.jsonl"))(content, folder)
    put("agentloop", "tools", to=str(folder / "tools.yaml"))(content, folder)


def broken_model(folder: Path) -> str:
    (folder / "model" / "config.json").write_text("{")
    return str(folder / "model")


def model_without_tokenizer(folder: Path) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()
    return str(folder / "model")


def model_with_broken_tokenizer(folder: Path) -> str:
    (folder / "model" / "tokenizer.json").write_text("{}")
    return str(folder / "model")


def long_prompt(folder: Path) -> str:
    import pandas

    rows = pandas.read_parquet(folder / "data.parquet").to_dict("records")
    rows[3]["prompt"] = [{"role": "user", "content": "1 + 1 = " * 3000}]
    pandas.DataFrame(rows).to_parquet(folder / "long.parquet")
    return str(folder / "long.parquet")


def misspelt_tools(folder: Path) -> str:
    (folder / "tools.yaml").write_text("tools:\n  - class_nmae: a.B\n")
    return str(folder / "tools.yaml")


TRAIN, MODEL = ("verl", "data", "train_files"), ("verl", "actor_rollout_ref", "model", "path")
BAD: list[tuple[str, Edit, str]] = [
    ("top-level key", put("verll", to={}), "unknown key 'verll'; did you mean 'verl'?"),
    ("platform", put("platform", to="gpu"), "platform"),
    ("agentloop's key", put("agentloop", "lop", to={}), "unknown key 'lop'; did you mean 'loop'?"),
    ("loop's key", put("agentloop", "loop", "max_turn", to=3), "did you mean 'max_turns'?"),
    ("verl's key", put("verl", "trainer", "total_epoch", to=1), "did you mean 'trainer.total_epochs'?"),
    ("verl's section", put("verl", "actor", "optim", "lr", to=1), "verl has no setting 'actor.optim.lr'"),
    ("no model", put(*MODEL, to=lambda folder: str(folder / "absent")), "is no model folder"),
    ("model without config", put(*MODEL, to=lambda folder: str(folder)), "has no config.json"),
    ("model with broken config", put(*MODEL, to=broken_model), "not valid JSON"),
    ("model without tokenizer", put(*MODEL, to=model_without_tokenizer), "has no tokenizer"),
    ("broken tokenizer", put(*MODEL, to=model_with_broken_tokenizer), "the tokenizer cannot be loaded"),
    ("prompt too long", put(*TRAIN, to=long_prompt), "row 3, column 'prompt': is 18008 tokens long"),
    ("no data", put(*TRAIN, to=lambda folder: str(folder / "absent.parquet")), "does not exist"),
    ("empty data", put(*TRAIN, to=empty_data), "empty.jsonl"),
    ("data without prompts", put(*TRAIN, to=no_prompt), "prompt"),
    ("a row's unknown tool", unknown_tool, "there is no tool 'no_such_tool'"),
    ("no tools file", put("agentloop", "tools", to="absent.yaml"), "absent.yaml"),
    ("misspelt tools", put("agentloop", "tools", to=misspelt_tools), "class_name"),
    ("no reward file", put("verl", "reward", "custom_reward_function", "path", to="absent.py"), "'absent.py' does not exist"),
    ("no reward of that name", put("verl", "reward", "custom_reward_function", "name", to="compute_scores"), "compute_score"),
    ("adapter rollouts", put("verl", "actor_rollout_ref", "model", "lora_rank", to=8), "lora.merge=true"),
    ("no rollout", put("platform", to="auto"), "rollout.name is missing"),
]


@pytest.mark.parametrize(("edit", "says"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_input_is_one_sentence_and_exit_status_2(
    folder: Path, edit: Edit, says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder, edit)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["agentloop", "train", str(path)])
    with pytest.raises(SystemExit) as stop:
        main()
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in message
    assert len(message.strip().splitlines()) == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("content", [None, "verl: [", "- a\n- b\n"])
def test_a_missing_or_malformed_file(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        make_plan(path)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.total_epoch=1", "did you mean 'trainer.total_epochs'"),
        ("agentloop.loop.max_turn=1", "did you mean 'max_turns'"),
        ("trainer", "expected key=value"),
        ("data.train_batch_size=[", "does not take"),
        ("model_engine=megatro", "model_engine"),
    ],
)
def test_a_bad_override(folder: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_plan(write(folder), [override])


def test_later_settings_win_and_every_preset_can_be_changed(folder: Path) -> None:
    def edit(content: dict[str, Any], _: Path) -> None:
        content["verl"]["trainer.total_training_steps"] = 5
        content["verl"]["reward"]["num_workers"] = 3
        content["verl"]["+custom.key"] = "it's 'quoted'"

    overrides = ["trainer.total_training_steps=7", "agentloop.loop.max_turns=4", "actor_rollout_ref.actor.strategy=fsdp"]
    plan = make_plan(write(folder, edit), [*overrides, "actor_rollout_ref.rollout.agent.agent_loop_manager_class=null"])
    given = arguments(plan)
    assert plan.total_steps == 7
    assert given["trainer.total_training_steps"] == "7"
    assert given["reward.num_workers"] == "3"
    assert given["actor_rollout_ref.actor.strategy"] == "fsdp"
    assert given["+actor_rollout_ref.rollout.agent.agent_loop_manager_class"] == "null"
    assert given["+agentloop.loop.max_turns"] == "4"
    assert given["+custom.key"] == r"'it\'s \'quoted\''"
    assert plan.run_dir == folder / "run"


def test_the_cpu_platform_sets_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_USE_EXTERNAL_MODULES", "my.plugin")
    monkeypatch.delenv("TENSORBOARD_DIR", raising=False)
    env = make_plan(write(folder)).env
    assert env["VERL_PLATFORM"] == "cpu"
    assert env["TENSORBOARD_DIR"] == str(folder / "run" / "tensorboard")
    assert env["CUDA_VISIBLE_DEVICES"] == "-1"  # hidden from CUDA, and one for Ray to count
    assert env["VERL_USE_EXTERNAL_MODULES"] == "my.plugin,agentloop.verl.plugin"
    assert os.getcwd() in env["PYTHONPATH"].split(os.pathsep)
    assert "VERL_PLATFORM" not in make_plan(write(folder), ["platform=auto", "actor_rollout_ref.rollout.name=sglang"]).env


def test_trainer_and_rollout_apart_get_a_backend_and_resources_on_the_cpu(folder: Path) -> None:
    mode = ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=1"]
    plan = make_plan(write(folder), mode)
    given = arguments(plan)
    checkpoint = "actor_rollout_ref.rollout.checkpoint_engine"
    assert given[f"{checkpoint}.backend"] == "agentloop_ray"
    assert given[f"{checkpoint}.custom_backend_module"] == "agentloop.verl.checkpoint"
    assert given["actor_rollout_ref.hybrid_engine"] == "false"
    assert (given["actor_rollout_ref.rollout.nnodes"], given["actor_rollout_ref.rollout.n_gpus_per_node"]) == ("1", "1")
    assert (given["+ray_kwargs.ray_init.num_gpus"], given["ray_kwargs.ray_init.num_cpus"]) == ("2", "10")
    assert plan.env["CUDA_VISIBLE_DEVICES"] == "-1,-1"
    more = [*mode, "actor_rollout_ref.rollout.n_gpus_per_node=2", "ray_kwargs.ray_init.num_cpus=20"]
    given = arguments(make_plan(write(folder), [*more, "actor_rollout_ref.hybrid_engine=true"]))
    assert (given["+ray_kwargs.ray_init.num_gpus"], given["ray_kwargs.ray_init.num_cpus"]) == ("3", "20")
    assert given["actor_rollout_ref.hybrid_engine"] == "true"
    assert f"{checkpoint}.backend" not in arguments(make_plan(write(folder)))


def test_sglang_async_is_registered_by_settings(folder: Path) -> None:
    given = arguments(make_plan(write(folder), ["platform=auto", "actor_rollout_ref.rollout.name=sglang_async"]))
    module = "agentloop.verl.replica_sglang"
    assert given["actor_rollout_ref.model.external_lib"] == module
    assert given["actor_rollout_ref.rollout.checkpoint_engine.custom_backend_module"] == module
    with pytest.raises(ConfigError, match="sglang_async needs a GPU"):
        make_plan(write(folder), ["actor_rollout_ref.rollout.name=sglang_async"])


def test_the_quick_sampler_stands_back_where_verl_gives_it_too_little(folder: Path) -> None:
    key = "trainer.v1.sampler.custom_sampler.name"
    assert arguments(make_plan(write(folder)))[key] == "QuickReplayBuffer"
    on_a_gpu = ["platform=auto", "actor_rollout_ref.rollout.name=sglang"]
    assert arguments(make_plan(write(folder), on_a_gpu))[key] == "QuickReplayBuffer"
    assert arguments(make_plan(write(folder), ["trainer.v1.trainer_mode=colocate_async"]))[key] == "QuickReplayBufferAsync"
    for override in (
        "trainer.v1.sampler.sync_refill_failed_groups=true",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups={enable:true}",
    ):
        assert key not in arguments(make_plan(write(folder), [override])), override
    mine = "{path:pkg://mine,name:Mine}"
    plan = make_plan(write(folder), [f"trainer.v1.sampler.custom_sampler={mine}"])
    assert key not in arguments(plan) and arguments(plan)[key.removesuffix(".name")] == mine


def test_dry_run_prints_the_command_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["agentloop", "train", str(path), "--dry-run"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert "-m verl.trainer.main_ppo" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before


def test_the_examples_of_the_documentation(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "train.md").read_text()
    (folder / "run.yaml").write_text(text.split("```yaml\n")[1].split("```")[0])
    (folder / "tools.yaml").write_text(
        "tools:\n  - class_name: examples.quickstart.calculator_tool.Calculator\n    config: {type: native}\n"
    )
    monkeypatch.chdir(folder)
    commands = [line.split() for line in text.splitlines() if line.startswith("agentloop train") and line.endswith("--dry-run")]
    assert len(commands) == 4
    for command in [*commands, ["agentloop", "train", "run.yaml", "--dry-run"]]:
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        printed = capsys.readouterr().out
        assert all(word in printed for word in command[3:-1] if not word.startswith(("agentloop.", "platform=")))


# -- running a command --------------------------------------------------------------------------------------------------


def test_nothing_outlives_the_run(tmp_path: Path) -> None:
    code = (
        "import os, subprocess, sys\n"
        "child = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"print(os.environ['{RUN_ID}'], child.pid, flush=True)\n"
        "sys.exit(3)\n"
    )
    log = tmp_path / "verl.log"
    assert run([sys.executable, "-c", code], {}, log) == 3
    pid = int(log.read_text().split()[1])
    assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_a_failure_shows_the_end_of_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([sys.executable, "-c", "raise SystemExit('it broke')"], {}, tmp_path / "verl.log")
    assert "it broke" in capsys.readouterr().err


def test_the_gist_of_verls_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        "(TaskRunnerV1 pid=7) noise",
        "\x1b[36m(_RolloutActor pid=9)\x1b[0m train step 1: 16/16 trajectories",
        "(TaskRunnerV1 pid=7) step:1 - critic/score/mean:0.25 - training/num_turns/mean:np.float64(2.5) - timing_s/step:1.5",
    ]
    code = f"import sys; sys.stdout.write('\\n'.join({lines!r}))"
    run([sys.executable, "-c", code], {}, tmp_path / "verl.log", total_steps=9)
    shown = capsys.readouterr().out
    assert "train step 1: 16/16 trajectories" in shown
    assert "step 1/9: score 0.25, turns 2.5, seconds 1.5" in shown
    assert "noise" not in shown


def test_metrics_of_verls_line() -> None:
    line = "step:2 - a/b:1e-3 - c:np.float64(-2.0) - d:text - e:nan"
    metrics = parse_metrics(line)
    assert metrics["a/b"] == 1e-3
    assert metrics["c"] == -2.0
    assert "d" not in metrics
