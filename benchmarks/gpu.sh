#!/usr/bin/env bash
# Builds the library, runs every GPU test and every GPU benchmark, inside nine minutes, and writes
# benchmarks/results/gpu-DATE.{md,json,log} and the table that backend="auto" follows (dsvlm/ops/measured.json).
# usage: bash benchmarks/gpu.sh [--out DIR] [--budget SECONDS] [--only build,tests,attention,...] [--smoke]
# Each stage has its own limit; a later one runs whatever became of an earlier one. Exit status 1: a stage failed.
# Stages come in order of importance: where time is short the last ones are left out. --smoke: tiny sizes on whatever is
# there. Environment: PYTHON; DSVLM_COMMIT, for a copy of the tree without .git; DSVLM_GPU_STAGES, other stages, one
# "name limit command" a line: {parts} is the directory for results, {seconds} what the stage has, less some to end in,
# and the end of "name&" is awaited only after the next stage that has no "&".
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

usage() { sed -n '2,11s/^# //p' benchmarks/gpu.sh; }
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
trap 'kill $(jobs -pr) 2>/dev/null; rm -rf "$work"' EXIT # a stage is no orphan that keeps the device busy
export logs=$work/logs
mkdir -p "$out" "$work/parts" "$logs"
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$work/inductor"
measured=dsvlm/ops/measured.json
[ -z "$smoke" ] || measured=$work/measured.json
reserve=20 # seconds kept for the report
begin=$SECONDS failed=0 names=() ends=()

build() { # with CUDA code where nvcc is, for this device; else what lies there has to hold it
    local capability wrong=0
    capability=$(timeout 20 nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1)
    case $capability in
        9.0) export DSVLM_CUDA_ARCH=${DSVLM_CUDA_ARCH:-90a} ;;
        *.*) export DSVLM_CUDA_ARCH=${DSVLM_CUDA_ARCH:-${capability/./}} ;;
    esac
    if command -v nvcc >/dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
        DSVLM_CUDA=1 "$python" setup.py build_ext --inplace || {
            echo "the build failed, what was there serves"
            wrong=1 # what another commit's code does is not to be published as this one's
        }
    fi
    "$python" - <<'EOF' || wrong=1
import sys, torch
from dsvlm.ops.library import library
has = torch._C._dispatch_has_kernel_for_dispatch_key
missing = not library() or not has("dsvlm::git_attention_forward", "CUDA")
sys.exit("there is no library with CUDA code" if missing else 0)
EOF
    return $wrong
}

gpu_tests() { # only files that have such tests are imported: the others may need what a GPU host lacks
    local files
    mapfile -t files < <(grep -rlE 'mark\.gpu\b' tests --include='test_*.py')
    [ ${#files[@]} -gt 0 ] || { echo "no tests are marked gpu"; return 0; }
    "$python" -m pytest -m gpu -p no:cacheprovider -ra --continue-on-collection-errors "${files[@]}"
}

sanitize() { # seconds: memcheck, racecheck and synccheck, side by side, of the smallest tests of our kernels
    local tool nvcc status summary check verdicts="" wrong=0 small
    nvcc=$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)
    tool=$(command -v compute-sanitizer || command -v "${nvcc%/*}/compute-sanitizer") || {
        echo "not checked: there is no compute-sanitizer on PATH or beside nvcc"
        return 0
    }
    small="follow_the_reference and ([63 or [65 or [130)"
    small+=" or [device and (choices_and_rows and -33- or sums_and_gradients and -33 or there_and_back and 64)"
    for check in memcheck racecheck synccheck; do
        local more=()
        # gaps between tensors, each in memory of its own; what torch asks of the driver in vain is no error of ours
        [ $check != memcheck ] || more=(--padding 256 --report-api-errors no)
        (
            PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -k 5 "$1" "$tool" --tool $check --kernel-name kns=dsvlm \
                --error-exitcode 86 "${more[@]}" "$python" -m pytest -m gpu -p no:cacheprovider -x -k "$small" \
                tests/ops/test_git_cuda.py tests/ops/test_moe_cuda.py >"$logs/$check.txt" 2>&1
            echo $? >"$logs/$check.status"
        ) &
    done
    wait
    for check in memcheck racecheck synccheck; do
        cat "$logs/$check.txt"
        status=$(cat "$logs/$check.status")
        summary=$(grep -oE 'SUMMARY: .*' "$logs/$check.txt" | tail -n 1)
        summary=${summary#SUMMARY: }
        if grep -qi "device not supported" "$logs/$check.txt"; then
            summary="not checked, it does not support this device"
        elif [ "$status" = 124 ] || [ "$status" = 137 ]; then
            summary="out of time" wrong=1
        elif [ "$status" != 0 ] || [ -z "$summary" ]; then
            summary="failed ($status) ${summary:-and told nothing}" wrong=1
        fi
        verdicts+="${verdicts:+; }$check: $summary"
    done
    echo "$verdicts"
    return $wrong
}
export -f build gpu_tests sanitize

stages() { # FlexAttention is compiled, and kernels are checked, beside the tests; nothing runs beside a measurement
    if [ -n "${DSVLM_GPU_STAGES:-}" ]; then
        printf '%s\n' "$DSVLM_GPU_STAGES"
        return
    fi
    [ -n "$smoke" ] || echo "build 110 build"
    [ -n "$smoke" ] || echo "compile& 140 $python -m benchmarks.attention --compile --seconds {seconds}"
    [ -n "$smoke" ] || echo "sanitizer& 140 sanitize {seconds}"
    [ -n "$smoke" ] || echo "tests 140 gpu_tests"
    echo "attention 300 $python -m benchmarks.attention $smoke --seconds {seconds} --out {parts}/1-attention.json" \
        "--measured $measured"
    echo "routing 50 $python -m benchmarks.routing $smoke --seconds {seconds} --out {parts}/2-routing.json"
    echo "layers 60 $python -m benchmarks.layers $smoke --out {parts}/3-layers.json"
}

run_stage() { # name, limit, command
    local start=$SECONDS status=0
    trap 'kill $!; exit' TERM
    timeout -k 5 "$2" bash -c "$3" >"$logs/$1.log" 2>&1 </dev/null &
    wait $! || status=$?
    echo "$status $((SECONDS - start))" >"$logs/$1.part"
    mv "$logs/$1.part" "$logs/$1.end"
}

ended() { # name, exit status, seconds
    local word="failed ($2)"
    case $2 in 0) word=ok ;; 124 | 137) word="out of time" ;; esac
    [ "$2" = 0 ] || failed=1
    printf '%s\t%s\t%s\n' "$1" "$word" "$3" >>"$work/stages.tsv"
    echo "== $1: $word, $3 s" >&2
}

await() { # stages that were left running; one that nothing can end, stuck in the driver, is not awaited any longer
    local i status seconds
    for i in "${!names[@]}"; do
        until [ -e "$logs/${names[$i]}.end" ] || [ "$SECONDS" -ge "${ends[$i]}" ]; do sleep 0.1; done
        status=137 seconds=0
        [ ! -e "$logs/${names[$i]}.end" ] || read -r status seconds <"$logs/${names[$i]}.end"
        ended "${names[$i]}" "$status" "$seconds"
    done
    names=() ends=()
}

for name in ${only//,/ }; do
    grep -qE "^$name&? " <<<"$(stages)" || { echo "gpu.sh: --only $name names no stage" >&2; exit 2; }
done
chosen=() later=0 # seconds that the stages after this one want
while read -r name limit command; do
    case ",$only," in ",," | *",${name%&},"*) ;; *) continue ;; esac
    [ -n "$name" ] || continue
    chosen+=("$name $limit $command")
    [ "${name%&}" != "$name" ] || later=$((later + limit))
done < <(stages)

for stage in "${chosen[@]}"; do
    read -r name limit command <<<"$stage"
    beside=no
    [ "${name%&}" = "$name" ] || beside=yes
    name=${name%&}
    left=$((budget - reserve - (SECONDS - begin)))
    [ "$beside" = yes ] || later=$((later - limit))
    if [ "$left" -lt 1 ]; then
        ended "$name" 124 0
        continue
    fi
    if [ "$limit" -gt $((left - later)) ] && [ $((2 * (left - later))) -ge "$limit" ]; then
        limit=$((left - later)) # half of its time, or more, does: those after it need the rest
    elif [ "$limit" -gt "$left" ]; then
        limit=$left
    fi
    echo "== $name: at most $limit s" >&2
    command=${command//"{parts}"/$work/parts}
    command=${command//"{seconds}"/$((limit > 20 ? limit - 12 : limit))}
    run_stage "$name" "$limit" "$command" &
    names+=("$name") ends+=($((SECONDS + limit + 7)))
    [ "$beside" = yes ] || await
done
await

spent=$((SECONDS - begin))
left=$((budget + 10 - spent))
timeout -k 2 $((left > 20 ? left : 20)) "$python" -m benchmarks.gpu_report --work "$work" --out "$out" \
    --measured "$measured" --seconds $spent $smoke || {
    failed=1
    echo "== the report failed: what it is made of is in $out/unreported" >&2
    mkdir -p "$out/unreported" && cp -r "$work/parts" "$logs" "$out/unreported"
}
exit $failed
