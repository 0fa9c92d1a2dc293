# SPDX-License-Identifier: Apache-2.0
"""The build setting behind --config=sm80 and its kin, and flags derived from it."""

load("@rules_cc//cc/common:cc_common.bzl", "cc_common")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")
load(":architectures.bzl", "parse_architectures")

ArchitecturesInfo = provider(
    doc = "The architecture setting, parsed.",
    fields = {
        "gencode": "dict from backend to its list of -gencode arguments",
        "value": "the setting as given",
    },
)

def _architectures_impl(ctx):
    value = ctx.build_setting_value
    return [ArchitecturesInfo(gencode = parse_architectures(value), value = value)]

architectures = rule(
    implementation = _architectures_impl,
    build_setting = config.string(flag = True),
    doc = "Which kernels are built, for which chips; the grammar is architectures.bzl's.",
)

def _backend_flag_impl(ctx):
    backends = ctx.attr._architectures[ArchitecturesInfo].gencode
    backend = ctx.attr.backend
    built = backend in backends if backend else len(backends) > 0
    return [config_common.FeatureFlagInfo(value = "yes" if built else "no")]

backend_flag = rule(
    implementation = _backend_flag_impl,
    attrs = {
        "backend": attr.string(doc = "Folder of //kernels; empty for any."),
        "_architectures": attr.label(default = Label("//tools/cuda:architectures")),
    },
    doc = "For a config_setting: \"yes\" where the setting builds `backend`, else \"no\".",
)

def _built_for_impl(ctx):
    value = ctx.attr._architectures[ArchitecturesInfo].value
    return [CcInfo(compilation_context = cc_common.create_compilation_context(
        defines = depset(["MOE_BUILT_FOR=\"%s\"" % value]),
    ))]

built_for = rule(
    implementation = _built_for_impl,
    attrs = {"_architectures": attr.label(default = Label("//tools/cuda:architectures"))},
    doc = "A C++ library of one definition: MOE_BUILT_FOR, the setting as a string literal.",
)
