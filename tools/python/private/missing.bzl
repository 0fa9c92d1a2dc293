# SPDX-License-Identifier: Apache-2.0
"""A target that fails when it is depended on."""

load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")
load("@rules_python//python:py_info.bzl", "PyInfo")

def _missing_impl(ctx):
    fail("fused_moe: " + ctx.attr.reason)

missing = rule(
    implementation = _missing_impl,
    attrs = {"reason": attr.string(mandatory = True, doc = "What is missing, and what to do.")},
    doc = "Stands for something this machine lacks: fails with `reason` once a target needs it.",
    provides = [CcInfo, PyInfo],
)
