"""``python -m dsv4ref``."""

from dsv4ref.cli import main

main()
