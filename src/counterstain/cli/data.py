"""Commands from tissue to a cohort: phantom, import, split, inspect."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
