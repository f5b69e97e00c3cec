"""The blocks of a Llama: found, walked, replaced, saved."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
