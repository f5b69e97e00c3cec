"""Models whose layers differ in size, as pruning leaves them."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from effbench.api.parts import LayerSize
from effbench.api.shape import ATTENTION_LINEARS, MLP_LINEARS, AnyShape, ModelShape, llama_layer

SLICED = "sliced_llama"
"""`model_type` in the config of a saved model whose layers differ in size."""
SIZES = "sizes.json"
"""File of an artefact that states the sizes of a sliced model."""


def sliced_shape(shape: AnyShape, hidden_size: int, layers: Sequence[LayerSize]) -> ModelShape:
    """Return a dense model with another width and other blocks.

    Args:
        shape: Gives everything else.
        hidden_size: Width of the residual stream.
        layers: Sizes of each block.
    """
    model = ModelShape.of(shape)
    readout, d = model.readout, hidden_size
    return replace(
        model,
        layers=tuple(llama_layer(d, shape.head_dim, size) for size in layers),
        embed=replace(model.embed, d_out=d),
        readout=replace(
            readout, norm=replace(readout.norm, size=d), head=replace(readout.head, d_in=d)
        ),
    )


def slice_in(shape: ModelShape, folder: Path | None) -> ModelShape | None:
    """Return `shape` with the sizes that an artefact states, None where there is no artefact."""
    if folder is None or not (folder / SIZES).is_file():
        return None
    sizes = json.loads((folder / SIZES).read_text())
    return sliced_shape(shape, sizes["hidden_size"], [LayerSize(*s) for s in sizes["layers"]])


def fixed_share(shape: AnyShape, prunable: Collection[str]) -> float:
    """Return the share of the linear weights that stays where only some kinds of blocks may go.

    Args:
        shape: Of the unpruned model.
        prunable: Of `groups`, `neurons`, `dims`.
    """
    if "dims" in prunable:
        return 0.0
    kinds = dict.fromkeys(ATTENTION_LINEARS, "groups") | dict.fromkeys(MLP_LINEARS, "neurons")
    fixed = sum(i * o for _, name, i, o in shape.linears() if kinds[name] not in prunable)
    return fixed / shape.linear_params


def planned_slice(shape: AnyShape, keep: float) -> ModelShape:
    """Return a model with at most the share `keep` of the linear weights, all dimensions kept.

    Each layer loses the same share: neurons first, then key/value groups with their query heads.
    """
    return sliced_shape(shape, shape.hidden_size, [_cut(shape, x.size, keep) for x in shape.layers])


def _cut(shape: AnyShape, size: LayerSize, keep: float) -> LayerSize:
    queries = size.num_heads // max(1, size.num_kv_heads)
    group = (2 * queries + 2) * shape.head_dim
    width = keep * (group * size.num_kv_heads + 3 * size.intermediate_size)
    groups = min(size.num_kv_heads, int(width / group))
    return LayerSize(groups * queries, groups, int((width - group * groups) / 3))
