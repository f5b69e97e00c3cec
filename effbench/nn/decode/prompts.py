"""Prompts that the C++ kernel reads, row by row as it reads tokens, in place of the forward pass.

A forward pass multiplies matrices: of few rows that is slower, it expands packed weights first, and
in bfloat16 a CPU without products of that dtype is slow whatever their number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from effbench.nn.llama.shared_attention import tail_of
from effbench.nn.quant.layout import NESTED, SIGNS, TRITS
from effbench.nn.quant.linears import QuantisedLinear
from effbench.util.hardware import native_bf16

if TYPE_CHECKING:
    from effbench.nn.decode.native_step import NativeStep
    from effbench.nn.decode.step import StepSession

PLAIN_ROWS, PACKED_ROWS = 32, 128
"""Positions of all prompts together up to which the kernel is faster."""
IN_PLANES = (SIGNS, TRITS, NESTED)
CHUNK_ROWS = 64
"""Most positions that the kernel reads at once: `kMostRows` of decode.cpp."""


def takes(session: StepSession, prompts: torch.Tensor, padded: bool) -> bool:
    """Whether the kernel is the way to read prompts [B, P]: they are not padded, and few or slow.

    Layers with stand-ins, and those whose states others take, read them through the model. So do
    weights in bit planes in float32: rounding what they are multiplied by is most of the error.
    """
    if padded or session.stand_ins or tail_of(session.model) or len(prompts) > CHUNK_ROWS:
        return False
    if session.dtype == torch.bfloat16 and not native_bf16():
        return True
    linears = (m for block in session.blocks for part in block.parts() for m in part.linears())
    layouts = [m.layout() for m in linears if isinstance(m, QuantisedLinear)]
    in_planes = any(layout is not None and layout.bits in IN_PLANES for layout in layouts)
    if in_planes and session.dtype == torch.float32:
        return False
    return prompts.numel() <= (PACKED_ROWS if layouts else PLAIN_ROWS)


def read(session: StepSession, kernel: NativeStep, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits after the last position of prompts, [B, V]; the caches take all of them.

    Args:
        session: Has read nothing.
        kernel: Its own.
        input_ids: [B, P], not padded.
    """
    batch, length = input_ids.shape
    starts = torch.zeros(batch, dtype=torch.long)
    positions = torch.arange(length).expand(batch, length)
    hidden = session.model.model.embed_tokens(input_ids)
    hidden = through(session, kernel, hidden, positions, starts, range(len(session.blocks)))
    return kernel.readout(session, hidden[:, -1], session.model.model.norm, session.model.lm_head)


def through(
    session: StepSession,
    kernel: NativeStep,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    starts: torch.Tensor,
    blocks: range,
) -> torch.Tensor:
    """Return what blocks make of the hidden states of prompts, [B, P, d]; see `run_blocks`."""
    batch, length, _ = hidden.shape
    caches = dict.fromkeys(c for c in session.caches[blocks.start : blocks.stop] if c is not None)
    session.make_ready(batch, length, list(caches))
    width, out = max(1, CHUNK_ROWS // batch), []
    for part, places in zip(hidden.split(width, 1), positions.split(width, 1), strict=True):
        out.append(kernel.run_blocks(session, part, places, starts, blocks))
        for cache in caches:
            cache.length += part.shape[1]
    return torch.cat(out, 1)
