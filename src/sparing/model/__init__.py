"""What a model computes: DeepSeek-V3 (arXiv 2412.19437 §2), and its baselines by configuration of the same files.

No I/O, no collectives, no optimizer. Parameters are float32 (or bfloat16) and cast to the activations' type where they are used; names are
those of the published checkpoints, except that a layer's experts are one tensor. Shape letters: see `sparing.kernels`.
"""
