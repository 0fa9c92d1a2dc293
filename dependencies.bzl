# SPDX-License-Identifier: Apache-2.0
"""The external repositories of fused_moe, for a WORKSPACE: see fused_moe_dependencies."""

load("//tools/bazel:repositories.bzl", "rule_set_stubs")
load("//tools/cuda:repositories.bzl", "cuda_toolkit", "cutlass_headers")
load("//tools/python:repositories.bzl", "python_interpreter", "python_packages")

def fused_moe_dependencies():
    """Declares every external repository that fused_moe needs, and its Python toolchain.

    Another workspace calls it after naming this one:

        local_repository(name = "fused_moe", path = "...")
        load("@fused_moe//:dependencies.bzl", "fused_moe_dependencies")
        fused_moe_dependencies()

    A repository that the caller has declared before (rules_cc, rules_python, ...) is kept.
    Nothing is downloaded until a target needs it: `cuda` and `cutlass` not at all with
    the architecture setting `cpu`.
    """
    rule_set_stubs()
    declare_repositories(_maybe)
    native.register_toolchains("@fused_moe_python//:toolchain")

def _maybe(repository_rule, name, **kwargs):
    """Declares a repository unless the workspace has one of that name."""
    if not native.existing_rule(name):
        repository_rule(name = name, **kwargs)

def declare_repositories(declare):
    """Declares the repositories that are the same for a WORKSPACE and for a module.

    One that BUILD files name, not only another of these, is named in MODULE.bazel as well.

    Args:
      declare: what to call for each with its rule, its name and its attributes.
    """
    declare(python_interpreter, name = "fused_moe_python")
    declare(
        python_packages,
        name = "plotting_packages",
        lock = Label("//tools/python:locks/plotting.txt"),
        modules = {"matplotlib": "matplotlib"},
    )
    declare(
        python_packages,
        name = "pybind11",
        lock = Label("//tools/python:locks/pybind11.txt"),
        modules = {"pybind11": "pybind11"},
    )
    declare(
        python_packages,
        name = "python_packages",
        aliases = {
            "matplotlib": "@plotting_packages//:matplotlib",
            "safetensors": "@transformers_packages//:safetensors",
            "transformers": "@transformers_packages//:transformers",
        },
        cuda_lock = Label("//tools/python:locks/torch_cuda.txt"),
        lock = Label("//tools/python:locks/packages.txt"),
        modules = {
            "absl_py": "absl",
            "hypothesis": "hypothesis",
            "numpy": "numpy",
            "pytest": "pytest",
            "torch": "torch",
            "tqdm": "tqdm",
        },
    )
    declare(
        python_packages,
        name = "transformers_packages",
        lock = Label("//tools/python:locks/transformers.txt"),
        modules = {
            "safetensors": "safetensors",
            "transformers": "transformers",
        },
        optional = True,
    )
    declare(
        cuda_toolkit,
        name = "cuda",
        lock = Label("//tools/cuda:locks/toolkit.txt"),
    )
    declare(
        cutlass_headers,
        name = "cutlass",
        lock = Label("//tools/cuda:locks/cutlass.txt"),
    )
