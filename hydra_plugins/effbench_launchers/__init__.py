"""Hydra launchers that take the runs of a grid to a Ray or a SLURM cluster.

Hydra finds what lies in `hydra_plugins` by itself: it runs each module whose name has no
underscore, once more than Python does. A launcher is offered when the package that it needs is
installed.
"""

from hydra_plugins.effbench_launchers._ray import RayLauncher
from hydra_plugins.effbench_launchers._slurm import SlurmLauncher

__all__ = ["RayLauncher", "SlurmLauncher"]
