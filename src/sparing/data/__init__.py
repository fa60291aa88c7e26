"""From files to batches.

`files` finds files, `sources` reads documents from them, `scan` measures a corpus, and `split` decides what is held out and what is
sampled. `tokenizer` turns text into tokens, in the processes of `workers`; `store` keeps them on disk; `prepare` does all of that once.
`rows` lays documents out in rows, and `loader` makes the batch of any step. `chat` renders chat templates.
"""
