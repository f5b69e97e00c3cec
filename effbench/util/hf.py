"""transformers, made silent or kept from the network for as long as a context lasts."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal

from effbench.util.errors import UserError
from effbench.util.files import write_atomic

PROBE_SECONDS = 4
COMMIT = re.compile(r"[0-9a-f]{40}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show neither progress bars nor warnings of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def reason_of(error: Exception) -> str:
    """Return what an error of transformers or the hub says, in one line without its full stop.

    That is the first line; of a config that fails a check, whose first line names the check alone,
    the last.
    """
    from huggingface_hub.errors import StrictDataclassError

    lines = (str(error).strip() or type(error).__name__).splitlines()
    return lines[-1 if isinstance(error, StrictDataclassError) else 0].strip().rstrip(".")


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Look nothing up on the model hub: what is not in a file at hand is not there."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def hub_switched_off() -> bool:
    """Whether the environment forbids the use of the hub."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


@cache
def hub_reachable() -> bool:
    """Whether the model hub answers; asked once, because its client retries for a minute."""
    if hub_switched_off():
        return False
    import ssl  # what reads finished runs has no need of a network
    from urllib.error import HTTPError, URLError
    from urllib.request import Request, urlopen

    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        urlopen(Request(address, method="HEAD"), timeout=PROBE_SECONDS).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)
    except (OSError, ValueError):
        return False
    return True


def commit_of(
    name: str, revision: str = "main", kind: Literal["model", "dataset"] = "model"
) -> str:
    """Return the commit that a revision on the hub stands for; empty when that is not known.

    It is what the revision was when something of it was first downloaded here, as the hub's client
    has noted it, else what the hub says now, which is noted then.

    Args:
        name: Id on the hub.
        revision: Branch, tag or commit.
        kind: What it is of.

    Raises:
        UserError: When a folder here has that name, which a library would take in its place.
    """
    with contextlib.suppress(OSError, ValueError):
        _refuse_here(name, kind)
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import constants

    place = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / revision
    with contextlib.suppress(OSError, ValueError):
        if COMMIT.fullmatch(noted := place.read_text().strip()):
            return noted
    found = _asked(name, revision, kind) if hub_reachable() else ""
    if found:
        with contextlib.suppress(OSError, UserError):
            write_atomic(place, found)
    return found


def _refuse_here(name: str, kind: str) -> None:
    if name and Path(name).exists():
        other = "model=folder model.path=FOLDER" if kind == "model" else "dataset=file"
        raise UserError(
            f"{kind}.id={name} is on this machine, not on the hub.",
            f"Take {other}, or give the command in another folder.",
        )


@cache
def _asked(name: str, revision: str, kind: str) -> str:
    """Return what the hub says; nothing when it refuses, for loading says why."""
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10).sha or ""
    except (OSError, ValueError, RuntimeError):
        return ""
