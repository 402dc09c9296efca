"""Attacks on sandboxes, as data: each is Python code that a model might write, and its judge on the host.

An attack counts only where it succeeds against a plain `subprocess` (`baseline.py`); `test_sandboxes_attacks.py` asserts that
in the same run in which it throws the attack at every kind of sandbox.
"""

from __future__ import annotations

from tests.conformance.attacks import control, files, kernel, memory, network, output, processes, sharing
from tests.conformance.attacks.base import Attack, Outcome, Place, Target, carry_out
from tests.conformance.attacks.host import Host

MODULES = (processes, memory, network, files, output, control, kernel, sharing)
ATTACKS: dict[str, Attack] = {attack.name: attack for module in MODULES for attack in module.ATTACKS}
assert len(ATTACKS) == sum(len(module.ATTACKS) for module in MODULES), "two attacks have one name"

__all__ = ["ATTACKS", "Attack", "Host", "Outcome", "Place", "Target", "carry_out"]
