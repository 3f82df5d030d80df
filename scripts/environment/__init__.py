"""The private environment of a checkout: a virtual environment with the pinned packages, and llama.cpp
compiled for this machine.

Standard library only, since it runs before anything is installed; it talks on stderr, so that the command
that it was started for keeps stdout. Started by scripts/environment.sh, which alone decides when.
"""
