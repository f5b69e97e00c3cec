"""Layers that are alike, and models whose layers share states."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
