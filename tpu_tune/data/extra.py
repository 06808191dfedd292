"""Libraries of the extra `data`, which only the commands `tpu-tune data ...` need: imported where they are used."""

from __future__ import annotations

import importlib
from types import ModuleType

from tpu_tune.errors import UserError


def extra_library(module: str, package: str, needed_by: str) -> ModuleType:
    """Import a module of the extra `data`.

    Args:
      package: the package that holds the module, as pip knows it.
      needed_by: the option or the kind of file that needs it, for the message.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise missing(package, needed_by, error) from error


def missing(package: str, needed_by: str, error: ImportError) -> UserError:
    """Return the error to raise where a package of the extra cannot be imported."""
    return UserError(f"{needed_by} needs {package}, which cannot be imported ({error}): pip install 'tpu_tune[data]'")
