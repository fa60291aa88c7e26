"""Inference: `generate` for Python callers, `engine` for many requests at once.

A request (`request`) becomes a token sequence; `scheduler` plans which sequences each step computes, `network` computes their logits from
`packed_weights` or in plain PyTorch, and `sample` turns logits into tokens and drafts. `approximate` lets requests use fewer experts, as
far as `calibration` allows; `predict` forecasts speed when experts stay on disk.
"""
