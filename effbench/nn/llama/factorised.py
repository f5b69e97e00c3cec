"""Projections of keys and values as two products, through few directions.

    W = U diag(s) V^T,   C = U_R^T W [R, d_in]      y = U_R C x + b

U_R [D, R] has orthonormal columns, so that the leading r of them are the best projection of rank r:
||W - U_r U_r^T W||_F^2 is the sum of s_i^2 over i > r (Eckart and Young, 1936).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from effbench.api.latents import PROJECTIONS
from effbench.nn.llama.stack import decoder_layers


class FactorisedLinear(torch.nn.Module):
    """A projection U C x + b in two products.

    Args:
        down: C, [R, d_in].
        up: U.
        bias: b, [D].
    """

    def __init__(
        self, down: torch.Tensor, up: torch.Tensor, bias: torch.nn.Parameter | None = None
    ) -> None:
        super().__init__()
        (rank, self.in_features), self.out_features = down.shape, len(up)
        with torch.device("meta"):
            self.down = torch.nn.Linear(self.in_features, rank, bias=False)
            self.up = torch.nn.Linear(rank, self.out_features, bias=False)
        self.down.weight = torch.nn.Parameter(down, requires_grad=False)
        self.up.weight = torch.nn.Parameter(up, requires_grad=False)
        self.up.register_parameter("bias", bias)

    @classmethod
    def empty(cls, linear: torch.nn.Linear, rank: int) -> FactorisedLinear:
        """Return one in the place of `linear` that waits for its weights."""
        weight = linear.weight.detach()
        down, up = (rank, linear.in_features), (linear.out_features, rank)
        return cls(weight.new_empty(down), weight.new_empty(up), linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., D] of [..., d_in]."""
        found: torch.Tensor = self.up(self.down(x))
        return found


class AbsorbedOutput(torch.nn.Linear):
    """An output projection that takes values, or their coordinates with U_v multiplied into it.

        sum_h W_h (U_g c_h + b_g) = sum_h M_h c_h + W b,      M_h = W_h U_g [d, R]

    for the coordinates c_h [r] that query head h mixed, W_h [d, D] its columns of W, and U_g the
    rows of its head of values. Which of the two it is given, their width says.

    Args:
        output: W.
        values: The projection of values.
        width: D, of a head.
    """

    def __init__(self, output: torch.nn.Linear, values: FactorisedLinear, width: int) -> None:
        with torch.device("meta"):
            super().__init__(output.in_features, output.out_features, bias=False)
        self.weight, self.width = output.weight, width
        self.register_parameter("bias", output.bias)
        up, bias = values.up.weight.detach(), values.up.bias
        groups = values.out_features // width
        heads = output.weight.detach().double().unflatten(1, (groups, -1, width))
        made = torch.einsum("oghw,gwr->ghro", heads, up.double().unflatten(0, (groups, width)))
        self.absorbed = torch.nn.Parameter(made.flatten(0, 1).to(up.dtype), requires_grad=False)
        """M of every query head, [H, R, d]."""
        own = torch.zeros(values.out_features) if bias is None else bias.detach()
        constant = heads.sum(2) * own.to(heads).view(groups, width)
        self.register_buffer("constant", constant.sum((1, 2)).to(up.dtype), persistent=False)

    def marked(self, mixed: torch.Tensor) -> torch.Tensor:
        """Return coordinates [B, W, H, r] so that they are no values: r = D have R + 1 - D zeros.

        No coordinates are as wide as that, and no values.
        """
        if mixed.shape[3] != self.width:
            return mixed
        return torch.nn.functional.pad(mixed, (0, self.absorbed.shape[1] + 1 - self.width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., d] of values [..., H D], or of marked coordinates [..., H r]."""
        if x.shape[-1] == self.in_features:
            return super().forward(x)
        heads, most = self.absorbed.shape[:2]
        given = x.reshape(-1, heads, x.shape[-1] // heads).transpose(0, 1)
        rank = self.width if given.shape[2] > most else given.shape[2]
        made = torch.bmm(given[..., :rank], self.absorbed[:, :rank]).sum(0) + self.get_buffer(
            "constant"
        )
        made = made if self.bias is None else made + self.bias
        return made.view(*x.shape[:-1], -1)


def directions(
    weight: torch.Tensor, gram: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return orthonormal directions of what a weight gives, [D, D], most first, and their sizes.

    They are the left singular vectors and the singular values of W, [D] float32; of W S^{1/2} with
    a gram matrix S, so that the sizes are those of what the weight really gives.

    Args:
        weight: W, [D, d_in].
        gram: S = sum over tokens of x x^T, [d_in, d_in].
    """
    dense = weight.detach().double()
    product = dense if gram is None else dense @ gram.double()
    squares, vectors = torch.linalg.eigh(product @ dense.T)
    singular = squares.flip(0).clamp(min=0).sqrt()
    return vectors.flip(1).float(), singular.float()


def factorised(linear: torch.nn.Linear, basis: torch.Tensor) -> FactorisedLinear:
    """Return the part of a linear that lies in directions U [D, R]: U (U^T W) x + b."""
    weight = linear.weight.detach()
    basis = basis.to(weight.device)
    down = (basis.T.double() @ weight.double()).to(weight.dtype)
    return FactorisedLinear(down, basis.to(weight.dtype).contiguous(), linear.bias)


def bases(attention: Any, gram: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the directions of a layer's keys and values and their sizes; see `directions`.

    Args:
        attention: With dense projections.
        gram: Of what they read.
    """
    found: dict[str, torch.Tensor] = {}
    for name in PROJECTIONS:
        basis, singular = directions(getattr(attention, name).weight, gram)
        found |= {f"{name}.basis": basis, f"{name}.singular": singular}
    return found


def factorise(
    model: Any,
    ranks: tuple[Sequence[int], Sequence[int]],
    found: Sequence[Mapping[str, torch.Tensor]] = (),
) -> None:
    """Put two products in the place of each projection that has a rank.

    Args:
        model: Of Llama's family.
        ranks: Of keys and of values in each layer; 0 leaves a projection as it is.
        found: The `bases` of each layer; without them, factors wait for their weights.
    """
    for index, layer in enumerate(decoder_layers(model)):
        attention: Any = layer.self_attn
        for name, own in zip(PROJECTIONS, ranks, strict=True):
            rank, linear = own[index], getattr(attention, name)
            if rank and found:
                basis = found[index][f"{name}.basis"][:, :rank]
                setattr(attention, name, factorised(linear, basis))
            elif rank:
                setattr(attention, name, FactorisedLinear.empty(linear, rank))


def absorb(model: Any) -> None:
    """Multiply the directions of values into the output projections, where they are factorised.

    Args:
        model: With the weights of its factors.
    """
    for layer in decoder_layers(model):
        attention: Any = layer.self_attn
        if isinstance(attention.v_proj, FactorisedLinear):
            parts = attention.o_proj, attention.v_proj, attention.head_dim
            attention.o_proj = AbsorbedOutput(*parts)


def factors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the names of all factors of a model, and the factors."""
    for name, module in model.named_modules():
        if isinstance(module, FactorisedLinear):
            yield f"{name}.down.weight", module.down.weight.detach()
            yield f"{name}.up.weight", module.up.weight.detach()
