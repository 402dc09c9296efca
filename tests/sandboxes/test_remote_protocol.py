"""SandboxFusion's answers as results, and results as its answers."""

from __future__ import annotations

from typing import Any

import pytest

from agentloop.sandboxes import Limits, Result, Status
from agentloop.sandboxes.remote.protocol import RunCodeResponse, answer, decode, encode, result_of

URL = "http://service"


def told(**response: Any) -> Result:
    return result_of(RunCodeResponse.model_validate({"message": "", **response}), Limits(), URL)


def run(status: str = "Finished", code: int | None = 0, out: str = "", err: str = "") -> dict[str, Any]:
    return {"status": status, "execution_time": 0.5, "return_code": code, "stdout": out, "stderr": err}


@pytest.mark.parametrize(
    ("response", "status"),
    [
        ({"status": "Success", "run_result": run(out="1\n")}, Status.OK),
        ({"status": "Failed", "run_result": run(code=1, err="Traceback")}, Status.ERROR),
        ({"status": "Failed", "run_result": run(code=-9)}, Status.ERROR),
        ({"status": "Failed", "run_result": run("TimeLimitExceeded", None, "part")}, Status.TIMEOUT),
        # It reads the pipes only at the end: a flood hangs until the timeout, and was not slow.
        ({"status": "Failed", "run_result": run("TimeLimitExceeded", None, "x" * 70_000)}, Status.OUTPUT_LIMIT),
        ({"status": "Failed", "run_result": run(code=1, err="Traceback …\nMemoryError\n")}, Status.OOM),
        ({"status": "Success", "run_result": run(out="x" * 70_000)}, Status.OUTPUT_LIMIT),
        # Its own failures, however they are dressed.
        ({"status": "SandboxError", "message": "no space", "run_result": run("Error", None, err="no space")}, Status.INFRA),
        ({"status": "Failed", "run_result": run("Error", 1, err="fork failed")}, Status.INFRA),
        ({"status": "SandboxError", "message": "exception on running code", "run_result": None}, Status.INFRA),
        ({"status": "Failed", "run_result": None}, Status.INFRA),
        ({"status": "Success", "run_result": run(code=None)}, Status.INFRA),
        # A compiler that refuses the code is the code's doing, one that hangs too.
        ({"status": "Failed", "compile_result": run(code=1, err="error: expected ;"), "run_result": None}, Status.ERROR),
        ({"status": "Failed", "compile_result": run("TimeLimitExceeded", None), "run_result": None}, Status.TIMEOUT),
        ({"status": "Failed", "compile_result": run("Error", None), "run_result": None}, Status.INFRA),
        ({"status": "Success", "compile_result": run(), "run_result": run()}, Status.OK),
        ({"status": "Success", "compile_result": run(), "run_result": None}, Status.INFRA),
    ],
)
def test_an_answer_of_sandbox_fusion(response: dict[str, Any], status: Status) -> None:
    result = told(**response)
    assert result.status is status
    assert bool(result.error) is not result.ok
    if status is Status.INFRA:
        assert URL in result.error


def test_output_beyond_the_limit_keeps_its_beginning_and_end() -> None:
    result = told(status="Success", run_result=run(out="begin" + "x" * 100_000 + "end"))
    assert len(result.stdout) == 64 * 1024
    assert result.stdout.startswith("begin") and result.stdout.endswith("end")
    assert result.stdout_cut == 100_008 - 64 * 1024


@pytest.mark.parametrize("status", list(Status))
def test_a_result_survives_the_way_there_and_back(status: Status) -> None:
    result = Result(
        status, "out", "err", "42", None if status is Status.TIMEOUT else 1, "" if status is Status.OK else "why",
        1, 2, 3, True, 0.25, 0.5, 0.125, 10.5, {"f": b"\0\xff"},
    )  # fmt: skip
    there = answer(result, exact=True).model_dump_json()
    assert result_of(RunCodeResponse.model_validate_json(there), Limits(), URL) == result


@pytest.mark.parametrize(
    ("result", "status", "inner", "code"),
    [
        (Result(Status.OK, exit_code=0), "Success", "Finished", 0),
        (Result(Status.ERROR, exit_code=3), "Failed", "Finished", 3),
        (Result(Status.TIMEOUT), "Failed", "TimeLimitExceeded", None),
        (Result(Status.OOM, error="it needed more"), "Failed", "Finished", 137),
        (Result(Status.OUTPUT_LIMIT, error="it wrote more"), "Failed", "Finished", 137),
        (Result(Status.INFRA, error="the pool is gone"), "SandboxError", "Error", None),
    ],
)
def test_a_result_in_sandbox_fusions_words(result: Result, status: str, inner: str, code: int | None) -> None:
    said = answer(result, exact=False)
    assert said.run_result is not None
    assert (said.status, said.run_result.status, said.run_result.return_code) == (status, inner, code)
    assert said.agentloop is None
    if status == "SandboxError":
        assert said.message == result.error
    assert (result.error in (said.run_result.stderr or "")) or result.status in (Status.INFRA, Status.TIMEOUT)


def test_files_are_base64() -> None:
    assert decode(encode({"a": "text", "b": b"\xff"})) == {"a": b"text", "b": b"\xff"}
    with pytest.raises(ValueError, match="file 'x': not valid base64"):
        decode({"x": "?"})
