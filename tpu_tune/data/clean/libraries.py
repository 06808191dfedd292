"""Libraries that one rule needs: imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from tpu_tune.errors import UserError


def library(module: str, package: str, rule: str) -> ModuleType:
    """Import a module.

    Args:
      package: what brings it, as pip knows it.
      rule: the option that needs it.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{rule} needs {package}, which is not here ({error}); pip install {package}") from error
