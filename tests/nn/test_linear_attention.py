"""Feature maps, decays and the three forms of linear attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import generator
from scipy.fft import dct, idct

from effbench.nn.linear_attention import attention, decay, features, products
from effbench.nn.linear_attention.state import StateLayer, state_of
from effbench.util.errors import UserError

TRUTH = Path(__file__).parents[3] / "shared" / "truth" / "dijiang.npz"
EXACT = {"atol": 1e-10, "rtol": 1e-10}


class Case(NamedTuple):
    """Features of 3 queries a key, and all that goes with them, in float64."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    gamma: torch.Tensor


def case(length: int = 37, gamma: Any = None) -> Case:
    draws = generator(3)

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=draws, dtype=torch.float64)

    rates = torch.tensor([0.9, 0.97] if gamma is None else [gamma] * 2, dtype=torch.float64)
    q, k = drawn(2, 2, 3, length, 8).softmax(-1), drawn(2, 2, length, 8).softmax(-1)
    return Case(q, k, drawn(2, 2, length, 8), rates)


def directly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma: torch.Tensor) -> Any:
    """Return y by the sum as it is written."""
    y = torch.zeros_like(q)
    for n in range(q.shape[3]):
        for m in range(n + 1):
            weight = (q[:, :, :, n] * k[:, :, None, m]).sum(-1) * (gamma ** (n - m))[:, None]
            y[:, :, :, n] += weight[..., None] * v[:, :, None, m]
    return y


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """Return y all at once."""
    return products.parallel(q, k, v, products.decays(gamma, q.shape[3]))


def stepped(of: Case, state: torch.Tensor | None = None) -> tuple[torch.Tensor, Any]:
    found = []
    for n in range(of.q.shape[3]):
        at = slice(n, n + 1)
        here = of.q[:, :, :, at], of.k[:, :, at], of.v[:, :, at]
        y, state = products.step(*here, of.gamma, state)
        found.append(y)
    return torch.cat(found, dim=3), state


# -- features ----------------------------------------------------------------------------------


@pytest.mark.skipif(not TRUTH.is_file(), reason="the authors' numbers are not here")
def test_it_computes_what_the_authors_code_computes() -> None:
    truth = {name: torch.tensor(t).double() for name, t in np.load(TRUTH).items()}
    q, k, v, p = (truth[name] for name in ("q", "k", "v", "P"))
    scales = features.dct_matrix(16).T @ p
    torch.testing.assert_close(scales, scales.diagonal().diag(), atol=1e-6, rtol=0)
    gamma = decay.head_decays(4).double()
    powers = torch.arange(12, dtype=torch.float64)
    torch.testing.assert_close(gamma[:, None] ** powers, truth["D1"][0, ..., 0], atol=1e-6, rtol=0)
    phi = features.FeatureMap("softmax", p)
    mapped = phi(q)[:, :, None], phi(k)
    scores = mapped[0][:, :, 0] @ mapped[1].transpose(-1, -2) * products.decays(gamma, 12)
    torch.testing.assert_close(scores, truth["A"], atol=1e-6, rtol=1e-6)
    y, _ = products.chunked(*mapped, v, gamma, chunk=5)
    torch.testing.assert_close(y[:, :, 0], truth["y"], atol=2e-6, rtol=1e-6)
    side = y[:, :, 0].transpose(1, 2).reshape(-1, 64)
    normed = F.group_norm(side, 16).view(2, 12, 64)
    torch.testing.assert_close(normed, truth["z"], atol=5e-6, rtol=1e-5)


def test_the_transform_is_orthonormal_and_what_an_fft_gives() -> None:
    c = features.dct_matrix(24)
    torch.testing.assert_close(c.T @ c, torch.eye(24, dtype=torch.float64), **EXACT)
    x = torch.randn(5, 24, generator=generator(), dtype=torch.float64)
    there = torch.from_numpy(dct(np.eye(24), axis=0, norm="ortho"))
    torch.testing.assert_close(c, there, **EXACT)
    back = torch.from_numpy(idct(x.numpy(), norm="ortho"))
    torch.testing.assert_close(x @ c, back, **EXACT)


def test_directions_are_a_scaled_basis() -> None:
    p = features.directions("softmax", "dct", True, 16, generator(1))
    assert p is not None
    w = features.normal_quantiles(16, generator(1))
    torch.testing.assert_close(p, features.dct_matrix(16) @ w.diag(), **EXACT)
    plain = features.directions("exp", "dct", False, 16, generator(1))
    assert plain is not None and plain.equal(features.dct_matrix(16))
    q = features.directions("softmax", "orthogonal", False, 16, generator(1))
    assert q is not None
    torch.testing.assert_close(q.T @ q, torch.eye(16, dtype=torch.float64), **EXACT)
    assert features.directions("elu", "dct", True, 16, generator(1)) is None


def test_features_are_of_the_inverse_transform() -> None:
    """x P is w times what an inverse transform by FFT gives, not of the transform itself."""
    p = features.directions("softmax", "dct", True, 16, generator(1))
    phi = features.FeatureMap("softmax", p).double()
    x = torch.randn(5, 16, generator=generator(), dtype=torch.float64)
    w = features.normal_quantiles(16, generator(1))
    back, there = (torch.from_numpy(f(x.numpy(), norm="ortho")) for f in (idct, dct))
    torch.testing.assert_close(phi(x), (w * back).softmax(-1), atol=1e-6, rtol=1e-6)
    assert not phi(x).allclose((w * there).softmax(-1), atol=1e-2)


def test_quantiles_are_normal_and_finite() -> None:
    w = features.normal_quantiles(20_000, generator())
    assert abs(float(w.mean())) < 0.02 and abs(float(w.std()) - 1) < 0.02
    worst = torch.tensor([0.0, 1.0], dtype=torch.float64).clamp(2**-53, 1 - 2**-53)
    assert torch.special.ndtri(worst).isfinite().all()


@pytest.mark.parametrize("kind", ["softmax", "exp", "prf", "elu"])
def test_features_are_positive_and_bounded(kind: Any) -> None:
    phi = features.FeatureMap(kind, features.directions(kind, "dct", True, 16, generator()))
    x = 3 * torch.randn(50, 16, generator=generator(1), dtype=torch.float64)
    found = phi(x)
    assert found.dtype == torch.float64 and (found > 0).all()
    assert phi(1000 * x).isfinite().all()
    if kind == "softmax":
        torch.testing.assert_close(found.sum(-1), torch.ones(50, dtype=torch.float64), **EXACT)
    assert phi(x.bfloat16()).dtype == torch.float32


@torch.no_grad()
def test_random_features_estimate_the_exponential() -> None:
    x, y = 0.4 * torch.randn(2, 200, 16, generator=generator(1), dtype=torch.float64)
    maps = [
        features.FeatureMap("prf", features.directions("prf", "dct", True, 16, generator(i)))
        for i in range(100)
    ]
    found = torch.stack([(m(x) * m(y)).sum(-1) for m in maps]).mean(0)
    ratio = found / ((x * y).sum(-1) / 4).exp()
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01) and float(ratio.std()) < 0.1


def test_the_paper_differs_from_the_code_by_a_gain_and_no_norm() -> None:
    p = features.directions("exp", "dct", True, 16, generator())
    paper, code = features.FeatureMap("exp", p), features.FeatureMap("softmax", p)
    x = 0.1 * torch.randn(9, 16, generator=generator(1), dtype=torch.float64)
    found = paper(x)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), code(x), **EXACT)
    assert paper.log_gain is not None
    with torch.no_grad():
        paper.log_gain[3] += np.log(2)
    torch.testing.assert_close(paper(x)[:, 3], 2 * found[:, 3], atol=1e-6, rtol=1e-6)
    assert paper.log_gain.requires_grad and not paper.directions.requires_grad  # type: ignore[union-attr]


@torch.no_grad()
def test_untrained_the_kernel_is_a_weak_approximation() -> None:
    """Rows of the kernel correlate with those of exp(q . k / sqrt d) by about a fifth."""
    q, k = torch.randn(2, 256, 64, generator=generator(), dtype=torch.float64)
    exact = (q @ k.T / 8).exp()
    found = {}
    for kind in ("softmax", "exp", "prf"):
        maps = (
            features.FeatureMap(kind, features.directions(kind, "dct", True, 64, generator(i)))
            for i in range(8)
        )
        rows = torch.stack([phi(q) @ phi(k).T for phi in maps]).flatten(0, 1)
        both = torch.stack([rows, exact.repeat(8, 1)])
        both = F.normalize(both - both.mean(-1, keepdim=True), dim=-1)
        found[kind] = float((both[0] * both[1]).sum(-1).mean())
    assert found["softmax"] == pytest.approx(0.23, abs=0.05)
    assert found["exp"] == pytest.approx(0.16, abs=0.05)
    assert found["prf"] == pytest.approx(0.15, abs=0.05)


# -- products ----------------------------------------------------------------------------------


def test_three_forms_are_one_function() -> None:
    of = case()
    expected = directly(*of)
    torch.testing.assert_close(whole(*of), expected, **EXACT)
    y, state = stepped(of)
    torch.testing.assert_close(y, expected, **EXACT)
    for chunk in (1, 5, 36, 37, 64):
        y, end = products.chunked(*of, chunk=chunk)
        torch.testing.assert_close(y, expected, **EXACT)
        torch.testing.assert_close(end, state, **EXACT)
        assert products.chunked(*of, chunk=chunk, ends=True)[0].equal(y)


def test_a_prompt_and_what_follows_are_one_pass() -> None:
    of = case()
    expected = whole(*of)
    first = Case(of.q[:, :, :, :20], of.k[:, :, :20], of.v[:, :, :20], of.gamma)
    rest = Case(of.q[:, :, :, 20:], of.k[:, :, 20:], of.v[:, :, 20:], of.gamma)
    before, state = products.chunked(*first, chunk=8)
    torch.testing.assert_close(before, expected[:, :, :, :20], **EXACT)
    torch.testing.assert_close(stepped(rest, state)[0], expected[:, :, :, 20:], **EXACT)
    after, _ = products.chunked(*rest, state, chunk=8)
    torch.testing.assert_close(after, expected[:, :, :, 20:], **EXACT)


@pytest.mark.parametrize("form", ["parallel", "chunked", "step"])
def test_the_ends_of_the_decay(form: str) -> None:
    run = {
        "parallel": whole,
        "chunked": lambda *of: products.chunked(*of, chunk=7)[0],
        "step": lambda *of: stepped(Case(*of))[0],
    }[form]
    of = case(gamma=1.0)
    sums = (of.k[..., None] * of.v[:, :, :, None]).cumsum(2)
    torch.testing.assert_close(run(*of), torch.einsum("bgrtd,bgtde->bgrte", of.q, sums), **EXACT)
    of = case(gamma=0.0)
    own = (of.q * of.k[:, :, None]).sum(-1, keepdim=True) * of.v[:, :, None]
    torch.testing.assert_close(run(*of), own, **EXACT)


def test_nothing_before_a_token_depends_on_it() -> None:
    of = case()
    before, _ = products.chunked(*of, chunk=8)
    of.k[:, :, 20] += 1
    of.v[:, :, 20] += 1
    after, _ = products.chunked(*of, chunk=8)
    assert after[:, :, :, :20].equal(before[:, :, :, :20])
    assert not after[:, :, :, 20:].equal(before[:, :, :, 20:])


def test_queries_of_a_group_read_one_state() -> None:
    """As if each had keys and values of its own, all the same."""
    of = case()
    y, state = products.chunked(*of, chunk=8)
    alone = of.q.flatten(1, 2)[:, :, None]
    k, v = of.k.repeat_interleave(3, 1), of.v.repeat_interleave(3, 1)
    each, states = products.chunked(alone, k, v, of.gamma.repeat_interleave(3), chunk=8)
    torch.testing.assert_close(each[:, :, 0], y.flatten(1, 2), **EXACT)
    assert state is not None and state.shape == (2, 2, 8, 8)
    assert states is not None and states.shape == (2, 6, 8, 8)


def test_long_sequences_do_not_overflow() -> None:
    draws = generator()
    q, k = torch.rand(2, 1, 1, 20_000, 4, generator=draws)
    gamma = decay.head_decays(1)
    y, state = products.chunked(q[:, :, None], k, k, gamma)
    assert state is not None and state.isfinite().all()
    assert y.isfinite().all() and y[..., -1, :].abs().max() > 1


def test_kernels_are_for_float32_on_a_cuda_device_without_a_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def native(device: str = "cuda", dtype: torch.dtype = torch.float32) -> bool:
        found = attention.forms(torch.device(device), dtype)
        assert found in (attention.products, attention.triton_products)
        return bool(found is attention.triton_products)

    assert not native()  # a gradient is wanted
    with torch.no_grad():
        monkeypatch.setattr(attention, "has_triton", lambda: False)
        assert not native()
        monkeypatch.setattr(attention, "has_triton", lambda: True)
        assert native() and not native("cpu") and not native(dtype=torch.float64)
        monkeypatch.setenv("EFFBENCH_NATIVE", "0")
        assert not native()


# -- decays ------------------------------------------------------------------------------------


def test_rates_are_those_of_retentive_networks() -> None:
    gamma = decay.head_decays(5)
    assert gamma[0] == pytest.approx(1 - 1 / 32) and gamma[-1] == pytest.approx(1 - 1 / 512)
    gaps = (1 - gamma.double()).log().diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(4), atol=1e-4, rtol=1e-4)


def test_learned_rates_start_there_and_stay_within_bounds() -> None:
    rates = decay.Decay("learned", 3, 8)
    torch.testing.assert_close(rates.rates(), decay.head_decays(3))
    assert rates.delta is not None
    with torch.no_grad():
        rates.delta += torch.tensor([-9.0, 0.0, 4.0])
    assert ((rates.rates() > 0) & (rates.rates() < 1)).all()
    expected = torch.sigmoid(torch.logit(decay.head_decays(3)) + rates.delta)
    torch.testing.assert_close(rates.rates(), expected)
    rates.rates().sum().backward()
    assert (rates.delta.grad != 0).all()  # type: ignore[union-attr]


def test_tables_are_those_of_the_code_relative_to_the_rates() -> None:
    """D1_n D2_m of the code, and ones as they start."""
    tables = decay.Decay("table", 2, 16).double()
    positions = torch.arange(16)[None]
    assert all(f.eq(1).all() for f in tables.factors(positions) or ())
    assert tables.tables is not None
    with torch.no_grad():
        tables.tables += 0.1 * torch.randn(2, 2, 16, generator=generator())
    of = case(16)._replace(gamma=tables.rates())
    queries, keys = tables.factors(positions) or ()
    mapped = of.q * queries[:, :, None], of.k * keys
    d1 = tables.rates()[:, None] ** positions * tables.tables[0].exp()
    d2 = tables.rates()[:, None] ** -positions * tables.tables[1].exp()
    scores = torch.einsum("bgrnd,bgmd->bgrnm", of.q, of.k).tril()
    expected = (scores * d1[:, None, :, None] * d2[:, None, None, :]) @ of.v[:, :, None]
    torch.testing.assert_close(whole(*mapped, of.v, of.gamma), expected, **EXACT)
    with pytest.raises(UserError, match="16 positions"):
        tables.factors(positions + 1)


# -- masks and states --------------------------------------------------------------------------


def test_padding_is_read_from_every_kind_of_mask() -> None:
    flat = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    seen = flat[:, None, None].bool() & torch.ones(5, 5).tril().bool()
    added = torch.zeros(2, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (flat, seen, added):
        found = attention.real_tokens(mask, 5)
        assert found is not None and found.equal(flat.bool())
        last = attention.real_tokens(mask[..., -1:, :] if mask.ndim == 4 else mask, 1)
        assert last is not None and last.equal(torch.ones(2, 1).bool())
    assert attention.real_tokens(None, 5) is None


def test_a_state_is_an_entry_of_a_cache() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(*torch.zeros(2, 2, 1, 3, 4), layer_idx=0)
    entry = state_of(cache, 1)
    assert state_of(cache, 1) is entry and entry.kv_bytes() == 0
    entry.put(torch.arange(2.0).view(2, 1, 1, 1).expand(2, 1, 4, 4), 3)
    assert cache.get_seq_length(1) == 3 and cache.get_mask_sizes(2, 1) == (5, 0)
    assert entry.kv_bytes() == 2 * 16 * 4
    cache.reorder_cache(torch.tensor([1, 0, 1]).long()[:2])  # type: ignore[arg-type]
    assert entry.state is not None and entry.state[:, 0, 0, 0].tolist() == [1, 0]
    entry.batch_repeat_interleave(2)
    assert entry.state[:, 0, 0, 0].tolist() == [1, 1, 0, 0]
    with pytest.raises(UserError, match="cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(UserError, match="no room"):
        state_of(cache, 0)
    entry.reset()
    assert entry.get_seq_length() == 0 and isinstance(entry, StateLayer)
