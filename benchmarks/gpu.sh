#!/usr/bin/env bash
# Everything that needs a GPU, offline and in under nine minutes: headline figures, tests, tuning, all benchmarks, and the targets.
#
#   bash benchmarks/gpu.sh [--dry-run] [--resume] [STAGE ...]
#
# It installs nothing: torch, Triton and pytest have to be there. Without pytest-benchmark the rows are the same (benchmarks/common.py
# takes the turns itself) and only its table is missing; without torchvision there is no ResNet-50, without a peer its rows say so.
# A stage that fails or runs out of time does not stop the next ones; the exit code is then 1. Without a GPU it is 2.
#   OUT              folder for what comes out (default bench-output)
#   OOD_BENCH_SITE   folder of packages the machine lacks, put on PYTHONPATH
#   OOD_BENCH_COMMIT commit to note where there is no git
#   OOD_BENCH_TOTAL  seconds for everything (default 525)
#   PYTHON           interpreter (default python3)
set -u

usage="usage: bash benchmarks/gpu.sh [--dry-run] [--resume] [headline|tests|tuning|benchmarks|targets ...]"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
export PYTHON=${PYTHON:-python3} OUT=${OUT:-bench-output} RESUME=
total=${OOD_BENCH_TOTAL:-525}
configs=kernels/ood_kernels/triton_kernels/configs
stages=(headline tests tuning benchmarks targets)
declare -A budget=([headline]=70 [tests]=150 [tuning]=90 [benchmarks]=195 [targets]=15)

dry_run= wanted=()
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=yes ;;
        --resume) RESUME=--resume ;;
        headline | tests | tuning | benchmarks | targets) wanted+=("$argument") ;;
        *) echo "gpu.sh: unknown argument $argument; $usage" >&2; exit 64 ;;
    esac
done
[ ${#wanted[@]} -eq 0 ] || stages=("${wanted[@]}")
export PYTHONPATH="kernels:.${OOD_BENCH_SITE:+:$OOD_BENCH_SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

headline() { # the kernels that the targets ask about, before anything can use up the time; tuning comes later
    measure "$OUT/headline.json" --quick benchmarks/kernels.py
}

benchmarks() {
    measure "$OUT/rows.json" $RESUME benchmarks/kernels.py benchmarks/engine.py benchmarks/methods.py benchmarks/fitting.py
}

measure() { # file, arguments: a case that puts the GPU out of order ends the process with 3, and a new one goes on after it
    local file=$1 code
    shift
    "$PYTHON" -m pytest -q -p no:cacheprovider --rows "$file" "$@"
    code=$?
    while [ $code -eq 3 ]; do
        "$PYTHON" -m pytest -q -p no:cacheprovider --rows "$file" --resume "$@"
        code=$?
    done
    return $code
}

tests() { # each file in a process of its own, those of the kernels first: they take longest
    mkdir -p "$OUT/tests"
    { find tests -name 'test_*.py' -path '*kernels*' | sort; find tests -name 'test_*.py' -not -path '*kernels*' | sort; } |
        xargs -P "$(($(nproc) > 15 ? 8 : ($(nproc) + 1) / 2))" -I{} bash -c 'one_test {}'
}

one_test() { # a file that cannot be imported since a package is missing is skipped
    local log verdict=passed missing
    log=$OUT/tests/$(tr / . <<<"$1").log
    "$PYTHON" -m pytest "$1" -q -p no:cacheprovider --color=no >"$log" 2>&1
    case $? in
        0 | 5) ;;
        2) missing=$(sed -n "s/.*ModuleNotFoundError: No module named '\([A-Za-z0-9_]*\).*/\1/p" "$log" | head -n 1)
           verdict=FAILED
           if [ -n "$missing" ] && ! "$PYTHON" -c "import $missing" 2>>"$log"; then verdict="SKIPPED (no $missing)"; fi ;;
        *) verdict=FAILED ;;
    esac
    echo "$verdict $1: $(tail -n 1 "$log")"
    [ "$verdict" != FAILED ]
}

tuning() { # what is finished goes into the checkout at once, so that the benchmarks use it
    "$PYTHON" -m ood_kernels.tune --minutes "$MINUTES"
}

targets() {
    local file=$OUT/rows.json
    [ -f "$file" ] || file=$OUT/headline.json
    "$PYTHON" -m benchmarks.readme --targets "$file"
}
export -f headline benchmarks measure tests one_test tuning targets

limit_of() { # stage, seconds gone: its budget; what the stages before left over goes to the benchmarks
    local left=$((total - $2)) limit=${budget[$1]}
    [ "$1" = targets ] || left=$((left - budget[targets]))
    [ "$1" = benchmarks ] && limit=$left
    [ "$limit" -lt "$left" ] || limit=$left
    [ "$limit" -gt 1 ] || limit=1
    echo "$limit"
}

if [ -n "$dry_run" ]; then
    gone=0
    for stage in "${stages[@]}"; do
        printf '%-10s at most %3d s\n' "$stage" "${budget[$stage]}"
        gone=$((gone + budget[$stage]))
    done
    echo "together at most $gone s; what comes out goes to $OUT"
    exit 0
fi

if ! reason=$("$PYTHON" -c 'import torch; print("" if torch.cuda.is_available() else "torch finds no GPU")' 2>&1); then
    reason="$PYTHON cannot import torch"
fi
if [ -n "$reason" ]; then
    echo "gpu.sh: nothing to measure on: ${reason##*$'\n'}" >&2
    exit 2
fi
command -v timeout >/dev/null || { echo "gpu.sh: the command timeout (GNU coreutils) is missing" >&2; exit 1; }

mkdir -p "$OUT" || exit 1
OUT=$(cd "$OUT" && pwd)
log=$OUT/gpu.log start_mark=$(mktemp)
trap 'rm -f "$start_mark"' EXIT
if [ -z "${OOD_BENCH_COMMIT:-}" ] && commit=$(git rev-parse HEAD 2>/dev/null); then
    [ -z "$(git status --porcelain 2>/dev/null)" ] || commit+=+
    export OOD_BENCH_COMMIT=$commit
fi

clocks() { # power, clocks and what throttles them
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.draw,clocks_throttle_reasons.active --format=csv 2>/dev/null |
        tee -a "$log"
}

: >"$log"
status=0
clocks
for stage in "${stages[@]}"; do
    limit=$(limit_of "$stage" "$SECONDS") start=$SECONDS
    # Tuning stops by itself a little earlier.
    MINUTES=$(printf '%d.%02d' $((limit * 85 / 6000)) $((limit * 85 / 60 % 100)))
    export MINUTES
    echo "== $stage, at most $limit s" | tee -a "$log"
    timeout --signal=INT --kill-after=5 "$limit" bash -c "$stage" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) failure= ;;
        124 | 137) failure="FAILED: stopped after $limit s" ;;
        *) failure="FAILED: exit code $code" ;;
    esac
    # A missed target is a result, and no failure of the run.
    [ -z "$failure" ] || [ "$stage" = targets ] || status=1
    echo "== $stage: $((SECONDS - start)) s${failure:+, $failure}" | tee -a "$log"
done
clocks
[ ! -d "$configs" ] || find "$configs" -name '*.json' -newer "$start_mark" -exec cp {} "$OUT" \;
echo "== everything: $SECONDS s, results in $OUT" | tee -a "$log"
exit $status
