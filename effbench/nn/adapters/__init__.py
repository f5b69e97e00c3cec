"""What is trained beside a weight, and how it is merged."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
