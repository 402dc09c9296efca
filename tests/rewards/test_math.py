"""Mathematical answers: what is found in a text, what counts as equal, and what no answer can do to a grader."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agentloop.errors import ConfigError
from agentloop.rewards import load_reward
from agentloop.rewards.math import VERDICTS, Grader, GraderError, MathReward, compute_score
from agentloop.rewards.math.compare import equal
from agentloop.rewards.math.extract import find_answer
from agentloop.rewards.math.worker import work
from agentloop.sandboxes.base import SandboxError
from agentloop.trajectory import CallRecord, CallStatus, EndReason, Sample, StopReason, ToolCall, Trajectory, Turn
from tests.rewards.math_bombs import bombs

PAIRS = Path(__file__).parents[3] / "shared" / "data" / "pairs"

SAME = [
    ("2 hours and 30 minutes", "2.5 hours"),
    (r"2\text{ h }30\text{ min}", "150 minutes"),
    ("1 m 50 cm", "1.5 m"),
    ("3 dollars and 5 cents", r"\$3.05"),
    (r"1 \text{ L}", r"1000 \text{ cm}^3"),
    ("40 sq. ft.", r"40\text{ ft}^2"),
    (r"12^\circ 30'", r"12.5^\circ"),
    ("2\\pi \\text{ radians}", r"360^\circ"),
    (r"m\angle B = 70^\circ", "70"),
    ("p + q = 31", "31"),
    (r"\frac{a}{b} = \frac{3}{5}", r"\frac{3}{5}"),
    ("f(n) = n^2", "f(x) = x^2"),
    ("thirty-two", "32"),
    ("one hundred and five", "105"),
    ("May 4", "4th of May"),
    ("DNE", "does not exist"),
    ("C_6^2", "15"),
    ("C_n^2", r"\frac{n(n-1)}{2}"),
    (r"\mathbb{R}\setminus\{1,4\}", r"x \ne 1, 4"),
    (r"\{k\pi \mid k \in \mathbb{Z}\}", r"n\pi, n \in \mathbb{Z}"),
    (r"\begin{bmatrix}1\\2\end{bmatrix}^T", r"\begin{bmatrix}1&2\end{bmatrix}"),
    (r"4\operatorname{cis}\frac{\pi}{2}", "4i"),
    (r"\log 1000", "3"),
    (r"\varepsilon", r"\epsilon"),
    (r"\max\{2, 7\}", "7"),
    (r"\pounds 8", "8"),
    (r"[2,\infty]", r"[2,\infty)"),
    ("Room 4", "room 4"),
    (r"P(X = 3) = 0.2", "0.2"),
    (r"\text{Area: } 30", "30"),
    ("x_1 = 2, x_2 = 3", "3, 2"),
    ("no real roots", r"\emptyset"),
    ("{3 \\over 4}", "0.75"),
    ("0.1\\dot{6}", "1/6"),
    ("0.333...", "1/3"),
    ("0.(3)", "1/3"),
    ("\\text{12}", "12"),
    ("\\textcolor{red}{12}", "12"),
    ("1.2 x 10^5", "120000"),
    ("⅔", "2/3"),
    ("α + 1", "1 + \\alpha"),
    ("2 + 3*I", "2+3i"),
    ("1 2 3", "1, 2, 3"),
    ("x = -2 \\quad x = 3", "-2, 3"),
    ("P(1, 2)", "(1, 2)"),
    ("\\{x : 1 < x < 2\\}", "(1, 2)"),
    ("(1,2) U (3,4)", "(1,2)\\cup(3,4)"),
    ("x > 1 and x < 2", "1 < x < 2"),
    ("x < 1 or x > 2", "(-\\infty,1)\\cup(2,\\infty)"),
    ("]1, 2[", "(1, 2)"),
    ("2x > 6", "x > 3"),
    ("xy = 1", "y = 1/x"),
    ("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "Matrix([[1,2],[3,4]])"),
    ("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", "-2"),
    ("1.5 hours", "90 min"),
    ("1 hour 30 minutes", "90 minutes"),
    ("25^\\circ C", "25 degrees Celsius"),
    ("A, C", "AC"),
    ("Option B", "(B)"),
    ("3 to 4", "3:4"),
    ("$6 pm$", "6 p.m."),
    ("2143_{\\text{five}}", "2143_5"),
    ("\\frac{dy}{dx} = 2x", "2x"),
    ("x^2 + c", "x^2 + C"),
    ("x = n\\pi, n \\in \\mathbb{Z}", "k\\pi"),
    ("\\frac{1}{2", "1/2"),
    ("21^{st}", "21"),
    ("x \\equiv 2 \\pmod{7}", "x ≡ 2 (mod 7)"),
    ("AB = CD", "CD = AB"),
    ("\\text{Area} = 6", "6"),
    ("x = y = z = 1", "(1, 1, 1)"),
    ("5个", "5"),
    ("54 km/h", "15 m/s"),
    ("30 miles per hour", "44 ft/s"),
    (r"6.5\ \mathrm{m/s^2}", "6.5 m/s^2"),
    ("1.5 kg", "1500 g"),
    ("2 L", "2000 mL"),
    (r"40\,\mathrm{cm^2}", "40 square centimeters"),
    ("3 m^2", "30000 cm^2"),
    ("Ann and Zoe", "Zoe and Ann"),
    ("two-thirds", "2/3"),
    ("half", "0.5"),
    ("2021-03-04", "2021-03-04"),
    ("3/4", r"\frac{3}{4}"),
    ("3/4", "0.75"),
    ("3/4", "75\\%"),
    ("12", "12.00"),
    ("12", "12."),
    ("2e4", "20000"),
    ("2500", "2,500"),
    ("2500", r"2{,}500"),
    ("2500", "2 500"),
    ("2.5", "2,5"),
    ("7", "x = 7"),
    ("7", r"7\text{ apples}"),
    ("7", "$7"),
    ("7", r"\text{the answer is } 7"),
    (r"3\text{ m}", r"300\text{ cm}"),
    (r"60^\circ", "60"),
    (r"9\frac{3}{8}", "9 3/8"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    ("(x-3)(x+3)", "x^2-9"),
    (r"\cos 2t", r"1-2\sin^2 t"),
    (r"\log_3 81", "4"),
    (r"\binom{6}{3}", "20"),
    ("3+4i", "4i+3"),
    (r"\{3,1,2\}", r"\{1,2,3\}"),
    ("3, 4", "4 and 3"),
    (r"\pm 6", "-6, 6"),
    (r"(-1,4]", r"-1 < x \le 4"),
    (r"x \ge 3", r"[3,\infty)"),
    (r"(-\infty,1)\cup(1,\infty)", r"x \ne 1"),
    (r"(-\infty,1)\cup(1,\infty)", r"\mathbb{R}\setminus\{1\}"),
    (r"\emptyset", r"\{\}"),
    (r"\begin{pmatrix}3\\4\end{pmatrix}", "(3,4)"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & 8/2 \end{bmatrix}"),
    ("y=3x-2", "3x-y=2"),
    ("g(x)=x^3", "x^3"),
    ("4:6", r"\frac{2}{3}"),
    ("211_3", "211_{3}"),
    ("7:15 pm", "19:15"),
    ("D", "(D)"),
    ("D", "D. because"),
    (r"\text{Monday}", "monday"),
    ("0.577350269189626", r"\frac{1}{\sqrt{3}}"),
    ("0.\\overline{3}", "1/3"),
    ("x=1, y=2", "y=2, x=1"),
    ("１２", "12"),
    ("−4", "-4"),
    ("5", "five"),
    ("x^2 < 9", "(-3,3)"),
    ("3 million", "3,000,000"),
    (r"\text{A, B}", r"\text{B, A}"),
    ("5", "**5**"),
    (r"\{x \mid x > 2\}", r"(2,\infty)"),
    (r"\frac{\pi}{3}+k\pi, k\in\mathbb{Z}", r"n\pi+\frac{\pi}{3}, n \in \mathbb{Z}"),
    (r"\mathbb{R}", r"\text{all real numbers}"),
    (r"\emptyset", "no solution"),
    (r"\$2.50", "250 cents"),
    ("2.5 hours", "150 minutes"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{\sqrt{2}}{2} \approx 0.707"),
    ("x^2+y^2=9", "y^2=9-x^2"),
    ("x+y<3", "3-x-y>0"),
    (r"7\frac{1}{2}\%", "7.5%"),
]
DIFFERENT = [
    ("2 hours and 30 minutes", "2.3 hours"),
    ("1 m 50 cm", "1.05 m"),
    ("1 L", r"1000 \text{ cm}^2"),
    (r"30^\circ", r"\frac{\pi}{6}"),
    (r"30^\circ", r"\frac{\pi}{3} \text{ radians}"),
    ("30", r"\frac{\pi}{6}"),
    ("x + y = 31", "31"),
    ("a + b = 3", "ab = 3"),
    (r"\frac{a}{b} = 2", "a = 2"),
    ("f(n) = nx", "f(x) = x^2"),
    ("f(2) = 3", "f(3) = 3"),
    ("5", "6 = 5"),
    ("two and three", "5"),
    ("May 4", "May 5"),
    ("C_1^2", "0"),
    ("XI", "IX"),
    ("x", "x'"),
    (r"[1,2]", "1, 2"),
    (r"x \in [1,2]", r"\{1,2\}"),
    (r"\{\{1\},\{2\}\}", r"\{1,2\}"),
    (r"\{\emptyset\}", r"\emptyset"),
    ("Room 4", "Room 5"),
    (r"(1,2)\cap(2,3)", "(2,1)"),
    ("1<x<2", "(0,0),(1,2),(2,1)"),
    ("a_{10} = 55", "a_{11} = 55"),
    ("f'(x) = 2x", "f(x) = 2x"),
    (r"P(A \cap B) = 0.2", r"P(A \cup B) = 0.2"),
    (r"\text{not: } 30", "30"),
    (r"\textbf{(A) } 5", r"\textbf{(B) } 5"),
    ("2x > 6", "3x > 100"),
    ("x > 1 and x < 2", "x < 1 or x > 2"),
    ("\\{x \\in \\mathbb{Z} : 0 < x < 4\\}", "(0, 4)"),
    ("x > 1", "x > 1, y > 2"),
    ("5 square meters", "5 meters"),
    ("0.333...", "0.333"),
    ("1 2 3", "123"),
    ("A, C", "B, C"),
    ("y = 1/x", "y = 2/x"),
    ("1 hour 30 minutes", "130 minutes"),
    ("3 to 4", "4 to 3"),
    ("p \\Rightarrow q", "q \\Rightarrow p"),
    ("\\overline{A}", "A"),
    ("AB = CD", "AB = CE"),
    ("x^2 + c", "x^2 + d"),
    ("$6 pm$", "6 am"),
    ("5,678", "5.678"),
    ("2021-03-04", "2014"),
    ("3/4/2021", "3/8084"),
    ("15 m/s", "15 m"),
    ("4 m^2", "4 m"),
    ("3 kg", "3 g"),
    ("20 mph", "20 km/h"),
    ("Ann and Zoe", "Ann and Bea"),
    ("3/4", "0.7500001"),
    ("1/2^99", "1/2^98"),
    (r"\frac{1}{3^{80}}", r"\frac{1}{3^{81}}"),
    (r"\frac{\pi}{4}", "0.785398"),
    ("3.14", r"\pi"),
    ("1000000007", "1000000008"),
    (r"5\text{ cm}", r"5\text{ m}"),
    ("6 pm", "6 am"),
    ("6 pm", "6"),
    ("101_2", "101"),
    ("101_2", "101_3"),
    ("(3,4)", "(4,3)"),
    ("(3,4)", "[3,4]"),
    ("(3,4]", "[3,4)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("x>2", r"x\ge 2"),
    (r"\infty", r"-\infty"),
    ("x", r"|x|"),
    ("5", "5 or 6"),
    ("5", "not 5"),
    ("5", r"5 \text{ or maybe } 6"),
    ("5", "1,2,3,4,5"),
    ("5", r"5\neq 6"),
    ("5", "about 5"),
    ("5", "5 million"),
    ("5", "-5"),
    ("5", "--5"),
    ("5", ""),
    ("1/0", "1/0"),
    ("3", "x=1, y=3"),
    ("x=1, y=2", "x=2, y=1"),
    ("x=5", "y=5"),
    ("y=3x-2", "y=3x-3"),
    ("B", "A"),
    ("B", "A or B"),
    ("B", "B and C"),
    ("A", "А"),  # a Cyrillic letter
    ("5", "٥"),
    ("no", "yes"),
    ("god", "dog dog"),
    ("10^{400}", "10^{400}+1"),
    (r"\sqrt{2}", "1.41421356"),
    ("2n", "2k"),
    ("i", "1"),
    ("0", "10^{-80}"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}"),
    ("12:15", "4:05"),
    ("5", r"5 \approx 6"),
    ("5", "5, maybe 6"),
    ("5", "5-6"),
    ("5", "5 (or 6)"),
    ("5", "between 5 and 6"),
    ("5", r"x \in \{5,6\}"),
    ("5", r"x \ge 5"),
    ("5", "5?"),
    ("x^2 < 9", "(-3,4)"),
    ("2^{5000}", "2^{5000}+1"),
    (r"e^{\pi\sqrt{163}}", "262537412640768744"),
]
ONE_WAY = {("6 pm", "6")}


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_the_same(gold: str, answer: str) -> None:
    assert equal(gold, answer)
    assert equal(answer, gold)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(gold: str, answer: str) -> None:
    assert not equal(gold, answer)
    assert equal(answer, gold) == ((gold, answer) in ONE_WAY)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"so \boxed{5}.", ("5",)),
        (r"\boxed{4}, no wait. It is \boxed{5}.", ("5",)),
        (r"\boxed{\frac{1}{2}}", (r"\frac{1}{2}",)),
        (r"\boxed{4} or \boxed{5}", ("4", "5")),
        (r"\boxed{4}. Or \boxed{5}", ("4", "5")),
        (r"$\boxed{4}$ and $\boxed{5}$", ("4", "5")),
        (r"\boxed{4} \boxed{5}", ("4", "5")),
        (r"\boxed{5}\boxed{5}", ("5",)),
        (r"\boxed{\boxed{5}}", ("5",)),
        (r"\boxed{\{1,2\}}", (r"\{1,2\}",)),
        (r"\boxed{20} percent", (r"20 \%",)),
        ("<answer>5</answer>", ("5",)),
        (r"<answer>so \boxed{5}</answer>", ("5",)),
        ("work\n#### 42", ("42",)),
        ("So the correct option is (C).", ("(C)",)),
        ("The answer is 42.", ("42",)),
        ("**Final answer:** $x=4$. I hope it is correct.", ("$x=4$",)),
        (r"\boxed{3}. No: the answer is 4.", ("4",)),
        ("<think>\\boxed{3}</think> The answer is 4", ("4",)),
        ("we get 1,250 km", (r"1,250",)),
        ("so it is 7 or 8.", ("7 , 8",)),
        ("A2B", ("A2B",)),
        ("no idea at all, sorry about that", ()),
        ("", ()),
        ("<answer>6</answer> <answer>5</answer>", ("6", "5")),
        (r"\boxed{6} <answer>5</answer>", ("6", "5")),
        ("#### 6\n#### 5", ("6", "5")),
        ("so we get 1 2 3", ("1 , 2 , 3",)),
        ("The answer is unknown, not 5.", ("unknown, not 5",)),
    ],
)
def test_what_is_found(text: str, parts: tuple[str, ...]) -> None:
    assert find_answer(text).parts == parts


@pytest.mark.parametrize("text", [r"\boxed{5} and then \boxed{6", "<answer>5", "<think> it is \\boxed{5}"])
def test_what_is_cut_off_is_no_answer(text: str) -> None:
    assert find_answer(text).how == "truncated"


def graded(text: str, gold: str, **more: Any) -> str:
    payload = {"gold": [gold], "text": text, "submitted": None, "marked_only": False, **more}
    return str(work(payload)["verdict"])


def test_verdicts() -> None:
    assert graded(r"\boxed{5}", "5") == "correct"
    assert graded(r"\boxed{6}", "5") == "wrong"
    assert graded(r"\boxed{5} or \boxed{6}", "5") == "conflicting"
    assert graded(r"\boxed{0.5} or \boxed{1/2}", "1/2") == "correct"
    assert graded(r"\boxed{5} and \boxed{6}", "5, 6") == "correct"
    assert graded(r"\boxed{5", "5") == "truncated"
    assert graded("I do not know", "5") in ("wrong", "no_answer")
    assert graded("it is 5", "5", marked_only=True) == "no_answer"
    assert graded("it is 5", "5", cut_off=True) == "truncated"
    assert graded(r"it is \boxed{5} and", "5", cut_off=True) == "correct"
    assert graded(r"\boxed{)(}", "5") == "unreadable"
    assert graded(r"\boxed{5}", " ") == "no_ground_truth"
    assert graded("", "5", submitted=["5"]) == "correct"
    assert graded("", "5", submitted=["5", "6"]) == "conflicting"
    assert set(VERDICTS) >= {"timeout", "too_large"}


def test_a_ground_truth_that_is_a_solution() -> None:
    assert graded("it is 7", r"We add $3$ and $4$, so the sum is $\boxed{7}$.") == "correct"
    assert graded("it is 4", r"We add $3$ and $4$, so the sum is $\boxed{7}$.") == "wrong"


def load(name: str) -> list[dict[str, Any]]:
    path = PAIRS / f"{name}.json"
    if not path.exists():
        pytest.skip("the pair sets of ../shared/data/pairs are not here")
    pairs: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return pairs


@pytest.mark.parametrize("name", ["own", "nemo_skills"])
def test_fewer_wrong_verdicts_than_math_verify(name: str) -> None:
    pairs = load(name)
    ours = [p for p in pairs if (graded(p["pred"], p["gold"]) == "correct") != bool(p["exp"])]
    bare = [p for p in pairs if equal(p["g"], p["p"]) != bool(p["exp"])]
    math_verify = pytest.importorskip("math_verify")
    theirs = [
        p
        for p in pairs
        if bool(math_verify.verify(math_verify.parse(p["gold"]), math_verify.parse(p["pred"]))) != bool(p["exp"])
    ]
    assert len(ours) < len(theirs), ours
    assert len(bare) < len(theirs), bare


@pytest.mark.parametrize("name", ["own", "nemo_skills"])
def test_the_sets_are_judged_alike_from_both_sides(name: str) -> None:
    for pair in load(name):
        gold, answer = pair["g"], pair["p"]
        if gold.strip() and answer.strip():
            assert equal(gold, answer) == equal(answer, gold), pair


_PIECES = r"""
\frac { } 1 2 x ^ _ ( ) [ ] , ; \{ \} \pm + - * / = < \le \sqrt \text{cm} \cup \infty \begin{pmatrix}
\end{pmatrix} & \\ | ! % ^\circ \in \mathbb{R} sin log and or e i \pi 0 ' : \sum \mid \approx $ \boxed{ \log_
\overline{ \begin{cases} \end{cases} \left \not \binom \vec \lfloor \rfloor 12 0.5 1,000 \% ~ ? \angle
\mathrm{ \operatorname{ \mathrm{} pm hours A B
"""


@given(*(st.lists(st.sampled_from(_PIECES.split()), max_size=14).map("".join) for _ in range(2)))
@settings(max_examples=500, deadline=None)
def test_no_text_makes_the_reader_stumble(gold: str, answer: str) -> None:
    assert equal(gold, answer) == equal(answer, gold) or "pm" in gold + answer
    assert graded(answer, gold or "5") in VERDICTS


# -- in processes that can be killed ----------------------------------------------------------------------------------------


@pytest.fixture
async def grader() -> AsyncIterator[Grader]:
    grader = Grader(2, 2.0, 512, "process")
    yield grader
    await grader.close()


async def test_grading_in_the_pool(grader: Grader) -> None:
    rewards = await asyncio.gather(*(grader.grade(f"\\boxed{{{n}}}", n % 7) for n in range(70)))
    assert [reward.value for reward in rewards] == [float(n < 7) for n in range(70)]
    assert rewards[3].components == {"correct": 1.0}
    assert rewards[3].info == {"verdict": "correct", "answer": "3", "how": "box"}
    assert (await grader.grade("5", ["4", 5])).value == 1.0
    assert (await grader.grade("0.5", 0.5)).value == 1.0
    wrongs: list[Any] = [None, True, {}, []]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="ground truth"):
            await grader.grade("5", wrong)


async def test_no_bomb_holds_a_grader_or_the_event_loop(grader: Grader) -> None:
    """The loop's longest pause is counted in its own CPU time, which other processes do not change."""
    texts = bombs()
    assert len(texts) >= 200
    await grader.grade("5", "5")
    worst_cpu = 0.0

    async def watch() -> None:
        nonlocal worst_cpu
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.001)
            worst_cpu = max(worst_cpu, time.thread_time() - before)

    async def one(text: str) -> float:
        reward = await grader.grade(text, "123456")
        assert reward.info["verdict"] in VERDICTS
        return reward.value

    values: list[float] = []
    gc.collect()
    gc.disable()  # a collection of all that the process has imported takes longer, and is nobody's here
    try:
        watching = asyncio.create_task(watch())
        for start in range(0, len(texts), 8):
            values += await asyncio.gather(*(one(text) for text in texts[start : start + 8]))
        watching.cancel()
    finally:
        gc.enable()
    assert not any(values)
    assert worst_cpu < 0.020
    assert (await grader.grade("5", "5")).value == 1.0


WRITES = [
    "open({path!r}, 'w').write('x')",
    "__import__('os').system('touch {path}')",
    "__import__('subprocess').run(['touch', '{path}'])",
    "__import__('pathlib').Path('{path}').touch()",
    "exec(\"open('{path}','w')\")",
    "eval(\"open('{path}','w')\")",
    "().__class__.__base__.__subclasses__()[0]; open('{path}','w')",
    "(lambda: open('{path}','w'))()",
    "[open('{path}','w') for _ in (1,)]",
    "Symbol('x', open('{path}','w'))",
    "sympify(\"open('{path}','w')\")",
    "parse_expr(\"open('{path}','w')\")",
    "1 if open('{path}','w') else 2",
    'f\'{{open("{path}","w")}}\'',
    "print(1, file=open('{path}','w'))",
    '\\input|"touch {path}"',
    "\\write18{{touch {path}}}",
    "\\immediate\\write18{{touch {path}}}",
    "\\openout5={path}",
    "`touch {path}`",
    "$(touch {path})",
    "; touch {path}",
    "import os; os.system('touch {path}')",
    'S(\'open("{path}","w")\')',
    "lambdify((), \"open('{path}','w')\")()",
]
FRAMES = ["\\boxed{{{0}}}", "<answer>{0}</answer>", "The answer is {0}"]


async def test_no_text_is_evaluated(grader: Grader, tmp_path: Path) -> None:
    path = tmp_path / "written"
    answers = [write.format(path=str(path)) for write in WRITES]
    texts = [frame.format(answer) for answer in answers for frame in FRAMES]
    assert len(texts) >= 50
    rewards = await asyncio.gather(*(grader.grade(text, "123456") for text in texts))
    submitted = await asyncio.gather(*(grader.grade("", "123456", submitted=[answer]) for answer in answers))
    golds = await asyncio.gather(*(grader.grade("123456", answer) for answer in answers))
    assert not any(reward.value for reward in (*rewards, *submitted, *golds))
    assert not path.exists()


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        (r"\frac{1}{3}", r"\int_0^1 x^2 dx", "correct"),
        (r"\int_0^1 x^2 dx", "1/2", "wrong"),
        ("55", r"\sum_{k=1}^{10} k", "correct"),
        (r"0.785398", r"\int_0^1 \frac{1}{1+x^2} dx", "wrong"),
        ("101", r"\sum_{k=1}^{1} 101_2", "wrong"),
    ],
)
def test_what_is_only_compared_in_writing_has_a_second_reader(gold: str, answer: str, verdict: str) -> None:
    pytest.importorskip("math_verify")
    payload = {"gold": [gold], "text": f"\\boxed{{{answer}}}", "submitted": None, "marked_only": False}
    assert work(payload)["verdict"] == verdict


async def test_a_ground_truth_that_no_grader_can_do_is_not_the_answers_fault() -> None:
    grader = Grader(1, 0.02, 512, "process")
    try:
        heavy = "*".join(f"\\sin({n}x)" for n in range(2, 300))
        with pytest.raises(GraderError):
            await grader.grade(f"\\boxed{{{heavy}}}", heavy)
    finally:
        await grader.close()


async def test_a_dead_service_is_no_reward(grader: Grader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    monkeypatch.setenv("AGENTLOOP_RUN_DIR", str(tmp_path / "open"))
    with pytest.raises(SandboxError):
        await Grader(1, 1.5, 512, "process").grade("5", "5")


def trajectory(*answers: str, end: EndReason = EndReason.FINAL_ANSWER) -> Trajectory:
    found = Trajectory(Sample(messages=[]))
    found.append_prompt([1])
    turn = Turn(0, 1, 2, StopReason.STOP)
    turn.calls = [CallRecord(ToolCall("submit", {"answer": answer}), CallStatus.OK, answer) for answer in answers]
    found.append_sampled([2], None, turn)
    found.end_reason = end
    return found


async def test_as_the_reward_of_a_run() -> None:
    reward = load_reward("agentloop.rewards.math:MathReward", {"workers": 1, "scope": "process"})
    row = Sample(messages=[], ground_truth="5")
    assert (await reward(trajectory(), row, r"\boxed{5}")).value == 1.0
    assert (await reward(trajectory("5"), row, "whatever 7")).value == 1.0
    assert (await reward(trajectory("5", "6"), row, "6")).info["verdict"] == "conflicting"
    cut = await reward(trajectory(end=EndReason.TOKEN_LIMIT), row, "the answer is 5")
    assert (cut.value, cut.info["verdict"]) == (0.0, "truncated")
    with pytest.raises(ConfigError, match="limit_s"):
        MathReward(limit_s=0)
    with pytest.raises(ConfigError, match="workers"):
        load_reward("agentloop.rewards.math:MathReward", {"worker": 1})


async def test_as_verls_function() -> None:
    """Called from a thread of verl's reward loop, and from a program without an event loop."""
    score = await asyncio.to_thread(compute_score, "math", r"\boxed{\frac{1}{2}}", "0.5", {})
    assert score == {"score": 1.0, "correct": 1.0, "verdict": "correct", "answer": r"\frac{1}{2}"}
    loaded = load_reward("agentloop.rewards.math:compute_score", {"marked_only": True})
    assert (await loaded(trajectory(), Sample(messages=[], ground_truth="5"), "it is 5")).value == 0.0
