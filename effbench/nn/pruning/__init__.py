"""Which blocks matter, and models without the others."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
