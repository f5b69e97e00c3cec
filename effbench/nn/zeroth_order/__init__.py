"""Gradients estimated from forward passes alone."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
