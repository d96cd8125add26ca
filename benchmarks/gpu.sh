#!/usr/bin/env bash
# Builds the library, runs every GPU test and every GPU benchmark, inside nine minutes, and writes
# benchmarks/results/gpu-DATE.{md,json,log} and the table that backend="auto" follows (dsvlm/ops/measured.json).
# usage: bash benchmarks/gpu.sh [--out DIR] [--budget SECONDS] [--only build,tests,attention,...] [--smoke]
# Each stage has its own limit; a later one runs whatever became of an earlier one. Exit status 1: a stage failed.
# --smoke: tiny sizes on whatever is there. Environment: PYTHON; DSVLM_COMMIT, for a copy of the tree without .git;
# DSVLM_GPU_STAGES, other stages, one "name limit command" a line: {parts} is the directory for results, {seconds} what
# the stage has, less some to end in, and the end of "name&" is awaited only after the next stage.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage() { sed -n '2,10s/^# //p' benchmarks/gpu.sh; }
out=benchmarks/results budget=530 only="" smoke=""
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=${2:?--out needs a directory}; shift ;;
        --budget) budget=${2:?--budget needs seconds}; shift ;;
        --only) only=${2:?--only needs names of stages}; shift ;;
        --smoke) smoke="--smoke" ;;
        -h | --help) usage; exit 0 ;;
        *) echo "gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

export python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out" "$work/parts" "$work/logs"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$work/inductor"
measured=dsvlm/ops/measured.json
[ -z "$smoke" ] || measured=$work/measured.json
reserve=10 # seconds kept for the report
begin=$SECONDS failed=0 pids=() names=()

build() { # with CUDA code where nvcc is, for this device; else what lies there has to hold it
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    case $capability in
        9.0) export DSVLM_CUDA_ARCH=${DSVLM_CUDA_ARCH:-90a} ;;
        *.*) export DSVLM_CUDA_ARCH=${DSVLM_CUDA_ARCH:-${capability/./}} ;;
    esac
    if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
        DSVLM_CUDA=1 "$python" setup.py build_ext --inplace || echo "the build failed: the library that was there is taken"
    fi
    "$python" - <<'EOF'
import sys, torch
from dsvlm.ops.library import library
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = not library() or not has("dsvlm::git_attention_forward", "CUDA")
sys.exit("there is no library with CUDA code" if missing else 0)
EOF
}

gpu_tests() { # only files that have such tests are imported: the others may need what a GPU host lacks
    local files
    mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py')
    [ ${#files[@]} -gt 0 ] || { echo "no tests are marked gpu"; return 0; }
    "$python" -m pytest -m gpu -p no:cacheprovider -ra --continue-on-collection-errors "${files[@]}"
}
export -f build gpu_tests

stages() { # FlexAttention is compiled beside the tests; nothing runs beside a measurement
    if [ -n "${DSVLM_GPU_STAGES:-}" ]; then
        printf '%s\n' "$DSVLM_GPU_STAGES"
        return
    fi
    [ -n "$smoke" ] || echo "build 110 build"
    [ -n "$smoke" ] || echo "compile& 140 $python -m benchmarks.attention --compile --seconds {seconds}"
    [ -n "$smoke" ] || echo "tests 140 gpu_tests"
    echo "routing 50 $python -m benchmarks.routing $smoke --seconds {seconds} --out {parts}/2-routing.json"
    echo "layers 60 $python -m benchmarks.layers $smoke --out {parts}/3-layers.json"
    echo "attention 300 $python -m benchmarks.attention $smoke --seconds {seconds} --out {parts}/1-attention.json" \
        "--measured $measured"
}

run_stage() { # name, limit, command
    local start=$SECONDS status=0
    timeout -k 5 "$2" bash -c "$3" >"$work/logs/$1.log" 2>&1 </dev/null || status=$?
    echo "$status $((SECONDS - start))" >"$work/logs/$1.end"
}

ended() { # name, exit status, seconds
    local word="failed ($2)"
    case $2 in 0) word=ok ;; 124 | 137) word="out of time" ;; esac
    [ "$2" = 0 ] || failed=1
    printf '%s\t%s\t%s\n' "$1" "$word" "$3" >>"$work/stages.tsv"
    echo "== $1: $word, $3 s" >&2
}

await() { # stages that were left running
    local i status seconds
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}"
        read -r status seconds <"$work/logs/${names[$i]}.end"
        ended "${names[$i]}" "$status" "$seconds"
    done
    pids=() names=()
}

while read -r name limit command; do
    [ -n "$name" ] || continue
    beside=no
    [ "${name%&}" = "$name" ] || beside=yes
    name=${name%&}
    case ",$only," in ",," | *",$name,"*) ;; *) continue ;; esac
    left=$((budget - reserve - (SECONDS - begin)))
    if [ "$left" -lt 1 ]; then
        ended "$name" 124 0
        continue
    fi
    [ "$limit" -lt "$left" ] || limit=$left
    echo "== $name: at most $limit s" >&2
    command=${command//"{parts}"/$work/parts}
    command=${command//"{seconds}"/$((limit > 20 ? limit - 12 : limit))}
    run_stage "$name" "$limit" "$command" &
    pids+=($!) names+=("$name")
    [ "$beside" = yes ] || await
done < <(stages)
await

timeout 60 "$python" -m benchmarks.gpu_report --work "$work" --out "$out" --measured "$measured" \
    --seconds $((SECONDS - begin)) $smoke || failed=1
exit $failed
