"""A folder in which something of a model is missing says so before anything is loaded."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest

from effbench.api.spec import ModelSpec
from effbench.models.files import require_tokenizer, require_weights
from effbench.models.load import fetch, fingerprint, load, require_files, shape_of
from effbench.util.errors import UserError


def tensors(length: int = 4) -> bytes:
    """Return a safetensors file of one tensor of 4 bytes, `length` of which are there."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * length


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
ADAPTER = json.dumps({"base_model_name_or_path": "org/base"})


def said(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        require_weights(folder)
    assert str(folder) in caught.value.message
    return str(caught.value)


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ({}, ["holds no weights", "is not complete"]),
        ({"model.safetensors": tensors(3)}, ["model.safetensors has ", "and should have", "anew"]),
        ({"model.safetensors": tensors(5)}, ["and should have"]),
        ({"model.safetensors": b"\xff" * 99}, ["model.safetensors has no header"]),
        ({"model.safetensors": b""}, ["model.safetensors has no header"]),
        (
            {"model.safetensors": "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"},
            ["is a pointer of Git LFS", "git lfs pull"],
        ),
        (
            {"model.safetensors.index.json": INDEX, "model-1.safetensors": tensors()},
            ["model-2.safetensors is not there", "the index of the weights names it"],
        ),
        (
            {
                "model.safetensors.index.json": INDEX,
                "model-1.safetensors": tensors(),
                "model-2.safetensors": tensors(1),
            },
            ["model-2.safetensors has ", "anew"],
        ),
        ({"model.safetensors.index.json": "[]"}, ["index.json does not say which weights"]),
        ({"model-1.safetensors": tensors()}, ["what is in model-1.safetensors", "index.json"]),
        ({"pytorch_model.bin": b"PK\3\4" + b"\0" * 99}, ["pytorch_model.bin ends too soon"]),
        ({"tf_model.h5": b"x"}, ["tf_model.h5 is TensorFlow's own"]),
        ({"x.gguf": b"GGUF"}, ["holds no weights", "model=gguf model.path="]),
        ({"adapter_config.json": ADAPTER}, ["is an adapter of peft for org/base", "from=RUN"]),
        (
            {"adapter_config.json": "no", "config.json": "{}", "model.safetensors": tensors()},
            ["a model and an adapter of peft", "elsewhere"],
        ),
    ],
)
def test_weights_that_cannot_be_loaded_are_named(
    tmp_path: Path, files: dict[str, str | bytes], parts: list[str]
) -> None:
    text = said(tmp_path, files)
    assert all(part in text for part in parts), text


def test_a_run_of_a_folder_begins_with_them(tmp_path: Path) -> None:
    """Commands ask before they start one; grids, teachers and functions of Python come here."""
    spec = ModelSpec("own", "folder", path=str(tmp_path))
    for begin in (fetch, lambda spec: load(spec, device="cpu", dtype=None)):  # type: ignore
        with pytest.raises(UserError, match="holds no weights"):
            begin(spec)


def test_whole_weights_pass(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as file:
        file.writestr("data", "x")
    require_weights(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(tensors())
    require_weights(tmp_path)


def test_a_tokenizer_without_a_vocabulary_is_refused(tmp_path: Path) -> None:
    """transformers makes one with a token or two of nothing."""
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    with pytest.raises(UserError, match="holds no tokenizer"):
        require_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(tensors())
    spec = ModelSpec("own", "folder", path=str(tmp_path))
    with pytest.raises(UserError, match="holds no tokenizer"):
        require_files(spec)
    require_files(spec, tokenizer=False)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    require_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "source.spm").touch()
    require_tokenizer(tmp_path)


def test_what_is_no_folder_of_a_model_says_what_it_is(tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    for path, source, part in (
        (gguf, "folder", f"model=gguf model.path={gguf}"),
        (tmp_path, "folder", f"model=gguf model.path={gguf}"),
        (tmp_path, "gguf", f"Name one in that folder: model.path={gguf}"),
    ):
        with pytest.raises(UserError) as caught:
            shape_of(ModelSpec("own", source, path=str(path)))
        assert part in caught.value.hint
    gguf.unlink()
    (tmp_path / "adapter_config.json").write_text(ADAPTER)
    with pytest.raises(UserError, match="is an adapter of peft for org/base"):
        shape_of(ModelSpec("own", "folder", path=str(tmp_path)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="There is no GGUF file") as caught:
        fingerprint(ModelSpec("own", "gguf", path=str(tmp_path)))
    assert "model=folder" in caught.value.hint
