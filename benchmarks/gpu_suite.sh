#!/usr/bin/env bash
# Everything of this repository that needs a GPU, in one call of less than ten minutes:
#
#     benchmarks/gpu_suite.sh RESULTS [PART…]       PART: tests kernels graphs unet-sd1 vae unet-sdxl
#
# Needs python3 (or PYTHON=/path/to/python) with torch, triton, numpy, tqdm and pytest, for the last three parts diffusers,
# transformers, onnxscript and onnxruntime too; latentrt need not be installed, and what is missing may be on PYTHONPATH.
# Full-size models with random weights are made once, in ~/.cache/latentrt. Leaves in RESULTS: summary.txt, log.txt,
# artefacts.json (kernels built for this GPU), kernels.json, graphs.json (pictures with CUDA graphs and without), and a JSON for each component measured, one of a quick run
# and one with torch.compile. Every part has its share of the time, so a call for one part gives it all: torch.compile and
# builds of engines that time their choices take minutes. What fails or runs out of time does not stop the others; the exit
# status is 1 if something did, and 2 where there is nothing to run on.
set -uo pipefail

[ $# -ge 1 ] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
mkdir -p "$1" && results=$(cd "$1" && pwd) || exit 2
shift
cd "$(dirname "$0")/.." || exit 2
declare -A seconds=([tests]=160 [kernels]=70 [graphs]=40 [unet-sd1]=140 [vae]=70 [unet-sdxl]=110)  # of ten minutes, if all run
parts=("$@") && [ $# -gt 0 ] || parts=(tests kernels graphs unet-sd1 vae unet-sdxl)
sum=0
for part in "${parts[@]}"; do
    [ -n "${seconds[$part]:-}" ] || { echo "error: got part $part, expected some of: ${!seconds[*]}" >&2; exit 2; }
    sum=$((sum + seconds[$part]))
done
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

chosen() { [[ " ${parts[*]} " == *" $1 "* ]]; }

# limit PART [PERCENT]: seconds of its share of 580, or of a percentage of that
limit() { echo $((seconds[$1] * 580 / sum * ${2:-100} / 100)); }

pytest_gpu() { step "$1" "$(limit tests)" "$python" -m pytest -m gpu -q --continue-on-collection-errors -p no:cacheprovider "${@:2}"; }

versions() {
    step versions 30 bash -c 'nvidia-smi; "$0" - <<END
import importlib.metadata as m, sys
print(sys.version)
print(*sorted({d.name + "==" + d.version for d in m.distributions() if d.name}), sep="\n")
END' "$python"
}

build() {
    step build "$(limit tests)" "$python" -m kernels build --arch "$arch" -o "$logs/kernels-$arch" --cache "$logs/cache" || return
    "$python" -m kernels list "$logs/kernels-$arch" --json > "$results/artefacts.json"
}

others() {
    local rest=() file
    for file in $(grep -lr --include='test_*.py' 'mark\.gpu' tests); do
        case $file in
            tests/kernels/triton/test_attention.py | tests/kernels/triton/test_group_norm.py | tests/kernels/test_launch.py | tests/runtime/devices/test_cuda.py) ;;
            *) rest+=("$file") ;;
        esac
    done
    pytest_gpu tests "${rest[@]}"
}

# model NAME SECONDS: a full-size model with random weights, in fp16
model() {
    step "random-$1" "$2" "$python" -c 'import sys; from benchmarks.harness import random_model
print(*random_model.make(sys.argv[1], dtype="fp16"))' "$1"
}

# The models that the chosen parts measure, one after another; each is waited for no longer than what measures it would run.
models() {
    if chosen unet-sd1 || chosen vae; then model sd1 "$1"; fi
    if chosen unet-sdxl; then model sdxl "$1"; fi
}

# component NAME PART COMMAND MODEL SIZE: first without torch.compile, whose start takes minutes, then everyone together.
component() {
    local run=("$python" -m benchmarks "$3" --random "$4" --size "$5" --device cuda --no-build --rounds 5 --seconds 10)
    step "$1" "$(limit "$2" "${6:-40}")" "${run[@]}" --without diffusers-compile-fp16 --json "$results/$1.json"
    step "$1-compile" "$(limit "$2" "${7:-60}")" "${run[@]}" --json "$results/$1-compile.json"
}

# graphs: pictures of the model that ships through the loop, with CUDA graphs and without, in turn.
graphs() {
    "$python" -m export models/shapes -o "$logs/shapes.bundle" > "$logs/export" 2>&1
    step graphs "$(limit graphs)" "$python" -m benchmarks graphs "$logs/shapes.bundle" --json "$results/graphs.json"
}

# What is right does not depend on the load: builds, tests and models share the machine. What is fast comes alone, after.
versions
jobs=()
if chosen tests; then
    build & jobs+=($!)
    pytest_gpu attention tests/kernels/triton/test_attention.py & jobs+=($!)
    pytest_gpu group_norm tests/kernels/triton/test_group_norm.py & jobs+=($!)
    pytest_gpu cubins tests/kernels/test_launch.py & jobs+=($!)
    pytest_gpu loop tests/runtime/devices/test_cuda.py & jobs+=($!)
    others & jobs+=($!)
fi
models "$(chosen tests && limit tests || echo 240)" & jobs+=($!)
for job in "${jobs[@]}"; do wait "$job"; done
if chosen kernels; then
    step kernels "$(limit kernels 70)" "$python" -m benchmarks kernels --device cuda --no-compile \
        --json "$results/kernels.json"
    step kernels-compile "$(limit kernels 30)" "$python" -m benchmarks kernels --device cuda \
        --json "$results/kernels-compile.json" --case sd15-2x8x4096x4096 sd15-2x320x64x64-silu sd15-8192x320
fi
if chosen graphs; then graphs; fi
if chosen unet-sd1; then component unet-sd1 unet-sd1 unet sd1 512x512; fi
if chosen vae; then
    component vae-512 vae vae sd1 512x512 20 30
    component vae-1024 vae vae sd1 1024x1024 20 30
fi
if chosen unet-sdxl; then component unet-sdxl unet-sdxl unet sdxl 1024x1024; fi

for log in "$logs"/*; do
    [ -f "$log" ] || continue
    printf '\n######## %s\n' "${log##*/}"
    cat "$log"
done > "$results/log.txt"
cat "$results/summary.txt"
! grep -qE 'failed|out of time' "$results/summary.txt"
