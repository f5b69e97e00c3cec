"""Products of linear attention by Triton; without a GPU, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import decoded, generator
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.nn.decode.session import CachedSession
from effbench.nn.linear_attention import attention, products

pytestmark = pytest.mark.gpu
CLOSE = 4e-6
"""Of the sums of absolute values, in float64 from the same features."""
GAMMAS = (0.0, 0.9, 1.0)


@pytest.fixture(scope="module")
def kernels(triton_runs: None) -> Any:
    from effbench.nn.linear_attention import triton_products

    return triton_products


def case(heads: int, width: int, length: int, device: str) -> list[torch.Tensor]:
    """Return features of so many queries a key, keys, values and decays; a group each of them."""
    draws = generator(width)
    shapes = (2, 3, heads, length, width), (2, 3, length, width), (2, 3, length, width)
    q, k, v = (torch.randn(*shape, generator=draws) for shape in shapes)
    # Values as they lie in a layer: heads beside each other.
    v = v.transpose(1, 2).contiguous().transpose(1, 2)
    return [t.to(device) for t in (q.softmax(-1), k.softmax(-1), v, torch.tensor(GAMMAS))]


def assert_right(form: str, of: list[torch.Tensor], before: Any, found: Any) -> None:
    """Check outputs and a state against the operations in float64."""
    exact, bounds = (
        getattr(products, form)(*(f(t.double()) for t in of), None if before is None else f(before))
        for f in (lambda t: t, torch.abs)
    )
    for own, right, bound in zip(found, exact, bounds, strict=True):
        assert own.dtype == torch.float32
        assert own.shape == right.shape
        assert ((own - right).abs() <= CLOSE * bound).all()


CASES = [(16, 130, 3), (20, 64, 1), (72, 37, 3), (128, 65, 1), (33, 2, 2)]


@pytest.mark.parametrize(("width", "length", "heads"), CASES)
def test_stretches_and_steps_are_the_operations(
    kernels: Any, width: int, length: int, heads: int, device: str
) -> None:
    of = case(heads, width, length, device)
    draws = generator(1)
    for before in (None, torch.randn(2, 3, width, width, generator=draws).to(device)):
        exact = None if before is None else before.double()
        y, state = kernels.chunked(*of, before)
        assert_right("chunked", of, exact, (y, state))
        ended, none = kernels.chunked(*of, before, ends=True)
        assert ended.equal(y)
        assert none is None
        one = [t[..., :1, :] for t in of[:3]] + of[3:]
        found, after = kernels.step(*one, before)
        assert before is None or after.data_ptr() == before.data_ptr()
        assert_right("step", one, exact, (found, after))


def test_a_prompt_and_its_steps_are_one_pass(kernels: Any, device: str) -> None:
    q, k, v, gamma = case(2, 24, 140, device)
    right = products.parallel(q, k, v, products.decays(gamma, 140))
    _, state = kernels.chunked(q[..., :131, :], k[..., :131, :], v[..., :131, :], gamma)
    for t in range(131, 140):
        at = slice(t, t + 1)
        y, state = kernels.step(q[..., at, :], k[..., at, :], v[..., at, :], gamma, state)
        torch.testing.assert_close(y, right[..., at, :], atol=1e-5, rtol=1e-5)
    y, _ = kernels.chunked(q, k, v, gamma, ends=True)
    torch.testing.assert_close(y, right, atol=1e-5, rtol=1e-5)


SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 60,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_reads_and_decodes_as_with_the_operations(
    kernels: Any, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows with padding on their left, states beside keys and values, factors of positions."""
    torch.manual_seed(4)
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    attention.convert(model, [0, 2], attention.Design(decay="table"), 0)
    model = model.to(device, dtype).requires_grad_(False)
    ids = torch.randint(1, 97, (3, 80), generator=generator()).to(device)
    mask = torch.ones(3, 70, dtype=torch.long, device=device)
    mask[1, :5] = 0
    seen = []
    with torch.inference_mode():
        for form in (products, kernels):
            monkeypatch.setenv("EFFBENCH_NATIVE", "0" if form is products else "1")
            if device == "cpu":
                monkeypatch.setattr(attention, "forms", lambda *_, form=form: form)
            else:
                chosen = attention.forms(torch.device(device), torch.float32)
                assert chosen is (
                    attention.products if form is products else attention.triton_products
                )
            held = CachedSession(model)
            found = decoded(held, ids, 70, mask)
            held.reorder(torch.tensor([1, 1, 2]))
            seen.append((found, held.step(ids[:, :1]), model(ids, use_cache=False).logits))
    close = 2e-4 if dtype == torch.float32 else 8e-2
    for own, right in zip(*reversed(seen), strict=True):
        assert right.std() > 0.3
        torch.testing.assert_close(own, right, atol=close, rtol=close)
