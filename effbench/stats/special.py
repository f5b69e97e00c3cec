"""SciPy's functions of distributions, without the rest of `scipy.special`."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

PACKAGE = "scipy.special"


@cache
def scipy_special() -> Any:
    """Return where the functions are; for arrays of numpy they are those of `scipy.special`.

    What that package prepares for arrays of other libraries takes a third of a CPU-second at its
    import, most of what a comparison takes to start. So its compiled module is taken, beside a
    package that has not run, which is gone again at the end.
    """
    import scipy

    if PACKAGE in sys.modules:
        return import_module(PACKAGE)
    bare = ModuleType(PACKAGE)
    bare.__path__ = [str(Path(scipy.__file__).parent / "special")]
    sys.modules[PACKAGE] = bare
    try:
        return import_module(f"{PACKAGE}._ufuncs")
    except ImportError:  # a SciPy that is built otherwise
        pass
    finally:
        del sys.modules[PACKAGE]
    return import_module(PACKAGE)
