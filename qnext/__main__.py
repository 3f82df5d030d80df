"""`python -m qnext`."""

from qnext.cli.main import main

main()
