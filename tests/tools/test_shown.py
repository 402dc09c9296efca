"""What a model is shown of a run, without a sandbox."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agentloop.sandboxes.base import LOST_BEFORE, Limits, Result, Status
from agentloop.tools.shown import shown, trim_traceback

LIMITS = Limits(timeout_s=5, memory_mb=256, output_bytes=1000)


def traceback_of(code: str) -> str:
    """As the real interpreter writes it."""
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False).stderr


def test_frames_of_libraries_are_counted_and_left_out() -> None:
    text = traceback_of("import json\ndef f():\n    json.loads('{')\nf()")
    assert text.count('File "') == 5
    trimmed = trim_traceback(text)
    assert [line for line in trimmed.splitlines() if line.startswith("  ")] == [
        '  File "<string>", line 4, in <module>',
        '  File "<string>", line 3, in f',
        "  [… 3 frames of library code …]",
    ]
    assert trimmed.splitlines()[-1] == text.splitlines()[-1]


def test_a_traceback_of_the_models_own_code_stays_as_it_is() -> None:
    for code in ("1/0", "x = (", "def f(n):\n    return f(n + 1)\nf(0)", "raise SystemExit('bye')"):
        text = traceback_of(code)
        assert trim_traceback(text) == text.rstrip("\n")


def test_causes_are_trimmed_each() -> None:
    code = "import json\ntry:\n    json.loads('{')\nexcept ValueError as error:\n    raise KeyError('no') from error"
    trimmed = trim_traceback(traceback_of(code))
    assert "direct cause" in trimmed and trimmed.count("library code") == 1 and "decoder.py" not in trimmed
    assert trimmed.endswith("KeyError: 'no'")


def test_output_that_only_looks_like_a_frame_is_kept() -> None:
    text = 'a\n  File "/usr/lib/python3/site-packages/x.py", line 3, in y\nb'
    assert trim_traceback(text) == "a\n  [… 1 frame of library code …]\nb"
    assert shown(Result(Status.OK, stderr=text), LIMITS).text == text


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (Result(Status.OK), "[no output]"),
        (Result(Status.OK, stdout="a\n", stderr="b\n", value="3"), "a\nb\n3"),
        (Result(Status.OK, value="'abc", value_cut=7), "'abc… [7 more bytes]"),
        (Result(Status.OK, stdout="ääää", stdout_cut=9), "ää\n[… 9 bytes left out …]\nää"),
        (Result(Status.ERROR, exit_code=2), "[Exit status 2.]"),
        (
            Result(Status.ERROR, exit_code=-11, state_lost=True),
            "[It was ended by signal 11; variables are lost, files are kept.]",
        ),
        (Result(Status.ERROR, error="the interpreter has ended"), "[The interpreter has ended.]"),
        (Result(Status.OK, stdout="1\n", state_lost=True), "1\n[Variables are lost, files are kept.]"),
        (Result(Status.OK, stdout="1\n", state_lost=True, error=LOST_BEFORE), "1\n[Variables and files are lost.]"),
        (
            Result(Status.TIMEOUT, stdout="begun\n", error="its time ran out and it was killed", state_lost=True),
            "begun\n[It ran longer than 5 s and was stopped; variables are lost, files are kept. Do less work at once, or find "
            "a faster way.]",
        ),
        (
            Result(Status.TIMEOUT, error="it used more than 5 s of CPU time and was killed"),
            "[It used more than 5 s of CPU time and was stopped. Do less work at once.]",
        ),
        (Result(Status.OOM), "[It asked for more than 256 MiB of memory. Work on less data at once.]"),
        (
            Result(Status.OUTPUT_LIMIT, stdout="x"),
            "x\n[It wrote more than 1000 bytes of output and was stopped. Print less, or write to a file.]",
        ),
    ],
)
def test_every_status(result: Result, text: str) -> None:
    answer = shown(result, LIMITS)
    assert (answer.text, answer.error) == (text, not result.ok)


def test_a_notice_comes_first_and_numbers_are_metrics() -> None:
    answer = shown(Result(Status.OK, value="3", cpu_s=0.5, peak_memory_mb=12.0), LIMITS, "Something was stopped.")
    assert (answer.text, answer.metrics) == ("[Something was stopped.]\n3", {"cpu_s": 0.5, "peak_memory_mb": 12.0})
