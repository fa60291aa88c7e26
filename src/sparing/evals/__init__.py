"""Scores models through callables, so that the same code scores a model in training and a loaded one.

`bpb` measures bits per byte of text, `select` chooses what of the text is read, `harness` runs lm-eval, and `tasks` makes its tasks from
files of questions. `verifiers` say what an answer is worth, some in a process that can be ended (`judge`), code without any rights
(`contained`).
"""
