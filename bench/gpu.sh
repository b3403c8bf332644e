#!/usr/bin/env bash
# On a machine with a GPU, torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark, without network or installation:
# the tests that such a machine can run, then the benchmarks. Each part is bounded in time; rows land in bench/results.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" SCALELONG_RECORD=1

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "make gpu: $PYTHON sees no GPU"
    exit 1
}
failed=0
part() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name (at most $seconds s)"
    timeout "$seconds" "$@" || { echo "== $name failed ($?)"; failed=1; }
}

part 180 "operators and models" "$PYTHON" -m pytest -q -p no:cacheprovider \
    tests/test_attention.py tests/test_skip_linear.py tests/test_skip_scale.py tests/test_uvit.py tests/test_uvit_checkpoint.py
part 120 "on the GPU" "$PYTHON" -m pytest -q -p no:cacheprovider tests/test_gpu.py
part 240 "benchmarks" "$PYTHON" -m pytest bench -o python_files='bench_*.py' --benchmark-only -q
exit $failed
