# SPDX-License-Identifier: Apache-2.0
"""Repository rules for the CUDA toolkit and CUTLASS."""

load(
    "//tools/python:repositories.bzl",
    "LICENSE",
    "MISSING",
    "PYTHON_ATTRIBUTE",
    "fetch_wheels",
    "link_licenses",
    "own",
    "read_python",
)

# Of an installed toolkit, as README.md says.
_OLDEST_RELEASE = [11, 8]

# For reproducible objects; not every nvcc since 11.8 has them.
_WANTED_OPTIONS = ["--frandom-seed", "--objdir-as-tempdir"]

_TOOLKIT_BUILD = """\
load("{toolkit}", "toolkit")
load("{missing}", "missing")
load("@rules_cc//cc:defs.bzl", "cc_import", "cc_library")

package(default_visibility = ["//visibility:public"])

toolkit(
    name = "toolkit",
    # Folders, not their thousands of files: one link each in a sandbox.
    files = [{folders}],
    nvcc = "{nvcc}",
    options = [{options}],
)

cc_library(
    name = "headers",
    hdrs = glob(
        ["host_include/**"],
        allow_empty = True,
        # C++ libraries for device code, which nvcc brings along by itself.
        exclude = [
            "host_include/cccl/**",
            "host_include/cub/**",
            "host_include/cuda/**",
            "host_include/nv/**",
            "host_include/thrust/**",
        ],
    ),
    includes = [{includes}],
)

cc_import(
    name = "cudart_archive",
    static_library = "lib/libcudart_static.a",
)

cc_library(
    name = "cudart_static",
    linkopts = [
        "-ldl",
        "-lpthread",
        "-lrt",
    ],
    deps = [
        ":cudart_archive",
        ":headers",
    ],
)
"""

_TOOL = """
filegroup(
    name = "{tool}",
    srcs = ["bin/{tool}"],
)
"""

_NO_TOOL = """
missing(
    name = "{tool}",
    reason = "the toolkit {root} (MOE_CUDA_TOOLKIT) has no bin/{tool}",
)
"""

def _first(repository_ctx, root, names):
    """Returns the first of the paths below `root` that exists, or None."""
    for name in names:
        path = repository_ctx.path(root + "/" + name)
        if path.exists:
            return path
    return None

# CUDA 13.0 declares two functions that glibc 2.42 added, with another exception specification: no
# file compiles there. Later toolkits have this condition too.
_RSQRT = """\
#include <features.h>
#if defined(__GLIBC__) && (__GLIBC__ > 2 || (__GLIBC__ == 2 && __GLIBC_MINOR__ >= 42))
#define MOE_RSQRT_SPECIFIER __THROW
#else
#define MOE_RSQRT_SPECIFIER
#endif
"""

def _declare_rsqrt_as_glibc(repository_ctx, header):
    """Lets the wheels' header declare rsqrt and rsqrtf as the machine's glibc does."""
    text = repository_ctx.read(header)
    guard = "#define __MATH_FUNCTIONS_H__\n"
    if guard not in text:
        fail("fused_moe: %s has no line %s" % (header, guard))
    text = text.replace(guard, guard + _RSQRT, 1)
    for name in ["double                 rsqrt(double x)", "float                  rsqrtf(float x)"]:
        text = text.replace(" %s;" % name, " %s MOE_RSQRT_SPECIFIER;" % name)
    for name in ["double rsqrt(double a)", "float rsqrtf(float a)"]:
        text = text.replace("__func__(%s);" % name, "__func__(%s MOE_RSQRT_SPECIFIER);" % name)
    repository_ctx.file(header, text, executable = False)

def _installed_toolkit(repository_ctx, root):
    """Describes the toolkit installed at `root`, which stays where it is."""
    nvcc = _first(repository_ctx, root, ["bin/nvcc"])
    headers = _first(repository_ctx, root, ["include", "targets/x86_64-linux/include"])
    archive = _first(repository_ctx, root, [
        folder + "/libcudart_static.a"
        for folder in ["lib64", "lib", "targets/x86_64-linux/lib", "lib/x86_64-linux-gnu"]
    ])
    for what, path in [("bin/nvcc", nvcc), ("libcudart_static.a", archive)]:
        if not path:
            fail(("MOE_CUDA_TOOLKIT is %s, which has no %s; it must be the absolute path " +
                  "of a CUDA toolkit, such as /usr/local/cuda") % (root, what))
    if not headers or not headers.get_child("cuda_runtime.h").exists:
        fail("MOE_CUDA_TOOLKIT is %s, which has no include/cuda_runtime.h" % root)
    result = repository_ctx.execute([nvcc, "--version"])
    release = result.stdout.partition(", release ")[2].partition(",")[0]
    if not release.replace(".", "", 1).isdigit():
        fail("MOE_CUDA_TOOLKIT is %s, whose nvcc --version tells no release: %s" %
             (root, result.stdout + result.stderr))
    if [int(part) for part in release.split(".")] < _OLDEST_RELEASE:
        fail("MOE_CUDA_TOOLKIT is %s, which is CUDA %s; it must be %s or newer" %
             (root, release, ".".join([str(part) for part in _OLDEST_RELEASE])))
    return struct(
        archive = archive,
        folders = [],
        # Distributions put the headers where every compiler looks already.
        headers = None if str(headers) == "/usr/include" else headers,
        nvcc = str(nvcc),
        root = root,
    )

def _wheel_toolkit(repository_ctx, python):
    """Downloads the locked toolkit into this repository and describes it."""
    fetch_wheels(repository_ctx, python, "wheels", ["--any-python"])
    link_licenses(repository_ctx, "wheels", "nvidia_cuda_runtime")
    root = "wheels/nvidia/cu13"
    _declare_rsqrt_as_glibc(repository_ctx, root + "/include/crt/math_functions.h")
    return struct(
        archive = repository_ctx.path(root + "/lib/libcudart_static.a"),
        folders = [root],
        headers = repository_ctx.path(root + "/include"),
        nvcc = root + "/bin/nvcc",
        root = root,
    )

def _nvcc_options(repository_ctx, nvcc):
    """Returns those of _WANTED_OPTIONS that this nvcc has."""
    result = repository_ctx.execute([repository_ctx.path(nvcc), "--help"])
    if result.return_code != 0:
        fail("fused_moe: %s --help fails: %s" % (nvcc, result.stdout + result.stderr))
    return [option for option in _WANTED_OPTIONS if option in result.stdout]

def _cuda_toolkit_impl(repository_ctx):
    root = repository_ctx.os.environ.get("MOE_CUDA_TOOLKIT")
    if root:
        toolkit = _installed_toolkit(repository_ctx, root.rstrip("/") or "/")
    else:
        toolkit = _wheel_toolkit(repository_ctx, read_python(repository_ctx))
    repository_ctx.symlink(toolkit.archive, "lib/libcudart_static.a")
    if toolkit.headers:
        repository_ctx.symlink(toolkit.headers, "host_include")
    build = _TOOLKIT_BUILD.format(
        folders = ", ".join([repr(folder) for folder in toolkit.folders]),
        includes = "\"host_include\"" if toolkit.headers else "",
        missing = MISSING,
        nvcc = toolkit.nvcc,
        options = ", ".join([
            repr(option)
            for option in _nvcc_options(repository_ctx, toolkit.nvcc)
        ]),
        toolkit = own(Label("//tools/cuda/private:toolkit.bzl")),
    )
    build += LICENSE
    for tool in ["cuobjdump", "nvdisasm"]:
        path = repository_ctx.path(toolkit.root + "/bin/" + tool)
        if path.exists:
            repository_ctx.symlink(path, "bin/" + tool)
        build += (_TOOL if path.exists else _NO_TOOL).format(root = root, tool = tool)
    repository_ctx.file("BUILD.bazel", build)

cuda_toolkit = repository_rule(
    implementation = _cuda_toolkit_impl,
    attrs = {
        "lock": attr.label(mandatory = True, doc = "Lock file of the toolkit's wheels."),
        "_fetch": attr.label(default = Label("//tools/python:fetch.py")),
        "_python": PYTHON_ATTRIBUTE,
    },
    doc = """The CUDA toolkit: locked wheels, or with MOE_CUDA_TOOLKIT=/path an installed one.""",
    environ = ["MOE_CUDA_TOOLKIT"],
)

_CUTLASS_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "cutlass",
    hdrs = glob(["include/**"]),
    includes = ["include"],
)
"""

def _cutlass_headers_impl(repository_ctx):
    fetch_wheels(repository_ctx, read_python(repository_ctx), "wheel", ["--any-python"])
    repository_ctx.symlink("wheel/cutlass_library/source/include", "include")
    link_licenses(repository_ctx, "wheel", "nvidia_cutlass")
    repository_ctx.file("BUILD.bazel", _CUTLASS_BUILD + LICENSE)

cutlass_headers = repository_rule(
    implementation = _cutlass_headers_impl,
    attrs = {
        "lock": attr.label(mandatory = True, doc = "Lock file of the CUTLASS wheel."),
        "_fetch": attr.label(default = Label("//tools/python:fetch.py")),
        "_python": PYTHON_ATTRIBUTE,
    },
    doc = "CUTLASS's and CuTe's headers, from the locked wheel.",
)
