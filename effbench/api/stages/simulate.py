"""Play what a model would do on stated hardware, from its shape alone: nothing is loaded or run.

Every number of such a run is labelled as simulated. Without a run to go on from, the method is
taken as it is planned.

\b
Examples:
  effbench simulate model=llama2-7b hardware=h200
  effbench simulate method=rtn model=llama2-7b hardware=h200 evaluator.serving.rate=8
  effbench simulate -m method=none,rtn,gqa model=llama2-7b hardware=h200
"""

from effbench.api.stages.base import Stage

STAGE = Stage(method="none", evaluators=("serving",), loads=False)
