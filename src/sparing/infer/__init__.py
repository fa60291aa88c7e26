"""Using a trained model: `engine.Engine` continues many texts at once, `loaded.Model` computes logits.

`request` says what is asked and answered, `scheduler` who computes what, `cache` where it is kept. `network` is the model over that
cache in plain PyTorch, `compiled` the same through kernels/decode.c, from weights that `pack` has packed. `sample` turns logits into
tokens, `text` tokens into text; `speculate` drafts, and `adapt` chooses by measuring.
`approximate` leaves experts out for requests that ask for it, as many as `calibration` has found that a text can spare.
"""
