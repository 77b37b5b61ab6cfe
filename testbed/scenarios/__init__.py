"""Scenarios to run with `python -m testbed scenario FILE`; each a module with a `SCENARIO`."""
