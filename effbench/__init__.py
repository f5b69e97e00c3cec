"""effbench: fine-tune, compress and evaluate language models, with honest costs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effbench.cli.calls import compare, compress, evaluate, runs, train

__version__ = "0.1.0"
__all__ = ["__version__", "compare", "compress", "evaluate", "runs", "train"]


def __getattr__(name: str) -> Any:
    """Return a command as a function; importing the package imports none of them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("effbench.cli.calls"), name)
