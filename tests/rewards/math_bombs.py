"""Answers that are too much work, for whoever computes before he looks."""

from __future__ import annotations


def bombs() -> list[str]:
    """At least 200 texts, each with a box or without."""
    answers = [f"{a}^{{{b}^{{{c}^{{{d}}}}}}}" for a in (2, 9, 99) for b in (9, 99) for c in (9, 99) for d in (9, 99)]
    answers += [f"{n}!!!" for n in range(10, 40)]
    answers += [f"({n}!)!" for n in (100, 1000, 10_000, 20_000, 99_999)]
    answers += [f"\\binom{{10^{{{n}}}}}{{10^{{{n - 1}}}}}" for n in range(5, 25)]
    answers += [f"(x+1)^{{10^{{{n}}}}}" for n in range(2, 22)]
    answers += [f"\\sin(10^{{{10**n}}})" for n in range(1, 9)]
    answers += [f"e^{{e^{{{n}}}}}" for n in range(1, 21)]
    answers += ["\\frac{1}{" * n + "1" + "}" * n for n in (50, 500, 5000, 50_000)]
    answers += ["(" * n + "1" + ")" * n for n in (50, 500, 5000, 100_000)]
    answers += ["{" * n for n in (10, 1000, 100_000)]
    answers += ["\\sqrt{" * n + "2" + "}" * n for n in (10, 55, 600)]
    answers += ["1" * n for n in (1000, 3000, 100_000, 1_000_000)]
    answers += ["0." + "3" * n for n in (1000, 1900, 10_000)]
    answers += [",".join(str(k) for k in range(n)) for n in (100, 800, 20_000)]
    answers += [",".join(f"\\sqrt{{{k}}}" for k in range(n)) for n in (50, 300, 3000)]
    answers += ["*".join(f"\\sin({k}x)" for k in range(n)) for n in (50, 200, 3000)]
    answers += ["\\begin{pmatrix}a&b\\\\c&d\\end{pmatrix}" * n for n in (2, 6, 60)]
    answers += ["\\begin{pmatrix}" + ("1&" * n + "1\\\\") * n + "\\end{pmatrix}" for n in (5, 30, 200)]
    answers += ["\\pm 1" * n for n in (2, 30, 500)]
    answers += ["x" + sign * n for sign in ("!", "'", "%", "^2", "_x", "\\\\", "|", "-", "$") for n in (100, 3000, 150_000)]
    texts = [f"\\boxed{{{answer}}}" for answer in answers]
    texts += ["\\boxed{" * 20_000, "\\boxed{5}" * 20_000, "$" * 200_000, "$\n" * 100_000, "1,000" * 40_000, "1 " * 100_000]
    texts += [
        "the answer is " * 15_000,
        "<answer>" * 25_000,
        "#### \n" * 30_000,
        " " * 1_000_000,
        "\\" * 200_000,
        "\u200b" * 200_000,
    ]
    return texts
