"""`python -m covey.cli`: the same as the `covey` command, for children that we start."""

from .main import main

main()
