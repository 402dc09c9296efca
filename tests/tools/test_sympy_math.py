"""`sympy_math`: what a model gets for what it asks, and what it cannot do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from agentloop.errors import ConfigError
from agentloop.tools.sympy_math import SympyMath


@pytest.fixture
async def tool() -> AsyncIterator[SympyMath]:
    tool = SympyMath({"scope": "process", "limit_s": 20})
    yield tool
    await tool._pool.close()


async def ask(tool: SympyMath, operation: str, expression: str, **more: Any) -> str:
    parameters = SympyMath.Arguments(operation=operation, expression=expression, **more).model_dump()
    answered: Any = await tool.execute("i", parameters)
    response = answered[0]
    assert response.error == response.text.startswith("Error: ")
    return str(response.text)


async def test_operations(tool: SympyMath) -> None:
    assert await ask(tool, "solve", "x^2 = 4") == "x = -2\nx = 2"
    assert await ask(tool, "solve", "x + y = 3, x - y = 1") == "x = 2, y = 1"
    assert await ask(tool, "solve", "a x^2 = b", variable="a") == "a = b/x**2"
    assert await ask(tool, "solve", "x^2 < 4") == "(-2 < x) & (x < 2)"
    assert await ask(tool, "solve", "x = x + 1") == "no solution"
    assert await ask(tool, "simplify", r"\sin^2 x + \cos^2 x") == "1"
    assert await ask(tool, "simplify", "sqrt(8)") == "2*sqrt(2) ≈ 2.82842712474619"
    assert await ask(tool, "expand", "(x+1)^3") == "x**3 + 3*x**2 + 3*x + 1"
    assert await ask(tool, "factor", "x^2 - 1") == "(x - 1)*(x + 1)"
    assert await ask(tool, "factor", "360") == "2**3*3**2*5**1"
    assert await ask(tool, "integrate", "2x") == "x**2"
    assert await ask(tool, "integrate", r"\frac{1}{x^2}", lower="1", upper="infinity") == "1"
    assert await ask(tool, "differentiate", "x^3", order=2) == "6*x"
    assert await ask(tool, "limit", "sin(x)/x", point="0") == "1"
    assert await ask(tool, "limit", "1/x", point="0", direction="left") == "-oo"
    assert await ask(tool, "series", "e^x", order=3) == "1 + x + x**2/2 + O(x**3)"
    assert await ask(tool, "evaluate", "pi", digits=20) == "3.1415926535897932385"


async def test_what_is_wrong_is_told(tool: SympyMath) -> None:
    assert "x has no value" in await ask(tool, "evaluate", "x + 1")
    assert "give 'variable': one of x, y" in await ask(tool, "differentiate", "x y")
    assert "both 'lower' and 'upper'" in await ask(tool, "integrate", "x", lower="1")
    assert "without '='" in await ask(tool, "simplify", "x = 1")
    assert "give 'point'" in await ask(tool, "limit", "x")
    assert "does not exist" in await ask(tool, "limit", "1/x", point="0")
    assert "division by zero" in await ask(tool, "evaluate", "1/0")
    assert "cannot be read" in await ask(tool, "evaluate", "2 +")
    assert "2000 digits" in await ask(tool, "evaluate", "9^9^9")
    assert "no variable" in await ask(tool, "solve", "x = 1", variable="e")
    assert "characters" in await ask(tool, "expand", "(x+y+z)^40")


async def test_nothing_is_evaluated(tool: SympyMath, tmp_path: Path) -> None:
    path = tmp_path / "written"
    for text in (
        "open('{0}','w')",
        "__import__('os').system('touch {0}')",
        "S(\"open('{0}','w')\")",
        "x.__class__",
        "`touch {0}`",
    ):
        for operation in ("evaluate", "solve", "simplify"):
            assert (await ask(tool, operation, text.format(path))).startswith("Error: ")
    assert not path.exists()


async def test_a_computation_without_end_is_ended() -> None:
    tool = SympyMath({"scope": "process", "limit_s": 1})
    try:
        assert "longer than 1 s" in await ask(tool, "expand", "(a+b+c+d+e1+f)^90")
        assert await ask(tool, "expand", "(a+1)^2") == "a**2 + 2*a + 1"
    finally:
        await tool._pool.close()


def test_config() -> None:
    with pytest.raises(ConfigError, match="limit_s"):
        SympyMath({"limits": 3})
