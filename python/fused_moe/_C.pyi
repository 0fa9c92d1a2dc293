# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: problems, sizes and launches on plain addresses, no PyTorch."""

BACKENDS: tuple[str, ...]
"""The kernel backends compiled in: () or ("sm80",)."""

MAX_LOCAL_EXPERTS: int
"""The most experts a rank may have; absent where BACKENDS is empty, like all functions."""

BUILT_FOR: str
"""The architecture setting of the build: "sm80", "sm80_on_sm90", "cpu"."""

class Problem:
    """The sizes and formats of a call. Immutable. num_experts counts those of all ranks.

    dtype and output_dtype are 0 float32, 1 float16, 2 bfloat16; activation is the value of an
    ActivationType; weight_format is 0 for weights of `dtype`, 1 for int8, 2 for uint8, 3 for
    int4, 4 for mxfp4; group_size is the number of weights that share a scale, 0 for others.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        hidden_size: int,
        intermediate_size: int,
        num_local_experts: int,
        first_local_expert: int,
        top_k: int,
        activation: int,
        dtype: int,
        output_dtype: int,
        weight_format: int,
        num_experts: int = 0,
        group_size: int = 0,
    ) -> None: ...

class Tactic:
    """One way to run a matrix product; sizes in elements, shared_memory in bytes a block.

    whole_layer: it runs both products, and all else, in one launch.
    """

    @property
    def name(self) -> str: ...
    @property
    def whole_layer(self) -> bool: ...
    @property
    def tile_m(self) -> int: ...
    @property
    def tile_n(self) -> int: ...
    @property
    def tile_k(self) -> int: ...
    @property
    def stages(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def shared_memory(self) -> int: ...

def workspace_size(backend: str, problem: Problem) -> int:
    """The bytes of workspace that `run` needs. Asks no GPU."""

def tactics(backend: str, weight_format: int = 0) -> list[Tactic]:
    """All tactics for a format of weights; their order is the numbering used elsewhere."""

def supported_tactics(backend: str, problem: Problem, shared_memory_per_block: int) -> list[int]:
    """The tactics that can run a GEMM of `problem` within the shared memory of a block."""

def whole_layer_tactics(
    backend: str, problem: Problem, shared_memory_per_block: int
) -> list[tuple[int, int]]:
    """The pairs for `run` that do the whole layer in one launch; [] beyond a few tokens."""

def choose_tactics(
    backend: str,
    problem: Problem,
    *,
    multiprocessors: int,
    shared_memory_per_block: int,
    shared_memory_per_multiprocessor: int,
) -> tuple[int, int]:
    """The tactics of GEMM 1 and GEMM 2 that `run` takes by itself on such a chip."""

def run(
    backend: str,
    problem: Problem,
    stream: int,
    input: int,
    experts: int,
    scales: int,
    fc1_weights: int,
    fc2_weights: int,
    fc1_scales: int,
    fc2_scales: int,
    weight_scale_dtype: int,
    fc1_bias: int,
    fc2_bias: int,
    swiglu_alpha: int,
    swiglu_beta: int,
    swiglu_limit: int,
    output: int,
    workspace: int,
    workspace_bytes: int,
    add_fc2_bias: bool,
    tactics: tuple[int, int] | None = None,
    shared_memory_per_block: int = 0,
) -> None:
    """Launches a call on `stream` of the current device. Quicker by position than by name.

    Addresses are 0 where an argument is not given. shared_memory_per_block = 0 asks the
    device; a smaller number imposes the limit of a smaller chip.

    Raises:
        RuntimeError: an error of the CUDA runtime.
    """
