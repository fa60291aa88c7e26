"""What a run would cost and reach, before it runs: FLOPs, memory, units of a budget.

Pure arithmetic over a `Config`; nothing is measured here.
"""
