"""What tools may be called."""

from __future__ import annotations

import re

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
"""OpenAI's rule for a function's name, which chat templates and parsers count on."""
