"""Hugging Face folders: `export_hf` writes one, `import_hf` streams one in."""

from sparing.interop.hf_read import import_hf
from sparing.interop.hf_write import export_hf

__all__ = ["export_hf", "import_hf"]
