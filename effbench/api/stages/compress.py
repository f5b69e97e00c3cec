"""Compress a model, or what an earlier run made, then evaluate it.

\b
Examples:
  effbench compress method=rtn method.bits=4
  effbench compress method=rtn from=latest
  effbench compress -m method=rtn method.bits=2,3,4,8
"""

from effbench.api.stages.base import Stage

STAGE = Stage(method="rtn", makes=True)
