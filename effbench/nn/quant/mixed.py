"""A width for each linear of nested codes, so that all of them together read at most some bytes.

What an error of a linear's weights costs at b bits is measured with the sensitivities F of
`effbench.nn.quant.sensitivity`, and adds up over linears:

    loss_b = sum of F (w - ŵ_b)^2

Linears of one name in one block, such as those of its experts, have one width. `knapsack` chooses.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from effbench.api.shape import LINEARS, AnyShape, ModelShape
from effbench.nn.llama import stack, surgery
from effbench.nn.quant import knapsack, nested_linear
from effbench.nn.quant.formats.any_precision import AnyPrecisionCodes
from effbench.util.errors import UserError
from effbench.util.files import write_atomic
from effbench.util.lazy import torch

FILE = "widths.json"
"""File of an artefact: the chosen widths, and what each width loses."""
WIDTHS = "nested_widths"
"""Where a model has them."""
Losses = Mapping[str, Sequence[float]]
"""By group of linears, `<block>.<name>`: what it loses at each width, the lowest first."""
Sizes = Mapping[str, Sequence[int]]
"""The same for the bytes that are read."""


N = TypeVar("N", int, float)


class Found(NamedTuple):
    """What an artefact says of its widths; groups are in the order that they run."""

    budget: int
    """Bytes."""
    widths: dict[str, int]
    """By group of linears."""
    losses: dict[str, list[float]]
    """At each width, the lowest first."""


def allot(sizes: Sizes, losses: Losses, lowest: int, budget: int) -> dict[str, int]:
    """Return the widths that lose least, by group.

    Args:
        sizes: Bytes of each group at the widths that there are.
        losses: The same, perhaps of further widths.
        lowest: The first of the widths.
        budget: Most bytes of all groups together.
    """
    lost = [losses[group][: len(sizes[group])] for group in sizes]
    chosen = knapsack.choose([*sizes.values()], lost, budget)
    return {group: lowest + option for group, option in zip(sizes, chosen, strict=True)}


# -- of shapes -------------------------------------------------------------------------------------


def sizes_of(shape: AnyShape, codes: AnyPrecisionCodes) -> dict[str, list[int]]:
    """Return the bytes that each group of linears reads at each width of `codes`."""
    return _summed(
        (group, [copies * n for n in codes.reads(d_in, d_out)])
        for group, d_in, d_out, copies in _linears(shape)
    )


def guessed(shape: AnyShape, codes: AnyPrecisionCodes) -> dict[str, list[float]]:
    """Return losses for a plan: all weights alike, and a quarter of the error for each bit more."""
    return _summed(
        (group, [copies * d_in * d_out / 4**b for b in codes.widths])
        for group, d_in, d_out, copies in _linears(shape)
    )


def _linears(shape: AnyShape) -> Iterator[tuple[str, int, int, int]]:
    """Yield group, columns, rows and number of the linears that are packed."""
    model = ModelShape.of(shape)
    names = model.chosen(LINEARS)
    for index, layer in enumerate(model.layers):
        for x in layer.linears:
            if x.name in names:
                yield f"{index}.{x.name}", x.d_in, x.d_out, x.copies


# -- of models -------------------------------------------------------------------------------------


def groups(model: torch.nn.Module) -> dict[str, str]:
    """Return the group of each decoder linear, by its name."""
    modules = {module: name for name, module in model.named_modules()}
    blocks = {f"{modules[x]}.": i for i, x in enumerate(stack.decoder_layers(model))}
    found = {}
    for name, _ in surgery.decoder_linears(model):
        index = next(i for block, i in blocks.items() if name.startswith(block))
        found[name] = f"{index}.{name.rpartition('.')[2]}"
    return found


def sizes_in(model: torch.nn.Module, codes: AnyPrecisionCodes) -> dict[str, list[int]]:
    """Return the bytes that each group of a model's linears reads at each width of `codes`."""
    found = ((group, model.get_submodule(name)) for name, group in groups(model).items())
    linears = ((group, cast("torch.nn.Linear", layer)) for group, layer in found)
    return _summed((g, codes.reads(x.in_features, x.out_features)) for g, x in linears)


def allot_model(
    model: torch.nn.Module, codes: AnyPrecisionCodes, losses: Losses, budget: int
) -> None:
    """Choose the widths of a model's nested linears.

    Args:
        model: Its linears are nested.
        codes: How.
        losses: Of each linear, by its name.
        budget: Bytes.
    """
    of = groups(model)
    summed = _summed((of[name], lost) for name, lost in losses.items())
    give(
        model, Found(budget, allot(sizes_in(model, codes), summed, codes.seed_bits, budget), summed)
    )


def give(model: torch.nn.Module, found: Found) -> None:
    """Tell each nested linear the width of its group, and the model how they were found."""
    for name, group in groups(model).items():
        layer = cast("nested_linear.NestedLinear", model.get_submodule(name))
        layer.own_bits = found.widths[group]
    vars(model)[WIDTHS] = found


def _summed(parts: Iterable[tuple[str, Sequence[N]]]) -> dict[str, list[N]]:
    """Return the sum of what each group has."""
    found: dict[str, list[N]] = {}
    for group, numbers in parts:
        before = found.get(group, [0] * len(numbers))
        found[group] = [a + b for a, b in zip(before, numbers, strict=True)]
    return found


# -- of artefacts ----------------------------------------------------------------------------------


def write(model: torch.nn.Module, folder: Path) -> None:
    """Write the widths that were chosen for a model into the folder of its artefact."""
    write_atomic(folder / FILE, json.dumps(vars(model)[WIDTHS]._asdict(), indent=1) + "\n")


def read(folder: Path, sizes: Sizes) -> Found:
    """Return the widths of an artefact.

    Args:
        folder: Of the artefact.
        sizes: Of the model that it is used with.

    Raises:
        UserError: When it has none, or not for this model.
    """
    path = folder / FILE
    try:
        found = Found(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"{folder} does not say what each width loses.",
            "Compress with method.budget=BYTES first; another budget can be given afterwards.",
        ) from None
    except (ValueError, TypeError) as error:
        raise UserError(
            f"{path} cannot be read: {error}.", "Run again with --fresh to make it anew."
        ) from None
    if found.losses.keys() != sizes.keys():
        raise UserError(
            f"{path} does not fit this model.", "Use it with the model that it was made from."
        )
    return found
