"""Fine-tune a model with a method, then evaluate it at every operating point.

A finished run is not run again; an interrupted one goes on from its last checkpoint.

\b
Examples:
  effbench train method=qdylora
  effbench train method=qdylora method.rank=8 train.max_steps=200 seed=1
  effbench train method=lora model=hub model.id=Qwen/Qwen2.5-0.5B dataset=gsm8k
  effbench train -m method=lora,qlora seed=0,1,2
  effbench train experiment=qdylora_paper --dry-run
"""

from effbench.api.stages.base import Stage

STAGE = Stage(method="lora", trains=True, makes=True)
