"""A tool for the tests, as a user writes one."""

from agentloop.tools import tool


@tool
def add(a: int, b: int) -> str:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return str(a + b)
