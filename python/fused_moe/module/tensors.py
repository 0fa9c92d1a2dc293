# SPDX-License-Identifier: Apache-2.0
"""What the modules have in common: tensors that keep their dtype, and no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# What `cutlass_fused_moe` wants of the addresses of weights, biases and scales.
ALIGNMENT = 16


def parameter(
    shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None
) -> torch.nn.Parameter:
    """A parameter of any dtype with memory of its own that asks for no gradient."""
    return torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)


class InferenceModule(torch.nn.Module):
    """A module whose parameters get no gradient and some of whose tensors keep their dtype.

    `module.to(torch.float16)`, `half()` and the like would turn every floating point tensor
    into that dtype, the float32 scales of INT8 weights among them, and loading a checkpoint with
    `assign` into its dtypes. The parameters and buffers named in `kept` only follow to another
    device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept: set[str] = set()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        own = {**self._parameters, **self._buffers}
        kept = [own[name] for name in self.kept if own.get(name) is not None]

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            if any(tensor is other for other in kept) and tensor.is_floating_point():
                # As bytes it has no floating point dtype that `fn` could change.
                return fn(tensor.detach().view(torch.uint8)).view(tensor.dtype)
            return fn(tensor)

        return super()._apply(apply, recurse)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *others: Any,
    ) -> None:
        """As every module, but `assign` converts what is kept, as copying does."""
        if local_metadata.get("assign_to_params_buffers", False):
            for name in self.kept:
                own, given = getattr(self, name), state_dict.get(prefix + name)
                if own is not None and given is not None and own.is_floating_point():
                    state_dict[prefix + name] = given.to(own.dtype)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def extra_repr(self) -> str:
        """The tensors of this module itself, a dtype and a shape each."""
        own = {**self._parameters, **self._buffers}
        shown = (
            f"{name}={str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            for name, tensor in own.items()
            if tensor is not None
        )
        return ", ".join(shown)


def refuse_gradients(*tensors: torch.Tensor | None) -> None:
    """Raises RuntimeError where autograd would have to follow one of the tensors."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "FusedMoE is for inference: no gradient flows through it, but its input or one of its "
            "parameters requires one; call it under torch.inference_mode() or torch.no_grad(), or "
            "use .requires_grad_(False)"
        )


def check_tokens(name: str, x: torch.Tensor, hidden_size: int) -> None:
    """Raises ValueError unless the last dimension of `x` is a token."""
    if x.ndim < 1 or x.shape[-1] != hidden_size:
        raise ValueError(
            f"{name} has the shape {list(x.shape)}; its last dimension must be the hidden size, "
            f"{hidden_size}"
        )


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it is contiguous, aligned and all of its storage, else a copy.

    So no two tensors of a module share memory, which safetensors refuses to save, and a part
    of a checkpoint does not keep the whole of it alive.
    """
    tensor = tensor.detach()
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole and tensor.is_contiguous() and is_aligned(tensor) else copied(tensor)


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether kernels can load from the tensor's address; a tensor of a mapped file may not be."""
    return tensor.is_meta or tensor.data_ptr() % ALIGNMENT == 0


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy in memory of its own, which the allocator aligns."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)
