"""The command line: Typer commands, exit codes, what is printed where. Computes nothing itself."""
