"""What a model is shown of a run in a sandbox."""

from __future__ import annotations

import re

from agentloop.sandboxes.base import Limits, Result, Status
from agentloop.tools.base import ToolResult

_FRAME = re.compile(r'\s*(?:\| +)?File "(.+?)", line \d+')
_LIBRARY = re.compile(r"/lib(64)?/python|/(site|dist)-packages/|^<frozen |^<__array_function__")


def shown(result: Result, limits: Limits, notice: str = "") -> ToolResult:
    """Output, the last value and, if something went wrong, what to make of it; not for `Status.INFRA`.

    `notice` is a sentence that goes before everything.
    """
    stderr = _cut(result.stderr, result.stderr_cut)
    if not result.ok:
        stderr = trim_traceback(stderr)
    parts = [f"[{notice}]" if notice else "", _cut(result.stdout, result.stdout_cut), stderr]
    if result.value is not None:
        more = f"… [{result.value_cut} more bytes]" if result.value_cut else ""
        parts.append(result.value + more)
    if sentence := _sentence(result, limits):
        parts.append(f"[{sentence}]")
    text = "\n".join(part.rstrip("\n") for part in parts if part.strip())
    metrics = {"cpu_s": result.cpu_s, "peak_memory_mb": result.peak_memory_mb}
    known = {name: value for name, value in metrics.items() if value is not None}
    return ToolResult(text or "[no output]", metrics=known, error=not result.ok)


def _sentence(result: Result, limits: Limits) -> str:
    """What happened, what is left, and what to do about it."""
    raised = "Traceback (most recent call last)" in result.stderr or "SyntaxError" in result.stderr
    match result.status:
        case Status.TIMEOUT if "CPU" in result.error:
            cpu_s = limits.cpu_s or limits.timeout_s
            said = f"It used more than {cpu_s:g} s of CPU time and was stopped"
            advice = "Do less work at once."
        case Status.TIMEOUT:
            said = f"It ran longer than {limits.timeout_s:g} s and was stopped"
            advice = "Do less work at once, or find a faster way."
        case Status.OOM:
            said = f"It asked for more than {limits.memory_mb} MiB of memory"
            advice = "Work on less data at once."
        case Status.OUTPUT_LIMIT:
            said = f"It wrote more than {limits.output_bytes} bytes of output and was stopped"
            advice = "Print less, or write to a file."
        case Status.ERROR if result.exit_code is not None and result.exit_code > 0 and not raised:
            said, advice = f"Exit status {result.exit_code}", ""
        case Status.ERROR if result.exit_code is not None and result.exit_code < 0:
            said, advice = f"It was ended by signal {-result.exit_code}", ""
        case Status.ERROR if not raised:
            said, advice = result.error[:1].upper() + result.error[1:], ""
        case _:
            said, advice = "", ""
    lost = what_is_lost(result)
    first = "; ".join(part for part in (said.rstrip("."), lost) if part)
    return " ".join(part for part in (f"{first[:1].upper()}{first[1:]}." if first else "", advice) if part)


def what_is_lost(result: Result) -> str:
    """Of a session, by this run or one before it; empty if nothing."""
    if not result.state_lost:
        return ""
    return "variables and files are lost" if "files are gone" in result.error else "variables are lost, files are kept"


def _cut(text: str, left_out: int) -> str:
    """`text`, of which the sandbox kept beginning and end, with a mark where `left_out` bytes are missing."""
    if not left_out:
        return text
    data = text.encode("utf-8", "replace")
    half = len(data) - len(data) // 2
    before, after = data[:half].decode("utf-8", "ignore"), data[half:].decode("utf-8", "ignore")
    return f"{before}\n[… {left_out} bytes left out …]\n{after}"


def trim_traceback(text: str) -> str:
    """Tracebacks in `text` without the frames of Python's own and installed libraries; says how many were left out."""
    kept: list[str] = []
    dropping = 0
    in_library = False
    for line in text.splitlines():
        if frame := _FRAME.match(line):
            in_library = bool(_LIBRARY.search(frame[1]))
            dropping += in_library
        if in_library and (frame or line.startswith("    ") or line.lstrip().startswith("[Previous line repeated")):
            continue
        in_library = False
        if dropping:
            kept.append(f"  [… {dropping} frame{'s' if dropping > 1 else ''} of library code …]")
            dropping = 0
        kept.append(line)
    return "\n".join(kept)
