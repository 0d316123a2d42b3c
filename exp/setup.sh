#!/bin/sh
# Create .venv in the repository's root and install requirements.txt into it; does nothing if it is up to date.
#     sh exp/setup.sh [further packages]        (PYTHON: the interpreter to create it with, default python3)
set -eu

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
python=${PYTHON:-python3}
stamp=$root/.venv/installed-$(echo "$@" | cat "$root/requirements.txt" - | cksum | tr ' ' '-')
[ -f "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "$python is too old or missing: Python 3.10 or newer is needed (set PYTHON to choose another)" >&2
    exit 1
}
if ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then # missing or incomplete
    echo "creating $root/.venv" >&2
    "$python" -m venv --clear "$root/.venv" || {
        echo "$python cannot create virtual environments (on Debian and Ubuntu: apt-get install python3-venv)" >&2
        exit 1
    }
fi
echo "installing requirements.txt $*" >&2
"$root/.venv/bin/python" -m pip install --quiet --requirement "$root/requirements.txt" "$@"
touch "$stamp"
