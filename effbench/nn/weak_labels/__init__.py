"""Labels from rules: how rules are found, judged and matched, and classifiers learn from them."""

from effbench.util.lazy import lazy_modules

lazy_modules(__name__)
