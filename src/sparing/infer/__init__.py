"""Using a trained model: `engine.Engine` continues many texts at once (`request` says what is asked, `scheduler` who computes what, `cache` and
`network` how, `sample` and `text` turn logits into tokens and tokens into text); `loaded.Model` computes logits.
"""
