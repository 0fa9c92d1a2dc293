# SPDX-License-Identifier: Apache-2.0
"""The CUDA toolkit as a target."""

ToolkitInfo = provider(
    doc = "A CUDA toolkit.",
    fields = {
        "files": "depset of files and folders that nvcc needs beside itself",
        "nvcc": "path of nvcc, absolute or from the execution root",
        "version": "release as a tuple of integers, (13, 0)",
    },
)

def _toolkit_impl(ctx):
    nvcc = ctx.attr.nvcc
    if not nvcc.startswith("/"):
        nvcc = "%s/%s" % (ctx.label.workspace_root, nvcc)
    return [ToolkitInfo(
        files = depset(ctx.files.files),
        nvcc = nvcc,
        version = tuple([int(number) for number in ctx.attr.version.split(".")]),
    )]

toolkit = rule(
    implementation = _toolkit_impl,
    attrs = {
        "files": attr.label_list(allow_files = True, doc = "Folders of the toolkit."),
        "nvcc": attr.string(mandatory = True, doc = "Absolute, or in this repository."),
        "version": attr.string(mandatory = True, doc = "Release, such as \"13.0\"."),
    },
    doc = "Describes a toolkit to cuda_library.",
)
