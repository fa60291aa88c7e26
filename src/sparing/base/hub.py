"""Repositories of huggingface.co, or of the hub that $HF_ENDPOINT names, in its library's own cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sparing.base.config import CannotGoOn, UserError


def snapshot(name: str, patterns: Sequence[str], kind: str = "model", not_here: str = "") -> Path:
    """The folder of a repository OWNER/NAME with the files that match `patterns`; the folder's name is its revision.

    kind: model or dataset. not_here: what was looked for before; errors that leave open what was meant begin with it.

    Raises UserError where the library is missing or there is no such repository, CannotGoOn where the hub cannot be reached.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError:
        raise UserError(f"{name}: {not_here}the hub needs the huggingface_hub package: pip install 'sparing[hub]'") from None
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except HFValidationError as error:
        raise UserError(f"{name}: {not_here}{_line(error)}") from None
    except GatedRepoError:
        raise UserError(f"{name}: its publisher asks for an agreement first: accept it on the hub, then log in (hf auth login)") from None
    except RepositoryNotFoundError:
        raise UserError(f"{name}: {not_here}the hub has no such repository (or it is private: hf auth login)") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno and error.filename:
            raise
        raise CannotGoOn(f"{name}: {not_here}the hub cannot be reached, and it was not fetched before ({_line(error)})") from None


def _line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))[:300]
