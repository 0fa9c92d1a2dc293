# SPDX-License-Identifier: Apache-2.0
"""In-tree answers to the rule sets that Bazel 4 would download.

Bazel 4.2.3 has the C++, Java and Python rules built in, yet loads their names from rules_cc,
rules_java and rules_python, and at every `bazel test` wants remote_coverage_tools. Each stub
passes the built-in rules on.
"""

_CC_DEFS = """\
cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
"""

# A file may not give a built-in name to its own variable of that name.
_CC_BUILTINS = """\
builtin_cc_common = cc_common
builtin_cc_info = CcInfo
"""

_CC_COMMON = """\
load(":builtins.bzl", "builtin_cc_common")

cc_common = builtin_cc_common
"""

_CC_INFO = """\
load(":builtins.bzl", "builtin_cc_info")

CcInfo = builtin_cc_info
"""

_CC_TOOLCHAIN = """\
load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")

find_cc_toolchain = find_cpp_toolchain

def use_cc_toolchain(mandatory = False):
    return ["@bazel_tools//tools/cpp:toolchain_type"]
"""

_CC_ACTION_NAMES = """\
load(
    "@bazel_tools//tools/build_defs/cc:action_names.bzl",
    _CPP_COMPILE_ACTION_NAME = "CPP_COMPILE_ACTION_NAME",
)

CPP_COMPILE_ACTION_NAME = _CPP_COMPILE_ACTION_NAME
"""

_JAVA_DEFS = """\
java_binary = native.java_binary
java_import = native.java_import
java_library = native.java_library
java_package_configuration = native.java_package_configuration
java_plugin = native.java_plugin
java_runtime = native.java_runtime
java_test = native.java_test
java_toolchain = native.java_toolchain
"""

_PYTHON_DEFS = """\
load("@bazel_tools//tools/python:toolchain.bzl", _py_runtime_pair = "py_runtime_pair")

py_binary = native.py_binary
py_library = native.py_library
py_runtime = native.py_runtime
py_runtime_pair = _py_runtime_pair
py_test = native.py_test
"""

_PYTHON_BUILTINS = """\
builtin_py_info = PyInfo
"""

_PYTHON_INFO = """\
load(":builtins.bzl", "builtin_py_info")

PyInfo = builtin_py_info
"""

_COVERAGE_BUILD = """\
load("@rules_cc//cc:defs.bzl", "cc_library")

# Bazel looks these names up for every test, and runs them for `bazel coverage` alone.
[
    cc_library(
        name = name,
        visibility = ["//visibility:public"],
    )
    for name in ("coverage_report_generator", "lcov_merger")
]
"""

_STUBS = {
    "remote_coverage_tools": {"BUILD.bazel": _COVERAGE_BUILD},
    "rules_cc": {
        "BUILD.bazel": "",
        "cc/BUILD.bazel": "",
        "cc/action_names.bzl": _CC_ACTION_NAMES,
        "cc/common/BUILD.bazel": "",
        "cc/common/builtins.bzl": _CC_BUILTINS,
        "cc/common/cc_common.bzl": _CC_COMMON,
        "cc/common/cc_info.bzl": _CC_INFO,
        "cc/defs.bzl": _CC_DEFS,
        "cc/find_cc_toolchain.bzl": _CC_TOOLCHAIN,
    },
    "rules_java": {
        "BUILD.bazel": "",
        "java/BUILD.bazel": "",
        "java/defs.bzl": _JAVA_DEFS,
    },
    "rules_python": {
        "BUILD.bazel": "",
        "python/BUILD.bazel": "",
        "python/builtins.bzl": _PYTHON_BUILTINS,
        "python/defs.bzl": _PYTHON_DEFS,
        "python/py_info.bzl": _PYTHON_INFO,
    },
}

def _stub_impl(repository_ctx):
    for path, content in repository_ctx.attr.contents.items():
        repository_ctx.file(path, content, executable = False)

_stub = repository_rule(
    implementation = _stub_impl,
    attrs = {"contents": attr.string_dict(doc = "Path to text of each file.")},
    doc = "A repository of the given files.",
)

def rule_set_stubs():
    """Declares the stub repositories that the workspace does not declare itself."""
    for name, contents in _STUBS.items():
        if not native.existing_rule(name):
            _stub(name = name, contents = contents)
