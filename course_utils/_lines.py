"""Sentences for a page of limited width."""

import textwrap

LENGTH = 100  # characters: JupyterLab would break longer lines inside words


def in_lines(text: str) -> str:
    """A paragraph broken between words."""
    return textwrap.fill(text, LENGTH, break_on_hyphens=False)
