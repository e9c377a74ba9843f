"""``python -m counterstain``."""

from counterstain.cli import main

main()
