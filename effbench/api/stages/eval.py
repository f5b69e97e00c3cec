"""Evaluate a model as it is, or what an earlier run made.

\b
Examples:
  effbench eval model=smollm2-135m
  effbench eval from=latest evaluator=speed
  effbench eval from=3f2a dataset=arc-easy evaluator=[perplexity,choices]
"""

from effbench.api.stages.base import Stage

STAGE = Stage(method="none")
