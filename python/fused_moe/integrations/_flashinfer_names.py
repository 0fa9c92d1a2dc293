# SPDX-License-Identifier: Apache-2.0
"""The other public names of `flashinfer.fused_moe`: its enumerations, and what is refused.

Code that imports a dozen of those names and calls one should get as far as the call. They are those
of FlashInfer 0.7.2.post1, and what releases from 0.6.0 on had besides.
"""

from __future__ import annotations

import enum
from typing import Any


class ActivationType(enum.IntEnum):
    """FlashInfer's activations: those of `fused_moe.ActivationType`, and three it adds.

    Situ and ClampedRelu2 can be named, not computed. The numbers are FlashInfer's.
    """

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9
    Situ = 10
    InvalidType = 11
    ClampedRelu2 = 12

    @property
    def is_gated(self) -> bool:
        """Whether fc1 has 2I rows."""
        return self.name in ("Swiglu", "Geglu", "SwigluBias", "SwigluStep", "GegluTanh", "Situ")


def is_gated_activation(activation_type: int) -> bool:
    """FlashInfer's question whether fc1 has 2I rows.

    Raises:
        ValueError: there is no such activation.
    """
    return ActivationType(activation_type).is_gated


class RoutingMethodType(enum.IntEnum):
    """How FlashInfer's trtllm functions may route; here for code that names it."""

    Default = 0
    Renormalize = 1
    DeepSeekV3 = 2
    Llama4 = 3
    RenormalizeNaive = 4
    TopK = 5
    SigmoidRenorm = 6
    MiniMax2 = 7
    Sigmoid = 8
    TopKSigmoid = 9
    Unspecified = 10


class RoutingInputMode(enum.IntEnum):
    """In which form FlashInfer's trtllm functions get the routing."""

    FromLogits = 0
    PackedPrecomputed = 1
    UnpackedPrecomputed = 2


class WeightLayout(enum.IntEnum):
    """How FlashInfer's trtllm functions get their weights."""

    MajorK = 0
    MajorMn = 1
    BlockMajorK = 2


class GatedActType(enum.IntEnum):
    """The gated activations of FlashInfer's trtllm functions, in releases up to 0.6.2."""

    SwiGlu = 0
    GeGlu = 1


class Fp8QuantizationType(enum.IntEnum):
    """Which FP8 format FlashInfer's trtllm functions get."""

    NoneFp8 = 0
    DeepSeekFp8 = 1
    MxFp8 = 2
    PerTensorFp8 = 3
    PerChannelFp8 = 4


# Why a name is refused and what to use, then the names.
_REFUSED: dict[str, str] = {
    "it generates FlashInfer's own kernels, and those of fused_moe are compiled beforehand: "
    "leave the call out": """
        gen_cutlass_fused_moe_sm100_module gen_cutlass_fused_moe_sm103_module
        gen_cutlass_fused_moe_sm120_module gen_cutlass_fused_moe_sm90_module
        gen_trtllm_gen_fused_moe_sm100_module
    """,
    "it rearranges weights for a kernel of Hopper or Blackwell, and cutlass_fused_moe here takes "
    "plain row-major weights: leave the call out": """
        alphamoe_interleave_gated_weights convert_to_block_layout interleave_for_tma_wgmma_up
        prepare_nvfp4_w1_data prepare_nvfp4_w1_gate_up_data prepare_nvfp4_w1_gate_up_scales
        prepare_nvfp4_w1_scales prepare_nvfp4_w2_data prepare_nvfp4_w2_data_k256
        prepare_nvfp4_w2_scales prepare_nvfp4_w2_scales_k256
        preprocess_moe_weights_for_sm90_mixed_gemm_humming reorder_rows_for_gated_act_gemm
    """,
    "it is a router for FlashInfer's own kernels: compute ids (int32) and scales (float32) in "
    "PyTorch, for example with fused_moe.topk_softmax, and call cutlass_fused_moe": """
        AlphaMoERoutePlan RoutingConfig TrtllmGenRoutingResult TrtllmMoERoutingMetadata
        TrtllmMoERoutingMetadataSlot allocate_alphamoe_route_plan allocate_kimi_k3_route_plan
        alphamoe_fused_router fused_topk_deepseek hash_topk kimi_k3_fused_router
        prepare_kimi_k3_fused_router trtllm_gen_routing trtllm_moe_allocate_routing_metadata
        trtllm_moe_allocate_routing_metadata_multi_tile
    """,
    "there is no LoRA here: merge the adapter into the weights and call cutlass_fused_moe": """
        BGMVMoEBlackwellPlan BGMVMoECakePlan BGMVMoEPortablePlan bgmv_moe bgmv_moe_expand
        bgmv_moe_gemm1_lora_delta bgmv_moe_gemm2_lora_delta bgmv_moe_shrink fill_w_ptr
        prepare_bgmv_moe
    """,
    "it belongs to FlashInfer's layer classes, whose kernels need Hopper or Blackwell: call "
    "cutlass_fused_moe, with its activation_type and quant_scales": """
        ActivationConfig AlphaMoeNvfp4DeferredOutput B12xMoEWrapper B12xNvfp4Config
        B12xNvfp4Runner B12xW4A16Config B12xW4A16Runner BackendOptions CakeWarpDecodeConfig
        CakeWarpDecodeRunner CuTileBf16Config CuTileBf16Runner CuTileFp8PerTensorBf16Config
        CuTileFp8PerTensorBf16Runner CuTileFp8PerTensorConfig CuTileFp8PerTensorRunner
        CuTileMxfp4Bf16Config CuTileMxfp4Bf16Runner CuTileMxfp4Config CuTileMxfp4Mxfp8Config
        CuTileMxfp4Mxfp8Runner CuTileMxfp4Runner CuTileMxfp8Bf16Config CuTileMxfp8Bf16Runner
        CuTileMxfp8Config CuTileMxfp8Runner CuTileNvfp4Bf16Config CuTileNvfp4Bf16Runner
        CuTileNvfp4Config CuTileNvfp4Runner CudnnFrostBf16Config CudnnFrostMxfp8Config
        CudnnFrostMxfp8Mxfp4Config CudnnFrostNvfp4Config CuteDslBf16MoEWrapper CuteDslConfig
        CuteDslMoEWrapper CuteDslMxfp8Mxfp4MoEWrapper CuteDslNvfp4Runner CuteDslRunner
        CutlassBf16Config CutlassBf16Runner CutlassConfig CutlassFp8BlockConfig
        CutlassFp8BlockRunner
        CutlassFp8PerTensorConfig CutlassFp8PerTensorRunner CutlassHummingConfig
        CutlassHummingRunner CutlassMxfp8Config CutlassMxfp8Mxfp4Config
        CutlassMxfp8Mxfp4Runner CutlassMxfp8Runner CutlassNvfp4Config CutlassNvfp4Runner
        CutlassW4A16Config CutlassW4A16Runner CutlassW4A8Config CutlassW4A8Runner
        ExecutionConfig ExpertConfig GELU GeGLU GeGLUTanh Identity MoEActivationPack MoEConfig
        MoEFinalizeConfig MoELayer MoEWeightPack NVFP44Over6Config NVFP44Over6ErrMode
        PrimsTsConfig PrimsTsRunner QuantConfig QuantFormat QuantVariant ReLU ReLU2
        SM12xFp8Config
        SM12xFp8Runner SM12xMxfp8Mxfp4Config SM12xMxfp8Mxfp4Runner SM12xNvfp4Bf16Config
        SM12xNvfp4Bf16Runner SM12xNvfp4Config SM12xNvfp4Runner SiLU SiTU SwiGLU SwiGLUStep
        TrtllmBf16Config TrtllmBf16RoutedRunner TrtllmFp4Config TrtllmFp4RoutedRunner
        TrtllmFp8BlockConfig TrtllmFp8BlockRunner TrtllmFp8PerTensorConfig
        TrtllmFp8PerTensorRunner TrtllmMxInt4Config TrtllmMxInt4RoutedRunner
    """,
    "its kernels need Hopper or Blackwell: call cutlass_fused_moe, with 16-bit weights or a "
    "weight-only format": """
        alloc_scratchpad alphamoe_fp8_block_scale_aligned_moe alphamoe_nvfp4_aligned_moe
        alphamoe_nvfp4_finalize_deferred alphamoe_nvfp4_routed_moe
        alphamoe_nvfp4_routed_moe_deferred b12x_fused_moe cake_fused_moe_prepare_workspace
        cudnn_frost_grouped_gemm1_swiglu cudnn_frost_grouped_gemm1_swiglu_workspace_size
        cute_dsl_fused_moe cute_dsl_fused_moe_bf16 cute_dsl_fused_moe_mxfp8_mxfp4
        cute_dsl_fused_moe_nvfp4 cute_dsl_sm12x_fc1_act_fp8 cute_dsl_sm12x_fc1_act_mxfp8_mxfp4
        cute_dsl_sm12x_fc1_act_q1_fp8 cute_dsl_sm12x_fc1_act_q1_mxfp8_mxfp4
        cute_dsl_sm12x_fc2_finalize_fp8 cute_dsl_sm12x_fc2_finalize_mxfp8_mxfp4
        cute_dsl_sm12x_moe_gemm_fp8 cute_dsl_sm12x_moe_gemm_mxfp8_mxfp4
        cutlass_fused_moe_prepare_workspace get_scratchpad_size_bytes mono_moe
        prims_ts_bf16_moe prims_ts_bf16_moe_partitioned prims_ts_bf16_routed_moe
        prims_ts_fp4_block_scale_moe prims_ts_fp4_block_scale_moe_partitioned
        prims_ts_fp4_block_scale_routed_moe prims_ts_fp8_block_scale_moe
        prims_ts_fp8_block_scale_moe_partitioned prims_ts_fp8_block_scale_routed_moe
        prims_ts_fp8_per_tensor_scale_moe prims_ts_fp8_per_tensor_scale_moe_partitioned
        trtllm_bf16_moe trtllm_bf16_routed_moe
        trtllm_fp4_block_scale_moe trtllm_fp4_block_scale_routed_moe trtllm_fp8_block_scale_moe
        trtllm_fp8_block_scale_routed_moe trtllm_fp8_per_channel_scale_moe
        trtllm_fp8_per_channel_scale_routed_moe trtllm_fp8_per_tensor_scale_moe
        trtllm_fp8_per_tensor_scale_routed_moe trtllm_moe_acquire_da_graph_leases
        trtllm_moe_da_diagnostics trtllm_moe_release_da_resources trtllm_mxint4_block_scale_moe
        trtllm_mxint4_block_scale_routed_moe
    """,
}

# What each refused name says when it is called.
REFUSED: dict[str, str] = {
    name: f"flashinfer.fused_moe.{name} is not in fused_moe: {why}"
    for why, names in _REFUSED.items()
    for name in names.split()
}


class _RefusedClass(type):
    """A class that can be imported, annotated with and tested for, not used."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(REFUSED[cls.__name__])

    def __getattr__(cls, name: str) -> Any:
        # Members of its enumerations. Python's own look-ups want the usual answer.
        if name.startswith("_"):
            raise AttributeError(name)
        raise NotImplementedError(REFUSED[cls.__name__])


def refused(name: str) -> Any:
    """What stands for a name of `REFUSED`: using it raises NotImplementedError, with its text."""
    text = REFUSED[name]
    if name[0].isupper():
        return _RefusedClass(name, (), {"__doc__": text})

    def function(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(text)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    return function
