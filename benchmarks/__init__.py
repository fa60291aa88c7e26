"""Other programs that Sparing is compared with, each run in a process of its own by `sparing bench`.

`transformers_training` and `transformers_generation` (their fastest settings are found by `trials`), `llamacpp`, and `yardstick`, a plain
Llama-style model trained in transformers.
"""
