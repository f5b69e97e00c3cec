"""Which session decodes a model fastest where everything is kept."""

from __future__ import annotations

import torch

from effbench.api.session import Session
from effbench.nn.decode.between import Between
from effbench.nn.decode.mixing import MixingSession
from effbench.nn.decode.session import CachedSession
from effbench.nn.decode.shared import SharedSession
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.shared_attention import tail_of
from effbench.nn.llama.walk import why_not


def session_for(model: torch.nn.Module) -> Session:
    """Return the fastest session that decodes `model` as its own forward pass would."""
    if not why_not(model):
        return StaticSession(model)
    if tail_of(model):
        return SharedSession(model)
    between = None if why_not(model, mixers=True) else Between.of(model, mixers=True)
    return CachedSession(model) if between is None else MixingSession(model, between)
