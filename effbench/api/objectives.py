"""What distillation makes of the logits, in bytes."""

from __future__ import annotations

from effbench.api.parts import Objective

DISTILLED = Objective(logit_bytes=28, every=True)
"""Both models' distributions: seven float32 tensors of logits when the backward pass begins. They
are the student's two log-softmaxes, the teacher's, its exponential, their difference, two
gradients."""
CHUNK = 128
"""Positions whose float32 distributions are in memory at once (`nn.losses.distill`)."""
CHUNK_BYTES = 28
"""Bytes per logit of a chunk in its backward pass: seven float32 tensors."""


def distilled_in_chunks(vocab_size: int) -> Objective:
    """Return logits made a chunk at a time, and made again; those of the teacher are whole."""
    chunk = CHUNK * CHUNK_BYTES * vocab_size
    return Objective(logit_bytes=None, fixed=chunk, again=True)


PERTURBED_BYTES = 40
"""Bytes per logit of a chunk of a perturbed loss: ten float32 tensors at its peak, both models'
logits among them."""


def perturbed_in_chunks(vocab_size: int) -> Objective:
    """Return both models' logits made a chunk at a time, and made again; none is whole."""
    return Objective(
        logit_bytes=0, fixed=CHUNK * PERTURBED_BYTES * vocab_size, again=True, held_again=True
    )
