"""Writes what a run made in another tool's format."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from effbench.api.points import find_point
from effbench.api.spec import Job, Runtime
from effbench.api.stages import base as stages
from effbench.results.store import RunFolder, Store
from effbench.util.errors import UserError
from effbench.util.files import replace_folder, scratch_folder


def export(ref: str, folder: Path, point: str, results: Path) -> None:
    """Write the artefact of a run at one operating point into a new folder.

    Raises:
        UserError: For an unknown run or point, a folder that exists, or a method without export.
    """
    store = Store(results)
    key = store.resolve(ref)
    spec = store.spec_of(key)
    while not stages.find(spec.stage).makes and spec.parent:
        key, spec = spec.parent, store.spec_of(spec.parent)
    if not stages.find(spec.stage).makes:
        raise UserError(f"Run {key} made nothing to export.", "Choose a train or compress run.")
    if folder.exists():
        raise UserError(f"{folder} is there already.", "Choose another folder.")

    from effbench.runner.open import context, open_model
    from effbench.runner.run import open_run

    with TemporaryDirectory() as scratch:  # the run is finished, and nothing is added to it
        run = open_run(Job(spec, Runtime(results=str(results))), RunFolder(Path(scratch)), store)
        opened = open_model(run)
        run.events.close()
    own = opened.method
    at = find_point(own.points(), point, f"Run {key}") if point else own.default_point()
    artefact = store.run(key).check_artefact(whole=True)
    model = own.load(opened.model, artefact, context(run))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, folder.name) as new:
        own.export(model, at, new)
        if (new / "config.json").is_file():  # a whole model is of use with its tokenizer alone
            run.tokenizer.save_pretrained(new)
        replace_folder(new, folder)
