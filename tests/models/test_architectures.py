"""What is counted of an architecture is what its modules have, and what works on it works."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from effbench.api import registry
from effbench.api.cost import cost_of
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.shape import ModelShape
from effbench.api.spec import Plugin
from effbench.api.weights import find
from effbench.methods.chain import resolved, shape_of
from effbench.models.counted import counted
from effbench.models.load import shape_in
from effbench.models.survey import empty_model, require_causal, survey
from effbench.models.written import decoded, encoded
from effbench.nn.decode.session import CachedSession
from effbench.nn.llama.stack import as_linears
from effbench.nn.quant.linears import pack_linears, storage_bytes
from effbench.resources.counting import flops, parameters
from effbench.testing.models import given
from effbench.util.errors import UserError

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT = {**OLD, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
HEADED = {**SIZES, "head_dim": 8}
EXPERTS = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "llama, biased": {**SIZES, "attention_bias": True, "mlp_bias": True},
    "mistral": {**SIZES, "sliding_window": None},
    "mistral, sliding": {**SIZES, "sliding_window": 8},
    "qwen2": SIZES,
    "qwen3": HEADED,
    "phi": SIZES,
    "phi3": SIZES,
    "olmo": SIZES,
    "olmo2": SIZES,
    "stablelm": {**SIZES, "use_qkv_bias": True},
    "gemma": HEADED,
    "gemma2": {**HEADED, "sliding_window": 8},
    "gemma3_text": {**HEADED, "sliding_window": 8},
    "granite": SIZES,
    "cohere": SIZES,
    "smollm3": SIZES,
    "starcoder2": SIZES,
    "glm": HEADED,
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gptj": {**GPT, "rotary_dim": 4},
    "gpt_neox": SIZES,
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {**OLD, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {**OLD, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mixtral": {**EXPERTS, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {**EXPERTS, "num_experts": 4, "head_dim": 8},
    "olmoe": {**EXPERTS, "num_experts": 4},
    "gpt_oss": {**EXPERTS, "num_local_experts": 4, "head_dim": 8},
}
"""Smallest models of the architectures that people bring, by the name in the documentation."""

ODD = ("gpt2", "gpt_neox", "phi3", "qwen2", "mixtral")
"""With transposed and fused linears, with biases, and with experts."""
IDS = torch.arange(12).reshape(2, 6) % 60 + 3


def config(name: str) -> dict[str, Any]:
    kind = name.partition(",")[0]
    found: dict[str, Any] = CONFIG_MAPPING[kind](**MODELS[name]).to_dict()
    return found


@cache
def shape(name: str) -> ModelShape:
    return survey(empty_model(config(name)))


def made(name: str, attention: str | None = None) -> Any:
    torch.manual_seed(0)
    made = CONFIG_MAPPING[name.partition(",")[0]](**MODELS[name])
    model = AutoModelForCausalLM.from_config(
        made, attn_implementation=attention, experts_implementation="eager"
    )
    as_linears(model)
    return model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_what_is_counted_is_what_the_modules_have(name: str) -> None:
    model, cost = made(name, "eager"), cost_of(shape(name), "float32")
    assert cost.params == shape(name).params == parameters(model).total
    assert cost.resident_bytes == storage_bytes(model)
    with torch.no_grad():
        one = flops(lambda: model(input_ids=IDS[:1, :1], use_cache=False))
    assert cost.flops_per_token + 4 * shape(name).attention_width == one
    session = CachedSession(model)
    session.prefill(IDS, torch.ones_like(IDS))
    session.step(IDS[:, :1])
    assert session.kv_bytes() == cost.kv_bytes_per_token * (IDS.numel() + 2)
    require_causal(model)


@pytest.mark.parametrize("name", MODELS)
def test_a_session_says_what_a_pass_says(name: str) -> None:
    model = made(name)
    with torch.no_grad():
        whole = model(input_ids=IDS).logits[:, -1]
    session = CachedSession(model)
    session.prefill(IDS[:, :-1], torch.ones_like(IDS[:, :-1]))
    torch.testing.assert_close(session.step(IDS[:, -1:]), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, method) for name in MODELS for method in ("lora", "full", "rtn")),
        *((name, method) for name in ODD for method in ("dora", "dylora", "qlora")),
    ],
)
def test_methods_that_need_names_alone_change_what_they_count(name: str, method: str) -> None:
    settings = {"rank": 4} if "lora" in method or method == "dora" else {}
    chosen = make_method(Plugin(method, settings))
    ready, model = resolved(chosen, shape(name)), made(name).requires_grad_(False)
    draws = torch.Generator().manual_seed(0)
    ctx = Context(
        seed=0, device=torch.device("cpu"), dtype=torch.float32, generator=draws, load_model=made
    )
    if method == "rtn":
        for part in ready.compress(model, [], ctx):
            part.put(part.make())
    else:
        if method == "qlora":
            pack_linears(model, find("nf4")(), torch.float32)
        model = ready.prepare(model, ctx)
    cost = cost_of(shape_of(ready, shape(name), phase="train"), "float32")
    found = parameters(model)
    trained = found.trainable if method != "rtn" else 0
    assert (cost.params, cost.trainable) == (found.total, trained)
    assert cost.resident_bytes == storage_bytes(model)
    with torch.no_grad():
        assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_methods_that_need_more_say_so_before_anything_is_loaded(name: str) -> None:
    for method, needed in (("layer_drop", ("plain", "llama")), ("gqa", ("plain",))):
        if name == "llama":
            continue
        if shape(name).anatomy not in needed:
            with pytest.raises(UserError, match=f"{method} does not work on this model"):
                resolved(make_method(Plugin(method, {})), shape(name))


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bloom", "llama, biased"])
def test_a_shape_comes_back_from_its_file(name: str) -> None:
    assert decoded(json.loads(json.dumps(encoded(shape(name))))) == shape(name)


def test_a_shape_that_was_damaged_is_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path))
    small = {**config("gpt2"), "n_positions": 77}
    right = counted(small, "it")
    (path,) = (tmp_path / "shapes").iterdir()
    path.write_text(path.read_text().replace("77", "78"))
    assert counted(small, "it") == right
    assert right.max_positions == 77
    path.unlink()
    path.mkdir()
    assert counted(small, "it") == right, "and where it cannot be kept"
    monkeypatch.delattr("effbench.models.counted.surveyed")
    assert counted(small, "it") == right, "there once in a process"


# -- what the documentation says ---------------------------------------------------------------


def row(name: str) -> str:
    found = shape(name)
    linears = found.layers[-1].linears
    blocks = {"other": "own", "llama": "Llama's"}[found.anatomy]
    names = ", ".join(f"`{x}`" for x in found.linear_names)
    packed = "no" if any(x.bare and x.copies > 1 for x in linears) else "yes"
    return f"| {name} | {blocks} | {names} | {packed} |"


def test_the_table_of_architectures_is_what_was_counted() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    first = text.partition("## Methods and architectures")[0]
    rows = [line for line in first.splitlines() if line.endswith(("| yes |", "| no |"))]
    assert rows == [row(name) for name in sorted(MODELS)]


KINDS = {
    "Llama": ("llama",),
    "Llama's blocks, biased": ("llama, biased", "mistral", "qwen2"),
}
"""Columns of the matrix, before those of all other architectures."""


def experts(name: str) -> bool:
    return any(x.copies > 1 for x in shape(name).layers[0].linears)


@cache
def cell(method: str, name: str) -> str:
    """Return whether a method works on an architecture, or what is in its way."""
    try:
        resolved(given(method), shape_in(config(name), name) if name == "llama" else shape(name))
    except UserError as error:
        if "blocks" in error.message:
            return "no: other blocks" if "made as" in error.message else "no: biases"
        assert error.message.startswith("method."), error  # a size of this tiny model
    return "yes"


def matrix() -> list[str]:
    """Return the rows of the documented matrix."""
    own = [n for n in MODELS if not any(n in names for names in KINDS.values())]
    columns = [*KINDS.items(), ("own blocks", tuple(n for n in own if not experts(n)))]
    columns += [("own blocks, experts", tuple(filter(experts, own)))]
    titles = " | ".join(title for title, _ in columns)
    rows = [f"| method | {titles} |", "|---|---|---|---|---|"]
    for method in registry.names("methods"):
        cells = []
        for _, names in columns:
            [found] = {cell(method, name) for name in names}  # one for all of the kind
            cells.append(found)
        rows.append(f"| `{method}` | {' | '.join(cells)} |")
    return rows


def test_the_matrix_of_methods_and_architectures_is_what_they_say() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text()
    assert "\n".join(matrix()) in text, "\n".join(matrix())
