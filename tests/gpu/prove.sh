#!/bin/bash
# Shows on a machine with a GPU what this repository can only argue without one: results, then speeds, within eight minutes.
#
#   tests/gpu/prove.sh                    in a bundle of `cargo xtask gpu-bundle`, or in the repository after `cargo xtask test`
#   tests/gpu/prove.sh --model DIR        the last run with a model of yours instead of a small one of random weights
#   tests/gpu/prove.sh --device cpu       a rehearsal on processors: every line is executed, nothing is proven of a GPU
#
# The CUDA half of libtorch is that of Python's torch 2.11 (`pip install torch==2.11.0`), of $PYTHON or python3, unless
# LD_LIBRARY_PATH names one.
set -u
here=$(cd "$(dirname "$0")" && pwd) || exit 70
python=${PYTHON:-python3}
site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# One of the set-up, beside the CPU half.
for found in "$site" "${XDG_CACHE_HOME:-$HOME/.cache}/pacs/torch-2.11.0-cuda/site"; do
    if [ -e "$found/torch/lib/libtorch_cuda.so" ]; then
        LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$found/torch/lib
        export LD_LIBRARY_PATH
        break
    fi
done
exec "$python" "$here/prove.py" "$@"
