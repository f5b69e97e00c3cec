"""Sizes in bytes as people write them."""

from __future__ import annotations

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9}
"""Bytes in each unit, in lower case: of tens, and of twos (`k` is `kib`)."""
UNITS |= {"k": 2**10, "m": 2**20, "g": 2**30, "kib": 2**10, "mib": 2**20, "gib": 2**30}
