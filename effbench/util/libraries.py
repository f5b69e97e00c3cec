"""Other people's libraries, imported without what nobody here calls."""

from __future__ import annotations

import os
from importlib import import_module
from types import ModuleType


def import_uncompiled(name: str) -> ModuleType:
    """Import a library whose functions are to run as they are written, not through torch.compile.

    bitsandbytes, which PEFT imports, asks for torch.compile while it is imported. That alone loads
    torch's compiler, a third of what a process on a CPU imports, for functions that we never call.
    """
    before = os.environ.get("TORCHDYNAMO_DISABLE")
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    try:
        return import_module(name)
    finally:
        del os.environ["TORCHDYNAMO_DISABLE"]
        if before is not None:
            os.environ["TORCHDYNAMO_DISABLE"] = before
