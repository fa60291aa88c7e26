"""Sizes that kernels work in and that what a run needs is counted by (`sparing.budget`). Without torch, so that a plan need not load it."""

ATTENTION_ROWS = 128
"""Query rows of a block of the plain attention: few enough to skip most of the upper triangle, enough for efficient products."""
EXPERT_ROWS = 64
"""Groups of an expert's rows are filled up to a multiple of this: oneDNN builds a kernel for every new shape, which costs more than the
filler rows."""
HEAD_TOKENS = 512
"""Tokens whose logits exist at once."""
MOMENT_BLOCK = 256
"""Numbers of an 8-bit moment that share a float32 scale at most (also in storage.c)."""
