"""What a stage says of itself, and the stages there are: one file each beside this one.

The docstring of a stage's file is the help of its command. What it does is `perform(run)` in the
file of the same name in `effbench/runner/stages`, which is imported when a run is at work. That of
another package has `STAGE` and `perform` in the one module that its entry point names.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path

from effbench.util.errors import UserError, did_you_mean
from effbench.util.offered import docstring, offered


@dataclass(frozen=True)
class Stage:
    """One thing that a run can do with a model."""

    method: str
    """The method when no `method=` is given."""
    evaluators: tuple[str, ...] = ()
    """The evaluators when no `evaluator=` is given; none leaves those of the config."""
    trains: bool = False
    """Whether it trains, on the dataset's split of that name."""
    makes: bool = False
    """Whether it makes an artefact, with a method of its own, that other runs go on from."""
    loads: bool = True
    """Whether it loads a model; else shapes and stated ceilings are all that it has."""
    name: str = ""
    """The name of its file, or of its entry point."""


@cache
def names() -> tuple[str, ...]:
    """Return the names of all stages: those first that do most to a model, then other packages'."""
    here = Path(__file__)
    own = {p.stem for p in here.parent.glob("*.py")} - {"__init__", here.stem}
    return (*sorted(own - offered("stages").keys(), key=_order), *sorted(offered("stages")))


def _order(name: str) -> tuple[bool, bool, bool, str]:
    stage = find(name)
    return not stage.trains, not stage.makes, not stage.loads, name


@cache
def find(name: str) -> Stage:
    """Return the stage called `name`.

    Raises:
        UserError: When there is none.
    """
    if name not in offered("stages") and not (Path(__file__).parent / f"{name}.py").is_file():
        raise UserError(f"There is no stage called {name!r}.", did_you_mean(name, names()))
    module = import_module(_module(name, f"effbench.api.stages.{name}"))
    stage = getattr(module, "STAGE", None)
    if not isinstance(stage, Stage):
        raise UserError(
            f"{module.__name__} has no STAGE, so that it is no stage.",
            "Define STAGE = Stage(...) there, with Stage of effbench.api.stages.base.",
        )
    return replace(stage, name=name)


def help_of(name: str) -> str:
    """Return the help of a stage's command; a package's module is read for it, not imported."""
    if name in offered("stages"):
        return docstring(offered("stages")[name])
    return import_module(f"effbench.api.stages.{name}").__doc__ or ""


def performs(name: str) -> str:
    """Return the module whose `perform` does what a stage does."""
    return _module(name, f"effbench.runner.stages.{name}")


def _module(name: str, own: str) -> str:
    """Return the module that another package offers for a stage, else effbench's own."""
    return offered("stages")[name].module if name in offered("stages") else own


def trains(name: str) -> bool:
    """Whether a stage trains; one that is not known here does not."""
    return name in names() and find(name).trains
