"""Makes training text better before it is read."""
