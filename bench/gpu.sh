#!/usr/bin/env bash
# On a machine with a GPU, torch >= 2.11, triton >= 3.6, pytest and pytest-benchmark, without network or installation.
# bench/gpu.sh [tests|group-norm|uvit|unet|tune|data|rest|all], most informative first: parity on the GPU, the benchmark
# of the fused GroupNorm, U-ViT's training step with its operators, that of the UNets, the tilings of GroupNorm timed,
# reading, then the models and the rest of the first. Each part takes less than ten minutes and ends with a table; all
# take less than 50. Rows land in bench/results as they are measured. The patched UNets need diffusers and reading needs
# DALI; they are skipped without.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
PART=${1:-all}
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" SCALELONG_RECORD=1

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "make gpu: $PYTHON sees no GPU"
    exit 1
}
failed=0
# An interrupted pytest still says what it found.
run() {
    local seconds=$1 name=$2
    shift 2
    echo "== $name (at most $seconds s)"
    timeout --signal=INT --kill-after=20 "$seconds" "$@" || { echo "== $name failed ($?)"; failed=1; }
}
tests() {
    run "$1" "$2" "$PYTHON" -m pytest -q -p no:cacheprovider "${@:3}"
}
# Stops by itself before the limit, to print its table: a benchmark that has begun, and compiles, takes up to a minute.
benchmarks() {
    run "$1" "$2" "$PYTHON" -m pytest -o python_files='bench_*.py' -p no:cacheprovider --benchmark-only -q -r fE \
        --stop-after $(($1 - 60)) "${@:3}"
}

part_tests() {
    tests 390 "parity on the GPU" -m gpu tests/test_gpu.py
}
part_group_norm() {
    benchmarks 480 "fused GroupNorm, forward with backward" bench/bench_group_norm.py -k 'both and not all-compilers'
}
part_uvit() {
    benchmarks 220 "skip projection and attention" bench/bench_skip_linear.py bench/bench_attention.py
    benchmarks 370 "U-ViT's training step" bench/bench_uvit_step.py
}
part_unet() {
    benchmarks 580 "the UNets' training step" bench/bench_unet_step.py
}
part_tune() {
    if [ -f bench/tune_group_norm.py ]; then
        run 170 "tilings of the fused GroupNorm" "$PYTHON" -m scalelong.bench.tune_group_norm --max-seconds 150
    fi
}
part_data() {
    tests 200 "reading with nvJPEG" -m gpu tests/test_gpu_data.py
    benchmarks 200 "the data pipeline" bench/bench_data.py
}
part_rest() {
    local files=(tests/test_{attention,gelu_linear,skip_conv1x1,skip_linear,skip_scale}.py)
    files+=(tests/test_{uvit,unet}{,_fused}.py tests/test_{uvit,adm}_checkpoint.py tests/test_conv3x3.py)
    "$PYTHON" -c 'import hypothesis' 2>/dev/null && files+=(tests/test_group_norm.py)
    tests 280 "operators and models" "${files[@]}"
    benchmarks 250 "fused GroupNorm, the rest" bench/bench_group_norm.py -k 'forward or backward or all-compilers'
}

case $PART in
    tests) part_tests ;;
    group-norm) part_group_norm ;;
    uvit) part_uvit ;;
    unet) part_unet ;;
    tune) part_tune ;;
    data) part_data ;;
    rest) part_rest ;;
    all)
        part_tests
        part_group_norm
        part_uvit
        part_unet
        part_tune
        part_data
        part_rest
        ;;
    *)
        echo "bench/gpu.sh: no part '$PART'; there are tests, group-norm, uvit, unet, tune, data, rest and all"
        exit 2
        ;;
esac
exit $failed
