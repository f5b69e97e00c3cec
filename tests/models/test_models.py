"""Models: the same from the same spec, and errors that name the file or the way out."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from effbench.api.schema import build, plain
from effbench.api.shape import Shape
from effbench.api.spec import ModelSpec
from effbench.config.compose import compose
from effbench.models import gguf_convert
from effbench.models import load as models
from effbench.models.gguf_header import config_in, read_header
from effbench.models.load import (
    Loaded,
    _fingerprint_of_ends,
    fingerprint,
    load,
    load_tokenizer,
    shape_of,
    unchanged,
)
from effbench.runner.open import check_rows
from effbench.util import hf
from effbench.util.errors import UserError
from effbench.util.package_data import conf_dir

SMALL = Shape(
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    max_positions=64,
    rope_theta=20000.0,
)


def named(name: str, **changes: Any) -> ModelSpec:
    values = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text())
    return build(ModelSpec, {**values, **changes}, "model")


def small(seed: int = 0, shape: Shape = SMALL) -> ModelSpec:
    return ModelSpec(name="small", source="random", shape=shape, weights_seed=seed)


def on_cpu(spec: ModelSpec, dtype: torch.dtype = torch.float32, **options: Any) -> Loaded:
    return load(spec, device="cpu", dtype=dtype, **options)


def state(loaded: Loaded) -> dict[str, torch.Tensor]:
    return loaded.model.state_dict()


def logits(loaded: Loaded, ids: list[int] | None = None) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.tensor([ids or [5, 9, 200, 31]])).logits


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    loaded = on_cpu(small())
    folder = tmp_path / "saved"
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def folder_spec(folder: Path) -> ModelSpec:
    return ModelSpec(name="folder", source="folder", path=str(folder))


# -- random weights ------------------------------------------------------------------------------


def test_same_seed_same_weights_another_seed_others() -> None:
    first, again, other = (state(on_cpu(small(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first if "proj" in n)


def test_drawing_weights_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    on_cpu(small())
    assert torch.equal(before, torch.get_rng_state())


def test_lower_precision_is_the_rounded_float32_model() -> None:
    full, half = state(on_cpu(small())), state(on_cpu(small(), torch.bfloat16))
    assert all(v.dtype == torch.bfloat16 for v in half.values())
    assert all(torch.equal(full[n].bfloat16(), half[n]) for n in full)


@pytest.mark.parametrize("tied", [False, True])
def test_random_model_has_its_shape(tied: bool) -> None:
    shape = replace(SMALL, tied=tied)
    loaded = on_cpu(small(shape=shape))
    assert sum(p.numel() for p in loaded.model.parameters()) == shape.params
    assert models.shape_in(loaded.model.config.to_dict(), "") == shape == loaded.shape
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == "sdpa"
    assert loaded.model.model.embed_tokens.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_byte_tokenizer_round_trip() -> None:
    tokenizer = load_tokenizer(small())
    text = "Ünïcode 日本 \n\t<tag> 🙂"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert max(ids) < SMALL.vocab_size
    assert tokenizer.decode(ids) == text
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert special == (0, 1, 2)
    batch = tokenizer(["a", "abc"], padding=True, return_tensors="pt")
    assert batch.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_vocabulary_too_small_for_bytes() -> None:
    spec = small(shape=replace(SMALL, vocab_size=100))
    assert on_cpu(spec, tokenizer=False).tokenizer is None
    with pytest.raises(UserError, match="vocab_size=100"):
        load_tokenizer(spec)


def test_random_weights_need_a_shape() -> None:
    with pytest.raises(UserError, match="no shape"):
        on_cpu(ModelSpec(name="x", source="random"))


@pytest.mark.parametrize(("weights", "dtype"), [("compute", torch.bfloat16), ("float32", None)])
def test_weights_are_held_as_asked(weights: Any, dtype: torch.dtype | None) -> None:
    loaded = on_cpu(named("tiny"), torch.bfloat16, weights=weights)
    assert {p.dtype for p in loaded.model.parameters()} == {dtype or torch.float32}


def test_nf4_replaces_the_decoder_linears() -> None:
    dense = on_cpu(named("tiny"))
    packed = on_cpu(named("tiny"), weights="nf4")
    names = {n for n, m in dense.model.named_modules() if type(m) is torch.nn.Linear}
    left = {n for n, m in packed.model.named_modules() if type(m) is torch.nn.Linear}
    assert names - left == {n for n in names if n != "lm_head"}
    assert logits(packed).isfinite().all()


def test_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        load(small(), device="cuda", dtype=torch.float32)


# -- folders -------------------------------------------------------------------------------------


def test_folder_round_trip(saved: Path) -> None:
    random, loaded = on_cpu(small()), on_cpu(folder_spec(saved))
    assert loaded.shape == shape_of(folder_spec(saved)) == SMALL
    assert torch.equal(logits(loaded), logits(random))
    assert loaded.tokenizer("abc").input_ids == random.tokenizer("abc").input_ids
    assert not loaded.model.training


def test_folder_without_padding_token_gets_one(saved: Path) -> None:
    path = saved / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(folder_spec(saved))
    assert tokenizer.pad_token == tokenizer.eos_token == "<eos>"


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_truncated_weights(saved: Path, keep: float) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(UserError, match=f"model.safetensors has .*have {len(content):,}") as caught:
        on_cpu(folder_spec(saved))
    assert "not copied to its end" in caught.value.hint


def test_a_padding_token_without_a_row_is_refused(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pad_token_id": 9999}))
    with pytest.raises(UserError, match="saved cannot be loaded: Padding_idx must be within"):
        on_cpu(folder_spec(saved))


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(saved: Path) -> None:
    loaded = on_cpu(folder_spec(saved))
    models.require_rows(loaded.tokenizer, loaded.shape, "mine")
    loaded.tokenizer.add_tokens([f"<{i}>" for i in range(600)])
    with pytest.raises(
        UserError, match=r"embedding of \d+ rows has none; the first is '<"
    ) as caught:
        models.require_rows(loaded.tokenizer, loaded.shape, "mine")
    assert caught.value.hint.endswith("the embedding was not resized.")
    size = loaded.shape.vocab_size
    made = SimpleNamespace(get_vocab=lambda: {"a": 1, "<unk>": size}, unk_token="<unk>")
    with pytest.raises(UserError, match="has 1 token for which") as caught:
        models.require_rows(made, loaded.shape, "mine")
    assert "names none: name one that the tokenizer has" in caught.value.hint
    loaded.tokenizer.save_pretrained(saved)
    words = ["model=folder", f"model.path={saved}", "dataset=arithmetic", "dataset.max_length=64"]
    with pytest.raises(UserError, match="rows has none"):
        check_rows(compose("eval", words))


def test_what_transformers_says_is_passed_on(saved: Path) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "none"}))
    with pytest.raises(UserError, match="none") as found:
        on_cpu(folder_spec(saved))
    assert "corrupt" not in found.value.hint


def test_missing_weights_are_not_made_up(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = saved / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"lack 1 weights, .*layers\.1\.mlp\.up_proj"):
        on_cpu(folder_spec(saved))


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_file(saved: Path, gone: str) -> None:
    (saved / gone).unlink()
    with pytest.raises(UserError, match="saved"):
        on_cpu(folder_spec(saved))


def test_corrupt_config(saved: Path) -> None:
    (saved / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json"):
        shape_of(folder_spec(saved))
    with pytest.raises(UserError):
        on_cpu(folder_spec(saved))


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"] * 9}, "number of `layer_types`"),
        ({"model_type": "qwen2", "hidden_size": "wide"}, "'hidden_size' expected int"),
    ],
)
def test_a_config_that_contradicts_itself(saved: Path, change: dict[str, Any], said: str) -> None:
    values = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UserError, match=said):
        shape_of(folder_spec(saved))


def test_stated_shape_must_be_the_files_shape(saved: Path) -> None:
    wrong = replace(folder_spec(saved), shape=replace(SMALL, num_layers=3))
    with pytest.raises(UserError, match=r"num_layers=3, but the files of saved have 2"):
        on_cpu(wrong)


@pytest.mark.parametrize("source", ["folder", "gguf"])
def test_no_such_path(tmp_path: Path, source: Any) -> None:
    spec = ModelSpec(name="x", source=source, path=str(tmp_path / "none"))
    for ask in (shape_of, fingerprint, on_cpu):
        with pytest.raises(UserError, match="There is no"):
            ask(spec)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            {"architectures": ["BertForTokenClassification"]},
            "those of a BertForTokenClassification",
        ),
        ({"model_type": "bert"}, "each of its tokens sees those after it"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "it has an encoder"),
        ({"model_type": "none"}, "knows no model of type 'none'"),
        ({"model_type": "mamba"}, "its layers keep something else"),
    ],
)
def test_what_is_no_decoder_is_refused(saved: Path, config: dict[str, Any], reason: str) -> None:
    path = saved / "config.json"
    base = json.loads(path.read_text())
    del base["architectures"]
    path.write_text(json.dumps({**base, **config}))
    with pytest.raises(UserError, match=reason):
        shape_of(folder_spec(saved))


def test_older_configs_state_theta_at_the_top(saved: Path) -> None:
    path = saved / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"], config["head_dim"]
    path.write_text(json.dumps({**config, "rope_theta": 123.0, "hidden_size": 64}))
    shape = shape_of(folder_spec(saved))
    assert (shape.rope_theta, shape.head_dim) == (123.0, 16)


def test_the_same_folder_elsewhere_has_the_same_fingerprint(saved: Path, tmp_path: Path) -> None:
    first = fingerprint(folder_spec(saved))
    moved = Path(shutil.copytree(saved, tmp_path / "elsewhere"))
    assert fingerprint(folder_spec(moved)) == first
    assert fingerprint(small()) == ""


UNREAD = [".hidden", "README.md", "LICENSE", "optimizer.pt", "trainer_state.json", "a/model.bin"]


@pytest.mark.parametrize("name", UNREAD)
def test_what_loading_does_not_read_is_not_in_the_fingerprint(saved: Path, name: str) -> None:
    first = fingerprint(folder_spec(saved))
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("does not count")
    assert fingerprint(folder_spec(saved)) == first


READ = ["generation_config.json", "chat_template.jinja", "additional_chat_templates/a.jinja"]
READ += ["vocab.txt", "adapter_config.json", "tokenizer.model", "model-00002.safetensors"]


@pytest.mark.parametrize("name", READ)
def test_every_file_that_loading_may_read_is_in_the_fingerprint(saved: Path, name: str) -> None:
    found = [fingerprint(folder_spec(saved))]
    for content in ("{}", "{ }"):
        (saved / name).parent.mkdir(exist_ok=True)
        (saved / name).write_text(content)
        found.append(fingerprint(folder_spec(saved)))
    assert len(set(found)) == 3


def test_weights_that_an_index_names_are_in_the_fingerprint(saved: Path) -> None:
    (saved / "inner").mkdir()
    (saved / "inner" / "part.safetensors").write_text("1")
    index = {"weight_map": {"a": "inner/part.safetensors"}}
    (saved / "model.safetensors.index.json").write_text(json.dumps(index))
    first = fingerprint(folder_spec(saved))
    (saved / "inner" / "part.safetensors").write_text("2")
    assert fingerprint(folder_spec(saved)) != first


@pytest.mark.parametrize("place", [0, 3 << 20, (6 << 20) - 1])
def test_every_byte_of_weights_is_in_the_fingerprint(saved: Path, place: int) -> None:
    """Also those in the middle of a large file, which once were not."""
    content = bytearray(6 << 20)
    (saved / "model.safetensors").write_bytes(content)
    first = fingerprint(folder_spec(saved))
    content[place] = 1
    (saved / "model.safetensors").write_bytes(content)
    assert fingerprint(folder_spec(saved)) != first


def test_files_that_changed_after_the_command_are_not_loaded(saved: Path) -> None:
    spec = replace(folder_spec(saved), fingerprint=fingerprint(folder_spec(saved)))
    assert load_tokenizer(spec)
    (saved / "generation_config.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="have changed since the command was given"):
        load_tokenizer(spec)


def test_fingerprints_of_before_whole_files_were_hashed_still_hold(saved: Path) -> None:
    old = replace(folder_spec(saved), fingerprint=_fingerprint_of_ends(folder_spec(saved)))
    assert len(old.fingerprint) == 16
    assert unchanged(old)
    assert load_tokenizer(old)
    (saved / "config.json").write_text("{}")
    assert not unchanged(old)


# -- GGUF ----------------------------------------------------------------------------------------


GGUF = replace(SMALL, head_dim=8)


@pytest.fixture
def gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small model, written the way llama.cpp lays it out."""
    import gguf
    import numpy as np

    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "small.gguf"
    loaded = on_cpu(small(shape=GGUF))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_block_count(GGUF.num_layers)
    writer.add_context_length(GGUF.max_positions)
    writer.add_embedding_length(GGUF.hidden_size)
    writer.add_feed_forward_length(GGUF.intermediate_size)
    writer.add_head_count(GGUF.num_heads)
    writer.add_head_count_kv(GGUF.num_kv_heads)
    writer.add_key_length(GGUF.head_dim)
    writer.add_layer_norm_rms_eps(GGUF.rms_eps)
    writer.add_rope_freq_base(GGUF.rope_theta)
    writer.add_vocab_size(GGUF.vocab_size)
    letters = list(loaded.tokenizer.get_vocab())
    letters = sorted(letters, key=loaded.tokenizer.get_vocab().get)
    letters += ["ab", *(f"<unused{i}>" for i in range(GGUF.vocab_size - len(letters) - 1))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters)
    writer.add_token_types([3] * 4 + [1] * (GGUF.vocab_size - 4))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, GGUF.num_layers)
    for name, tensor in state(loaded).items():
        heads = {"q_proj": GGUF.num_heads, "k_proj": GGUF.num_kv_heads}.get(name.split(".")[-2])
        if heads:
            half = tensor.view(heads, 2, -1, tensor.shape[-1])
            tensor = half.swapaxes(1, 2).reshape(tensor.shape)
        values = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_spec(path: Path) -> ModelSpec:
    return ModelSpec(name="gguf", source="gguf", path=str(path))


def test_gguf_is_converted_once(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = gguf_spec(gguf_file)
    assert shape_of(spec) == GGUF
    loaded = on_cpu(spec)
    assert loaded.shape == GGUF
    assert capfd.readouterr().err.count("\n") == 1
    rounded = on_cpu(small(shape=GGUF), torch.bfloat16)
    for name, value in state(rounded).items():
        assert torch.equal(state(loaded)[name], value.float()), name
    assert "quantization_config" not in loaded.model.config.to_dict()
    monkeypatch.setattr(gguf_convert, "_convert", lambda *a: pytest.fail("converted again"))
    assert torch.equal(logits(on_cpu(spec)), logits(loaded))


def test_corrupt_conversion_is_made_anew(gguf_file: Path) -> None:
    spec = gguf_spec(gguf_file)
    first = logits(on_cpu(spec))
    (weights,) = (gguf_file.parent / "cache" / "models").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    assert torch.equal(logits(on_cpu(spec)), first)


@pytest.mark.parametrize("damage", ["empty", "text", "header", "weights"])
def test_corrupt_gguf(gguf_file: Path, damage: str) -> None:
    content = gguf_file.read_bytes()
    damaged = {
        "empty": b"",
        "text": b"not a model" * 99,
        "header": content[:700],
        "weights": content[: len(content) // 2],
    }
    gguf_file.write_bytes(damaged[damage])
    with pytest.raises(UserError, match=r"small\.gguf cannot be read as GGUF") as caught:
        on_cpu(gguf_spec(gguf_file))
    assert "truncated or corrupt" in caught.value.hint
    assert not list((gguf_file.parent / "cache").rglob("config.json"))


def test_gguf_cut_inside_its_last_tensor(gguf_file: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"small\.gguf cannot be"):
        on_cpu(gguf_spec(gguf_file))


def test_full_disk_while_converting(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM

    def full(self: Any, *arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(UserError, match="No space is left"):
        on_cpu(gguf_spec(gguf_file))
    assert not list((gguf_file.parent / "cache").rglob("*.json"))


def test_fingerprint_of_a_gguf_file(gguf_file: Path) -> None:
    first = fingerprint(gguf_spec(gguf_file))
    content = gguf_file.read_bytes()
    gguf_file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint(gguf_spec(gguf_file)) != first != ""


def shorter(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["num_hidden_layers"] = 1


def biased(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(64)


def wider(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["vocab_size"] = 400


def fewer_heads(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    config["num_key_value_heads"] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shorter,
            r"9 weights that its config has no place for.*layers\.1\.input_layernorm",
        ),
        (
            biased,
            r"1 weights that its config has no place for.*self_attn\.q_proj\.bias",
        ),
        (wider, r"has the sizes \[300, 32\] in the files of .*, but \[400, 32\] by its config"),
        (fewer_heads, r"k_proj\.weight has the sizes \[32, 32\] .*, but \[16, 32\]"),
    ],
)
def test_weights_that_the_config_does_not_fit_are_no_other_model(
    change: Callable[..., None], message: str, saved: Path
) -> None:
    file, weights = saved / "config.json", saved / "model.safetensors"
    config, tensors = json.loads(file.read_text()), load_file(weights)
    change(config, tensors)
    file.write_text(json.dumps(config))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(UserError, match=message):
        on_cpu(ModelSpec(name="mine", source="folder", path=str(saved)))


def test_angles_that_older_files_hold_are_no_weights(saved: Path) -> None:
    weights = saved / "model.safetensors"
    angles = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file({**load_file(weights), **angles}, weights, metadata={"format": "pt"})
    found = on_cpu(ModelSpec(name="mine", source="folder", path=str(saved)))
    assert torch.equal(logits(found), logits(on_cpu(small())))


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": []}', "{"])
def test_an_index_that_is_none_is_left_to_whoever_loads(text: str, saved: Path) -> None:
    (saved / "model.safetensors.index.json").write_text(text)
    assert fingerprint(ModelSpec(name="mine", source="folder", path=str(saved)))


def test_a_config_that_is_no_object_is_named(saved: Path) -> None:
    (saved / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json is no JSON object"):
        shape_of(ModelSpec(name="mine", source="folder", path=str(saved)))


# -- hub -----------------------------------------------------------------------------------------


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hf.hub_reachable.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: pytest.fail("asked the network"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))


def test_hub_without_network_names_what_works(no_hub: None) -> None:
    with pytest.raises(UserError, match="gpt-nobody cannot be had from the model hub") as caught:
        on_cpu(ModelSpec(name="hub", source="hub", id="nobody/gpt-nobody"))
    assert "smollm2-135m, tiny" in caught.value.hint


def test_impossible_hub_id(no_hub: None) -> None:
    spec = ModelSpec(name="hub", source="hub", id="not / an id")
    for ask in (shape_of, on_cpu):
        with pytest.raises(UserError, match="not / an id"):
            ask(spec)


def test_hub_model_from_an_earlier_download(no_hub: None, saved: Path, tmp_path: Path) -> None:
    commit = "0" * 40
    home = tmp_path / "models--org--small"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    (home / "snapshots").mkdir()
    saved.rename(home / "snapshots" / commit)
    spec = ModelSpec(name="hub", source="hub", id="org/small")
    assert shape_of(spec) == SMALL
    assert torch.equal(logits(on_cpu(spec)), logits(on_cpu(small())))
    with pytest.raises(UserError, match="only after its download"):
        shape_of(replace(spec, revision="other"))


def downloaded(home: Path, commit: str, seed: int, main: bool = True) -> None:
    """Lay out a commit of org/small as the hub's client does, as what main stands for."""
    at = home / "models--org--small"
    loaded = on_cpu(small(seed))
    loaded.model.save_pretrained(at / "snapshots" / commit)
    loaded.tokenizer.save_pretrained(at / "snapshots" / commit)
    if main:
        (at / "refs").mkdir(exist_ok=True)
        (at / "refs" / "main").write_text(commit)


HUB = ["model=hub", "model.id=org/small", "dataset=arithmetic", "hardware.device=cpu"]


def test_a_branch_of_the_hub_is_the_commit_that_it_stood_for(no_hub: None, tmp_path: Path) -> None:
    first, second = "a" * 40, "b" * 40
    downloaded(tmp_path, first, seed=1)
    before = compose("eval", HUB).spec
    assert before.model.fingerprint == first
    downloaded(tmp_path, second, seed=2)
    now = compose("eval", HUB).spec
    assert (now.model.fingerprint, now.key == before.key) == (second, False)
    for spec, seed in ((before, 1), (now, 2)):  # an earlier run's is still the earlier one
        assert torch.equal(logits(on_cpu(spec.model)), logits(on_cpu(small(seed))))


def test_a_commit_itself_needs_no_pin_and_another_revision_gets_its_own(
    no_hub: None, tmp_path: Path
) -> None:
    downloaded(tmp_path, "a" * 40, seed=1)
    (tmp_path / "models--org--small" / "refs" / "v2").write_text("c" * 40)
    assert not compose("eval", [*HUB, f"model.revision={'d' * 40}"]).spec.model.fingerprint
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(plain(compose("eval", HUB).spec)))
    again, other = (
        compose("eval", [str(file), *more]).spec.model for more in ([], ["model.revision=v2"])
    )
    assert (again.fingerprint, other.fingerprint) == ("a" * 40, "c" * 40)


@pytest.mark.parametrize("noted", ["", "a" * 39, "no commit"])
def test_a_damaged_note_of_the_hubs_client_is_no_commit(
    noted: str, no_hub: None, tmp_path: Path
) -> None:
    downloaded(tmp_path, "a" * 40, seed=1)
    (tmp_path / "models--org--small" / "refs" / "main").write_text(noted)
    assert hf.commit_of("org/small") == ""


def test_the_hub_is_asked_once_and_the_answer_kept(
    no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def repo_info(self: Any, name: str, **options: Any) -> Any:
        asked.append((name, options["repo_type"], options["revision"]))
        return SimpleNamespace(sha="e" * 40)

    monkeypatch.setattr(hf, "hub_reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", repo_info)
    hf._asked.cache_clear()
    for _ in range(2):
        assert hf.commit_of("org/rows", kind="dataset") == "e" * 40
        hf._asked.cache_clear()
    assert asked == [("org/rows", "dataset", "main")]
    words = ["model=tiny", "dataset.source=hub", "dataset.id=org/rows", "hardware.device=cpu"]
    assert compose("eval", words).spec.dataset.fingerprint == "e" * 40


@pytest.mark.parametrize("words", [["model=hub", "model.id=org/small"],
                                   ["dataset.source=hub", "dataset.id=org/small"]])  # fmt: skip
def test_a_folder_is_not_taken_for_a_name_on_the_hub(
    words: list[str], no_hub: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="id=org/small is on this machine, not on the hub"):
        compose("eval", [*words, "hardware.device=cpu"])


def test_offline_is_left_as_it_was() -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with hf.offline():
        assert constants.HF_HUB_OFFLINE
    assert before == constants.HF_HUB_OFFLINE


# -- configs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("smollm2-135m", 134_515_008),
        ("tinyllama-1.1b", 1_100_048_384),
        ("llama2-7b", 6_738_415_616),
        ("llama3-8b", 8_030_261_248),
    ],
)
def test_named_shapes_have_the_published_size(name: str, params: int) -> None:
    assert shape_of(named(name)).params == params


def test_every_config_is_a_spec_with_a_summary() -> None:
    for path in (conf_dir() / "model").glob("*.yaml"):
        values = yaml.safe_load(path.read_text())
        spec = build(ModelSpec, values, "model")
        assert spec.name == path.stem
        assert path.read_text().startswith("# ")
        if spec.shape and spec.source != "random":
            assert shape_of(replace(spec, source="random")) == spec.shape


def test_shapes_and_fingerprints_need_no_torch(saved: Path) -> None:
    code = (
        "import sys; from effbench.models.load import *; from effbench.api.spec import ModelSpec\n"
        "spec = ModelSpec(name='x', source='folder', path=sys.argv[1])\n"
        "shape_of(spec), fingerprint(spec)\n"
        "print([m for m in ('torch', 'transformers', 'gguf') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(saved)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.real
def test_smollm2_from_its_package() -> None:
    spec = named("smollm2-135m")
    loaded = on_cpu(spec)
    assert sum(p.numel() for p in loaded.model.parameters()) == 134_515_008
    assert shape_of(replace(spec, shape=None)) == spec.shape == loaded.shape
    from effbench.data import assets

    header = read_header(assets.fetch("smollm2-135m") / assets.GGUF)
    assert models.shape_in(config_in(header), "") == spec.shape
    ids = loaded.tokenizer("The capital of France is").input_ids
    assert loaded.tokenizer.decode(logits(loaded, ids)[0, -1].argmax()) == " Paris"
    text = "The sun rises in the east and sets in the west."
    ids = loaded.tokenizer(text).input_ids
    nll = torch.nn.functional.cross_entropy(logits(loaded, ids)[0, :-1], torch.tensor(ids[1:]))
    assert 0.5 < nll.item() < 3.0
    random = named("smollm2-135m", source="random")
    assert load_tokenizer(random)(text).input_ids == ids
