"""What a run really costs, and on what machine: `hardware` looks at this machine and keeps what was measured on it."""
