"""Kinds of models: what each reads, what its answers are, and what of it learns with any method."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
