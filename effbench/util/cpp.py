"""C++ sources of this package: compiled once for this machine, then loaded.

They are plain C functions over pointers, so they need a compiler but no headers of torch. A library
lies in effbench's cache under the hash of its sources, the compiler's version and the CPU's
features, so that a cache that several machines share never gives one of them instructions that it
lacks. They use OpenMP as torch does: both share one pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from effbench.util.cache import cache_dir, make_once
from effbench.util.errors import UserError
from effbench.util.hardware import cpu_flags, cpu_name

OPTIONS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno")
NATIVE = ("-march=native",)
"""Left out where the compiler does not know this CPU."""


def why_off() -> str:
    """Return why no library is wanted, in words; EFFBENCH_NATIVE=0 turns them off."""
    return "EFFBENCH_NATIVE=0" if os.environ.get("EFFBENCH_NATIVE") == "0" else ""


@cache
def compiler() -> str | None:
    """Return the C++ compiler: CXX, else c++, g++ or clang++; None where there is none."""
    own = os.environ.get("CXX", "").split()
    found = (shutil.which(name) for name in (*own[:1], "c++", "g++", "clang++"))
    return next((path for path in found if path), None)


def library(source: Path, options: Sequence[str] = OPTIONS) -> Path | str:
    """Return the library that is compiled from a source, or why it cannot be had, in words.

    Args:
        source: What is compiled, with the files that it includes by a path of their own.
        options: For the compiler.
    """
    program = compiler()
    if program is None:
        return "there is no C++ compiler"
    origin = {
        "source": [source.name, *(path.read_text() for path in sources(source))],
        "compiler": _version(program),
        "options": [*options, *NATIVE],
        "cpu": [cpu_name(), *sorted(cpu_flags())],
    }
    hashed = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
    folder, name = cache_dir() / "kernels" / hashed, f"{source.stem}.so"
    try:
        make_once(
            folder,
            {"hash": hashed},
            lambda place: _compile(program, options, source, place / name),
            "compiling kernels",
        )
    except subprocess.SubprocessError as error:
        return f"{program} cannot compile them ({error})"
    except UserError as error:
        return error.message
    except OSError as error:
        return f"they cannot be compiled ({error})"
    return folder / name


def sources(source: Path) -> list[Path]:
    """Return a source and all that it includes by a path of their own, each once."""
    found, rest = [], [source.resolve()]
    while rest:
        path = rest.pop()
        if path not in found:
            found.append(path)
            own = re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE)
            rest += [(path.parent / name).resolve() for name in own]
    return found


def loaded(source: Path, options: Sequence[str] = OPTIONS) -> ctypes.CDLL | None:
    """Return the library of a source, loaded; None where it cannot be compiled or loaded."""
    found = library(source, options)
    if isinstance(found, str):
        return None
    try:
        return ctypes.CDLL(str(found))
    except OSError:
        return None


def _compile(program: str, options: Sequence[str], source: Path, target: Path) -> None:
    """Compile for this CPU if the compiler knows it.

    Raises:
        subprocess.CalledProcessError: When the compiler refuses.
    """
    for chosen in ((*options, *NATIVE), tuple(options)):
        command = [program, *chosen, str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        if done.returncode == 0:
            return
    done.check_returncode()


def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return done.stdout
