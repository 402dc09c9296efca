"""Arithmetic of small matrices whose entries are trees."""

from __future__ import annotations

from agentloop.expressions.tree import Node, number

MAX_MATRICES = 6
"""Of one expression that are added or multiplied; the entries of a product grow exponentially with their number."""
MAX_DETERMINANT = 4


def of_matrices(node: Node) -> Node:
    """Sums, products and multiples of matrices as one matrix; determinants of small ones."""
    if node.op == "call" and node.text == "det" and node.args[0].op == "matrix":
        rows = [row.args for row in node.args[0].args]
        return _determinant(rows) if len(rows) == len(rows[0]) <= MAX_DETERMINANT else node
    if node.op == "pow" and node.args[0].op == "matrix" and node.args[1] in (Node("sym", (), "T"), Node("sym", (), "\\top")):
        return Node(
            "matrix", tuple(Node("row", column) for column in zip(*(row.args for row in node.args[0].args), strict=True))
        )
    if node.op not in ("add", "mul", "neg", "div") or not 0 < sum(part.op == "matrix" for part in node.walk()) <= MAX_MATRICES:
        return node
    args = [of_matrices(arg) for arg in node.args]
    if node.op == "neg" and args[0].op == "matrix":
        return _scaled(number(-1), args[0])
    if node.op == "div" and args[0].op == "matrix" and args[1].op != "matrix":
        return _scaled(Node("div", (number(1), args[1])), args[0])
    if node.op in ("add", "mul") and any(arg.op == "matrix" for arg in args):
        result: Node | None = args[0]
        for arg in args[1:]:
            result = (_sum if node.op == "add" else _product)(result, arg) if result is not None else None
        if result is not None:
            return result
    return node


def _determinant(rows: list[tuple[Node, ...]]) -> Node:
    if len(rows) == 1:
        return rows[0][0]
    terms = []
    for column, entry in enumerate(rows[0]):
        minor = Node("mul", (entry, _determinant([row[:column] + row[column + 1 :] for row in rows[1:]])))
        terms.append(Node("neg", (minor,)) if column % 2 else minor)
    return Node("add", tuple(terms))


def _scaled(factor: Node, matrix: Node) -> Node:
    return Node("matrix", tuple(Node("row", tuple(Node("mul", (factor, entry)) for entry in row.args)) for row in matrix.args))


def _sum(one: Node, two: Node) -> Node | None:
    if one.op != "matrix" or two.op != "matrix" or [len(r.args) for r in one.args] != [len(r.args) for r in two.args]:
        return None
    rows = zip(one.args, two.args, strict=True)
    return Node("matrix", tuple(Node("row", tuple(Node("add", e) for e in zip(a.args, b.args, strict=True))) for a, b in rows))


def _product(one: Node, two: Node) -> Node | None:
    if one.op != "matrix" and two.op != "matrix":
        return Node("mul", (one, two))
    if one.op != "matrix" or two.op != "matrix":
        return _scaled(one, two) if two.op == "matrix" else _scaled(two, one)
    if len(one.args[0].args) != len(two.args) or len(one.args) * len(two.args) * len(two.args[0].args) > 1000:
        return None
    columns = list(zip(*(row.args for row in two.args), strict=True))

    def entry(row: tuple[Node, ...], column: tuple[Node, ...]) -> Node:
        terms = tuple(Node("mul", pair) for pair in zip(row, column, strict=True))
        return terms[0] if len(terms) == 1 else Node("add", terms)

    return Node("matrix", tuple(Node("row", tuple(entry(row.args, column) for column in columns)) for row in one.args))
