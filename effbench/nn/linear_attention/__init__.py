"""Attention without a softmax over positions: feature maps, decays, products, states."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
