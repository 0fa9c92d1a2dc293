# SPDX-License-Identifier: Apache-2.0
"""What the transformers integration does around its calls: order of weights, memory, refusals."""

from __future__ import annotations

import concurrent.futures
import copy
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "transformers", minversion="5.17", reason="this Python has no transformers 5.17 or newer"
)
import transformers

from fused_moe.integrations import transformers as moe
from gpu_layer import require_sm80
from transformers_tiny import (
    IDS,
    experts_modules,
    load,
    run,
    write_checkpoint,
)

moe.register()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints: one whose experts are in the usual layout, and gpt-oss's, with its own."""
    made = {family: tmp_path_factory.mktemp(family) for family in ("mixtral", "gpt_oss")}
    for family, folder in made.items():
        write_checkpoint(family, folder)
    return made


both_layouts = pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the experts' parameters as they lie in memory."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if ".experts." in name
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@both_layouts
def test_other_implementations_find_their_order(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], "eager")
    original, eager = tensors(model), run(model)
    model.set_experts_implementation("fused_moe")
    fused = run(model)
    assert not same(tensors(model), original)  # converted in place
    for other in ("eager", "grouped_mm", "batched_mm", "eager"):
        model.set_experts_implementation(other)
        again = run(model)
        assert same(tensors(model), original), other
        if other == "eager":
            assert torch.equal(again, eager)
        model.set_experts_implementation("fused_moe")
        assert torch.equal(run(model), fused)


@both_layouts
def test_conversion_keeps_storage(family: str, folders: dict[str, Path]) -> None:
    # In place: a captured graph stays right, and no second copy of the weights exists.
    model = load(folders[family], "fused_moe")
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert moe.prepare(model) == len(experts_modules(model)) == 2
    model.state_dict()
    assert moe.prepare(model) == 2
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@both_layouts
def test_state_dict_after_a_run(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], "fused_moe")
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fused = run(model)
    assert same(model.state_dict(), original)
    assert torch.equal(run(model), fused)
    # Loading comes in transformers' order as well, into converted experts too.
    for tensor in original.values():
        tensor.mul_(1.25)
    model.load_state_dict(original)
    fresh = load(folders[family], "fused_moe")
    fresh.load_state_dict(original)
    assert torch.equal(run(model), run(fresh))
    assert not torch.equal(run(model), fused)


@pytest.mark.parametrize("kept", moe.FORMATS)
@both_layouts
def test_copies_of_a_model(family: str, kept: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], f"fused_moe_{kept}" if kept else "fused_moe")
    fused = run(model)
    assert torch.equal(run(copy.deepcopy(model)), fused)
    experts = experts_modules(model)[0]
    x = torch.randn(3, 64)
    ids = torch.tensor([[0, 1], [2, 3], [1, 0]])
    scales = torch.rand(3, 2)
    unpickled = pickle.loads(pickle.dumps(experts))
    with torch.no_grad():
        assert torch.equal(unpickled(x, ids, scales), experts(x, ids, scales))


@both_layouts
def test_another_dtype_after_conversion(family: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], "fused_moe")
    run(model)
    model.to(torch.bfloat16)
    fresh = load(folders[family], "fused_moe").to(torch.bfloat16)
    assert torch.equal(run(model), run(fresh))


@pytest.mark.parametrize("kept", moe.FORMATS)
@both_layouts
def test_compile(family: str, kept: str, folders: dict[str, Path]) -> None:
    model = load(folders[family], f"fused_moe_{kept}" if kept else "fused_moe")
    x, ids = torch.randn(5, 64), torch.randint(0, 4, (5, 2))
    scales = torch.rand(5, 2)
    experts = experts_modules(model)[0]
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with pytest.raises(Exception, match=r"prepare\(model\)"):
            compiled(x, ids, scales)
        torch._dynamo.reset()
        moe.prepare(model)
        assert torch.equal(compiled(x, ids, scales), experts(x, ids, scales))
        if not kept:
            # A state dict puts the order back, which code compiled before must not overlook.
            fused = experts(x, ids, scales)
            model.state_dict()
            with pytest.raises(Exception, match=r"prepare\(model\)"):
                compiled(x, ids, scales)
            moe.prepare(model)
            assert torch.equal(compiled(x, ids, scales), fused)


def test_compiling_another_implementation_afterwards(folders: dict[str, Path]) -> None:
    model = load(folders["mixtral"], "fused_moe")
    run(model)
    model.set_experts_implementation("batched_mm")
    run(model)
    experts = experts_modules(model)[0]
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    x, ids, scales = torch.randn(5, 64), torch.randint(0, 4, (5, 2)), torch.rand(5, 2)
    with torch.no_grad():
        assert torch.equal(compiled(x, ids, scales), experts(x, ids, scales))


def test_gradients_are_refused(folders: dict[str, Path]) -> None:
    model = load(folders["mixtral"], "fused_moe")
    with pytest.raises(RuntimeError, match=r"inference only.*torch\.no_grad"):
        model(IDS)
    with torch.inference_mode():
        inference = model(IDS, use_cache=False).logits
    assert torch.equal(inference, run(model))


def test_inference_mode_leaves_ordinary_parameters(folders: dict[str, Path]) -> None:
    model = load(folders["mixtral"], "fused_moe_int8")
    with torch.inference_mode():
        model(IDS)
    assert not any(tensor.is_inference() for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("name", moe.IMPLEMENTATIONS)
def test_models_loaded_in_inference_mode(name: str, folders: dict[str, Path]) -> None:
    for family in folders:
        expected = run(load(folders[family], name))
        with torch.inference_mode():
            model = load(folders[family], name)
        assert torch.equal(run(model), expected), family
        if name == "fused_moe":
            model.set_experts_implementation("eager")
            assert torch.equal(run(model), run(load(folders[family], "eager")))


def test_first_calls_from_several_threads(folders: dict[str, Path]) -> None:
    experts = experts_modules(load(folders["mixtral"], "fused_moe"))[0]
    for name in ("gate_up_proj", "down_proj"):  # large enough that converting them takes a while
        weight = torch.randn(getattr(experts, name).repeat(1, 8, 8).shape) / 16
        getattr(experts, name).data = weight
    x, ids, scales = torch.randn(3, 512), torch.tensor([[0, 1], [2, 3], [1, 0]]), torch.rand(3, 2)
    again = copy.deepcopy(experts)
    at_once = threading.Barrier(4)

    def call(_: int) -> torch.Tensor:
        at_once.wait()
        with torch.no_grad():
            return experts(x, ids, scales)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(call, range(4)))
    with torch.no_grad():
        expected = again(x, ids, scales)
        outputs.append(experts(x, ids, scales))
    assert all(torch.equal(out, expected) for out in outputs)


@both_layouts
@pytest.mark.parametrize("back", [False, True])
def test_a_conversion_that_stops_halfway(
    family: str, back: bool, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Done again from its start it would exchange twice what it had exchanged: wrong, silently.
    model = load(folders[family], "fused_moe")
    if back:
        run(model)
    with monkeypatch.context() as patch:
        real, calls = moe.experts._rewrite, []

        def rewrite(tensor: torch.Tensor, **options: Any) -> None:
            calls.append(tensor)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no memory")
            real(tensor, **options)

        patch.setattr(moe.experts, "_rewrite", rewrite)
        model.set_experts_implementation("eager" if back else "fused_moe")
        with pytest.raises(torch.OutOfMemoryError):
            run(model)
    for name in ("fused_moe", "fused_moe_int8", "eager"):
        model.set_experts_implementation(name)
        with pytest.raises(RuntimeError, match=r"stopped halfway.*load the model again"):
            run(model)
    with pytest.raises(RuntimeError, match="stopped halfway"):
        model.state_dict()


@both_layouts
def test_distributed_parameters_get_their_order_back(family: str, folders: dict[str, Path]) -> None:
    # With tensor parallelism transformers shows the forward local tensors, all others DTensors.
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = load(folders[family], "fused_moe")
    original = tensors(model)
    run(model)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        for module in experts_modules(model):
            for name, parameter in list(module.named_parameters()):
                whole = DTensor.from_local(parameter.detach(), mesh, [Shard(1)], run_check=False)
                setattr(module, name, torch.nn.Parameter(whole, requires_grad=False))
        state = model.state_dict()
        assert all(torch.equal(state[name].to_local(), original[name]) for name in original)
        with pytest.raises(NotImplementedError, match="a distributed tensor"):
            moe.prepare(model)
    finally:
        torch.distributed.destroy_process_group()


def test_dtypes_must_agree(folders: dict[str, Path]) -> None:
    experts = experts_modules(load(folders["mixtral"], "fused_moe", torch.bfloat16))[0]
    x, ids, scales = torch.randn(3, 64), torch.randint(0, 4, (3, 2)), torch.rand(3, 2)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"one dtype, or run it under torch\.autocast"):
            experts(x, ids, scales)
        with torch.autocast("cpu", torch.bfloat16):
            out = experts(x, ids, scales)
        assert out.dtype == torch.float32
        assert torch.equal(out.bfloat16(), experts(x.bfloat16(), ids, scales))


def test_float32_on_a_gpu_is_refused(folders: dict[str, Path]) -> None:
    require_sm80()
    with pytest.raises(NotImplementedError, match=r"float32 on a GPU.*dtype=torch\.bfloat16"):
        moe.prepare(load(folders["mixtral"], "fused_moe", device="cuda"))


def test_moving_a_prepared_model_to_a_gpu(folders: dict[str, Path]) -> None:
    require_sm80()
    for family, folder in folders.items():
        for name in moe.IMPLEMENTATIONS:
            model = load(folder, name, torch.bfloat16)
            moe.prepare(model)
            there = load(folder, name, torch.bfloat16, "cuda")
            assert torch.equal(run(model.to("cuda")), run(there)), (family, name)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@both_layouts
def test_generating_with_compiled_steps(family: str, device: str, folders: dict[str, Path]) -> None:
    # With a static cache generate() compiles the steps after the first: on a GPU by Inductor,
    # with CUDA graphs; on the CPU, where it has to be asked, as they are traced.
    if device == "cuda":
        require_sm80()
        compiled = None
    else:
        compiled = transformers.CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        compiled._compile_all_devices = True
    model = load(folders[family], "fused_moe", torch.bfloat16, device)
    prompt = IDS[:1].to(device)
    torch._dynamo.utils.counters.clear()
    tokens = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=8,
        do_sample=False,
        cache_implementation="static",
        compile_config=compiled,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    assert tokens.shape[1] == prompt.shape[1] + 8
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    made = tokens[0, prompt.shape[1] :, None]
    # The largest logit, or one that rounding, which fused steps do less of, may put before it.
    behind = logits.amax(dim=1) - logits.gather(1, made)[:, 0]
    assert (behind < 0.05 * logits.std(dim=1)).all(), behind


def test_misaligned_weights(folders: dict[str, Path]) -> None:
    # Tensors of a mapped file start anywhere.
    model = load(folders["mixtral"], "fused_moe", torch.bfloat16)
    expected = run(model)
    model.state_dict()
    for module in experts_modules(model):
        for parameter in module.parameters():
            room = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)
            parameter.data = room[1:].view(parameter.shape).copy_(parameter)
            assert parameter.data_ptr() % 16
    assert torch.equal(run(model), expected)


def test_expert_parallel_ids(folders: dict[str, Path]) -> None:
    # transformers marks choices of other ranks' experts by the number of experts here.
    experts = experts_modules(load(folders["mixtral"], "fused_moe"))[0]
    x, scales = torch.randn(3, 64), torch.rand(3, 2)
    ids = torch.tensor([[0, 4], [4, 4], [4, 2]])
    with torch.no_grad():
        out = experts(x, ids, scales)
        assert torch.equal(out[1], torch.zeros(64))
        for row, choice in ((0, 0), (2, 1)):
            alone = experts(x[row : row + 1], ids[row : row + 1, choice : choice + 1],
                            scales[row : row + 1, choice : choice + 1])  # fmt: skip
            assert torch.allclose(out[row], alone[0], rtol=1e-5, atol=1e-6)


def test_missing_transformers_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch, pytest.raises(ImportError, match=r"this is 5\.6\.2"):
        patch.setattr(sys.modules["transformers"], "__version__", "5.6.2")
        moe.register()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"needs transformers 5\.7 or newer.*pip install"):
        moe.register()


def test_the_page_shows_what_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of docs/transformers.md, as it stands there."""
    page = Path(__file__).absolute().parent.parent / "docs" / "transformers.md"
    program = page.read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(program, str(page), "exec"), names)
    assert [p.dtype for p in experts_modules(names["model"])[0].parameters()] == [torch.int8] * 2
