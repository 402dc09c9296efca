"""The viewer's committed files are what its sources give."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

VIEWER = Path(__file__).parents[2] / "agentloop" / "replay" / "viewer"


def test_building_again_gives_the_committed_bytes(tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    for name in ("package.json", "package-lock.json", "build.mjs"):
        shutil.copy(VIEWER / name, tmp_path)
    shutil.copytree(VIEWER / "src", tmp_path / "src")
    install = subprocess.run(
        ["npm", "ci", "--no-audit", "--no-fund", "--prefer-offline"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    if install.returncode:
        pytest.skip(f"npm ci could not install the bundler: {install.stderr.strip()[-300:]}")
    built = subprocess.run(["npm", "run", "build"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert built.returncode == 0, built.stderr
    for name in ("viewer.js", "page.js"):
        same = (tmp_path / "dist" / name).read_bytes() == (VIEWER / "dist" / name).read_bytes()
        assert same, f"dist/{name} is not what src/ gives: run `npm ci && npm run build` in agentloop/replay/viewer and commit"
