# SPDX-License-Identifier: Apache-2.0
"""The architecture setting: its grammar, and what nvcc generates for each value.

    VALUE   = "cpu" | CHOICE ( "+" CHOICE )*
    CHOICE  = a key of CHOICES, at most one for each backend

`cpu` builds no CUDA code. A choice compiles one folder of //kernels, a backend, for some chips.
A new architecture is a folder there and a line in CHOICES.
"""

CHOICES = {
    # Machine code for every 8.x chip; the PTX lets newer chips run it.
    "sm80": struct(
        backend = "sm80",
        gencode = ["arch=compute_80,code=[sm_80,compute_80]"],
    ),
    # The Ampere kernels, unchanged, as Hopper machine code: to test and time them there.
    "sm80_on_sm90": struct(
        backend = "sm80",
        gencode = ["arch=compute_80,code=sm_90"],
    ),
}

# What no flag gives.
DEFAULT = "sm80"

BACKENDS = {choice.backend: None for choice in CHOICES.values()}.keys()

def parse_architectures(value):
    """Parses the setting; fails with the right values where it is not in the grammar.

    Args:
      value: the setting.

    Returns:
      A dict from backend to its list of -gencode arguments; {} for "cpu".
    """
    if value == "cpu":
        return {}
    backends = {}
    for word in value.split("+"):
        choice = CHOICES.get(word)
        if not choice:
            fail(("//tools/cuda:architectures is %r, which has no %r; it must be 'cpu' or one of " +
                  "%s, or several of these for different backends joined by '+'") %
                 (value, word, ", ".join([repr(name) for name in CHOICES])))
        if choice.backend in backends:
            fail(("//tools/cuda:architectures is %r, which chooses the backend %r twice; name " +
                  "one of %s") % (value, choice.backend, ", ".join([
                repr(name)
                for name, other in CHOICES.items()
                if other.backend == choice.backend
            ])))
        backends[choice.backend] = choice.gencode
    return backends
