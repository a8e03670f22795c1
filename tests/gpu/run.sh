#!/usr/bin/env bash
# Everything that needs a GPU, in under eight minutes, with what is installed: Python, PyTorch, CuPy, JAX, pytest.
#
#     tests/gpu/run.sh                          all steps
#     tests/gpu/run.sh tests benchmarks         only these, in this order
#
# Steps: versions, smoke, tests, sanitizers, benchmarks. A step that fails does not stop the others. Logs and results go
# to $OUT, if set, else to asv_benchmarks/results/<device>/: summary.json (each step's exit status and seconds, device,
# versions), gpu.json (benchmarks), <step>.log. The exit status is that of the first step that failed.
set -uo pipefail
cd "$(dirname "$0")/../.."

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export CUBN_REQUIRE_GPU=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export CUPY_CACHE_DIR=$scratch/cupy CUBN_CACHE_DIR=$scratch/cubn
out=${OUT:-asv_benchmarks/results/$("$python" asv_benchmarks/gpu_machine.py folder || echo no-device)}
mkdir -p "$out"

versions() { "$python" asv_benchmarks/gpu_machine.py; }

smoke() { "$python" -m tests.gpu.smoke; }

# What says most comes first, in case time runs out.
tests() {
    "$python" -m pytest -m gpu -p no:cacheprovider -W default -v --tb=short --durations=10 \
        tests/gpu/test_{libraries,streams,graphs,devices,operations,large}.py tests/gpu
}

# All tools at the same time, each on a small run of every kernel.
sanitizers() {
    local tool status=0
    if ! command -v compute-sanitizer; then
        echo "NOT RUN: compute-sanitizer is not installed"
        return 3
    fi
    local -A running
    for tool in memcheck racecheck synccheck initcheck; do
        timeout 75 compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 \
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

benchmarks() { "$python" asv_benchmarks/compare_gpu.py --out "$out" --seconds 140; }

declare -A limit=([versions]=15 [smoke]=50 [tests]=170 [benchmarks]=165 [sanitizers]=80) # seconds
steps=("$@")
[[ $# -gt 0 ]] || steps=(versions smoke tests benchmarks sanitizers)

failed=0
: >"$scratch/steps"
for step in "${steps[@]}"; do
    if [[ -z ${limit[$step]:-} ]]; then
        echo "unknown step $step; there are: ${!limit[*]}" >&2
        exit 2
    fi
    echo "== $step"
    begin=$SECONDS
    export -f "$step"
    export python out scratch
    timeout --kill-after=10 "${limit[$step]}" bash -c "$step" >"$out/$step.log" 2>&1
    status=$?
    tail -n 15 "$out/$step.log"
    echo "== $step: exit status $status, $((SECONDS - begin)) s"
    echo "$step $status $((SECONDS - begin))" >>"$scratch/steps"
    [[ $failed -ne 0 ]] || failed=$status
    "$python" asv_benchmarks/gpu_machine.py summary "$scratch/steps" >"$out/summary.json" # so far
done
echo "results: $out"
exit "$failed"
