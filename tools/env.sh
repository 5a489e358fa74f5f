#!/usr/bin/env bash
# Makes .venv with every package of constraints.txt; called by `make env`. Needs Python 3.11 or newer.
# PYTHON names an interpreter; TORCH_INDEX an index with CPU builds of torch (empty: none).
set -euo pipefail
cd "$(dirname "$0")/.."
readonly venv=.venv log=.venv/install.log
readonly torch_index=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 PIP_CONSTRAINT=constraints.txt

die() { printf 'make env: %s\n' "$@" >&2; exit 1; }

good() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if good "$candidate"; then command -v "$candidate"; return; fi
    done
    return 1
}

apt() { # install Debian packages where that needs no password
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    echo "installing Debian packages: $*"
    apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

progress() { # run a command with its output in the log and one line on the screen
    local label=$1 start=$SECONDS pid
    shift
    "$@" >>"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null || true; exit 130' INT TERM
    [ -t 1 ] || printf '%s ...\n' "$label"
    while kill -0 "$pid" 2>/dev/null; do
        [ -t 1 ] && printf '\r%s: %d packages found, %d s ' \
            "$label" "$(grep -c '^Collecting ' "$log" || true)" $((SECONDS - start))
        sleep 1
    done
    if ! wait "$pid"; then
        tail -n 25 "$log" >&2
        die "$label failed; the end of $log is above. Fix the cause and run the command again."
    fi
    printf '%s%s: done in %d s                \n' "$([ -t 1 ] && printf '\r')" "$label" $((SECONDS - start))
}

cpu_index() { # the index of CPU builds, if this machine has no NVIDIA device and can reach it
    [ -n "$torch_index" ] && [ ! -e /proc/driver/nvidia ] && [ "$(uname -s)" = Linux ] || return 0
    "$venv/bin/python" - "$torch_index" <<'PY' && echo "--extra-index-url $torch_index"
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=5).close()
except OSError:
    sys.exit(1)
PY
    return 0
}

if ! { good "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    python=$(find_python) || { [ -z "${PYTHON:-}" ] && apt python3 python3-venv && python=$(find_python); } ||
        die "Python 3.11 or newer is needed; ${PYTHON:-python3} is not that or not there." \
            "Install one (Debian: apt-get install python3 python3-venv) or run: make env PYTHON=/path/to/python3"
    make_venv=("$python" -m venv --clear "$venv")
    "${make_venv[@]}" >/dev/null 2>&1 || { apt python3-venv && "${make_venv[@]}"; } ||
        die "$python cannot make a virtual environment." \
            "Install its venv module (Debian: apt-get install python3-venv) and run the command again."
fi

: >"$log"
pip=("$venv/bin/python" -m pip install --progress-bar off --retries 8 --no-compile) # all at once, at the end
# shellcheck disable=SC2046 # the answer is an option and its value, or nothing
progress "installing torch" "${pip[@]}" $(cpu_index) torch hatchling editables
progress "installing packages" "${pip[@]}" --no-build-isolation -e '.[cluster,data,demo,dev,test]'
# Their models are tested; without what they ask for, torchvision above all, which has no build for this torch.
progress "installing model libraries" "${pip[@]}" --no-deps diffusers sentence-transformers timm
# Adapters are tested under them; named with all that they import, so that no pin moves and no other torch comes.
progress "installing trainers" "${pip[@]}" --no-deps trl datasets dill multiprocess pandas xxhash \
    pytorch-lightning lightning-utilities torchmetrics
# On every core, as pip does it on one; some packages hold files of other versions of Python, which do not compile.
compile_all() { "$venv/bin/python" -m compileall -q -j 0 "$venv/lib" || true; }
progress "compiling packages" compile_all
