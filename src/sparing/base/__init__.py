"""What every other folder may import: files that are never half written (`files`), this machine and what was measured on it (`hardware`),
signals (`preempt`), messages.
"""
