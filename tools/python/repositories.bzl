# SPDX-License-Identifier: Apache-2.0
"""Repository rules for the Python interpreter and its packages."""

# This repository, whatever the workspace that uses it calls it.
HERE = "@" + (Label("//:BUILD.bazel").workspace_name or "fused_moe")

_ENVIRONMENT = ["MOE_PYTHON", "PATH"]

_DESCRIBE = """
import json, os, sys, sysconfig
include = sysconfig.get_paths()["include"]
print(json.dumps({
    "interpreter": os.path.realpath(sys.executable) if sys.prefix == sys.base_prefix
                   else sys.executable,
    "include": include if os.path.exists(os.path.join(include, "Python.h")) else "",
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "version": "%d.%d" % sys.version_info[:2],
}))
"""

_INTERPRETER_BUILD = """\
load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime")

package(default_visibility = ["//visibility:public"])

py_runtime(
    name = "runtime",
    interpreter_path = "{interpreter}",
    python_version = "PY3",
    stub_shebang = "#!{interpreter}",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)
"""

_HEADERS = """
cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    # As a system path: warnings in it are not ours.
    includes = ["include"],
)
"""

_NO_HEADERS = """
load("{here}//tools/python/private:missing.bzl", "missing")

missing(
    name = "headers",
    reason = "{interpreter} has no headers (Python.h); Debian: apt install python3-dev",
)
"""

def find_python(repository_ctx):
    """Returns what the build needs to know of the interpreter.

    It is $MOE_PYTHON, or the first python3 on PATH.

    Args:
      repository_ctx: the repository rule's context; its environ must hold MOE_PYTHON and PATH.

    Returns:
      A struct of strings: interpreter (absolute path), include ("" without headers), suffix (of
      extension modules), version ("3.11").
    """
    command = repository_ctx.os.environ.get("MOE_PYTHON") or repository_ctx.which("python3")
    if not command:
        fail("fused_moe: no python3 on PATH; install Python 3.10 or newer, or set MOE_PYTHON")
    result = repository_ctx.execute([command, "-c", _DESCRIBE])
    if result.return_code != 0:
        fail("fused_moe: %s does not run: %s" % (command, result.stderr))
    return struct(**json.decode(result.stdout))

def _python_interpreter_impl(repository_ctx):
    python = find_python(repository_ctx)
    build = _INTERPRETER_BUILD
    if python.include:
        repository_ctx.symlink(python.include, "include")
        build += _HEADERS
    else:
        build += _NO_HEADERS
    repository_ctx.file("BUILD.bazel", build.format(
        here = HERE,
        interpreter = python.interpreter,
    ))
    repository_ctx.file("python.bzl", "EXTENSION_SUFFIX = \"%s\"\n" % python.suffix)

python_interpreter = repository_rule(
    implementation = _python_interpreter_impl,
    doc = "The machine's Python: toolchain, headers, and the suffix of extension modules.",
    environ = _ENVIRONMENT,
    local = True,
)

_PACKAGES_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_library")
load("{here}//tools/python/private:missing.bzl", "missing")

package(default_visibility = ["//visibility:public"])
"""

# One folder is one input: a sandbox then needs one link, not 12,000, and PyTorch's libraries find
# each other by their relative paths.
_PACKAGE = """
py_library(
    name = "{name}",
    data = ["site-packages"],
    imports = ["site-packages"],
)
"""

_SYSTEM_PACKAGE = """
py_library(name = "{name}")
"""

_ALIAS = """
alias(
    name = "{name}",
    actual = "{actual}",
)
"""

_MISSING = """
missing(
    name = "{name}",
    reason = "{interpreter} has no package {name}, and MOE_PYTHON_PACKAGES=system says to " +
             "take it from there",
)
"""

_PYBIND11 = """
cc_library(
    name = "headers",
    hdrs = glob(["pybind11_include/**/*.h"]),
    includes = ["pybind11_include"],
    deps = ["@fused_moe_python//:headers"],
)
"""

_FIND_MODULES = """
import importlib.util, json, sys
found = {name: importlib.util.find_spec(name) for name in sys.argv[1:]}
print(json.dumps({name: spec.origin or "" for name, spec in found.items() if spec}))
"""

def fetch_wheels(repository_ctx, python, destination, flags):
    """Downloads and unpacks a lock's wheels.

    Args:
      repository_ctx: the repository rule's context, with the attributes `lock` and `_fetch`.
      python: find_python's answer.
      destination: folder in the repository.
      flags: further arguments of fetch.py.
    """
    lock = repository_ctx.path(repository_ctx.attr.lock)
    repository_ctx.report_progress("Downloading the packages of %s" % lock.basename)
    repository_ctx.file(destination + "/.keep", "")
    result = repository_ctx.execute(
        [
            python.interpreter,
            repository_ctx.path(repository_ctx.attr._fetch),
            "--lock",
            lock,
            "--destination",
            repository_ctx.path(destination),
        ] + flags,
        timeout = 3600,
    )
    if result.return_code != 0:
        fail("\n" + result.stdout + result.stderr)
    repository_ctx.delete(destination + "/.keep")

def _python_packages_impl(repository_ctx):
    python = find_python(repository_ctx)
    choice = repository_ctx.os.environ.get("MOE_PYTHON_PACKAGES") or "locked"
    if choice not in ("locked", "system"):
        fail("MOE_PYTHON_PACKAGES is %r; it must be 'locked' (or unset) or 'system'" % choice)
    modules = repository_ctx.attr.modules
    build = _PACKAGES_BUILD.format(here = HERE)
    pybind11 = None
    if choice == "locked":
        flags = ["--compile"]
        if repository_ctx.attr.cuda_lock:
            flags += ["--cuda-lock", repository_ctx.path(repository_ctx.attr.cuda_lock)]
        fetch_wheels(repository_ctx, python, "site-packages", flags)
        for name in modules:
            build += _PACKAGE.format(name = name)
        pybind11 = repository_ctx.path("site-packages/pybind11/include")
    else:
        command = [python.interpreter, "-c", _FIND_MODULES] + modules.values()
        result = repository_ctx.execute(command)
        if result.return_code != 0:
            fail("fused_moe: %s does not run: %s" % (python.interpreter, result.stderr))
        found = json.decode(result.stdout)
        for name, module in modules.items():
            text = _SYSTEM_PACKAGE if module in found else _MISSING
            build += text.format(name = name, interpreter = python.interpreter)
        if "pybind11" in found:
            pybind11 = repository_ctx.path(found["pybind11"]).dirname.get_child("include")
    if "pybind11" in modules:
        if pybind11:
            repository_ctx.symlink(pybind11, "pybind11_include")
            build += _PYBIND11
        else:
            build += _MISSING.format(name = "headers", interpreter = python.interpreter)
    for name, actual in repository_ctx.attr.aliases.items():
        build += _ALIAS.format(name = name, actual = actual)
    repository_ctx.file("BUILD.bazel", build)

python_packages = repository_rule(
    implementation = _python_packages_impl,
    attrs = {
        "aliases": attr.string_dict(doc = "Target to its place in another repository."),
        "cuda_lock": attr.label(doc = "Lock that PyTorch's default build needs besides."),
        "lock": attr.label(mandatory = True, doc = "Lock file; see lock.py."),
        "modules": attr.string_dict(doc = "Target to the module it makes importable."),
        "_fetch": attr.label(default = Label("//tools/python:fetch.py")),
    },
    doc = """A lock's packages, as one site-packages tree behind one target a package.

With MOE_PYTHON_PACKAGES=system nothing is downloaded: the targets stand for the interpreter's own
packages, and one that it lacks fails, by name, when something depends on it.
""",
    environ = _ENVIRONMENT + ["MOE_PYTHON_PACKAGES"],
)
