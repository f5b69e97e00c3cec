"""Decoding: sessions, caches, and the engine's routes."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
