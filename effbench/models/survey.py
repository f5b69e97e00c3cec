"""The shape of any model of transformers, read off its modules.

A survey looks at a model without weights: linears become `api.parts.Linear`, vectors norms or
biases, and what a pass leaves in a cache is what one more token adds to it. What does not fit is
refused by name, so that nothing is counted wrongly. It needs torch; `models.counted` keeps what was
found for those that have none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig

from effbench.api.examples import IGNORED
from effbench.api.parts import MLP, ROUTERS, Cache, LayerShape, Linear, Mixer, Norm, Readout
from effbench.api.shape import AnyShape, ModelShape
from effbench.models.written import KIND, encoded
from effbench.nn.llama.experts import Experts, has_experts
from effbench.nn.llama.stack import as_linears, decoder_layers, fix_positions, slides
from effbench.nn.llama.walk import is_llama
from effbench.nn.model_kinds.base import CAUSAL, find, kind_of
from effbench.nn.quant.linears import persistent_buffers
from effbench.util.errors import UserError

PROBE_TOKENS = 3
"""Tokens that are read to see what the cache keeps."""
PROBED = 8
"""Tokens of the texts that differ in the last one."""
ROUNDING = 0.02
"""Largest difference between logits, over the largest of them, that may come from rounding."""
ATTENDING = ("Attention", "Attn")
"""What the class of a block's attention has in its name."""
OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Names of the last linear of an attention, which some classes name before the others."""


def empty_model(values: Mapping[str, Any], kind: str = "") -> Any:
    """Return a model of a config, in evaluation mode, its tensors on the meta device.

    Raises:
        UserError: As `model_of`.
    """
    return model_of(values, kind, "meta", torch.bfloat16)


def model_of(values: Mapping[str, Any], kind: str, device: str, dtype: torch.dtype) -> Any:
    """Return a model of a config as transformers makes it, in evaluation mode.

    Args:
        values: As in `config.json`.
        kind: A file in `nn/model_kinds`; empty for a causal model.
        device: Where its tensors are made.
        dtype: Of its weights.

    Raises:
        UserError: When transformers has no model of that kind, or cannot make it.
    """
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from effbench.util.hf import quiet, reason_of

    family, auto = str(values.get("model_type", "")), find(kind or CAUSAL).auto
    if family not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"transformers knows no model of type {family!r}.",
            f"Choose a model that {auto} loads.",
        )
    try:
        config: PreTrainedConfig = transformers.CONFIG_MAPPING[family].from_dict(dict(values))
        with quiet(), torch.device(device):
            model = getattr(transformers, auto).from_config(config, dtype=dtype)
            find(kind or CAUSAL).adjust(model, values)
        as_linears(model)
        fix_positions(model)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        ImportError,
        StrictDataclassError,
    ) as error:
        raise UserError(
            f"transformers cannot make a model of type {family!r}: {reason_of(error)}.",
            f"Choose a model that {auto} loads.",
        ) from error
    return model.eval()


def survey(model: Any) -> ModelShape:
    """Return the shape of a model of transformers as its modules have it.

    Args:
        model: On the meta device; nothing is computed.

    Raises:
        UserError: For a model that is more or something else than blocks of attention and MLP
            between an embedding and a head.
    """
    config, kind = model.config, kind_of(model)
    blocks = decoder_layers(model)
    embedding = model.get_input_embeddings().weight
    readout = _readout(model, embedding)
    outside = _Outside.of(model, blocks, embedding)
    width = int(embedding.shape[1])
    caches = _caches(model, len(blocks)) if kind.caches else [Cache()] * len(blocks)
    active = _active_experts(config)
    encoder = kind.encoding(model)
    layers = tuple(
        _layer(model, block, cache, width, active, 2 if encoder and index >= encoder else 1)
        for index, (block, cache) in enumerate(zip(blocks, caches, strict=True))
    )
    norms = outside.norms
    if not readout.learns:
        final, *others = norms[::-1] or [Norm(0)]
        readout, norms = replace(readout, norm=final), tuple(others)
    found = ModelShape(
        layers=layers,
        embed=Linear("embed_tokens", int(embedding.shape[0]), width),
        readout=readout,
        tables=outside.tables,
        norms=norms,
        max_positions=kind.positions(config),
        rope_theta=_theta(config),
        rms_eps=float(getattr(config, "rms_norm_eps", None) or 1e-6),
        head_dim=max((x.mixer.head_dim for x in layers if x.mixer), default=0),
        anatomy="llama" if is_llama(model) and not slides(config) else "other",
        family=str(config.model_type),
        kind=kind.name,
        encoder=encoder,
        fixed=sum(b.numel() for b in persistent_buffers(model) if b.is_floating_point()),
    )
    hold(found, model)
    return found


def _readout(model: Any, embedding: torch.Tensor) -> Readout:
    """Return what gives a model's logits, the norm before it aside where it has no heads.

    Raises:
        UserError: When nothing does.
    """
    parts = [part for _, head in kind_of(model).heads(model) for part in head.modules()]
    if not parts:
        head = model.get_output_embeddings()
        if head is None or head.weight.ndim != 2:
            raise _odd(model, "it has no head that gives logits")
        return Readout(Norm(0), _linear("lm_head", head), head.weight is embedding)
    multiplying = [part for part in parts if isinstance(part, torch.nn.Linear)]
    linears = [_linear("head", part) for part in multiplying]
    counted = {id(p) for part in multiplying for p in part.parameters(recurse=False)}
    norms = [
        norm
        for part in parts
        for norm in _vectors(
            {n: p for n, p in part.named_parameters(recurse=False) if id(p) not in counted}
        )
    ]
    config = model.config
    outputs = config.vocab_size if kind_of(model).speaks else config.num_labels
    if not linears or linears[-1].d_out != outputs or len(norms) > 1:
        what = "token" if kind_of(model).speaks else "class"
        raise _odd(model, f"its head is not made of linears that end in one logit a {what}")
    tied = multiplying[-1].weight is embedding
    first = tuple(linears[:-1])
    return Readout([*norms, Norm(0)][0], linears[-1], tied, before=first, learns=True)


def hold(shape: AnyShape, model: Any) -> None:
    """Refuse a shape that has another number of parameters or other linears than a model has.

    Args:
        shape: Of the model.
        model: With its weights or without, nothing of it packed or adapted.

    Raises:
        UserError: With what differs.
    """
    found = sum(p.numel() for p in model.parameters())
    if found != shape.params:
        raise UserError(
            f"{type(model).__name__} has {found:,} parameters, but its config says "
            f"{shape.params:,}.",
            "The config does not belong to these weights, or effbench counts them wrongly.",
        )
    bare = {(i, x.name) for i, layer in enumerate(shape.layers) for x in layer.linears if x.bare}
    named = [
        (index, name, m.in_features, m.out_features)
        for index, block in enumerate(decoder_layers(model))
        for name, m in _linears_in(block)
        if (index, name) not in bare
    ]
    counted = [x for x in shape.linears() if x[:2] not in bare]
    if sorted(named) != sorted(counted):
        odd = sorted({*named} ^ {*counted})
        index, name, d_in, d_out = odd[0] if odd else sorted(named)[0]
        raise UserError(
            f"The linear layers of {type(model).__name__} are not those that its config says: "
            f"{name} of layer {index}, {d_in} x {d_out}, is one of them only.",
            "The config does not belong to these weights, or effbench counts them wrongly.",
        )


@torch.inference_mode()
def require_causal(model: Any) -> None:
    """Refuse a model of which a token changes what is predicted before it.

    Raises:
        UserError: When it does.
    """
    device = model.get_input_embeddings().weight.device
    rows = torch.arange(2 * PROBED, device=device).reshape(2, PROBED) % model.config.vocab_size
    rows[1, :-1] = rows[0, :-1]
    first, second = (model(input_ids=row[None], use_cache=False).logits[0, :-1] for row in rows)
    # Tokens are multiplied in groups, whose sizes change how sums are rounded.
    allowed = ROUNDING * first.abs().amax() if has_experts(model) else 0.0
    if (first - second).abs().amax() > allowed:
        raise UserError(
            f"{type(model).__name__} is no causal language model: its tokens see those after them.",
            "Give a decoder-only model.",
        )


@torch.inference_mode()
def require_same_when_padded(model: Any) -> None:
    """Refuse a model whose answer depends on what stands behind a text, where nothing is.

    Raises:
        UserError: When it does.
    """
    device = model.get_input_embeddings().weight.device
    row = torch.arange(PROBED, device=device)[None] % model.config.vocab_size
    asked, ignored = slice(PROBED // 2 - 1, PROBED - 1), torch.full_like(row, IGNORED)
    labels = torch.cat([ignored[:, : PROBED // 2], row[:, PROBED // 2 :]], 1)
    alone = kind_of(model).logits(model, row, torch.ones_like(row), labels)[:, asked]
    wide, mask = (torch.cat([x, x * 0], 1) for x in (row, torch.ones_like(row)))
    beside, both = wide.flip(1), torch.ones_like(mask)  # so that the batch is as wide as it
    rows = torch.cat([wide, beside]), torch.cat([mask, both])
    known = torch.cat([torch.cat([labels, ignored], 1), torch.cat([ignored, row], 1)])
    padded = kind_of(model).logits(model, *rows, known)[:1, asked]
    if (alone - padded).abs().amax() > ROUNDING * alone.abs().amax():
        raise UserError(
            f"{type(model).__name__} answers otherwise when padding stands behind a text.",
            "Choose a model that takes an attention mask.",
        )


@dataclass(frozen=True)
class _Outside:
    """What of a model is neither in its blocks nor its embedding nor its head."""

    tables: tuple[Linear, ...]
    norms: tuple[Norm, ...]

    @classmethod
    def of(cls, model: Any, blocks: torch.nn.Module, embedding: torch.Tensor) -> _Outside:
        """Return it.

        Raises:
            UserError: When there is anything but norms and tables.
        """
        heads = [part for _, head in kind_of(model).heads(model) for part in head.modules()]
        inside = {*blocks.modules(), *(heads or [model.get_output_embeddings()])}
        tables, norms = [], []
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Embedding):
                if module.weight is not embedding and "weight" in module._parameters:
                    sizes = module.num_embeddings, module.embedding_dim
                    tables.append(Linear(_last(name), *sizes))
            elif module in inside:
                continue
            elif own := dict(module.named_parameters(recurse=False)):
                if any(p.ndim != 1 for p in own.values()):
                    raise _odd(model, f"{name} stands outside its blocks")
                norms += _vectors(own)
        return cls(tuple(tables), tuple(norms))


class _Block:
    """Sorts the tensors of one block into those of its attention and those of its MLP."""

    def __init__(
        self, model: Any, block: torch.nn.Module, width: int, active: int, attentions: int
    ) -> None:
        self.model, self.width, self.active = model, width, active
        attending = tuple(n for n, m in _children(block) if _attends(m))
        if len(attending) != attentions:
            found = f"a {type(block).__name__} has {len(attending)} attentions"
            raise _odd(model, f"{found}, not {attentions}")
        self.own: list[Norm] = []
        self.linears: dict[bool, list[Linear]] = {True: [], False: []}
        self.norms: dict[bool, list[Norm]] = {True: [], False: []}
        inside = [name for name, module in block.named_modules() if isinstance(module, Experts)]
        for name, module in block.named_modules():
            mixes = f"{name}.".startswith(tuple(f"{path}." for path in attending))
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, Experts):
                self.linears[mixes] += self._split(module)
            elif isinstance(module, torch.nn.Linear):
                if not any(name.startswith(f"{path}.") for path in inside):
                    self.linears[mixes].append(_linear(_last(name), module))
            elif isinstance(module, torch.nn.Embedding):
                continue  # a table, see `_Outside`
            elif any(p.ndim > 1 for p in own.values()):
                self.linears[mixes] += self._tensors(name, own)
            elif "." not in name and name not in attending:
                self.own += _vectors(own)
            else:
                self.norms[mixes] += _vectors(own)
        self.norms[False] += self.own[2:]

    def _tensors(self, name: str, own: dict[str, torch.Tensor]) -> Iterator[Linear]:
        """Yield what a module with matrices of its own multiplies by."""
        vectors = {n: p for n, p in own.items() if p.ndim == 1}
        experts = {n: p for n, p in own.items() if p.ndim == 3}
        for key, tensor in own.items():
            if key in vectors or (f"{key.removesuffix('_bias')}" in experts and key not in experts):
                continue
            if tensor.ndim == 3:
                yield self._experts(f"{_last(name)}.{key}", tensor, f"{key}_bias" in own)
            elif key == "weight" and _last(name) in ROUTERS:
                out, d_in = tensor.shape
                bias = any(len(v) == out for v in vectors.values())
                yield Linear(_last(name), d_in, out, bias=bias, bare=True)
            else:
                raise _odd(self.model, f"{name} has a tensor {key} {list(tensor.shape)}")

    def _split(self, experts: Experts) -> Iterator[Linear]:
        """Yield the linears that each of a layer's experts has."""
        self._require_active()
        for name, module in experts[0].named_children():
            yield replace(_linear(name, module), copies=len(experts), active=self.active)

    def _require_active(self) -> None:
        if not self.active:
            raise _odd(self.model, "its config does not say how many experts a token goes through")

    def _experts(self, name: str, tensor: torch.Tensor, bias: bool) -> Linear:
        """Return all experts' matrices of one kind, [E, d_out, d_in] or [E, d_in, d_out]."""
        self._require_active()
        copies, first, second = tensor.shape
        down = "down" in name
        d_out, d_in = (
            (first, second) if (first if down else second) == self.width else (second, first)
        )
        return Linear(name, d_in, d_out, copies=copies, active=self.active, bias=bias, bare=True)

    def mlp(self) -> MLP | None:
        """Return its MLP."""
        linears = tuple(self.linears[False])
        if not linears:
            return None
        chosen = [x for x in linears if x.name not in ROUTERS]
        into = [x for x in chosen if any(word in x.name for word in ("gate", "up"))]
        out = [x for x in chosen if x.d_out == self.width and x not in into]
        neurons = sum(x.d_in * int(x.active) for x in out)
        entering = sum(x.d_out * int(x.active) for x in chosen if x not in out)
        return MLP(linears, neurons, norms=tuple(self.norms[False]), gated=entering > neurons)


def _layer(
    model: Any,
    block: torch.nn.Module,
    cache: Cache,
    width: int,
    active: int,
    attentions: int,
) -> LayerShape:
    parts = _Block(model, block, width, active, attentions)
    heads = _number(model.config, "num_attention_heads", "n_heads", "n_head")
    if not cache.per_token:
        head_dim = _number(model.config, "head_dim") or width // heads
        heads = kv_heads = attentions * heads
    else:
        kv_heads = min(heads, int(cache.keys)) if cache.width > 1 else heads
        head_dim = cache.width if cache.width > 1 else int(cache.keys) // heads
    linears = sorted(parts.linears[True], key=lambda x: x.name in OUTPUTS)
    mixer = Mixer(tuple(linears), heads, kv_heads, head_dim, cache, norms=tuple(parts.norms[True]))
    first, second = [*parts.own, Norm(0), Norm(0)][:2]
    return LayerShape(mixer, parts.mlp(), (first, second))


def _caches(model: Any, layers: int) -> list[Cache]:
    """Return what each block adds to a growing cache of keys and values, by a pass.

    Raises:
        UserError: When it keeps something else.
    """
    cache, config = DynamicCache(), model.config
    config.pad_token_id = None  # else the ids, which are not there, are looked through for it
    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise _odd(model, f"a pass with a cache of keys and values fails ({reason})") from error
    if len(cache.layers) != layers or any(_tokens(x) != PROBE_TOKENS for x in cache.layers):
        raise _odd(model, "its layers keep something else than a key and a value for each token")
    kept: list[Any] = list(cache.layers)
    return [_cache(x.keys, x.values) for x in kept]


def _tokens(layer: Any) -> int:
    keys = getattr(layer, "keys", None)
    return int(keys.shape[2]) if keys is not None and keys.ndim == 4 else 0


def _cache(keys: torch.Tensor, values: torch.Tensor) -> Cache:
    """Return what one token adds, from keys and values [B, H, T, D]."""
    if keys.shape[3] == values.shape[3]:
        return Cache(keys.shape[1], values.shape[1], keys.shape[3])
    return Cache(keys.shape[1] * keys.shape[3], values.shape[1] * values.shape[3], 1)


def _linears_in(block: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear):
            yield _last(name), module


def _linear(name: str, module: Any) -> Linear:
    sizes = module.in_features, module.out_features
    return Linear(name, *sizes, bias=module.bias is not None, bare=name in ROUTERS)


def _vectors(own: Mapping[str, torch.Tensor]) -> list[Norm]:
    """Return a module's vectors as norms: a weight with its bias, and every other one."""
    sizes = {name: p.numel() for name, p in own.items() if p.ndim == 1}
    both = "weight" in sizes and sizes.get("bias") == sizes["weight"]
    if both:
        del sizes["bias"]
    return [Norm(size, bias=both and name == "weight") for name, size in sizes.items()]


def _children(block: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules that a block is made of, those in a list of its own each for itself."""
    for name, module in block.named_children():
        if isinstance(module, torch.nn.ModuleList):
            yield from ((f"{name}.{index}", inner) for index, inner in module.named_children())
        else:
            yield name, module


def _attends(module: torch.nn.Module) -> bool:
    return any(word in type(module).__name__ for word in ATTENDING)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _number(config: Any, *names: str) -> int:
    """Return the first of some numbers that a config has, else 0."""
    found = (getattr(config, name, None) for name in names)
    return next((x for x in found if isinstance(x, int)), 0)


def _active_experts(config: Any) -> int:
    return _number(config, "num_experts_per_tok", "moe_k", "moe_topk", "experts_per_token")


def _theta(config: Any) -> float:
    rope = getattr(config, "rope_parameters", None) or {}
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


def _odd(model: Any, reason: str) -> UserError:
    return UserError(
        f"{type(model).__name__} cannot be counted: {reason}.",
        "effbench works on decoders made of blocks of attention and MLP.",
    )


def main() -> None:
    """Survey the model whose config stands on standard input; print its shape as JSON."""
    import json
    import sys

    try:
        config = json.load(sys.stdin)
        answer = encoded(survey(empty_model(config, config.pop(KIND, ""))))
    except UserError as error:
        answer = {"message": error.message, "hint": error.hint}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
