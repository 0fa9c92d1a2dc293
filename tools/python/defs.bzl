# SPDX-License-Identifier: Apache-2.0
"""Macros for extension modules and pytest tests."""

load("@fused_moe_python//:python.bzl", "EXTENSION_SUFFIX")
load("@rules_cc//cc:defs.bzl", "cc_binary")
load("@rules_python//python:defs.bzl", "py_test")
load("@rules_python//python:py_info.bzl", "PyInfo")

def pybind_extension(name, srcs, deps = [], copts = [], local_defines = [], visibility = None):
    """Builds a pybind11 extension module, for a python_package to take in.

    Args:
      name: the target; also the module's own name, as in PYBIND11_MODULE(name, m).
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
        # Bazel 4 asks for C++11. Hidden: two extensions with the same C++ names may live in one
        # process.
        copts = ["-std=c++17", "-fvisibility=hidden"] + copts,
        linkopts = ["-Wl,--exclude-libs,ALL"],
        linkshared = True,
        local_defines = local_defines,
        visibility = ["//visibility:private"],
        deps = deps + ["@pybind11//:headers"],
    )
    native.filegroup(
        name = name,
        srcs = [library],
        visibility = visibility,
    )

def _python_package_impl(ctx):
    package = ctx.attr.package
    tree = ctx.actions.declare_directory("%s.import/%s" % (ctx.label.name, package))
    args = ctx.actions.args()
    args.add(tree.path)
    inputs = list(ctx.files.srcs)
    for source in ctx.files.srcs:
        inside = source.short_path.rpartition("/%s/" % package)[2]
        args.add_all([source, inside])
    for extension in ctx.attr.extensions:
        library = extension[DefaultInfo].files.to_list()[0]
        args.add_all([library, extension.label.name + EXTENSION_SUFFIX])
        inputs.append(library)
    ctx.actions.run_shell(
        arguments = [args],
        command = """
set -eu
tree=$1
shift
while [ $# -gt 0 ]; do
  mkdir -p "$(dirname "$tree/$2")"
  cp -L "$1" "$tree/$2"
  shift 2
done
""",
        inputs = inputs,
        outputs = [tree],
        mnemonic = "PythonPackage",
        progress_message = "Assembling the package %s" % package,
    )
    runfiles = ctx.runfiles(files = [tree])
    imports = ["%s/%s" % (
        ctx.label.workspace_name or ctx.workspace_name,
        tree.short_path.rpartition("/")[0].replace("../%s/" % ctx.label.workspace_name, ""),
    )]
    for dep in ctx.attr.deps:
        runfiles = runfiles.merge(dep[DefaultInfo].default_runfiles)
    return [
        DefaultInfo(files = depset([tree]), runfiles = runfiles),
        PyInfo(
            imports = depset(
                imports,
                transitive = [dep[PyInfo].imports for dep in ctx.attr.deps],
            ),
            transitive_sources = depset(
                transitive = [dep[PyInfo].transitive_sources for dep in ctx.attr.deps],
            ),
        ),
    ]

python_package = rule(
    implementation = _python_package_impl,
    attrs = {
        "deps": attr.label_list(doc = "Python libraries.", providers = [PyInfo]),
        "extensions": attr.label_list(doc = "pybind_extension targets, inside by their names."),
        "package": attr.string(doc = "Its name, and the folder of srcs.", mandatory = True),
        "srcs": attr.label_list(allow_files = True, doc = "All files of the package."),
    },
    doc = """A Python package with its extension modules, in one folder as an installer lays it out.

Depend on it like on a py_library. With loose files, Bazel would put an empty __init__.py into each
folder above them, the repository's own too; from another workspace that one, which has the
package's name, would be imported in its stead.
""",
    provides = [PyInfo],
)

def moe_py_test(name, srcs, deps = [], data = [], args = [], size = "medium", gpu = False, tags = [], **kwargs):
    """Runs pytest on a file.

    `--test_filter=EXPRESSION` is pytest's -k, `shard_count` splits the cases, the JUnit XML goes
    where Bazel wants it. With --config=gpu (MOE_REQUIRE_GPU=1) a case that is skipped for a reason
    that names a GPU fails instead.

    Args:
      name: the target.
      srcs: Python files; pytest collects the first, or NAME.py if it is among them.
      deps: Python libraries; pytest is added.
      data: files the tests read.
      args: further arguments of pytest.
      size: as everywhere.
      gpu: whether cases use a GPU: such a test runs alone, and with --config=gpu it fails at once
        where there is none.
      tags: as everywhere.
      **kwargs: passed to py_test.
    """
    collected = name + ".py" if name + ".py" in srcs else srcs[0]
    runner = Label("//tools/python:pytest_main.py")
    py_test(
        name = name,
        size = size,
        srcs = srcs + [runner],
        args = (["--gpu"] if gpu else []) + ["$(rootpath %s)" % collected] + args,
        data = data,
        main = runner,
        python_version = "PY3",
        tags = tags + (["gpu", "exclusive-if-local"] if gpu else []),
        deps = deps + ["@python_packages//:pytest"],
        **kwargs
    )
