"""The shape of linear attention: a state in the place of a growing cache, and a gate."""

from __future__ import annotations

from dataclasses import replace

from effbench.api.parts import Cache, LayerShape, Linear, Norm, Recurrence
from effbench.api.weights import FLOAT32

CHUNK = 64
"""Positions of a stretch, within which a pass over many compares all with each other."""
FEATURES = {"softmax": 1, "elu": 2, "exp": 3, "prf": 4}
"""Tensors that a gradient needs of each kind of features."""
MADE = {"softmax": (2, 3), "elu": (2, 3), "exp": (3, 4), "prf": (5, 5)}
"""Float32 tensors of a query's size that there are while its features are made: of one in float32,
and of one that is cast to it first."""


def linear_attention(
    layer: LayerShape, features: str, gate: bool, learned: dict[str, int]
) -> LayerShape:
    """Return a layer with linear attention in the place of its attention.

    Args:
        layer: With attention.
        features: A name of `FEATURES`; `elu` alone has no fixed matrix.
        gate: Whether its output is multiplied with a projection of its input.
        learned: Sizes of further parameters by name, which nothing is multiplied with; `rates` are
            those of the decay.
    """
    mixer = layer.mixer
    assert mixer is not None
    *read, out = mixer.linears
    sizes, mapped = (mixer.heads, mixer.kv_heads, mixer.head_dim), features != "elu"
    kept, made = FEATURES[features], MADE[features]
    own = Recurrence(*sizes, mapped, CHUNK, kept, "rates" in learned, made)
    gates = [Linear("g_proj", out.d_out, out.d_in)] if gate else []
    extra = [Linear(n, 1, size, bare=True, active=0) for n, size in learned.items()]
    state = replace(
        mixer,
        linears=(*read, *gates, *extra, out),
        heads=0,
        cache=Cache(constant=own.state, element=FLOAT32.element),
        norms=(*mixer.norms, Norm(out.d_in, bias=True)),
        recurrence=own,
    )
    return replace(layer, mixer=state)
