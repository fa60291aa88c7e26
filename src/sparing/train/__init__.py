"""Training: `loop.py` shows a whole step on one screen; each other file is one noun of it.

optim muon: the update · schedule: learning rate and momentum over the run · pace clock: a budget becomes a number of steps,
re-planned as the machine drifts · checkpoint: what is saved, and the way back · guard: batches that must not be learnt from ·
log: progress line, metrics.jsonl, TensorBoard, W&B.
Every choice that timing made is written down before it takes effect, so that a killed run goes on bit for bit.
"""
