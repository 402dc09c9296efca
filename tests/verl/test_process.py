"""What becomes of verl's processes when `agentloop train` is told to stop."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_told_to_stop_takes_everything_with_it(tmp_path: Path, number: signal.Signals) -> None:
    inner = "import os, time; print('inner', os.getpid(), flush=True); time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True).wait()"
    code = (
        # As in a terminal; what was started in the background, as tests may be, ignores some of these.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "import sys; from pathlib import Path; from agentloop.verl.process import run\n"
        f"sys.exit(run([sys.executable, '-c', {outer!r}], {{}}, Path({str(tmp_path / 'log')!r}), verbose=True))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    inner_pid = int(child.stdout.readline().split()[1])
    child.send_signal(number)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "agentloop: interrupted; stopping verl" in told
    # A zombie is left where nobody adopts orphans.
    assert not Path(f"/proc/{inner_pid}").exists() or "Z" in Path(f"/proc/{inner_pid}/stat").read_text()
