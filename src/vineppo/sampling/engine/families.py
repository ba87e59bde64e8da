"""The weights and the shape of a transformers model, in the form of the compiled engine.

Supported are the model types of `SUPPORTED`, whose layers differ in few details: biases, norms of queries and keys,
norms behind attention and MLP, soft caps, sliding windows, activation and rotary positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from vineppo.sampling.engine.library import CompiledModel, Library, Shape

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
    """Return why the engine cannot compute a model, or an empty text if it can."""
    config = model.config.get_text_config()
    if config.model_type not in SUPPORTED:
        return f"the engine does not know models of type {config.model_type}"
    if kinds := set(_rope_kinds(config)) - _FIXED_ROPE:
        return f"the engine does not know rotary positions of type {', '.join(sorted(kinds))}"
    if _activation(config) not in _ACTIVATIONS:
        return f"the engine does not know the activation {_activation(config)}"
    if next(model.parameters()).device.type != "cpu":
        return "the engine computes on the CPU only"
    for layer in _decoder(model).layers:
        for name in _LINEAR.values():
            if _linear_parts(layer.get_submodule(name)) is None:
                return f"the engine does not know adapters of the kind in {name}"
    if (
        not isinstance(model.get_output_embeddings(), nn.Linear)
        or type(_decoder(model).embed_tokens).__mro__[-2] is not nn.Module
    ):
        return "the engine does not know adapters of embeddings"
    return ""


def _rope_kinds(config: Any) -> list[str]:
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [p for p in parameters.values() if isinstance(p, dict)]
    return [p.get("rope_type", p.get("type", "default")) or "default" for p in nested or [parameters]]


def _activation(config: Any) -> str:
    return getattr(config, "hidden_activation", None) or config.hidden_act


def _decoder(model: Any) -> Any:
    """Return the module with the layers: `model.model`, also behind the wrapper of peft."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model


def _linear_parts(module: Any) -> list[torch.Tensor] | None:
    """Return the tensors that the product of a linear layer depends on, or None if the layer is of an unknown kind."""
    if type(module) is nn.Linear:
        return [t for t in (module.weight, module.bias) if t is not None]
    if not _is_simple_lora(module):
        return None
    names = [name for name in module.active_adapters if name in module.lora_A]
    return [
        *(t for t in (module.base_layer.weight, module.base_layer.bias) if t is not None),
        *(t for name in names for t in (module.lora_A[name].weight, module.lora_B[name].weight)),
    ]


def _is_simple_lora(module: Any) -> bool:
    """Return whether a module is a linear layer whose active LoRA adapters only add a product of two matrices."""
    try:
        from peft.tuners.lora import Linear
    except ModuleNotFoundError:
        return False
    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and not module.merged
        and not module.disable_adapters
        and not any(name in module.lora_variant or module.lora_bias.get(name) for name in module.active_adapters)
    )


def _linear(module: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the weight, with the adapters added in float32, and the bias of a linear layer."""
    base = module if type(module) is nn.Linear else module.base_layer
    weight = base.weight.detach().float()
    if base is not module:
        for name in module.active_adapters:
            if name in module.lora_A:
                product = module.lora_B[name].weight.detach().float() @ module.lora_A[name].weight.detach().float()
                weight = weight + module.scaling[name] * product
    return _numbers(weight), None if base.bias is None else _numbers(base.bias)


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().float().numpy())


@dataclass(frozen=True)
class _Part:
    """A part of the weights: the tensors that it depends on, and how it is copied to the engine."""

    tensors: list[torch.Tensor]
    copy: Any

    @property
    def state(self) -> tuple[tuple[int, int], ...]:
        """Changes if a tensor is replaced or changed in place."""
        return tuple((t.data_ptr(), t._version) for t in self.tensors)


class EngineModel:
    """The copy of a transformers model that the engine computes with. `refresh` copies weights that have changed.

    Args:
        library: the compiled library.
        model: a model for which `unsupported` returns an empty text.
    """

    def __init__(self, library: Library, model: Any):
        self.model = model
        self.config = config = model.config.get_text_config()
        self.decoder = _decoder(model)
        attention = self.decoder.layers[0].self_attn
        gemma = config.model_type in ("gemma2", "gemma3_text")
        self._norm_offset = 1.0 if config.model_type.startswith("gemma") else 0.0
        self._norms = _NORMS_OF_GEMMA if gemma else _NORMS
        head = model.get_output_embeddings()
        embedding = self.decoder.embed_tokens
        self.tied = head.weight is embedding.weight
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ["full_attention"]))
        self._rope_tables = kinds if config.model_type == "gemma3_text" else kinds[:1]
        shape = Shape(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=attention.head_dim,
            intermediate=config.intermediate_size,
            vocabulary=head.weight.shape[0],
            rope_tables=len(self._rope_tables),
            tied=int(self.tied),
            activation=_ACTIVATIONS[_activation(config)],
            epsilon=config.rms_norm_eps,
            attention_scale=attention.scaling,
            attention_softcap=getattr(config, "attn_logit_softcapping", None) or 0.0,
            logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            embedding_scale=float(embedding.embed_scale.to(embedding.weight.dtype)) if self._norm_offset else 1.0,
        )
        self.compiled = CompiledModel(library, shape)
        self._positions = 0
        for number, layer in enumerate(self.decoder.layers):
            kind = getattr(layer.self_attn, "layer_type", None)
            table = self._rope_tables.index(kind) if kind in self._rope_tables else 0
            self.compiled.set_layer(number, table, getattr(layer.self_attn, "sliding_window", None) or _window(config))
        self._parts = list(self._all_parts())
        self._copied: list[Any] = [None] * len(self._parts)

    def kv_bytes(self, tokens: int) -> int:
        """Return the number of bytes of the keys and values of a sequence."""
        shape, panel = self.compiled.shape, 16
        padded = -(-shape.head_dim // panel) * panel
        return 4 * (-(-tokens // panel) * panel) * (shape.head_dim + padded) * shape.kv_heads * shape.layers

    def refresh(self, positions: int, version: int) -> None:
        """Copy the weights that have changed, and make the tables of positions large enough.

        Args:
            positions: number of positions that will be needed.
            version: number of updates of the weights. Trainable weights are copied again if it has changed.
        """
        for i, part in enumerate(self._parts):
            trained = any(tensor.requires_grad for tensor in part.tensors)
            state = (part.state, version if trained else None)
            if self._copied[i] != state:
                part.copy()
                self._copied[i] = state
        if positions > self._positions:
            self._set_positions(max(positions, 2 * self._positions, 512))

    def _set_positions(self, positions: int) -> None:
        place, x = torch.arange(positions)[None], torch.zeros(1, 1)
        for number, kind in enumerate(self._rope_tables):
            kinds = (kind,) if self.config.model_type == "gemma3_text" else ()
            with torch.no_grad():
                cosines, sines = self.decoder.rotary_emb(x, place, *kinds)
            self.compiled.set_rope(number, _numbers(cosines[0]), _numbers(sines[0]))
        self._positions = positions

    def _all_parts(self) -> Iterator[_Part]:
        for number, layer in enumerate(self.decoder.layers):
            for name, path in _LINEAR.items():
                yield self._matrix(number, name, layer.get_submodule(path))
            for name, path in self._norms.items():
                owner, _, attribute = path.rpartition(".")
                norm = getattr(layer.get_submodule(owner) if owner else layer, attribute, None)
                if norm is not None:
                    yield self._norm(number, name, norm)
        yield self._norm(-1, "", self.decoder.norm)
        yield self._matrix(-1, "", self.model.get_output_embeddings())
        if not self.tied:
            weight = self.decoder.embed_tokens.weight
            yield _Part([weight], lambda: self.compiled.set_embedding(_numbers(weight)))

    def _matrix(self, layer: int, name: str, module: Any) -> _Part:
        return _Part(_linear_parts(module) or [], lambda: self.compiled.set_matrix(layer, name, *_linear(module)))

    def _norm(self, layer: int, name: str, module: Any) -> _Part:
        return _Part(
            [module.weight],
            lambda: self.compiled.set_norm(layer, name, _numbers(module.weight.detach().float() + self._norm_offset)),
        )


def _window(config: Any) -> int:
    """Return the sliding window of all layers of a model that does not store it in its attention layers (Mistral)."""
    return (getattr(config, "sliding_window", None) or 0) if config.model_type == "mistral" else 0
