"""Simulations of a model that is never loaded: all there is are shapes and stated ceilings."""

from __future__ import annotations

from effbench.api.plugins import make_evaluator
from effbench.api.shape import AnyShape
from effbench.evaluators.simulator import Scene, Simulator
from effbench.methods.chain import resolved
from effbench.models.load import known_shape
from effbench.runner.evaluation import count_cost
from effbench.runner.run import Run
from effbench.util.errors import UserError


def perform(run: Run) -> None:
    """Play every simulator at every operating point of what the run would evaluate.

    Raises:
        UserError: When the model's shape is not known, or the method cannot work on it.
    """
    run.events.cut()
    base = _shape(run)
    start, left = run.lineage.start(base), run.lineage.left(base)
    method, dtype = resolved(run.lineage.methods[-1], start), run.spec.hardware.dtype
    whole = run.lineage.cost(base, dtype, method.full_point(left))
    for point in method.points():
        cost = run.lineage.cost(base, dtype, point)
        scene = Scene(left, cost, whole, point, run.spec.seed)
        for plugin in run.spec.evaluators:
            simulator: Simulator = make_evaluator(plugin)
            run.add(simulator.simulate(scene).metrics)
        count_cost(run, cost, point)
    run.note("Simulated from shapes and stated ceilings: no model was loaded or run.")


def _shape(run: Run) -> AnyShape:
    found = known_shape(run.spec.model)
    if found is None:
        raise UserError(
            f"The shape of {run.spec.model.called} is not known here.",
            "Give it as model.shape.*, or fetch the model first.",
        )
    return found
