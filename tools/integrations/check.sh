#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Runs the tests of the vLLM or SGLang integration on that framework's own code, without a GPU:
#
#     ./bazelw build --config=cpu //python:wheel
#     tools/integrations/check.sh vllm bazel-bin/python/wheel/fused_moe-*.whl
#     tools/integrations/check.sh sglang bazel-bin/python/wheel/fused_moe-*.whl
#
# The framework's Python code comes from its released wheel, without the compiled kernels, which
# need CUDA. $PYTHON (python3) must be one that the wheel is for, with PyTorch and pytest; what else
# the framework imports is installed in a virtual environment, in a folder that is removed.
set -euo pipefail
framework=${1:?vllm or sglang}
wheel=$(realpath "${2:?the wheel of fused_moe}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
case $framework in
  vllm) release=vllm==0.33.0 tests=(tests/serving_{frameworks,layers,updates}.py) ;;
  sglang) release=sglang==0.5.23 tests=(tests/serving_{sglang,layers,updates}.py) ;;
  *)
    echo "$framework is neither vllm nor sglang" >&2
    exit 1
    ;;
esac
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv --system-site-packages "$scratch/venv"
python=$scratch/venv/bin/python
"$python" -m pip install --quiet --no-deps -r tools/integrations/requirements.txt "$wheel"
"$python" -m pip download --quiet --no-deps --dest "$scratch" "$release"
"$python" - "$scratch" "$framework" << 'PYTHON'
import pathlib, sys, zipfile

scratch, framework = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(scratch.glob(f"{framework}-*.whl"))) as archive:
    # Everything but the compiled kernels.
    inside = [n for n in archive.namelist() if n.startswith(f"{framework}/")]
    archive.extractall(scratch / "code", [n for n in inside if not n.endswith(".so")])
PYTHON
if [ "$framework" = sglang ]; then
  mkdir "$scratch/code/torchvision"
  cp tools/integrations/torchvision_stand_in.py "$scratch/code/torchvision/__init__.py"
fi
PYTHONPATH="$scratch/code:tests" "$python" -m pytest -q -rs -p no:warnings "${tests[@]}"
