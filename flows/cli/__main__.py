"""`python -m flows.cli` is `elastic`."""

from flows.cli.app import main

main()
