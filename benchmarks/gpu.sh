#!/usr/bin/env bash
# Everything that needs a GPU, offline and in under nine minutes: tests, tuning, benchmarks, verdicts and pictures.
#
#   bash benchmarks/gpu.sh [--dry-run] [--resume] [STAGE ...]
#
# A stage that fails or runs out of time does not stop the next ones; the exit code is then 1. Without a GPU it is 2.
#   OUT              folder for what comes out (default benchmarks/results)
#   OOD_BENCH_SITE   folder of packages the machine lacks, put on PYTHONPATH
#   OOD_BENCH_COMMIT commit to note where there is no git
#   OOD_BENCH_TOTAL  seconds for everything (default 525)
#   PYTHON           interpreter (default python3)
set -u

usage="usage: bash benchmarks/gpu.sh [--dry-run] [--resume] [tests|tuning|benchmarks|report ...]"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 1
python=${PYTHON:-python3}
results=${OUT:-benchmarks/results}
total=${OOD_BENCH_TOTAL:-525}
configs=kernels/ood_kernels/triton_kernels/configs
file=$results/gpu-$(date -u +%Y-%m-%d).json
stages=(tests tuning benchmarks report)
declare -A budget=([tests]=160 [tuning]=100 [benchmarks]=235 [report]=30)

dry_run= resume= wanted=()
for argument in "$@"; do
    case $argument in
        --dry-run) dry_run=yes ;;
        --resume) resume=--resume ;;
        tests | tuning | benchmarks | report) wanted+=("$argument") ;;
        *) echo "gpu.sh: unknown argument $argument; $usage" >&2; exit 64 ;;
    esac
done
[ ${#wanted[@]} -eq 0 ] || stages=("${wanted[@]}")

export PYTHONPATH="kernels:.${OOD_BENCH_SITE:+:$OOD_BENCH_SITE}${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

command_of() { # stage, seconds: sets `command`
    # The stage stops by itself a little earlier, and writes what it has.
    local seconds=$(($2 > 100 ? $2 - 15 : $2 * 85 / 100)) minutes
    minutes=$(printf '%d.%02d' $((seconds / 60)) $((seconds % 60 * 100 / 60)))
    case $1 in
        tests) command=("$python" benchmarks/gpu_tests.py --minutes "$minutes" --log "$results/gpu-tests.log") ;;
        tuning) command=("$python" -m ood_kernels.tune --minutes "$minutes") ;;
        benchmarks) command=("$python" benchmarks/gpu_kernels.py --minutes "$minutes" --json "$file" $resume) ;;
        report) command=("$python" benchmarks/gpu_report.py "$file" --stages "$table") ;;
    esac
}

limit_of() { # stage, seconds gone: its budget; what tests and tuning left over goes to the benchmarks
    local left=$((total - $2)) limit=${budget[$1]}
    [ "$1" = report ] || left=$((left - budget[report]))
    [ "$1" = benchmarks ] && limit=$left
    [ "$limit" -lt "$left" ] || limit=$left
    [ "$limit" -gt 1 ] || limit=1
    echo "$limit"
}

if [ -n "$dry_run" ]; then
    table=STAGES gone=0
    for stage in "${stages[@]}"; do
        command_of "$stage" "${budget[$stage]}"
        printf '%-10s at most %3d s: %s\n' "$stage" "${budget[$stage]}" "${command[*]}"
        gone=$((gone + budget[$stage]))
    done
    echo "together at most $gone s; what comes out goes to $results"
    exit 0
fi

if ! reason=$("$python" -c 'import torch; print("" if torch.cuda.is_available() else "torch finds no GPU")' 2>&1); then
    reason="$python cannot import torch"
fi
if [ -n "$reason" ]; then
    echo "gpu.sh: nothing to measure on: ${reason##*$'\n'}" >&2
    exit 2
fi
command -v timeout >/dev/null || { echo "gpu.sh: the command timeout (GNU coreutils) is missing" >&2; exit 1; }

mkdir -p "$results" || exit 1
results=$(cd "$results" && pwd)
file=$results/${file##*/}
log=$results/gpu.log
table=$(mktemp) && trap 'rm -f "$table"' EXIT
if [ -z "${OOD_BENCH_COMMIT:-}" ] && commit=$(git rev-parse HEAD 2>/dev/null); then
    [ -z "$(git status --porcelain 2>/dev/null)" ] || commit+=+
    export OOD_BENCH_COMMIT=$commit
fi

: >"$log"
status=0
for stage in "${stages[@]}"; do
    limit=$(limit_of "$stage" "$SECONDS") start=$SECONDS
    command_of "$stage" "$limit"
    echo "== $stage, at most $limit s" | tee -a "$log"
    timeout --signal=INT --kill-after=5 "$limit" "${command[@]}" 2>&1 | tee -a "$log"
    code=${PIPESTATUS[0]}
    case $code in
        0) failure= ;;
        124 | 137) failure="FAILED: stopped after $limit s" ;;
        *) failure="FAILED: exit code $code" ;;
    esac
    [ -z "$failure" ] || status=1
    if [ "$stage" = tuning ]; then
        find "$configs" -name '*.json' -newer "$table" -exec cp {} "$results" \;
    fi
    last=$(tail -n 1 "$log" | tr '\t' ' ')
    printf '%s\t%d\t%d\t%d\t%s\n' "$stage" $((SECONDS - start)) "$limit" "$code" "$last" >>"$table"
    echo "== $stage: $((SECONDS - start)) s${failure:+, $failure}" | tee -a "$log"
done
echo "== everything: $SECONDS s, results in $results" | tee -a "$log"
exit $status
