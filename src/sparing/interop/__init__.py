"""Other programs' files: Hugging Face folders in and out, GGUF files out; jobs for torchrun, Slurm and SkyPilot.

`huggingface` writes and reads whole folders: config.json by `hf_config`, tensors by `hf_tensors`, 8-bit weights by `fp8_blocks`.
`families` has a table for each model family; `gguf` writes llama.cpp's format. `launch` starts ranks, `slurm` and `skypilot` write files
that do so elsewhere, and `mirror` keeps a copy of their run.
"""
