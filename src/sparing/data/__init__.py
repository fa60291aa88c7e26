"""From files to batches.

`files` finds files (`hub`: data sets by name), `sources` reads documents from them, with `web`, `wiki` and `office` for other people's
formats, whose parsers run `apart`; `accounts` counts what becomes of each. `scan` measures a corpus, and `split` decides what is held
out and what is sampled. `tokenizer` turns text into tokens, in the processes of `workers`; `store` keeps them on disk; `prepare` does
all of that once. `rows` lays documents out in rows, and `loader` makes the batch of any step. `chat` renders chat templates.
"""
