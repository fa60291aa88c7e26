"""Training: `trainer.py` shows a whole step on one screen; each other file is one noun of it.

objective: what is made small · replicas: rows divided among threads · world: several processes · optim: the update, and learning rate and
momentum over the run · stored: the same update for weights and averages in few bits · pace: a budget becomes a number of steps, re-planned
as the machine drifts · checkpoint: what is saved, and the way back · log: progress line, metrics.jsonl, TensorBoard, W&B.
Every choice that timing made is written down before it takes effect, so that a killed run goes on bit for bit.
"""
