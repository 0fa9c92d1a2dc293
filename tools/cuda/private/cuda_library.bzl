# SPDX-License-Identifier: Apache-2.0
"""The rule that compiles CUDA sources; //tools/cuda:defs.bzl has the macro to use."""

load("@rules_cc//cc:action_names.bzl", "CPP_COMPILE_ACTION_NAME")
load("@rules_cc//cc:find_cc_toolchain.bzl", "find_cc_toolchain", "use_cc_toolchain")
load("@rules_cc//cc/common:cc_common.bzl", "cc_common")
load("@rules_cc//cc/common:cc_info.bzl", "CcInfo")
load("//tools/cuda:settings.bzl", "ArchitecturesInfo")
load(":toolkit.bzl", "ToolkitInfo")

# Optimized whatever --compilation_mode says: unoptimized kernels are of no use to anyone.
_NVCC_FLAGS = [
    "--compile",
    "--x=cu",
    "--std=c++17",
    "--optimize=3",
    "--define-macro=NDEBUG",
    "--expt-relaxed-constexpr",
    "--relocatable-device-code=false",
]

# As the C++ toolchain does: position-independent only, no debug information, no machine's paths.
_HOST_FLAGS = ["-fPIC", "-g0", "-fvisibility=hidden"]

# The folder of compile.sh's files; any path does that is the same on every machine.
_UNITS = "/tmp/fused_moe_nvcc"

def _gencode(ctx):
    """Returns the -gencode arguments for this library's backend."""
    gencode = ctx.attr._architectures[ArchitecturesInfo].gencode
    if ctx.attr.backend != "common":
        return gencode[ctx.attr.backend]
    union = {}
    for arguments in gencode.values():
        union.update([(argument, None) for argument in arguments])
    return union.keys()

def _compile(ctx, source, toolkit, compiler, context):
    """Declares the action that compiles one source; returns the object."""
    stem = source.basename[:-len(".cu")]
    identity = "/".join([
        part
        for part in [
            ctx.label.workspace_root,
            ctx.label.package,
            ctx.label.name,
            source.basename,
        ]
        if part
    ])
    output = ctx.actions.declare_file("_objs/%s/%s.pic.o" % (ctx.label.name, stem))
    args = ctx.actions.args()
    args.add(source)
    args.add("%s/%s" % (_UNITS, identity))
    args.add(output)
    args.add(toolkit.nvcc)
    args.add_all(_NVCC_FLAGS)
    args.add("--compiler-bindir", compiler)
    args.add_all(_HOST_FLAGS, before_each = "--compiler-options")
    args.add_all(_gencode(ctx), before_each = "--generate-code")
    if "--frandom-seed" in toolkit.options:
        args.add("--frandom-seed=" + identity)
    if "--objdir-as-tempdir" in toolkit.options:
        # Intermediate files beside the object, which is in the action's own folder.
        args.add("--objdir-as-tempdir")
    args.add_all(context.defines, before_each = "--define-macro")
    args.add_all(ctx.attr.local_defines, before_each = "--define-macro")
    args.add("--include-path", ctx.label.workspace_root or ".")
    args.add_all(context.quote_includes, before_each = "--include-path")
    args.add_all(context.includes, before_each = "--include-path")
    args.add_all(context.system_includes, before_each = "-isystem")
    args.add_all(ctx.attr.copts)
    args.add("--output-file", output)
    ctx.actions.run(
        executable = ctx.file._compile,
        arguments = [args],
        inputs = depset([source], transitive = [toolkit.files, context.headers]),
        tools = ctx.attr._cc_toolchain.files,
        outputs = [output],
        mnemonic = "CudaCompile",
        progress_message = "Compiling %s (%s)" % (source.short_path, ctx.label.name),
        use_default_shell_env = True,
    )
    return output

def _cuda_library_impl(ctx):
    toolchain = find_cc_toolchain(ctx)
    features = cc_common.configure_features(
        ctx = ctx,
        cc_toolchain = toolchain,
        requested_features = ctx.features,
        unsupported_features = ctx.disabled_features,
    )
    compiler = cc_common.get_tool_for_action(
        feature_configuration = features,
        action_name = CPP_COMPILE_ACTION_NAME,
    )
    infos = [dep[CcInfo] for dep in ctx.attr.deps + [ctx.attr._cudart]]
    own = cc_common.create_compilation_context(
        headers = depset(ctx.files.hdrs),
        quote_includes = depset([ctx.label.workspace_root or "."]),
    )
    context = cc_common.merge_cc_infos(
        cc_infos = [CcInfo(compilation_context = own)] + infos,
    ).compilation_context
    toolkit = ctx.attr._toolkit[ToolkitInfo]
    objects = [_compile(ctx, source, toolkit, compiler, context) for source in ctx.files.srcs]
    linking = [info.linking_context for info in infos]
    if objects:
        # One archive of position-independent objects, linked in whole: nothing refers by name to
        # the registration code that nvcc adds to each.
        linking_context, _ = cc_common.create_linking_context_from_compilation_outputs(
            actions = ctx.actions,
            name = ctx.label.name,
            cc_toolchain = toolchain,
            feature_configuration = features,
            compilation_outputs = cc_common.create_compilation_outputs(
                pic_objects = depset(objects),
            ),
            linking_contexts = linking,
            alwayslink = True,
            disallow_dynamic_library = True,
        )
        info = CcInfo(compilation_context = context, linking_context = linking_context)
    else:
        info = cc_common.merge_cc_infos(
            cc_infos = [CcInfo(compilation_context = own)] + infos,
        )
    return [info, DefaultInfo(files = depset(objects))]

cuda_library_rule = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "backend": attr.string(mandatory = True),
        "copts": attr.string_list(),
        "deps": attr.label_list(providers = [CcInfo]),
        "hdrs": attr.label_list(allow_files = [".cuh", ".h"]),
        "local_defines": attr.string_list(),
        "srcs": attr.label_list(allow_files = [".cu"]),
        "_architectures": attr.label(default = Label("//tools/cuda:architectures")),
        "_cc_toolchain": attr.label(
            default = Label("@bazel_tools//tools/cpp:current_cc_toolchain"),
        ),
        "_compile": attr.label(
            allow_single_file = True,
            default = Label("//tools/cuda/private:compile.sh"),
        ),
        # nvcc's own code in each object calls it: it must follow them on the linker's command line.
        "_cudart": attr.label(default = Label("//tools/cuda:cudart")),
        "_toolkit": attr.label(default = Label("//tools/cuda:toolkit")),
    },
    doc = "Compiles CUDA sources; yields CcInfo, and the objects as files.",
    fragments = ["cpp"],
    provides = [CcInfo],
    toolchains = use_cc_toolchain(),
)
