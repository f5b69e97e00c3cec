"""Log-likelihoods of many requests and at many points."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
