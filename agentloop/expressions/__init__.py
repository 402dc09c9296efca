"""Mathematical text, read and compared without ever being evaluated as code.

`read.py` turns LaTeX or plain text into a tree of `Node`s (`tree.py`); `value.py` computes with trees, exactly or to many
digits, within bounds; `build.py` makes sympy objects of them, by constructors named in a table. No text reaches `eval`,
`sympify` or `parse_expr`. What runs on text that a model wrote runs in a process that can be killed
(`agentloop.sandboxes.killable`): the bounds keep nearly every input cheap, the process keeps the rest from mattering.
"""

from agentloop.expressions.read import parse
from agentloop.expressions.tree import Node, Unreadable

__all__ = ["Node", "Unreadable", "parse"]
