"""Mutants that behave like the solution for every caller: {task: {change: why nobody can see it}}."""

EQUIVALENT: dict[str, dict[str, str]] = {}
