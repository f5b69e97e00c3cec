"""Weights of training data: from proxies that disagree, and from a validation set."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
