"""`python -m qnext.cli`."""

from qnext.cli.main import main

main()
