"""Check that adapters (peft) can be trained, sampled from and saved, and apply their dropout.

The policy calls the transformers model inside the peft model, samples from it, and saves the model with the adapters
merged into its weights. Kinds of adapters for which this would give another model than the trained one are refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from vineppo.model.lora import adapter_layers, merged_layer
from vineppo.objects import message_line
from vineppo.seeds import derive_seed
from vineppo.types import UserError

SUPPORTED = (
    "LORA",
    "BEFT",
    "BOFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "FROD",
    "GLORA",
    "GRALORA",
    "HIRA",
    "HRA",
    "IA3",
    "LN_TUNING",
    "LOHA",
    "LOKR",
    "MISS",
    "OFT",
    "OSF",
    "PEANUT",
    "PSOFT",
    "RANDLORA",
    "ROAD",
    "SHIRA",
    "SUPERTUNING",
    "TINYLORA",
    "TRAINABLE_TOKENS",
    "UNILORA",
    "VBLORA",
    "VERA",
    "WAVEFT",
)
"""Kinds of adapters (`peft_type`) that are tested: trained, sampled from and saved as a model without adapters."""
_REASONS = {
    "ADALORA": "its ranks are changed by calls during training, which this trainer does not make",
    "ADAMSS": "its ranks are changed by calls during training, which this trainer does not make",
    "ADAPTION_PROMPT": "it replaces the attention of the model and cannot be merged into the weights",
    "PVERA": "it adds noise in training only, but the policy that is trained must be the policy that is sampled",
}
"""Kind -> why it is not supported. The other kinds add virtual tokens or depend on the input."""
_UNSUPPORTED_OPTIONS = {
    "alora_invocation_tokens": "such adapters depend on the tokens and cannot be merged into the weights",
    "arrow_config": "such adapters depend on the input and cannot be merged into the weights",
    "layer_replication": "the saved model would need copies of layers that its configuration does not describe",
    "monteclora_config": "it adds noise in training only, but the policy that is trained must be the one that is "
    "sampled",
    "velora_config": "it changes the forward pass in training mode only, which the policy does not use",
}
"""Option of `peft.LoraConfig` -> why it is not supported."""
_DATA_INITS = ("corda", "eva", "lora_ga")
"""Values of `init_lora_weights` that need data before the first step."""


def check_new_adapters(settings: Any) -> None:
    """Check the configuration of adapters (a `peft.PeftConfig`) that are about to be added to a model.

    Raises:
        UserError: if adapters of this kind or with one of these options are not supported.
    """
    check_settings(settings)
    init = getattr(settings, "init_lora_weights", None)
    if init in _DATA_INITS:
        raise UserError(
            f"peft_config has init_lora_weights {init!r}, which computes the first adapters from data; add the "
            "adapters with the functions of peft, and pass the peft model as model"
        )


def check_settings(settings: Any) -> None:
    """Check the configuration of adapters (a `peft.PeftConfig`), whether they are new or already in a model.

    Raises:
        UserError: if adapters of this kind or with one of these options are not supported.
    """
    kind = str(getattr(settings.peft_type, "value", settings.peft_type))
    if kind not in SUPPORTED:
        reason = _REASONS.get(kind, "it adds virtual tokens, or its effect cannot be merged into the weights")
        raise UserError(f"adapters of kind {kind} are not supported: {reason}; supported: {', '.join(SUPPORTED)}")
    for name, reason in _UNSUPPORTED_OPTIONS.items():
        if getattr(settings, name, None):
            raise UserError(f"adapters with {name} are not supported: {reason}; leave {name} out")
    for name in sorted(vars(settings)):
        if name.endswith("dropout") and name != "lora_dropout" and getattr(settings, name):
            raise UserError(f"adapters of kind {kind} with {name} are not supported; set {name} to 0, or use LORA")


def check_adapters(adapters: Any) -> None:
    """Check that the adapters of a peft model are supported, can be merged, and have trained weights.

    Raises:
        UserError: if one of these is not so.
    """
    for settings in adapters.peft_config.values():
        check_settings(settings)
    if not any(p.requires_grad for p in adapters.parameters()):
        raise UserError(
            "no weight of the model with adapters is trained; load the adapters with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    tried = set()
    for name, layer in adapter_layers(adapters.get_base_model()).items():
        if getattr(layer, "merged", False):
            raise UserError(
                f"the adapters of {name} are merged, so that they cannot be trained; call model.unmerge_adapter()"
            )
        base = getattr(layer, "base_layer", None)
        kind = (type(layer), type(base), getattr(base, "bias", None) is None)
        if kind in tried:  # Layers of one kind are merged by the same code, so one of them is tried.
            continue
        tried.add(kind)
        try:
            merged_layer(layer)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise UserError(
                f"peft cannot merge the adapters of {name} into the weights, so that the trained model could not be "
                f"saved: {message_line(error)}"
            ) from error


def can_be_disabled(model: Any, adapters: Any) -> bool:
    """Return whether a model with new adapters computes the same with its adapters disabled, also after training.

    It does not if the adapters change the model from the start, if they replace weights (such as `init_lora_weights`
    `pissa`), or if biases are trained, which stay changed when adapters are disabled.
    """
    if any(getattr(settings, "bias", "none") not in ("none", False) for settings in adapters.peft_config.values()):
        return False
    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.config.get_text_config().vocab_size  # (1, 8)
    with torch.no_grad():
        enabled = model(input_ids=ids, use_cache=False).logits.float()
        with adapters.disable_adapter():
            disabled = model(input_ids=ids, use_cache=False).logits.float()
    limit = 1e-3 if model.dtype == torch.float32 else 0.05
    return bool((enabled - disabled).abs().max() <= limit * enabled.abs().max())


def has_dropout(model: Any) -> bool:
    """Return whether a LoRA adapter of the model has a dropout rate above 0."""
    layers = (module for module in model.modules() if hasattr(module, "lora_dropout"))
    return any(getattr(dropout, "p", 0) > 0 for layer in layers for dropout in layer.lora_dropout.values())


@contextlib.contextmanager
def adapter_dropout(model: Any, seeds: Sequence[int], loss_masks: Sequence[Sequence[int]]) -> Iterator[None]:
    """Context manager in which the dropout of LoRA adapters is active in the forward and backward pass of one batch.

    The random numbers of a sequence depend only on its seed, on its length, and on the layer. They do not depend on
    the other sequences of the batch, on padding, or on random numbers drawn before. A layer that is computed again
    (gradient checkpointing) drops the same numbers.

    Args:
        seeds: one seed for each of the B sequences.
        loss_masks: the loss mask of each sequence, without padding: 1 for the tokens whose logits are computed.
    Raises:
        UserError: in the forward pass, if the rows of a layer's input are not those of the sequences. This is so for
            experts, each of which computes only some of the tokens.
    """
    layers = [module for module in model.modules() if hasattr(module, "lora_dropout")]
    dropouts = [
        (f"{name}.{key}", dropout)
        for name, module in model.named_modules()
        if hasattr(module, "lora_dropout")
        for key, dropout in module.lora_dropout.items()
        if isinstance(dropout, nn.Dropout) and dropout.p > 0
    ]
    handles = [dropout.register_forward_hook(_Drop(name, dropout.p, seeds, loss_masks)) for name, dropout in dropouts]
    try:
        for layer in layers:
            layer.training = True  # DoRA calls its dropout only if this attribute is true.
        yield
    finally:
        for layer in layers:
            layer.training = False
        for handle in handles:
            handle.remove()


class _Drop:
    """Forward hook of an `nn.Dropout` in evaluation mode, which drops numbers of the input by addressed seeds.

    Args:
        name: name of the dropout layer, which is a part of the address.
        p: share of the numbers that are set to 0. The others are divided by 1 - p.
        seeds, loss_masks: as in `adapter_dropout`.
    """

    def __init__(self, name: str, p: float, seeds: Sequence[int], loss_masks: Sequence[Sequence[int]]):
        self.name, self.p, self.loss_masks = name, p, loss_masks
        self.seeds = [derive_seed(seed, name) for seed in seeds]

    def __call__(self, _module: nn.Module, inputs: tuple[torch.Tensor, ...], _output: torch.Tensor) -> torch.Tensor:
        x = inputs[0]
        kept = self._kept(x.shape[-1], x.device)
        B, T = len(kept), max(map(len, kept))
        if x.shape[:-1] in ((B, T), (B * T,)):
            factors = torch.stack([F.pad(rows, (0, 0, 0, T - len(rows))) for rows in kept])  # (B, T, H)
        else:
            # The output layer gets the states before the tokens that the loss mask selects: (1, N, H).
            before = [[t - 1 for t, chosen in enumerate(mask) if chosen] for mask in self.loss_masks]
            factors = torch.cat([rows[indices] for rows, indices in zip(kept, before, strict=True)])[None]
            if x.shape != factors.shape:
                raise UserError(
                    f"dropout of adapters does not support the layer {self.name}, whose input has the shape "
                    f"{tuple(x.shape)} and not one row per sequence; set the dropout (model.lora.dropout) to 0, or "
                    "leave the layer out of the targets"
                )
        return x * (factors.view(x.shape) / (1 - self.p)).to(x.dtype)

    def _kept(self, width: int, device: torch.device) -> list[torch.Tensor]:
        """Return for each sequence a float32 tensor with 1 for numbers that are kept and 0 for others, (length, H)."""
        generator = torch.Generator(device)
        return [
            torch.empty(len(mask), width, device=device).bernoulli_(1 - self.p, generator=generator.manual_seed(seed))
            for seed, mask in zip(self.seeds, self.loss_masks, strict=True)
        ]
