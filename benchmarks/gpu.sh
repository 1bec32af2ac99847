#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes: the GPU-marked tests, then the benchmarks.
# Needs torch with CUDA, transformers, psutil, pytest and hypothesis; nothing of the page's, no network.
# Results go to $OUT, or to benchmarks/results/. Usage: bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
name=$(date -u +%Y-%m-%d)-$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '__')
mkdir -p "$out"
status=0
export PYTHONUNBUFFERED=1  # a benchmark that runs out of time leaves what it has measured in its log
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}  # as launch.py and the command line do

run() {  # run NAME SECONDS COMMAND…: keeps the log, and its last line as the result if that is a JSON object
    local log=$out/$name-$1.log seconds=$2
    shift 2
    echo "== $*"
    timeout "$seconds" "$@" 2>&1 | tee "$log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== ended with $code"; status=1; }
    tail -n 1 "$log" | grep '^{' > "${log%.log}.json" || rm -f "${log%.log}.json"
}

run tests 150 python3 -m pytest -m gpu -p no:cacheprovider \
    tests/test_gpu.py tests/test_transfer.py tests/test_transfer_backends.py
run transfer 60 python3 -m benchmarks.transfer --device cuda --mb 1024
run checkpoint 60 python3 -m benchmarks.reference_checkpoints c "$work/c" --device cuda
run decode 200 python3 -m benchmarks.decode "$work/c" --device cuda --vram 25% 50% 100% \
    --strategies moepic mixtral-offloading on-demand --transformers grouped_mm --rounds 2
exit $status
