"""Optional dependencies: imported where they are used, with a clear error if they are missing."""

import importlib
from typing import Any

from antransformer.errors import MissingExtraError, UsageError


def require(module: str, extra: str) -> Any:
    """Import a module of an optional dependency and return it.

    Args:
        module: full name, such as ``matplotlib.figure``.
        extra: extra of this package that installs it.

    Raises:
        MissingExtraError: the package is not installed.
        UsageError: the package is installed but cannot be imported.
    """
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] == package:
            raise MissingExtraError(package, extra) from error
        raise UsageError(f"{package} is installed but cannot be imported: {error}") from error


def require_analysis() -> None:
    """Check that what the reports of experiments need is installed; raises MissingExtraError."""
    for module in ("scipy", "matplotlib", "threadpoolctl"):
        require(module, "analysis")
