# SPDX-License-Identifier: Apache-2.0
"""The CUDA toolkit as a target."""

ToolkitInfo = provider(
    doc = "A CUDA toolkit.",
    fields = {
        "files": "depset of files and folders that nvcc needs beside itself",
        "nvcc": "path of nvcc, absolute or from the execution root",
        "options": "which of the options that not every nvcc has this one has",
    },
)

def _toolkit_impl(ctx):
    nvcc = ctx.attr.nvcc
    if not nvcc.startswith("/"):
        nvcc = "%s/%s" % (ctx.label.workspace_root, nvcc)
    return [ToolkitInfo(
        files = depset(ctx.files.files),
        nvcc = nvcc,
        options = ctx.attr.options,
    )]

toolkit = rule(
    implementation = _toolkit_impl,
    attrs = {
        "files": attr.label_list(allow_files = True, doc = "Folders of the toolkit."),
        "nvcc": attr.string(mandatory = True, doc = "Absolute, or in this repository."),
        "options": attr.string_list(doc = "Optional options that this nvcc has."),
    },
    doc = "Describes a toolkit to cuda_library.",
)
