"""Models of fewer layers, and layers that some tokens skip."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
