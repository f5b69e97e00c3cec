"""The C++ kernels of `kernels/`: compiled once for this machine (`util.cpp`), then loaded.

They are there in some twenty seconds.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from pathlib import Path

from effbench.util import cpp
from effbench.util.cache import cache_dir
from effbench.util.lazy import torch

SOURCES = Path(__file__).with_name("kernels")
SOURCE = SOURCES / "decode.cpp"
"""What is compiled; it includes the rest."""
OPTIONS = cpp.OPTIONS
SUFFIXES = {"torch.bfloat16": "bf16", "torch.float32": "f32"}
"""Endings of the functions' names, by dtype."""
LARGEST_BATCH = 16
"""Most rows of one step; with more of them, torch's matrix products are the faster ones."""
LARGEST_HEAD = 1024
"""Widest head."""
LARGEST_WIDTH = 32768
"""Most columns of a packed matrix."""
LARGEST_RANK = 1024
"""Highest rank of what stands in for a block."""
_lock = threading.Lock()
_latest: list[Kernels] = []
"""The kernels that were loaded last, if any were."""


class Matrix(ctypes.Structure):
    """Pointers of a linear layer, dense or packed; the fields of `struct Matrix`."""

    _fields_ = [
        *((n, c_void_p) for n in ("weight", "bias", "scales", "zeros", "levels", "offset")),
        *((n, c_int64) for n in ("bits", "group", "groups", "planes", "stride")),
    ]


class Layer(ctypes.Structure):
    """Pointers of one decoder block; the fields of `struct Layer`."""

    _fields_ = [
        *((n, Matrix) for n in ("q", "k", "v", "o", "gate", "up", "down")),
        *((n, c_void_p) for n in ("attention_norm", "mlp_norm", "keys", "values")),
        *((n, c_int64) for n in ("heads", "kv_heads", "inner", "capacity")),
        *((n, c_void_p) for n in ("a", "b", "anchor")),
        *((n, c_int64) for n in ("rank", "running")),
        ("scale", c_float),
    ]


class Model(ctypes.Structure):
    """Sizes and pointers of a model; the fields of `struct Model`."""

    _fields_ = [
        *((n, c_int64) for n in ("hidden", "inner", "heads")),
        *((n, c_int64) for n in ("head_dim", "vocab", "layers")),
        *((n, c_float) for n in ("eps", "scale")),
        *((n, c_void_p) for n in ("embedding", "norm")),
        *((n, Matrix) for n in ("table", "head")),
        *((n, c_void_p) for n in ("cos", "sin")),
        ("layer", ctypes.POINTER(Layer)),
    ]


class Step(ctypes.Structure):
    """What one call does; the fields of `struct Step`."""

    _fields_ = [
        ("batch", c_int64),
        *((n, c_void_p) for n in ("tokens", "positions", "starts", "lengths", "runs")),
        *((n, c_void_p) for n in ("logits", "scratch")),
        *((n, c_int64) for n in ("threads", "width", "first", "last")),
        *((n, c_void_p) for n in ("inputs", "outputs", "mixed", "queries", "keys", "values")),
    ]


class Kernels:
    """The functions of the loaded library."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        self._scratch = library.scratch_floats
        self._scratch.restype = c_int64
        self._scratch.argtypes = [c_void_p, c_int64, c_int64]
        self._decode = {d: getattr(library, f"decode_{s}") for d, s in SUFFIXES.items()}
        self._product = {d: getattr(library, f"product_{s}") for d, s in SUFFIXES.items()}
        self._argmax = {d: getattr(library, f"argmax_{s}") for d, s in SUFFIXES.items()}
        for function in self._argmax.values():
            function.argtypes, function.restype = [c_void_p, c_int64, c_int64, c_void_p], None
        for function in self._decode.values():
            function.argtypes, function.restype = [c_void_p, c_void_p], None
        for function in self._product.values():
            function.argtypes = [*[c_void_p] * 3, *[c_int64] * 4]
            function.restype = None

    def scratch_floats(self, model: Model, batch: int, capacity: int) -> int:
        """Return how many float32 numbers a step needs as working memory."""
        return int(self._scratch(ctypes.addressof(model), batch, capacity))

    def decode(self, model: Model, step: Step, dtype: torch.dtype) -> None:
        """Run one step; everything that it reads and writes is in the two structures."""
        self._decode[str(dtype)](ctypes.addressof(model), ctypes.addressof(step))

    def argmax(self, x: torch.Tensor) -> torch.Tensor:
        """Return where the largest of the last dimension of a contiguous x [..., N] stands, [...].

        The first of several, or the first that is no number.
        """
        out = torch.empty(x.shape[:-1], dtype=torch.long)
        self._argmax[str(x.dtype)](x.data_ptr(), out.numel(), x.shape[-1], out.data_ptr())
        return out

    def gemv(self, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Return W x, [N], for a contiguous W [N, K] and x [K] of the same dtype on the CPU."""
        matrix = Matrix(weight=weight.data_ptr())
        return self.product(matrix, x.contiguous()[None], *weight.shape)[0]

    def product(self, matrix: Matrix, x: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """Return x W^T, [B, N], for a contiguous x [B, K] and a W [N, K] as it lies."""
        out = torch.empty(len(x), n, dtype=x.dtype)
        addresses = ctypes.addressof(matrix), x.data_ptr(), out.data_ptr()
        self._product[str(x.dtype)](*addresses, len(x), n, k, torch.get_num_threads())
        return out


def address(tensor: torch.Tensor | None) -> int | None:
    """Return where a tensor begins; None for none."""
    return None if tensor is None else tensor.data_ptr()


def most_likely(logits: torch.Tensor) -> torch.Tensor:
    """Return the token with the largest of the logits [..., V], [...] int64.

    On a CPU by a kernel, if they are loaded: torch takes long for one row, and longer in 16 bits.
    """
    here = logits.device.type == "cpu" and str(logits.dtype) in SUFFIXES
    found = _latest[-1] if here and logits.is_contiguous() and _latest else None
    return logits.argmax(-1) if found is None else found.argmax(logits)


def kernels() -> Kernels | None:
    """Return the kernels, compiled at the first call of all; None where they cannot be had.

    EFFBENCH_NATIVE=0 turns them off; `why_not` has the reason.
    """
    found = _found()
    return found if isinstance(found, Kernels) else None


def why_not() -> str:
    """Return why there are no kernels, in words; empty when there are."""
    found = _found()
    return found if isinstance(found, str) else ""


def _found() -> Kernels | str:
    if reason := cpp.why_off():
        return reason
    with _lock:
        return _load(str(cache_dir()))


@cache
def _load(cache_folder: str) -> Kernels | str:
    """Return the kernels, or why they cannot be had."""
    found = cpp.library(SOURCE, OPTIONS)
    if isinstance(found, str):
        return found
    try:
        _latest[:] = [Kernels(found)]
        return _latest[0]
    except OSError as error:
        return f"they cannot be loaded ({error})"
