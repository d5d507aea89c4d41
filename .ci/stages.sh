# The stages of continuous integration. `stage NAME MINUTES COMMAND...` runs one and keeps its time; at the end, or at the first stage
# that fails, a summary is printed. Sourced by .ci/run and .ci/full from the root of the repository.
# shellcheck shell=bash

work=$(mktemp -d)
summary=()
current=""

finish() {
    local code=$?
    if [ -n "$current" ]; then
        # A stage that fails ends the script by `set -e`.
        summary+=("$(printf '%-18s %5d s  FAILED' "$current" $((SECONDS - began)))")
    fi
    echo
    echo "== summary"
    printf '%s\n' "${summary[@]}" "$(printf '%-18s %5d s' total "$SECONDS")"
    # shellcheck disable=SC2046
    kill $(jobs -p) 2>/dev/null || true
    rm -rf "$work"
    exit "$code"
}
trap finish EXIT

stage() {
    local budget=$((60 * $2))
    current=$1 began=$SECONDS
    echo "== $1 (at most $2 min)"
    "${@:3}"
    local took=$((SECONDS - began))
    summary+=("$(printf '%-18s %5d s of %d%s' "$current" "$took" "$budget" "$([ "$took" -le "$budget" ] || echo '  OVER ITS BUDGET')")")
    current=""
}

tests() { make test VENV="$work/venv"; }

lint() { make lint VENV="$work/venv"; }

aot() { PYTHONPATH=kernels "$work/venv/bin/python" -m ood_kernels.aot; }

# With the Triton of torch 2.11 all of it, and the bounds of a GPU that many have.
emulate() {
    make emulate VENV="$work/venv"
    PYTHONPATH="$work/venv/triton-3.6:kernels" "$work/venv/bin/python" -m ood_kernels.aot --target sm_90
}

# The tests that compare numbers, with the instructions and threads of other machines.
instruction_sets() {
    under ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 OMP_NUM_THREADS=1 &
    local first=$!
    under ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1
    wait "$first"
    under ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=2
    under ATEN_CPU_CAPABILITY=avx2 MKL_CBWR=AVX2 OMP_NUM_THREADS=2
}

under() {
    local log
    log=$(mktemp -p "$work")
    if env "$@" "$work/venv/bin/python" -m pytest -q -m numeric >"$log" 2>&1; then
        echo "$*: $(tail -n 1 "$log")"
    else
        cat "$log"
        echo "failed under: env $* python -m pytest -m numeric"
        return 1
    fi
}

# The lowest versions that setup.py names, under the tests of all that calls other packages.
lowest() {
    python3 -m venv "$work/lowest"
    PIP_CONSTRAINT=constraints/lowest.txt "$work/lowest/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$work/venv/torch.txt" --editable '.[test]'
    "$work/lowest/bin/python" -m pytest -q tests/ood_engine/{cli,demo,detectors,evaluation,images,test_engine.py,test_state.py} \
        tests/ood_kernels/triton_kernels/test_pool_nap.py tests/test_lowest.py
}

# The wheel as a user installs it: its size, its modules, and the command without its extra.
wheel() {
    "$work/venv/bin/python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" .
    local bytes
    bytes=$(stat -c %s "$work"/dist/*.whl)
    echo "wheel: $bytes bytes"
    [ "$bytes" -le 400000 ] || { echo "wheel: expected at most 400000 bytes"; return 1; }
    python3 -m venv "$work/empty"
    "$work/empty/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$work/venv/torch.txt" "$work"/dist/*.whl
    (cd "$work" && "$work/empty/bin/python" "$OLDPWD/.ci/wheel.py")
    local message
    if message=$("$work/empty/bin/ood-engine" --help 2>&1); then
        echo "ood-engine without [cli] did not fail"
        return 1
    fi
    grep "ood-engine\[cli\]" <<<"$message"
}
