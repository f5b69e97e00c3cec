"""What a run leaves behind."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
