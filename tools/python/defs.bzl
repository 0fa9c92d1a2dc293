# SPDX-License-Identifier: Apache-2.0
"""Macros for extension modules and pytest tests."""

load("@fused_moe_python//:python.bzl", "EXTENSION_SUFFIX")
load("@rules_cc//cc:defs.bzl", "cc_binary")
load("@rules_python//python:defs.bzl", "py_test")

def _extension_module_impl(ctx):
    library = ctx.file.library
    repository = ctx.label.workspace_name or ctx.workspace_name
    path = "/".join([repository, ctx.attr.module.replace(".", "/") + EXTENSION_SUFFIX])
    return [DefaultInfo(
        files = depset([library]),
        # The module lies beside the package's Python files, wherever its BUILD file is.
        runfiles = ctx.runfiles(root_symlinks = {path: library}),
    )]

_extension_module = rule(
    implementation = _extension_module_impl,
    attrs = {
        "library": attr.label(allow_single_file = True, mandatory = True),
        "module": attr.string(mandatory = True),
    },
    doc = "Puts a shared library where Python imports it from.",
)

def pybind_extension(name, module, srcs, deps = [], copts = [], local_defines = [], visibility = None):
    """Builds a pybind11 extension module.

    Depend on it through `data`; it works with the interpreter of @fused_moe_python.

    Args:
      name: the target; also the module's own name, as in PYBIND11_MODULE(name, m).
      module: where it is imported from, below the repository's root: "python.fused_moe._C" lies
        beside the files of python/fused_moe/.
      srcs: C++ sources.
      deps: C++ libraries; Python's and pybind11's headers are added.
      copts: further compiler flags.
      local_defines: preprocessor definitions of these sources alone.
      visibility: as everywhere.
    """
    library = name + ".so"
    cc_binary(
        name = library,
        srcs = srcs,
        # Hidden: two extensions with the same C++ names may live in one process.
        copts = ["-fvisibility=hidden"] + copts,
        linkopts = ["-Wl,--exclude-libs,ALL"],
        linkshared = True,
        local_defines = local_defines,
        visibility = ["//visibility:private"],
        deps = deps + ["@pybind11//:headers"],
    )
    _extension_module(
        name = name,
        library = library,
        module = module,
        visibility = visibility,
    )

def moe_py_test(name, srcs, deps = [], data = [], args = [], size = "medium", gpu = False, tags = [], **kwargs):
    """Runs pytest on a file.

    `--test_filter=EXPRESSION` is pytest's -k, `shard_count` splits the cases, the JUnit XML goes
    where Bazel wants it. A case marked `@pytest.mark.gpu` is skipped where there is no GPU; with
    --config=gpu (MOE_REQUIRE_GPU=1) it fails there.

    Args:
      name: the target.
      srcs: Python files; pytest collects the first, or NAME.py if it is among them.
      deps: Python libraries; pytest is added.
      data: files the tests read.
      args: further arguments of pytest.
      size: as everywhere.
      gpu: whether cases use a GPU; such tests run one at a time.
      tags: as everywhere.
      **kwargs: passed to py_test.
    """
    collected = name + ".py" if name + ".py" in srcs else srcs[0]
    runner = Label("//tools/python:pytest_main.py")
    py_test(
        name = name,
        size = size,
        srcs = srcs + [runner],
        args = ["$(rootpath %s)" % collected] + args,
        data = data,
        main = runner,
        python_version = "PY3",
        tags = tags + (["gpu", "exclusive-if-local"] if gpu else []),
        deps = deps + ["@python_packages//:pytest"],
        **kwargs
    )
