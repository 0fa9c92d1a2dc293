# SPDX-License-Identifier: Apache-2.0
"""How expert weights are stored in each format: shapes, dtypes and what makes them."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fused_moe import quantization

# The formats by name: the multiple that H and I must have, and the group sizes there are.
_FORMATS: dict[str, tuple[int, tuple[int, ...]]] = {
    "same": (8, ()),
    "int8": (16, ()),
    "uint8": (16, ()),
    "int4": (32, (32, 64, 128)),
    "mxfp4": (32, (32,)),
}


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """One way to store weights [E, N, K].

    ======  ======================  =================================================
    name    weight                  scale
    ======  ======================  =================================================
    same    [E, N, K] floating      none
    int8    [E, N, K] int8          [E, N] float32, one a row
    uint8   [E, N, K] uint8, q+128  [E, N] float32
    int4    [E, N, K/2] uint8       [E, N, K/group] float32
    mxfp4   [E, N, K/2] uint8       [E, N, K/32] uint8, E8M0
    ======  ======================  =================================================

    Attributes:
        name: one of the table.
        group_size: how many weights along K share a scale; 0 where it is the whole row.
    """

    name: str
    group_size: int

    @classmethod
    def of(cls, name: str, group_size: int | None, depths: tuple[int, ...]) -> WeightFormat:
        """The format `name` for weights of these depths, H and I.

        Args:
            name: one of the table above.
            group_size: of int4 32, 64 or 128; None is the largest that divides all depths.
            depths: the values of K that it must fit.

        Raises:
            ValueError: an unknown name, or a group or depth that does not fit.
        """
        if name not in _FORMATS:
            raise ValueError(f"weight_format is {name!r}; it must be one of {', '.join(_FORMATS)}")
        multiple, groups = _FORMATS[name]
        for depth in depths:
            if depth < multiple or depth % multiple:
                raise ValueError(
                    f"the hidden and intermediate sizes are {depths}; with the weight_format "
                    f"{name} both must be positive multiples of {multiple}: pad the weights with "
                    "zeros"
                )
        fitting = [g for g in groups if not any(depth % g for depth in depths)]
        if group_size is None:
            return cls(name, max(fitting, default=0))
        if group_size not in fitting:
            allowed = f"one of {fitting}, or None" if groups else "None"
            raise ValueError(
                f"group_size is {group_size}; with the weight_format {name} and the sizes {depths} "
                f"it must be {allowed}"
            )
        return cls(name, group_size)

    @property
    def is_quantized(self) -> bool:
        """Whether there are scales beside the weights."""
        return self.name != "same"

    @property
    def call_arguments(self) -> dict[str, Any]:
        """The arguments that tell `cutlass_fused_moe` which uint8 weights these are."""
        flags = {"int4": "use_packed_weights", "mxfp4": "use_w4_group_scaling"}
        return {flags[self.name]: True} if self.name in flags else {}

    @property
    def weights_an_element(self) -> int:
        """How many weights an element of the stored tensor holds."""
        return 2 if self.group_size else 1

    def weight(
        self, shape: tuple[int, int, int], dtype: torch.dtype | None
    ) -> tuple[tuple[int, ...], torch.dtype | None]:
        """Shape and dtype of the stored weights [E, N, K] of a layer in `dtype`."""
        experts, rows, depth = shape
        if self.name == "same":
            return shape, dtype
        if self.group_size:
            return (experts, rows, depth // self.weights_an_element), torch.uint8
        return shape, torch.int8 if self.name == "int8" else torch.uint8

    def scale(self, shape: tuple[int, int, int]) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of the scales of weights [E, N, K]; None without scales."""
        experts, rows, depth = shape
        if self.name == "same":
            return None
        if self.group_size:
            dtype = torch.uint8 if self.name == "mxfp4" else torch.float32
            return (experts, rows, depth // self.group_size), dtype
        return (experts, rows), torch.float32

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stored weights and scales of floating point weights [E, N, K]."""
        if self.name == "int4":
            return quantization.quantize_int4(weight, group_size=self.group_size)
        if self.name == "mxfp4":
            return quantization.quantize_mxfp4(weight)
        return quantization.quantize_int8(weight, unsigned=self.name == "uint8")


def stored_format(
    weight_format: str,
    group_size: int | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
) -> WeightFormat:
    """The format that a weight [E, N, ...] is in: "same" if it has no scale yet.

    Raises:
        ValueError: scales without a quantized format, floating point weights with scales, or
            whole numbers without.
    """
    if scale is None:
        if not weight.is_floating_point():
            raise ValueError(
                f"fc1_weight is {weight.dtype} but there are no quant_scales; quantized weights "
                "need both, weights to quantize must be floating point"
            )
        return WeightFormat("same", 0)
    if weight.is_floating_point() or weight_format == "same":
        raise ValueError(
            f"quant_scales are given with fc1_weight {weight.dtype} and weight_format "
            f'"{weight_format}"; they belong to weights quantized in int8, uint8, int4 or mxfp4'
        )
    depth = weight.shape[-1]
    if weight_format in ("int4", "mxfp4"):
        depth *= 2
        if group_size is None and scale.ndim == 3 and scale.shape[2]:
            group_size = depth // scale.shape[2]
    return WeightFormat.of(weight_format, group_size, (depth,))
