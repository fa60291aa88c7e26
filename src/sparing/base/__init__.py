"""What every other folder may import: this machine and what was measured on it (`hardware`), signals (`preempt`), messages."""
