# SPDX-License-Identifier: Apache-2.0
"""The main job in one program: router logits -> top-k softmax -> fused MoE layer, checked.

    bazel run --config=cpu //:demo                          # no GPU, no CUDA
    bazel run --config=sm80 //:demo                         # picks the GPU where there is one
    bazel run //:demo -- --model=Qwen3-30B-A3B --tokens=256 --dtype=float16 --weights=int8

It builds one layer with a model's shape and random weights, runs it, compares the result with
the float32 reference and exits with status 1 when the error is above the tolerance.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

import torch
from absl import app, flags

from fused_moe import (
    ActivationType,
    _extension,
    cutlass_fused_moe,
    quantize_int8,
    topk_softmax,
)
from fused_moe.backends import choose
from fused_moe.models import MODELS, ModelShape
from fused_moe.reference import reference_moe
from tolerances import TOLERANCES, relative_error

_MODEL = flags.DEFINE_enum("model", "Mixtral-8x7B", sorted(MODELS), "Whose layer shape to take.")
_TOKENS = flags.DEFINE_integer("tokens", 64, "Rows of the input.", lower_bound=0)
_DTYPE = flags.DEFINE_enum(
    "dtype", "bfloat16", ["float16", "bfloat16", "float32"], "Activations (float32: cpu only)."
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "same", ["same", "int8", "uint8"], "Weights: the activations' dtype, or INT8."
)
_BACKEND = flags.DEFINE_enum(
    "backend", "auto", ["auto", "cpu", "sm80", "sm90"], "auto: a GPU's own backend, else cpu."
)
_SCALE = flags.DEFINE_integer(
    "scale",
    0,
    "Divides the hidden and the intermediate size. 0: 1 on a GPU, 4 on a CPU.",
    lower_bound=0,
)
_EXPERTS = flags.DEFINE_integer("experts", 0, "Number of experts. 0: the model's.", lower_bound=0)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs, after one warm-up.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random layer and input.")


@dataclass(frozen=True)
class Layer:
    """One layer's weights, and the same weights as the reference sees them.

    fc1 [E, 2I or I, H] and fc2 [E, H, I] in the activation dtype, int8 or uint8; quant_scales
    is [] or [fc1 [E, 2I or I], fc2 [E, H]] float32; biases and swiglu tensors may be None.
    """

    fc1: torch.Tensor
    fc2: torch.Tensor
    quant_scales: list[torch.Tensor]
    fc1_biases: torch.Tensor | None
    fc2_biases: torch.Tensor | None
    swiglu: dict[str, torch.Tensor]
    activation: ActivationType


def rounded(size: int, scale: int) -> int:
    """size / scale, rounded up to a multiple of 16 so that every weight format accepts it."""
    return -(-size // (16 * scale)) * 16 if scale > 1 else size


def make_layer(
    model: ModelShape,
    hidden: int,
    inter: int,
    experts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Layer:
    """A random layer with activations of order 1, on `device`."""
    rows = 2 * inter if model.activation.is_gated else inter

    def normal(*shape: int, deviation: float) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype).mul_(deviation)

    fc1 = normal(experts, rows, hidden, deviation=hidden**-0.5)
    fc2 = normal(experts, hidden, inter, deviation=inter**-0.5)
    quant_scales: list[torch.Tensor] = []
    if _WEIGHTS.value != "same":
        unsigned = _WEIGHTS.value == "uint8"
        fc1, fc1_scale = quantize_int8(fc1, unsigned=unsigned)
        fc2, fc2_scale = quantize_int8(fc2, unsigned=unsigned)
        quant_scales = [fc1_scale, fc2_scale]
    swiglu = {
        name: torch.full((experts,), value, device=device, dtype=torch.float32)
        for name, value in (
            ("swiglu_alpha", model.swiglu_alpha),
            ("swiglu_beta", model.swiglu_beta),
            ("swiglu_limit", model.swiglu_limit),
        )
        if value is not None
    }
    return Layer(
        fc1=fc1,
        fc2=fc2,
        quant_scales=quant_scales,
        fc1_biases=normal(experts, rows, deviation=0.1) if model.biases else None,
        fc2_biases=normal(experts, hidden, deviation=0.1) if model.biases else None,
        swiglu=swiglu,
        activation=model.activation,
    )


def has_kernels() -> bool:
    """Whether this build has any backend for GPUs."""
    return _extension.C is not None and bool(_extension.C.BACKENDS)


def pick_device(backend: str) -> torch.device:
    """The device of a backend name; "auto" takes a GPU when its kernels are built in."""
    if backend == "cpu":
        return torch.device("cpu")
    if backend == "auto":
        return torch.device("cuda" if has_kernels() and torch.cuda.is_available() else "cpu")
    if not torch.cuda.is_available():
        raise app.UsageError(f"--backend={backend} needs a GPU and PyTorch sees none here")
    return torch.device("cuda")


def median_seconds(run: object, device: torch.device, repeats: int) -> float:
    """Median wall-clock seconds of run(), the device's work included, after one warm-up."""
    assert callable(run)
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main(argv: list[str]) -> None:
    """Runs the layer that the flags describe, checks and reports it."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; flags are written --name=value")
    model = MODELS[_MODEL.value]
    device = pick_device(_BACKEND.value)
    dtype: torch.dtype = getattr(torch, _DTYPE.value)
    if dtype == torch.float32 and device.type != "cpu":
        raise app.UsageError("--dtype=float32 is for the cpu backend: add --backend=cpu")
    backend = None if _BACKEND.value == "auto" else _BACKEND.value
    scale = _SCALE.value or (1 if device.type == "cuda" else 4)
    hidden = rounded(model.hidden_size, scale)
    inter = rounded(model.intermediate_size, scale)
    experts = _EXPERTS.value or model.num_experts
    top_k = min(model.top_k, experts)
    tokens = _TOKENS.value

    torch.manual_seed(_SEED.value)
    layer = make_layer(model, hidden, inter, experts, dtype, device)
    x = torch.randn(tokens, hidden, device=device, dtype=dtype)
    router = torch.randn(experts, hidden, device=device, dtype=dtype).mul_(hidden**-0.5)
    scales, ids = topk_softmax(x @ router.T, top_k)

    arguments = {
        "fc1_expert_biases": layer.fc1_biases,
        "fc2_expert_biases": layer.fc2_biases,
        "activation_type": layer.activation,
        **layer.swiglu,
    }

    def run() -> torch.Tensor:
        return cutlass_fused_moe(
            x,
            ids,
            scales,
            layer.fc1,
            layer.fc2,
            dtype,
            layer.quant_scales,
            backend=backend,
            **arguments,
        )

    out = run()
    seconds = median_seconds(run, device, _REPEATS.value)
    expected = reference_moe(
        x, ids, scales, layer.fc1, layer.fc2, quant_scales=layer.quant_scales, **arguments
    )
    error = relative_error(out, expected)

    if device.type == "cuda":
        where = torch.cuda.get_device_name()
    else:
        where = f"{torch.get_num_threads()} CPU threads"
        if _BACKEND.value == "auto" and has_kernels():
            where += ": PyTorch sees no GPU"
    chosen = choose(backend, device)
    weights = _DTYPE.value if _WEIGHTS.value == "same" else _WEIGHTS.value
    operations = 2 * tokens * top_k * hidden * inter * (3 if layer.activation.is_gated else 2)
    print(f"model      {_MODEL.value}, hidden and intermediate sizes divided by {scale}")
    print(f"backend    {chosen} on {where}")
    print(f"input      {tuple(x.shape)} {_DTYPE.value}; {experts} experts, {top_k} a token")
    print(f"weights    fc1 {tuple(layer.fc1.shape)}, fc2 {tuple(layer.fc2.shape)} {weights}")
    print(f"time       {seconds * 1e3:.3f} ms, median of {_REPEATS.value}")
    print(f"rate       {tokens / seconds:,.0f} tokens/s, {operations / seconds / 1e12:.3f} TFLOP/s")
    print(f"error      {error:.2e} relative to the float32 reference (limit {TOLERANCES[dtype]:g})")
    if not error < TOLERANCES[dtype]:
        print("FAILED: the error is above the limit", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
