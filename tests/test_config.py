"""Settings and YAML: right input is read, wrong input is one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field

from agentloop.config import CutoffAction, LoopConfig, OnCutoff, Strict, load_yaml, validate
from agentloop.errors import ConfigError, nearest
from agentloop.trajectory import EndReason


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


# -- load_yaml -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "overrides", "data"),
    [
        ("", [], {}),
        ("# nothing yet\n", [], {}),
        ("---\n", [], {}),
        ("null", ["a=1"], {"a": 1}),
        ("a: 1\nb: {c: [1, 2]}", [], {"a": 1, "b": {"c": [1, 2]}}),
        ("a: 1\nb: {c: 2, d: 3}", ["a=5", "b.c=6", "e.f=text"], {"a": 5, "b": {"c": 6, "d": 3}, "e": {"f": "text"}}),
        ("a: 1", ["a=2", "a=3"], {"a": 3}),
        (
            "a: 1",
            ["b=[1,x]", "c=null", "d=1e-3", "e=x=y", "f=true"],
            {"a": 1, "b": [1, "x"], "c": None, "d": 0.001, "e": "x=y", "f": True},
        ),
        ("a: ${b}\nb: 3", ["b=4"], {"a": 4, "b": 4}),
        ("a: {b: 1}", ["a=3"], {"a": 3}),
        ("\ufeffa: é", [], {"a": "é"}),
        ("1: x", [], {"1": "x"}),
    ],
)
def test_what_is_read(text: str, overrides: list[str], data: dict[str, Any], file: Path) -> None:
    file.write_text(text, encoding="utf-8")
    assert load_yaml(file, overrides) == data
    assert load_yaml(str(file), overrides) == data


@pytest.mark.parametrize(
    ("text", "overrides", "says"),
    [
        ("- 1\n- 2", [], "{file}: expected a mapping at the top, found a list"),
        ("- 1", ["a=1"], "{file}: expected a mapping at the top, found a list"),
        ("just text", [], "{file}: expected a mapping at the top, found a single value"),
        ("3", [], "{file}: expected a mapping at the top, found a single value"),
        ("a: 1\nb: [", [], "{file}: not valid YAML: line 2: "),
        ("a: 1\n\tb: 2", [], "{file}: not valid YAML: line 2: "),
        ("a: 1\na: 2", [], "{file}: not valid YAML: line 2: found duplicate key a"),
        ("a: 1\n---\nb: 2", [], "{file}: not valid YAML: line 2: "),
        ("a: \x00", [], "{file}: not valid YAML: "),
        (
            "a: !!python/object/apply:os.system ['true']",
            [],
            "{file}: not valid YAML: line 1: could not determine a constructor",
        ),
        ("a: &x [*x]", [], "{file}: nested too deeply"),
        ("a: " + "[" * 5000, [], "{file}: nested too deeply"),
        ("a: ${b}", [], "{file}: key 'a': Interpolation key 'b' not found"),
        ("a: ${a}", [], "{file}: key 'a': Recursive interpolation"),
        ("a:\n  b: ???", [], "{file}: key 'a.b': Missing mandatory value"),
        ("a: 1", ["b"], "override 'b': expected key=value"),
        ("a: 1", ["=3"], "override '=3': expected key=value"),
        ("a: 1", [""], "override '': expected key=value"),
        ("a: 1", ["~a"], "override '~a': expected key=value"),
        ("a: 1", ["b=[1,"], "override 'b=[1,': line 1: "),
    ],
)
def test_what_is_refused_in_one_sentence(text: str, overrides: list[str], says: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_yaml(file, overrides)
    assert str(error.value).startswith(says.format(file=file))
    assert "\n" not in str(error.value)


def test_files_that_are_not_there_or_no_text(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml: no such file"):
        load_yaml(file)
    with pytest.raises(ConfigError, match="is a folder"):
        load_yaml(file.parent)
    file.write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="cannot be read: 'utf-8'"):
        load_yaml(file)


# -- validate --------------------------------------------------------------------------------------------------------


class Inner(Strict):
    name: str
    kind: Literal["a", "b"] = "a"


class Outer(Strict):
    items: list[Inner] = Field(default_factory=list)
    by_name: dict[str, Inner] = Field(default_factory=dict)
    maybe: Inner | None = None
    either: Inner | int | None = None
    count: int | None = None
    flag: bool = False
    flag_or_count: bool | int = 0


@pytest.mark.parametrize(
    ("model", "data", "says"),
    [
        (LoopConfig, {"max_turn": 3}, "unknown key 'max_turn'; did you mean 'max_turns'?"),
        (LoopConfig, {"deadlines": {"trajectory": 3}}, "unknown key 'deadlines.trajectory'; did you mean 'trajectory_s'?"),
        (LoopConfig, {"on_cutoff": {"deadlin": "mask"}}, "unknown key 'on_cutoff.deadlin'; did you mean 'deadline'?"),
        (LoopConfig, {"on_cutoff": {"final_answer": "mask"}}, "unknown key 'on_cutoff.final_answer'; known are: aborted, "),
        (LoopConfig, {"on_cutoff": {"deadline": "scor"}}, "key 'on_cutoff.deadline': input should be 'score', 'mask' or "),
        (LoopConfig, {"max_turns": 0}, "key 'max_turns': input should be greater than or equal to 1, got 0"),
        (LoopConfig, {"max_turns": True}, "key 'max_turns': input should be a number, got True"),
        (LoopConfig, {"max_turn_tokens": False}, "key 'max_turn_tokens': input should be a number, got False"),
        (LoopConfig, {"max_turns": None}, "key 'max_turns': input should be a valid integer, got None"),
        (LoopConfig, {"deadlines": None}, "key 'deadlines': expected a mapping, got None"),
        (LoopConfig, {"deadlines": {"generate_s": -1}}, "key 'deadlines.generate_s': input should be greater than 0, got -1"),
        (LoopConfig, {"deadlines": {"score_s": float("nan")}}, "key 'deadlines.score_s': input should be greater than 0"),
        (LoopConfig, {"penalty": float("nan")}, "key 'penalty': input should be a finite number, got nan"),
        (LoopConfig, {"max_turns": "x" * 500}, "key 'max_turns': input should be a valid integer"),
        (LoopConfig, 3, "expected a mapping, got 3"),
        (Outer, {"items": [{"name": "x"}, {"nam": "x"}]}, "unknown key 'items.1.nam'; did you mean 'name'?"),
        (Outer, {"items": [{"name": "x", "kin": "a"}]}, "unknown key 'items.0.kin'; did you mean 'kind'?"),
        (Outer, {"by_name": {"k": {"name": "x", "kin": "a"}}}, "unknown key 'by_name.k.kin'; did you mean 'kind'?"),
        (Outer, {"maybe": {"name": "x", "kin": "a"}}, "unknown key 'maybe.kin'; did you mean 'kind'?"),
        (Outer, {"maybe": {}}, "key 'maybe.name' is missing"),
        (Outer, {"items": "x"}, "key 'items': input should be a valid list, got 'x'"),
    ],
)
def test_what_is_wrong_is_one_sentence(model: type[Strict], data: Any, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        validate(model, data, "run.yaml")
    assert str(error.value).startswith(f"run.yaml: {says}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_what_is_right() -> None:
    config = validate(LoopConfig, {"max_turns": "3", "deadlines": {"tools_s": float("inf")}, "penalty": -1}, "run.yaml")
    assert (config.max_turns, config.deadlines.tools_s, config.penalty) == (3, float("inf"), -1.0)
    outer = validate(Outer, {"flag": True, "flag_or_count": True, "count": 2, "either": 3}, "run.yaml")
    assert (outer.flag, outer.flag_or_count, outer.count, outer.either) == (True, True, 2, 3)


def test_every_end_reason_has_an_action() -> None:
    actions: dict[EndReason, CutoffAction] = {reason: OnCutoff().of(reason) for reason in EndReason}
    assert actions[EndReason.FINAL_ANSWER] == "score"
    scored = {reason for reason, action in actions.items() if action == "score"}
    assert scored == {EndReason.FINAL_ANSWER, EndReason.TURN_LIMIT, EndReason.TOKEN_LIMIT, EndReason.PARSE_FAILURE}
    assert {action for reason, action in actions.items() if reason not in scored} == {"mask"}
    assert OnCutoff(deadline="penalty").of(EndReason.DEADLINE) == "penalty"


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        LoopConfig().max_turns = 3  # type: ignore[misc]


def test_nearest() -> None:
    assert nearest("max_turn", ["max_turns", "deadline_s"]) == "did you mean 'max_turns'?"
    assert nearest("zzz", ["b", "a", "a"]) == "known are: a, b"
    assert nearest("zzz", []) == "nothing is known here"
