"""transformers, made silent or kept from the network for as long as a context lasts."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from functools import cache
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

PROBE_SECONDS = 4


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
