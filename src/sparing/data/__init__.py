"""From files to batches: `files` finds them, `sources` reads documents, `scan` measures them and `split` decides by content what is
held out and what is sampled; `tokenizer` and `pool` turn text into tokens; `store` keeps them on disk; `prepare` does all of that once.
`pack` lays documents out in rows, `loader` hands out batches: a pure function of (seed, row number), however many machines ask.
"""
