#!/usr/bin/env bash
# What needs a GPU, with what is installed: Python, CuPy, PyTorch, JAX, pytest; nothing is fetched.
#
#     tests/gpu/run.sh                   first, second
#     tests/gpu/run.sh first             what is worth most, in nine minutes
#     tests/gpu/run.sh second            sanitizers over clusters, in 200 seconds
#     tests/gpu/run.sh tests benchmarks sanitizers        all of each, at leisure
#     tests/gpu/run.sh --rehearse        first, second in small, with stand-ins for CUDA: whether the scripts work
#
# Results go to $OUT, if set, else to asv_benchmarks/results/<device>/. See tests/gpu/run.py and docs/gpu.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUBN_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
caches=${TMPDIR:-/tmp}/cubn_gpu_$UID # kept: the next stage finds the kernels of the last one
export CUPY_CACHE_DIR=${CUPY_CACHE_DIR:-$caches/cupy} CUBN_CACHE_DIR=${CUBN_CACHE_DIR:-$caches/cubn}
python=${PYTHON:-python3}
out=${OUT:-asv_benchmarks/results/$("$python" asv_benchmarks/gpu_machine.py folder)}
exec "$python" -m tests.gpu.run "$out" "$@"
