"""The weights and the shape of a transformers model, in the form of the compiled engine.

Supported are the model types of `SUPPORTED`, whose layers differ in few details: biases, norms of queries and keys,
norms behind attention and MLP, soft caps, sliding windows, activation and rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vineppo.sampling.engine.library import CompiledModel, Library, Shape
from vineppo.sampling.torch.packed import adds_a_product
from vineppo.types import UserError

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Values of `config.model_type` that the engine computes."""
_ACTIVATIONS = {"silu": 0, "swish": 0, "gelu_pytorch_tanh": 1, "gelu": 2}
_FIXED_ROPE = {"default", "linear", "llama3", "yarn"}
"""Kinds of rotary positions whose angles depend only on the position."""
_NORMS = {
    "before_attention": "input_layernorm",
    "before_mlp": "post_attention_layernorm",
    "query": "self_attn.q_norm",
    "key": "self_attn.k_norm",
}
"""For each norm of a layer, the name of its module. Models without the module do not have the norm."""
_NORMS_OF_GEMMA = _NORMS | {
    "after_attention": "post_attention_layernorm",
    "before_mlp": "pre_feedforward_layernorm",
    "after_mlp": "post_feedforward_layernorm",
}
_LINEAR = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def unsupported(model: Any) -> str:
    """Return why the engine cannot compute a model, or an empty text if it can.

    Everything that the engine does not know must be refused, because it would make samples wrong without an error:
    wrappers of peft around norms and embeddings, hooks, replaced functions, and classes that extend a family.
    """
    config = model.config.get_text_config()
    base = _without_adapters(model)
    if config.model_type not in SUPPORTED:
        return f"the engine does not know models of type {config.model_type}"
    if not _is_of(base, "ForCausalLM") or getattr(config, "use_bidirectional_attention", False):
        return f"the engine does not know models of the class {type(base).__name__} with this configuration"
    if kinds := set(_rope_kinds(config)) - _FIXED_ROPE:
        return f"the engine does not know rotary positions of type {', '.join(sorted(kinds))}"
    if _activation(config) not in _ACTIVATIONS:
        return f"the engine does not know the activation {_activation(config)}"
    if next(model.parameters()).device.type != "cpu":
        return "the engine computes on the CPU only"
    decoder = base.model
    if hasattr(decoder, "rotary_emb_local"):
        return "the engine needs a newer version of transformers for this model"
    for module in model.modules():
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            return f"a {type(module).__name__} has a hook or another function forward"
    return _unknown_module(model, decoder, config.model_type)


def _unknown_module(model: Any, decoder: Any, model_type: str) -> str:
    """Return which module the engine does not know, or an empty text."""
    for layer in decoder.layers:
        for name in _LINEAR.values():
            if _linear_parts(layer.get_submodule(name)) is None:
                return f"the engine does not know adapters of the kind in {name}"
    norms = [
        norm for layer in decoder.layers for name in _norms_of(model_type).values() if (norm := _find(layer, name))
    ]
    if not all(_is_of(norm, "RMSNorm") and "weight" in norm._parameters for norm in (*norms, decoder.norm)):
        return "the engine does not know adapters of norms"
    head, embedding = model.get_output_embeddings(), decoder.embed_tokens
    if type(head) is not nn.Linear or "weight" not in head._parameters:
        return "the engine does not know adapters of the output layer"
    if type(embedding) is not nn.Embedding and not _is_of(embedding, "ScaledWordEmbedding"):
        return "the engine does not know adapters of embeddings"
    if model_type.startswith("gemma") and not hasattr(embedding, "embed_scale"):
        return "the engine needs a newer version of transformers for this model"
    if "weight" not in embedding._parameters or embedding.weight.shape != head.weight.shape:
        return "the embedding and the output layer have different sizes"
    if any(parameter.is_inference() for parameter in model.parameters()):
        return "the weights were made in inference mode, so changes of them cannot be noticed"
    return ""


def _is_of(module: Any, ending: str) -> bool:
    """Return whether the class of a module is one of transformers' models, and its name has the ending."""
    cls = type(module)
    return cls.__module__.startswith("transformers.models.") and cls.__name__.endswith(ending)


def _find(layer: Any, path: str) -> Any:
    """Return a module within a layer, or None if the layer does not have it."""
    for name in path.split("."):
        layer = getattr(layer, name, None)
    return layer


def _norms_of(model_type: str) -> dict[str, str]:
    return _NORMS_OF_GEMMA if model_type in ("gemma2", "gemma3_text") else _NORMS


def _rope_kinds(config: Any) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return [p.get("rope_type", p.get("type", "default")) or "default" for p in nested or [parameters]]


def _activation(config: Any) -> str:
    named = config.hidden_activation if config.model_type in ("gemma2", "gemma3_text") else config.hidden_act
    return str(named)


def _without_adapters(model: Any) -> Any:
    """Return the model of transformers that peft has wrapped, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _linear_parts(module: Any) -> list[torch.Tensor] | None:
    """Return the tensors that the product of a linear layer depends on, or None if the layer is of an unknown kind."""
    if type(module) is nn.Linear:
        return [t for t in (module.weight, module.bias) if t is not None]
    if not adds_a_product(module):
        return None
    return [
        *(t for t in (module.base_layer.weight, module.base_layer.bias) if t is not None),
        *(t for name in _adapters(module) for t in (module.lora_A[name].weight, module.lora_B[name].weight)),
    ]


def _adapters(module: Any) -> list[str]:
    """Return the names of the active adapters that a linear layer with LoRA has."""
    return [name for name in module.active_adapters if name in module.lora_A]


def _linear(module: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the weight, with the adapters added in float32, and the bias of a linear layer."""
    base = module if type(module) is nn.Linear else module.base_layer
    weight = base.weight.detach().float()
    if base is not module:
        for name in _adapters(module):
            product = module.lora_B[name].weight.detach().float() @ module.lora_A[name].weight.detach().float()
            weight = weight + module.scaling[name] * product
    return _numbers(weight), None if base.bias is None else _numbers(base.bias)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


@dataclass(frozen=True)
class _Part:
    """A part of the weights: what it depends on, and how it is copied to the engine."""

    tensors: list[torch.Tensor]
    factors: tuple[Any, ...]
    """Other numbers that it depends on: names and scales of adapters."""
    copy: Callable[[], None]

    def equals(self, other: _Part | None) -> bool:
        """Return whether the tensors are the same objects, with the same factors."""
        return (
            other is not None
            and len(self.tensors) == len(other.tensors)
            and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))
            and self.factors == other.factors
        )


class EngineModel:
    """The copy of a transformers model that the engine computes with. `refresh` copies weights that have changed.

    Args:
        library: the compiled library.
        model: a model for which `unsupported` returns an empty text.
    """

    def __init__(self, library: Library, model: Any):
        self.library, self.model = library, model
        self.config = model.config.get_text_config()
        self._norm_offset = 1.0 if self.config.model_type.startswith("gemma") else 0.0
        kinds = list(dict.fromkeys(getattr(self.config, "layer_types", None) or ["full_attention"]))
        self._rope_tables = kinds if self.config.model_type == "gemma3_text" else kinds[:1]
        self._build()

    def _build(self) -> None:
        """Make a new copy, without weights."""
        self.decoder = _without_adapters(self.model).model
        self.compiled = CompiledModel(self.library, self._shape())
        self._positions = 0
        self._copied: dict[tuple[int, str], tuple[_Part, list[int], int]] = {}
        for number, layer in enumerate(self.decoder.layers):
            kind = getattr(layer.self_attn, "layer_type", None)
            table = self._rope_tables.index(kind) if kind in self._rope_tables else 0
            window = getattr(layer.self_attn, "sliding_window", None) or _window(self.config)
            self.compiled.set_layer(number, table, window)

    def _shape(self) -> Shape:
        config, attention = self.config, self.decoder.layers[0].self_attn
        head, embedding = self.model.get_output_embeddings(), self.decoder.embed_tokens
        softcap = config.attn_logit_softcapping if config.model_type == "gemma2" else None
        final = config.final_logit_softcapping if config.model_type in ("gemma2", "gemma3_text") else None
        return Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=attention.head_dim,
            intermediate=config.intermediate_size,
            vocabulary=head.weight.shape[0],
            rope_tables=len(self._rope_tables),
            tied=int(head.weight is embedding.weight),
            activation=_ACTIVATIONS[_activation(config)],
            epsilon=config.rms_norm_eps,
            attention_scale=attention.scaling,
            attention_softcap=softcap or 0.0,
            logit_softcap=final or 0.0,
            embedding_scale=float(embedding.embed_scale.to(embedding.weight.dtype)) if self._norm_offset else 1.0,
        )

    def refresh(self, positions: int, version: int, in_use: bool = False) -> None:
        """Copy the weights that have changed, and make the tables of positions large enough.

        A weight is copied if it is another tensor than before, if PyTorch has counted a change in place, or if the
        version has changed.

        Args:
            positions: number of positions that will be needed.
            version: number of updates of the weights.
            in_use: whether the engine computes with the weights at this moment.
        Raises:
            UserError: if the model has changed in a way that the engine does not know, or if a weight would have to be
                copied while it is in use.
        """
        if reason := unsupported(self.model):
            raise UserError(f"the model has changed since its sampler was built: {reason}; set sampler.engine to torch")
        self.decoder = _without_adapters(self.model).model
        rebuild = bytes(self._shape()) != bytes(self.compiled.shape)
        parts = dict(self._all_parts())
        changed = [key for key in parts if rebuild or self._is_changed(key, parts[key], version)]
        if in_use and (changed or positions > self._positions):
            raise UserError("the weights or the length changed while samples were drawn; call sample when it has ended")
        if rebuild:
            self._build()
        for key in changed:
            part = parts[key]
            part.copy()
            self._copied[key] = (part, [tensor._version for tensor in part.tensors], version)
        if positions > self._positions:
            self._set_positions(max(positions, 2 * self._positions, 512))

    def _is_changed(self, key: tuple[int, str], part: _Part, version: int) -> bool:
        copied, counts, copied_version = self._copied.get(key, (None, [], -1))
        counted = [tensor._version for tensor in part.tensors]
        return not part.equals(copied) or counts != counted or copied_version != version

    def _set_positions(self, positions: int) -> None:
        place, x = torch.arange(positions)[None], torch.zeros(1, 1)
        for number, kind in enumerate(self._rope_tables):
            kinds = (kind,) if self.config.model_type == "gemma3_text" else ()
            with torch.no_grad():
                cosines, sines = self.decoder.rotary_emb(x, place, *kinds)
            self.compiled.set_rope(number, _numbers(cosines[0]), _numbers(sines[0]))
        self._positions = positions

    def _all_parts(self) -> Iterator[tuple[tuple[int, str], _Part]]:
        """Yield ((layer, name), part) for all weights; the layer is -1 for the parts of the whole model."""
        for number, layer in enumerate(self.decoder.layers):
            for name, path in _LINEAR.items():
                yield (number, name), self._matrix(number, name, layer.get_submodule(path))
            for name, path in _norms_of(self.config.model_type).items():
                if (norm := _find(layer, path)) is not None:
                    yield (number, f"norm {name}"), self._norm(number, name, norm)
        yield (-1, "norm"), self._norm(-1, "", self.decoder.norm)
        yield (-1, "head"), self._matrix(-1, "", self.model.get_output_embeddings())
        weight = self.decoder.embed_tokens.weight
        if weight is not self.model.get_output_embeddings().weight:
            yield (-1, "embedding"), _Part([weight], (), lambda: self.compiled.set_embedding(_numbers(weight)))

    def _matrix(self, layer: int, name: str, module: Any) -> _Part:
        factors = () if type(module) is nn.Linear else tuple((n, module.scaling[n]) for n in _adapters(module))
        return _Part(
            _linear_parts(module) or [],
            factors,
            lambda: self.compiled.set_matrix(layer, name, *_linear(module)),
        )

    def _norm(self, layer: int, name: str, module: Any) -> _Part:
        def copy() -> None:
            self.compiled.set_norm(layer, name, _numbers(module.weight.detach().float() + self._norm_offset))

        return _Part([module.weight], (), copy)


def _window(config: Any) -> int:
    """Return the sliding window of all layers of a model that does not store it in its attention layers (Mistral)."""
    return (getattr(config, "sliding_window", None) or 0) if config.model_type == "mistral" else 0
