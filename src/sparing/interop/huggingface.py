"""Hugging Face folders: `export_hf` writes one, `import_hf` streams one in, `load_hf_into` fills a model from one."""

from sparing.interop.hf_read import import_hf, load_hf_into
from sparing.interop.hf_write import export_hf

__all__ = ["export_hf", "import_hf", "load_hf_into"]
