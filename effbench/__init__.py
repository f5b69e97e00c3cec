"""effbench: fine-tune, compress and evaluate language models, with honest costs."""

__version__ = "0.1.0"
