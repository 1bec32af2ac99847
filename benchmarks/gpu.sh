#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under 8 minutes: the GPU-marked tests, then the benchmarks.
# Needs torch with CUDA, transformers, pytest and hypothesis; no gradio, no network. Results go to $OUT, or to
# benchmarks/results/. Usage: bash benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
stamp=$(date -u +%Y-%m-%d)
card=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '__')
mkdir -p "$out"
status=0

run() {  # run NAME SECONDS COMMAND…: keeps the log, and the last line as the result
    local name=$1 seconds=$2
    shift 2
    echo "== $name: $*"
    timeout "$seconds" "$@" 2>&1 | tee "$out/$stamp-$card-$name.log"
    local code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || { echo "== $name ended with $code"; status=1; }
    tail -n 1 "$out/$stamp-$card-$name.log" | grep '^{' > "$out/$stamp-$card-$name.json" || rm -f "$out/$stamp-$card-$name.json"
}

run tests 180 python3 -m pytest -m gpu tests -q -p no:cacheprovider
run transfer 60 python3 -m benchmarks.transfer --device cuda --mb 2048
run checkpoint 60 python3 -m benchmarks.reference_checkpoints c "$work/c" --device cuda
run decode 150 python3 -m benchmarks.decode "$work/c" --device cuda --vram 25% 50% 100% \
    --strategies moepic mixtral-offloading pregated on-demand --transformers grouped_mm --rounds 3
exit $status
