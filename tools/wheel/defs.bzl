# SPDX-License-Identifier: Apache-2.0
"""The rule that packs a python_package into a wheel."""

load("@rules_python//python:py_info.bzl", "PyInfo")
load("//tools/cuda:architectures.bzl", "DEFAULT")
load("//tools/cuda:settings.bzl", "ArchitecturesInfo")

def _local_version(architectures):
    """Returns the local version (PEP 440) that tells this build from the default one."""
    if architectures == DEFAULT:
        return ""
    return architectures.replace("_", ".").replace("+", ".")

def _license_arguments(licenses):
    """Returns NAME=FILE for each licence file: of others' code below third_party/REPOSITORY/."""
    arguments = []
    for target, place in licenses.items():
        for file in target[DefaultInfo].files.to_list():
            name = "/".join([part for part in [place, file.basename] if part])
            arguments.append("%s=%s" % (name, file.path))
    return arguments

def _python_wheel_impl(ctx):
    package = ctx.files.package[0]
    output = ctx.actions.declare_directory(ctx.label.name)
    metadata = ctx.actions.declare_file(ctx.label.name + ".json")
    ctx.actions.write(metadata, json.encode(struct(
        classifiers = ctx.attr.classifiers,
        entry_points = ctx.attr.entry_points,
        extras = ctx.attr.extras,
        license = ctx.attr.license,
        local_version = _local_version(ctx.attr._architectures[ArchitecturesInfo].value),
        name = ctx.attr.distribution,
        requires = ctx.attr.requires,
        requires_python = ctx.attr.requires_python,
        summary = ctx.attr.summary,
    )))
    args = ctx.actions.args()
    args.add_all("--package", [package], expand_directories = False)
    args.add("--metadata", metadata)
    args.add("--description", ctx.file.description)
    args.add_all(_license_arguments(ctx.attr.license_files), before_each = "--license")
    args.add_all("--output", [output], expand_directories = False)
    ctx.actions.run(
        executable = ctx.executable._make_wheel,
        arguments = [args],
        inputs = [package, metadata, ctx.file.description] + ctx.files.license_files,
        outputs = [output],
        mnemonic = "PythonWheel",
        progress_message = "Packing the wheel %s" % ctx.label,
        use_default_shell_env = True,
    )
    return [DefaultInfo(files = depset([output]), runfiles = ctx.runfiles(files = [output]))]

python_wheel = rule(
    implementation = _python_wheel_impl,
    attrs = {
        "classifiers": attr.string_list(doc = "As registries know them."),
        "description": attr.label(
            allow_single_file = [".md"],
            doc = "What a registry shows.",
            mandatory = True,
        ),
        "distribution": attr.string(doc = "The name that pip installs.", mandatory = True),
        "entry_points": attr.string_list_dict(doc = "Group to its lines, `name = module:object`."),
        "extras": attr.string_list_dict(doc = "Name to the requirements that it adds."),
        "license": attr.string(doc = "An SPDX expression.", mandatory = True),
        "license_files": attr.label_keyed_string_dict(
            allow_files = True,
            doc = "Licence files, also of what is compiled in, to their folder in the wheel.",
        ),
        "package": attr.label(doc = "A python_package.", mandatory = True, providers = [PyInfo]),
        "requires": attr.string_list(doc = "Requirements (PEP 508)."),
        "requires_python": attr.string(doc = "A version specifier.", mandatory = True),
        "summary": attr.string(doc = "One line.", mandatory = True),
        "_architectures": attr.label(default = Label("//tools/cuda:architectures")),
        "_make_wheel": attr.label(
            cfg = "exec",
            default = Label("//tools/wheel:make_wheel"),
            executable = True,
        ),
    },
    doc = """A wheel, alone in a folder of the target's name.

A folder, because the file's name depends on what only its making tells: the version, which the
package's __init__.py says, and the tags, which follow from the extensions. A build for other than
the default architectures has them as its local version: 1.2.3+cpu, 1.2.3+sm80.on.sm90.
""",
)
