"""Which device runs which blocks: profiles, cost model, Pareto front, plan.

Pure: no I/O, no clock, no torch.
"""
