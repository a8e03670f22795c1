#!/usr/bin/env bash
# Everything that needs a GPU, with what is installed: Python, PyTorch, CuPy, JAX, numba, pytest.
#
#     tests/gpu/run.sh                          all stages
#     tests/gpu/run.sh tests benchmarks         only these, in this order
#
# Stages: versions, smoke, tests, benchmarks, sanitize; each by itself takes less than ten minutes, on a machine that has
# run none of the others. A stage that fails, or a part of one, does not stop what comes after it. Logs and results go
# to $OUT, if set, else to asv_benchmarks/results/<device>/: summary.json (each stage's exit status and seconds, device,
# versions), gpu.json (benchmarks), <stage>.log. The exit status is that of the first stage that failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUBN_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
python=${PYTHON:-python3}
caches=${TMPDIR:-/tmp}/cubn_gpu_$UID # kept: the next stage finds the kernels of the last one
export CUPY_CACHE_DIR=$caches/cupy CUBN_CACHE_DIR=$caches/cubn
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
out=${OUT:-asv_benchmarks/results/$("$python" asv_benchmarks/gpu_machine.py folder || echo no-device)}
mkdir -p "$out"

# The CPU's kernels, with whose results the GPU's are compared, are compiled by all processors.
host_kernels() { "$python" -m tests.gpu.host_kernels; }

versions() { "$python" asv_benchmarks/gpu_machine.py; }

smoke() { host_kernels; "$python" -m tests.gpu.smoke; }

# Kernels take some tenths of a second each to compile: several processes at a time. What needs most of the memory comes
# alone.
tests() {
    local run=("$python" -m pytest -m gpu -p no:cacheprovider -W default -v --tb=short --durations=10) several=() status=0
    host_kernels
    "$python" -c "import xdist" 2>/dev/null && several=(-n 8)
    timeout 400 "${run[@]}" "${several[@]}" --ignore=tests/gpu/test_large.py tests/gpu || status=$?
    timeout 130 "${run[@]}" tests/gpu/test_large.py || status=$?
    return "$status"
}

benchmarks() { "$python" asv_benchmarks/compare_gpu.py --out "$out" --seconds "${BENCHMARK_SECONDS:-480}"; }

# All tools at the same time, each on a small run of every kernel.
sanitize() {
    local tool sanitizer status=0
    sanitizer=$(command -v compute-sanitizer || ls -d /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | tail -n 1)
    if [[ -z $sanitizer ]]; then
        echo "NOT RUN: compute-sanitizer is not installed"
        return 3
    fi
    host_kernels
    "$python" -m tests.gpu.smoke --small # compiles the GPU's
    local -A running
    for tool in memcheck racecheck synccheck initcheck; do
        timeout --kill-after=5 400 "$sanitizer" --tool "$tool" --error-exitcode 9 --print-limit 20 \
            "$python" -m tests.gpu.smoke --small --no-pools >"$scratch/$tool" 2>&1 &
        running[$tool]=$!
    done
    for tool in "${!running[@]}"; do
        local found=0
        wait "${running[$tool]}" || found=$?
        printf '== %s: exit status %s\n' "$tool" "$found"
        tail -n 60 "$scratch/$tool"
        [[ $found -eq 0 ]] || status=$found
    done
    return "$status"
}

declare -A limit=([versions]=30 [smoke]=300 [tests]=580 [benchmarks]=580 [sanitize]=580) # seconds
stages=("$@")
[[ $# -gt 0 ]] || stages=(versions smoke tests benchmarks sanitize)
for stage in "${stages[@]}"; do
    if [[ -z ${limit[$stage]:-} ]]; then
        echo "unknown stage $stage; there are: ${!limit[*]}" >&2
        exit 2
    fi
done

failed=0
: >"$scratch/stages"
export -f host_kernels "${stages[@]}"
export python out scratch
for stage in "${stages[@]}"; do
    echo "== $stage"
    begin=$SECONDS
    timeout --kill-after=10 "${limit[$stage]}" bash -c "$stage" >"$out/$stage.log" 2>&1
    status=$?
    tail -n 15 "$out/$stage.log"
    echo "== $stage: exit status $status, $((SECONDS - begin)) s"
    echo "$stage $status $((SECONDS - begin))" >>"$scratch/stages"
    [[ $failed -ne 0 ]] || failed=$status
    "$python" asv_benchmarks/gpu_machine.py summary "$scratch/stages" >"$out/summary.json" # so far
done
echo "results: $out"
exit "$failed"
