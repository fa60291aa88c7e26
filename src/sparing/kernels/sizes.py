"""Block sizes of the kernels, and constants that Python and C share: `native` hands them to the C compiler.

The memory model (`sparing.budget.memory`) reads them too, so this file does not import torch.
"""

ATTENTION_ROWS = 128
"""Query rows of a block in plain attention: small enough to skip most of the upper triangle, large enough for efficient products."""
PART_TOKENS = 512
"""Tokens that go through MLA in float32 (`latent.inc`) together: each intermediate is in the second cache when it is read."""
EXPERT_ROWS = 64
"""The rows of each expert are filled up to a multiple of this: oneDNN builds a kernel for every new shape, which costs more than the
filler rows."""
HEAD_TOKENS = 512
"""Tokens of a chunk in the output head: only their logits exist at once."""
OWN_HEAD_TOKENS, FLOAT_HEAD_TOKENS = 256, 384
"""The same in the output head over our own products, of bfloat16 and of float32."""
SCORED_LOGITS = 1 << 22
"""Logits that exist at once, at most, where text is scored and nothing learns: as floats and as their softmax they are several tensors."""
MOMENT_BLOCK = 256
"""Numbers of an optimizer's 8-bit moments that share one float32 scale, at most."""
CACHE_BLOCK = 32
"""Tokens of a block of the inference cache."""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of Muon's quintic: the largest slope at zero that still lands singular values in about [0.7, 1.2]."""
