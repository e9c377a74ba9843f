"""Relabelled masks -> synthetic sets, redrawn regions, previews."""
