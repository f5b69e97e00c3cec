"""What replaces one parameter by another, cut from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

Cut = Callable[[torch.Tensor], torch.Tensor]
Replace = Callable[[nn.Parameter, nn.Parameter, Cut], None]
"""Told of each parameter and what takes its place; the last argument cuts a tensor of its shape."""
