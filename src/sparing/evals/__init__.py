"""How good a model is, measured over callables, so that the trainer and the inference engine are scored by the same code.
`bpb`: bits per byte of held-out text. `select`: which documents, when only some can be read. `tasks`: files of questions;
`harness`: lm-eval over them.
"""
