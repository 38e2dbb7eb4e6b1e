#!/usr/bin/env bash
# Everything of this repository that needs a GPU, in one call of less than ten minutes:
#
#     benchmarks/gpu_suite.sh RESULTS
#
# Needs python3 (or PYTHON=/path/to/python) with torch, triton, numpy, tqdm and pytest; latentrt need not be installed,
# what else the tests want may be on PYTHONPATH. BUNDLE is one that was exported elsewhere; without it the model that
# ships is exported, which needs diffusers and transformers. Leaves in RESULTS: summary.txt, log.txt, artefacts.json (what
# was built for this GPU), kernels.json and compile.json (figures without and with torch.compile), graphs.json (a picture
# with CUDA graphs and without). A step that fails or runs out of time does not stop the others; the exit status is 1 if
# one did, and 2 where there is nothing to run on.
set -uo pipefail

[ $# -eq 1 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" && results=$(cd "$1" && pwd) || exit 2
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
arch=$("$python" -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())') ||
    { echo "error: got no GPU from torch in $python, expected one; set PYTHON to a Python with a CUDA build" >&2; exit 2; }
logs=$(mktemp -d) && trap 'rm -rf "$logs"' EXIT
: > "$results/summary.txt"

# step NAME SECONDS COMMAND…: runs it under a limit, with its output in the log. Ctrl-C first, so that it can report.
step() {
    local name=$1 limit=$2 start=$SECONDS status=0 word=ok
    shift 2
    timeout --signal=INT --kill-after=10 "$limit" "$@" > "$logs/$name" 2>&1 || status=$?
    case $status in 0) ;; 124 | 137) word="out of time" ;; *) word="failed ($status)" ;; esac
    printf '%-14s %-12s %4d s   %s\n' "$name" "$word" $((SECONDS - start)) \
        "$(grep -v '^ *$' "$logs/$name" | tail -n 1 | cut -c 1-120)" >> "$results/summary.txt"
    return "$status"
}

pytest_gpu() { step "$1" 240 "$python" -m pytest -m gpu -q --continue-on-collection-errors -p no:cacheprovider "${@:2}"; }

versions() {
    step versions 30 bash -c 'nvidia-smi; "$0" - <<END
import importlib.metadata as m, sys
print(sys.version)
print(*sorted({d.name + "==" + d.version for d in m.distributions() if d.name}), sep="\n")
END' "$python"
}

build() {
    step build 240 "$python" -m kernels build --arch "$arch" -o "$logs/kernels-$arch" --cache "$logs/cache" || return
    "$python" -m kernels list "$logs/kernels-$arch" --json > "$results/artefacts.json"
}

others() {
    local rest=() file
    for file in $(grep -l 'mark\.gpu' tests/test_*.py); do
        case $file in
            tests/test_attention.py | tests/test_group_norm.py | tests/test_aot.py | tests/test_device.py) ;;
            *) rest+=("$file") ;;
        esac
    done
    pytest_gpu tests "${rest[@]}"
}

# graphs: pictures through the loop with CUDA graphs and without, in turn.
graphs() {
    local bundle=${BUNDLE:-$logs/shapes.bundle}
    [ -n "${BUNDLE:-}" ] || "$python" -m export models/shapes -o "$bundle" > "$logs/export" 2>&1 || cat "$logs/export"
    step graphs 120 "$python" -m benchmarks graphs "$bundle" --json "$results/graphs.json"
}

# What is right does not depend on the load: the build and the tests share the machine. What is fast comes alone, after.
versions
jobs=()
build & jobs+=($!)
pytest_gpu attention tests/test_attention.py & jobs+=($!)
pytest_gpu group_norm tests/test_group_norm.py & jobs+=($!)
pytest_gpu cubins tests/test_aot.py & jobs+=($!)
pytest_gpu loop tests/test_device.py & jobs+=($!)
others & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job"; done
step benchmark 170 "$python" -m benchmarks kernels --device cuda --no-compile --json "$results/kernels.json"
graphs
step compile 110 "$python" -m benchmarks kernels --device cuda --json "$results/compile.json" \
    --case sd15-2x8x4096x4096 sd15-2x8x4096x77 sd15-2x320x64x64-silu vae512-1x512x64x64 sd15-8192x320 sd15-8192x1280 \
    sd15-1x4x64x64 sd15-1x3x512x512

for name in versions build attention group_norm cubins loop tests benchmark graphs compile; do
    printf '\n######## %s\n' "$name"
    cat "$logs/$name"
done > "$results/log.txt"
cat "$results/summary.txt"
! grep -qE 'failed|out of time' "$results/summary.txt"
