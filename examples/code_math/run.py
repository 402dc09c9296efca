"""`python -m examples.code_math.run --seed 0`: GRPO through the real verl on two CPU cores, from data to a table and a picture.

The steps are the quickstart's; the task, the tool, the reward and the model are this example's.
"""

from __future__ import annotations

from examples.code_math.evaluate import CODE_MATH
from examples.quickstart.run import main

if __name__ == "__main__":
    raise SystemExit(main(CODE_MATH))
