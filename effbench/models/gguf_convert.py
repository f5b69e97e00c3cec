"""GGUF files, turned once into a bfloat16 safetensors folder in the cache.

Reading a GGUF file takes many times as long as reading the folder, and transformers can neither
train nor save a model that it still takes for a quantised one.
"""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stderr
from functools import partial
from importlib.metadata import version
from pathlib import Path

from effbench.util.cache import cache_dir, intact, make_once
from effbench.util.errors import UserError

CONVERTER = 1
"""Raised when the same GGUF file would give another folder."""


def converted(gguf: Path, sha256: str, name: str) -> Path:
    """Return the folder that a GGUF file is converted to, converting it if that is not done yet.

    Args:
        gguf: The file.
        sha256: Its content hash.
        name: Name of the folder in the cache.

    Raises:
        UserError: When the file is corrupt, of an unknown architecture, or the disk is full.
    """
    make = partial(_convert, gguf)
    return make_once(_folder(name), _origin(sha256), make, f"converting {gguf.name}")


def already_converted(sha256: str, name: str, whole: bool = False) -> Path | None:
    """Return the folder of an earlier conversion if it is there and intact.

    Args:
        sha256: Content hash of the GGUF file.
        name: Name of the folder in the cache.
        whole: Whether its weights are about to be read.
    """
    return _folder(name) if intact(_folder(name), _origin(sha256), whole) else None


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def _origin(sha256: str) -> dict[str, str | int]:
    # What a file becomes is up to transformers' reader, tokenizer and names of tensors.
    return {"gguf": sha256, "converter": CONVERTER, "transformers": version("transformers")}


def _convert(gguf: Path, folder: Path) -> None:
    from effbench.models.gguf_header import read_header

    read_header(gguf)
    print(f"Converting {gguf} once to bfloat16 safetensors …", file=sys.stderr)

    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from effbench.util.hf import offline, quiet

    try:
        with quiet(), offline(), redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.bfloat16,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer.save_pretrained(folder)
            model.save_pretrained(folder)
    except SafetensorError as error:
        if "os error 28" in str(error):
            raise OSError(28, "No space left on device") from None
        raise
    except OSError:
        raise
    except Exception as error:
        raise UserError(
            f"{gguf} cannot be converted: {(str(error) or repr(error)).splitlines()[0]}.",
            "The file is truncated or corrupt, or of an architecture that transformers "
            "does not read from GGUF.",
        ) from error
