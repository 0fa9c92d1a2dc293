# SPDX-License-Identifier: Apache-2.0
"""The module extension: for MODULE.bazel what dependencies.bzl is for a WORKSPACE."""

load("//:dependencies.bzl", "declare_repositories")

def _declare(repository_rule, name, **kwargs):
    """Declares a repository."""
    repository_rule(name = name, **kwargs)

def _dependencies_impl(module_ctx):
    # Modules have no say in it: the environment chooses, see .bazelrc.
    _ = module_ctx  # @unused
    declare_repositories(_declare)

dependencies = module_extension(
    implementation = _dependencies_impl,
    doc = "The interpreter, the locked Python packages, the CUDA toolkit and CUTLASS.",
)
