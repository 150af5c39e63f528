"""``python -m fastweights``."""

from .cli import main

main()
