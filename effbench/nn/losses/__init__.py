"""What is minimised, and distances between distributions."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
