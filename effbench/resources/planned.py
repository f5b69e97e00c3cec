"""The prediction for a job as a command gives it, before anything of it runs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from effbench.api.spec import Job
from effbench.api.stages import base as stages
from effbench.config.lineage import Lineage
from effbench.data.dataset import known_rows
from effbench.models.load import known_shape
from effbench.resources.predict import Prediction, predict
from effbench.results.store import Store
from effbench.util.errors import UserError


class Planned(NamedTuple):
    """A prediction and the training rows it rests on, 0 where they are not known."""

    prediction: Prediction
    rows: int


def predicted(job: Job) -> Planned:
    """Return what a job is predicted to need.

    Raises:
        UserError: When the shape of its model is not known here, what it goes on from is damaged,
            or its rows cannot be read.
    """
    spec = job.spec
    shape = known_shape(spec.model)
    if shape is None:
        raise UserError(
            f"The shape of {spec.model.id or spec.model.called} is not known here.",
            "Give it as model.shape.*, or fetch the model first.",
        )
    lineage = Lineage.of(spec, Store(Path(job.runtime.results)))
    rows = known_rows(spec.dataset, "train") if stages.trains(spec.stage) else 0
    earlier, folders = lineage.earlier, lineage.artefacts
    found = predict(
        spec,
        shape,
        job.runtime.machine,
        earlier,
        folders=folders,
        rows=rows,
        parallelism=job.runtime.parallelism,
    )
    return Planned(found, rows)
