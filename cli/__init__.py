"""The `covey` command: arguments and rendering, nothing else."""
