"""What has to lie in a folder before a model is loaded from it: looked at without torch.

transformers says little of a file that is not there, and without a vocabulary it goes on with a
tokenizer of a token or two.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from effbench.util.errors import UserError, printable
from effbench.util.tensor_files import stored_end

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names that transformers looks for, the first that is there; or for an index of several files."""
ADAPTER = "adapter_config.json"
POINTER = b"version https://git-lfs"
"""How a file begins that stands for one which Git LFS has not fetched."""
OTHERS = {"*.gguf": "GGUF", "tf_model*.h5": "TensorFlow", "flax_model*": "Flax", "*.pth": "PyTorch"}
"""Files of weights that are not read here, with whose they are."""
VOCABULARY = (
    "tokenizer.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
    "*.bpe",
    "tekken.json",
)
"""Files of which a tokenizer has at least one."""
TAIL_BYTES = 64
OF_BYTES = ("ByT5Tokenizer", "CanineTokenizer", "PerceiverTokenizer")
"""Tokenizers whose tokens are those of the text itself, so that they have no such file."""


def require_weights(folder: Path) -> None:
    """Refuse a folder whose weights are not all there, or not whole.

    Raises:
        UserError: With the file.
    """
    if (folder / ADAPTER).is_file():
        raise _adapter(folder)
    for file in _weight_files(folder):
        if reason := _not_whole(file):
            raise UserError(f"{file} {reason[0]}.", reason[1])


def require_tokenizer(folder: Path) -> None:
    """Refuse a folder without the files of a tokenizer.

    Raises:
        UserError: With what to put there.
    """
    whole = folder / VOCABULARY[0]
    if whole.is_file() and not _tail(whole).endswith(b"}"):
        raise UserError(f"{whole} is no JSON, or ends too soon.", "Get it anew.")
    if any(file.is_file() for pattern in VOCABULARY for file in folder.glob(pattern)):
        return
    config = _read(folder / "tokenizer_config.json")
    if not isinstance(config, dict) or config.get("tokenizer_class") not in OF_BYTES:
        raise UserError(
            f"{folder} holds no tokenizer: neither tokenizer.json nor another vocabulary.",
            "Copy tokenizer.json and tokenizer_config.json there from where the model is from.",
        )


def no_model(folder: Path) -> UserError:
    """Return what there is to say of a folder, or of a file in its place, without a config.json."""
    if folder.is_file():
        return _file(folder)
    if (folder / ADAPTER).is_file():
        return _adapter(folder)
    if found := sorted(folder.glob("*.gguf")):
        return _file(found[0])
    return UserError(
        f"{folder} holds no config.json.", "Give the folder of a saved transformers model."
    )


def _file(path: Path) -> UserError:
    if path.suffix.lower() == ".gguf":
        return UserError(
            f"{path} is a GGUF file, no folder of transformers.",
            f"Say so: model=gguf model.path={path}",
        )
    return UserError(f"{path} is a file.", f"Give the folder of the model: {path.parent}")


def _adapter(folder: Path) -> UserError:
    """Return what there is to say of a folder with an adapter.

    transformers would load the model that it names, wherever that is, and not what is here.
    """
    config = _read(folder / ADAPTER)
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if (folder / "config.json").is_file():
        return UserError(
            f"{folder} holds a model and an adapter of peft ({ADAPTER}): which is meant?",
            "Move the files of the adapter elsewhere; or merge it, and give the new folder.",
        )
    named = f" for {printable(str(base))}" if base else ""
    return UserError(
        f"{folder} is an adapter of peft{named}, no model.",
        "One that a run made here is used with from=RUN. Another one is merged first: "
        "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW)",
    )


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of weights that transformers would read.

    Raises:
        UserError: When there are none, or an index cannot be read.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = _read(index)
            try:
                return sorted({folder / str(part) for part in parts["weight_map"].values()})
            except (TypeError, LookupError, AttributeError):
                raise UserError(
                    f"{index} does not say which weights lie in which file.", "Get it anew."
                ) from None
    raise _no_weights(folder)


def _no_weights(folder: Path) -> UserError:
    message = f"{folder} holds no weights: neither {' nor '.join(WEIGHTS)}, nor an index of parts."
    if parts := sorted(folder.glob("*.safetensors")):
        return UserError(
            message,
            f"Without {WEIGHTS[0]}.index.json nothing says what is in {parts[0].name}: get it too.",
        )
    for pattern, whose in OTHERS.items():
        for file in sorted(folder.glob(pattern)):
            if whose == "GGUF":
                return UserError(message, f"For the GGUF file: model=gguf model.path={file}")
            return UserError(message, f"{file.name} is {whose}'s own: get the model's safetensors.")
    return UserError(message, "Its download or copy is not complete: get the weights too.")


def _not_whole(file: Path) -> tuple[str, str] | None:
    """Return what is wrong with a file of weights and what to do, None for one that is whole."""
    if not file.is_file():
        return "is not there, and the index of the weights names it", "Get that file too."
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(len(POINTER))
    if start == POINTER:
        return "is a pointer of Git LFS, no weights", "In its repository, run: git lfs pull"
    anew = "It was not copied to its end, or is corrupt: get it anew."
    if file.suffix == ".safetensors":
        try:
            end = stored_end(file)
        except (ValueError, LookupError, TypeError, AttributeError, MemoryError):
            return "has no header that can be read", anew
        if end != size:
            return f"has {size:,} bytes, and should have {end:,}", anew
    elif start.startswith(b"PK") and not zipfile.is_zipfile(file):
        return f"ends too soon, after {size:,} bytes", anew
    return None


def _tail(path: Path) -> bytes:
    """Return the last bytes of a file, without spaces and line ends."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return file.read().rstrip()


def _read(path: Path) -> Any:
    """Return what a file of JSON holds; None where it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
