"""The data set: what its columns mean (`docs/data.md`), rows as `Sample`s, and the linter."""

from agentloop.data.lint import LintReport, Problem, lint, lint_file, lint_longest, lint_pair
from agentloop.data.rows import content_key, plain, sample_from_row

__all__ = ["LintReport", "Problem", "content_key", "lint", "lint_file", "lint_longest", "lint_pair", "plain", "sample_from_row"]
