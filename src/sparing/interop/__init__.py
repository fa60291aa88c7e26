"""Other programs' files: Hugging Face folders in and out, GGUF files out.

`huggingface` writes and reads whole folders: config.json by `hf_config`, tensors by `hf_tensors`, 8-bit weights by `fp8_blocks`.
`families` has a table for each model family; `gguf` writes llama.cpp's format.
"""
