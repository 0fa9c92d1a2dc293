# SPDX-License-Identifier: Apache-2.0
"""Repository rules for the Python interpreter and its packages."""

def own(label):
    """Returns how a BUILD file of any repository names a target or file of this one.

    Args:
      label: Label("//...").
    """
    text = str(label)

    # Bazel 4 names the main repository by nothing, Bazel 7 by "@@".
    return text if text.startswith("@") else "@fused_moe" + text

MISSING = own(Label("//tools/python/private:missing.bzl"))

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
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime", "py_runtime_pair")

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

cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    # As a system path: warnings in it are not ours.
    includes = ["include"],
)
"""

def _python_interpreter_impl(repository_ctx):
    chosen = repository_ctx.os.environ.get("MOE_PYTHON")
    command = chosen or repository_ctx.which("python3")
    if not command:
        fail("fused_moe: no python3 on PATH; install Python 3.10 or newer, or set MOE_PYTHON")
    result = repository_ctx.execute([command, "-c", _DESCRIBE])
    if result.return_code != 0:
        if chosen:
            command = "MOE_PYTHON, a name on PATH or an absolute path, is %s, which" % chosen
        fail("fused_moe: %s does not run: %s" % (command, result.stderr))
    python = struct(**json.decode(result.stdout))
    if [int(part) for part in python.version.split(".")] < [3, 10]:
        fail(("fused_moe: %s is Python %s; it must be 3.10 or newer, and MOE_PYTHON may name " +
              "another than the first python3 on PATH") % (python.interpreter, python.version))
    if not python.include:
        fail("fused_moe: %s has no headers (Python.h); Debian: apt install python%s-dev" %
             (python.interpreter, python.version))
    repository_ctx.symlink(python.include, "include")
    repository_ctx.file(
        "BUILD.bazel",
        _INTERPRETER_BUILD.format(interpreter = python.interpreter),
    )
    repository_ctx.file("python.json", result.stdout)
    repository_ctx.file("python.bzl", "EXTENSION_SUFFIX = \"%s\"\n" % python.suffix)

python_interpreter = repository_rule(
    implementation = _python_interpreter_impl,
    doc = "The machine's Python: toolchain, headers, and the suffix of extension modules.",
    environ = ["MOE_PYTHON", "PATH"],
    local = True,
)

# For rules that run the interpreter. They depend on this file, not on PATH, most changes of which
# lead to the same interpreter: nothing is downloaded anew for those.
PYTHON_ATTRIBUTE = attr.label(default = Label("@fused_moe_python//:python.json"))

def read_python(repository_ctx):
    """Returns what the build needs to know of the interpreter.

    Args:
      repository_ctx: the context of a repository rule with `_python`, a PYTHON_ATTRIBUTE.

    Returns:
      A struct of strings: interpreter (absolute path), include, suffix (of extension modules),
      version ("3.11").
    """
    return struct(**json.decode(repository_ctx.read(repository_ctx.attr._python)))

_PACKAGES_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_library")
load("{missing}", "missing")

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
             "take it from there. Once it is installed: bazel sync --only={repository}",
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

# The licences of what this repository holds, for those who pass it on in a binary. Empty where an
# installed copy came without.
LICENSE = """
filegroup(
    name = "license",
    srcs = glob(
        ["license/*"],
        allow_empty = True,
    ),
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
      python: read_python's answer.
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

def link_licenses(repository_ctx, site_packages, distribution):
    """Links a distribution's licence files into the folder license/, for LICENSE.

    Args:
      repository_ctx: the repository rule's context.
      site_packages: folder with the distribution's .dist-info folder, a path or a string.
      distribution: its name, as that folder spells it.
    """
    for entry in repository_ctx.path(site_packages).readdir():
        name = entry.basename
        if not (name.startswith(distribution + "-") and name.endswith(".dist-info")):
            continue
        folder = entry.get_child("licenses")
        for file in (folder if folder.exists else entry).readdir():
            if file.basename.upper().startswith("LICENSE"):
                repository_ctx.symlink(file, "license/" + file.basename)

def _python_packages_impl(repository_ctx):
    python = read_python(repository_ctx)
    choice = repository_ctx.os.environ.get("MOE_PYTHON_PACKAGES") or "locked"
    if choice not in ("locked", "system"):
        fail("MOE_PYTHON_PACKAGES is %r; it must be 'locked' (or unset) or 'system'" % choice)
    modules = repository_ctx.attr.modules
    build = _PACKAGES_BUILD.format(missing = MISSING)
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
            present = module in found or repository_ctx.attr.optional
            text = _SYSTEM_PACKAGE if present else _MISSING
            build += text.format(
                name = name,
                interpreter = python.interpreter,
                repository = repository_ctx.name,
            )
        if "pybind11" in found:
            pybind11 = repository_ctx.path(found["pybind11"]).dirname.get_child("include")
    if "pybind11" in modules:
        if pybind11:
            repository_ctx.symlink(pybind11, "pybind11_include")
            link_licenses(repository_ctx, pybind11.dirname.dirname, "pybind11")
            build += _PYBIND11 + LICENSE
        else:
            build += _MISSING.format(
                name = "headers",
                interpreter = python.interpreter,
                repository = repository_ctx.name,
            ) + LICENSE
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
        "optional": attr.bool(doc = "Whether tests skip, at run time, what an interpreter lacks."),
        "_fetch": attr.label(default = Label("//tools/python:fetch.py")),
        "_python": PYTHON_ATTRIBUTE,
    },
    doc = """A lock's packages, as one site-packages tree behind one target a package.

With MOE_PYTHON_PACKAGES=system nothing is downloaded: the targets stand for the interpreter's own
packages, and one that it lacks fails, by name, when something depends on it. In an `optional`
repository it is an empty target instead: what depends on it finds out when it imports.
""",
    environ = ["MOE_PYTHON_PACKAGES"],
)
