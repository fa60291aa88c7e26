"""Other people's file formats: Hugging Face folders in and out.

`huggingface` exports and imports a whole folder. It stands on `hf_config` (config.json both ways), `hf_names` (where each
published tensor lies in ours), `hf_files` (safetensors streamed tensor by tensor) and `fp8_blocks` (block-scaled 8-bit weights).
"""
