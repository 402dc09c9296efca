"""More output than whoever reads it can hold."""

from __future__ import annotations

from tests.conformance.attacks.base import Attack, Judge, Outcome
from tests.conformance.attacks.host import Host


def received(most: int) -> Judge:
    def judge(outcome: Outcome, host: Host) -> str | None:
        size = len(outcome.stdout) + len(outcome.stderr) + len(outcome.value or "") + sum(map(len, outcome.files.values()))
        return f"the host took {size >> 20} MiB of it" if size > most else None

    return judge


MOST = 4 << 20

ATTACKS = (
    Attack(
        "stdout_flood",
        "fills the memory of whoever reads it",
        "block = b'x' * (1 << 20)\nfor _ in range(200):\n    os.write(1, block)\n",
        received(MOST),
        lasting=True,
    ),
    Attack(
        "stderr_flood",
        "fills the memory of whoever reads it",
        "block = b'x' * (1 << 20)\nfor _ in range(200):\n    os.write(2, block)\n",
        received(MOST),
        lasting=True,
    ),
    Attack(
        "stdout_flood_by_children",
        "fills the memory of whoever reads it, from many processes",
        """
for _ in range(8):
    if os.fork() == 0:
        mark()
        for _ in range(25):
            os.write(1, b"x" * (1 << 20))
        os._exit(0)
for _ in range(8):
    os.wait()
""",
        received(MOST),
    ),
    Attack(
        "print_flood",
        "fills the memory of whoever reads it",
        "for _ in range(2000):\n    print('y' * 100_000)\n",
        received(MOST),
    ),
    Attack(
        "value_flood",
        "fills the memory of whoever reads the last value",
        "class Big:\n    def __repr__(self):\n        return 'x' * (150 << 20)\nBig()\n",
        received(MOST),
        lasting=True,
    ),
    Attack(
        "exception_flood",
        "fills the memory of whoever reads the traceback",
        "raise ValueError('x' * (100 << 20))\n",
        received(MOST),
        lasting=True,
    ),
    Attack(
        "exception_chain_flood",
        "fills the memory of whoever reads the traceback",
        """
error = None
for _ in range(100):
    new = ValueError("x" * (1 << 18))
    new.__cause__ = error
    error = new
raise error
""",
        received(MOST),
    ),
    Attack(
        "large_file_fetched",
        "fills the memory of whoever fetches its files",
        "with open('loot', 'wb') as f:\n    f.truncate(600 << 20)\n",
        received(64 << 20),
        fetch=("loot",),
    ),
)
