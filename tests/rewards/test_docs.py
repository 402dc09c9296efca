"""The files that docs/rewards.md shows load."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from agentloop.config import validate
from agentloop.rewards.code_tests import read_tests
from agentloop.rewards.spec import RewardSpec

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
FILES = [yaml.safe_load(file) for file in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file["reward"].rpartition(":")[2])
def test_every_file_loads(file: dict[str, Any]) -> None:
    validate(RewardSpec, file, "docs/rewards.md").load("docs/rewards.md")


def test_every_shape_of_a_code_task_is_read() -> None:
    (shapes,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    for line in shapes.splitlines():
        assert read_tests(json.loads(line))
