"""``python -m saap``."""

from saap.cli import main

main()
