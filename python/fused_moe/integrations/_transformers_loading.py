# SPDX-License-Identifier: Apache-2.0
"""Quantizing experts while a checkpoint is read: transformers' own interface for quantizers.

transformers reads one layer's weight at a time and hands it over before the next: at no time
does the model's device hold more than one of them unquantized. This module imports transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fused_moe.integrations import _transformers_experts as experts
from fused_moe.integrations import _transformers_weights as weights


class FusedMoeQuantization(QuantizationConfigMixin):
    """The value of `quantization_config`: which format the experts are quantized to.

    Attributes:
        experts: one of `weights.FORMATS` but the empty one.
    """

    def __init__(self, experts: str = "int8", **_: Any) -> None:
        formats = [kept for kept in weights.FORMATS if kept]
        if experts not in formats:
            raise ValueError(f"experts is {experts!r}; it must be one of {formats}")
        self.quant_method = weights.NAME
        self.experts = experts


class _Quantize(ConversionOps):
    """What becomes of a weight of an experts module, as it comes in transformers' order.

    Attributes:
        kept: the format to quantize to.
        plans: of each module by its path, the layout of its class and the weights to a scale.
    """

    def __init__(self, kept: str, plans: dict[str, tuple[experts.Layout, int]]) -> None:
        self.kept = kept
        self.plans = plans

    def convert(
        self,
        input_dict: dict[str, Any],
        *args: Any,
        full_layer_name: str,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        path, _, name = full_layer_name.rpartition(".")
        layout, group = self.plans[path]
        if layout.transposed:
            weight = weight.transpose(1, 2)
        first = name != "down_proj"
        if first and layout.gated:
            weight = experts.up_first(weight, layout)
        q, scale = weights.quantized(weight.contiguous(), self.kept, group)
        scale_name = weights.SCALES[0 if first else 1]
        return {full_layer_name: q, f"{path}.{scale_name}": weights.held_scale(scale)}


def _names(module: torch.nn.Module) -> tuple[str, str]:
    """The parameters that are quantized."""
    return experts.first_name(module), "down_proj"


class FusedMoeQuantizer(HfQuantizer):
    """Replaces the experts' weights by quantized ones as they are read."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.plans: dict[str, tuple[experts.Layout, int]] = {}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter of the checkpoint is an expert's weight."""
        path, _, name = param_name.rpartition(".")
        return path in self.plans and name in _names(model.get_submodule(path))

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes a number, for the choice of devices."""
        if not self.param_needs_quantization(model, param_name):
            return param.element_size()
        return 1.0 if self.quantization_config.experts == "int8" else 0.5

    def get_quantize_ops(self) -> _Quantize:
        """What converts one weight."""
        return _Quantize(self.quantization_config.experts, self.plans)

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        kept = self.quantization_config.experts
        modules = weights.experts_modules(model)
        paths = {module: path for path, module in model.named_modules()}
        model.set_experts_implementation(f"{weights.NAME}_{kept}")
        for module in modules:
            experts.check_class(module)
            if weights.requested(module) not in weights.IMPLEMENTATIONS:
                raise ValueError(
                    f"{type(module).__name__} takes no other experts implementation than "
                    f"{weights.requested(module)!r}, and so no quantization of its experts"
                )
            _, layout = experts.recognize(module)
            group = weights.group_size(module, layout.transposed, kept)
            self.plans[paths[module]] = (layout, group)
            # What the checkpoint has no tensor for has to be there all the same, to be set.
            for name, scale_name in zip(_names(module), weights.SCALES, strict=True):
                number, rows, depth = getattr(module, name).shape
                if layout.transposed:
                    rows, depth = depth, rows
                shape = (number, rows, depth // group) if group else (number, rows)
                scale = torch.empty(shape, dtype=torch.float32, device="meta")
                module.register_buffer(scale_name, weights.held_scale(scale))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in weights.experts_modules(model):
            experts.check_class(module)
            for name in _names(module):
                if getattr(module, name).is_floating_point():
                    raise ValueError(f"the checkpoint has no {name} of {type(module).__name__}")
            state = weights.start(module)
            weights.align(module)
            experts.rewrite_bias(module, state.layout, back=False)
            weights.finish_quantized(state, self.quantization_config.experts)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """No: what would be saved is not what transformers loads under these names."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: inference only."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes: the layer is one operator."""
        return True


def register() -> None:
    """Makes the quantizer known to transformers; again is harmless."""
    if weights.NAME not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(weights.NAME)(FusedMoeQuantization)
        register_quantizer(weights.NAME)(FusedMoeQuantizer)
