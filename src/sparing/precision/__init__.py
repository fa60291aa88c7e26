"""Eight bits where they are safe (DeepSeek-V3, arXiv 2412.19437 §3.3).

Formats and scaled blocks (`formats`, `quantise`), a linear's products in them (`eight_bit`), the policy that moves linears between
8 and 16 bits by the error they make (`policy`). Storage: bfloat16 weights that miss no small update (`compensation`), an optimizer's
averages in 8 bits (`moments`), and what the backward pass keeps of a layer (`activations`).
docs/precision.md has what each switch is worth, LAB.md the measurements.
"""
