# Sourced by quickstart.sh and test.sh: `need_venv EXTRAS` makes .venv if there is none, installs this package and what
# it needs at the versions of constraints.txt if they are not there yet, and sets PY. EXTRAS: "" or "dev".
#
# Choose the interpreter that makes .venv with PYTHON=/path/to/python. For a CUDA build of PyTorch, or the small CPU
# build on Linux, install it into .venv first (the selector on pytorch.org gives the command); whichever build of the
# pinned version is found stays.

fail() {
    echo "error: $*" >&2
    exit 2
}

# The first Python >= 3.11 among the usual names.
find_python() {
    local name found=""
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python}; do
        command -v "$name" >/dev/null 2>&1 || continue
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$name" && return
        found="$found$("$name" -c 'import sys; print(", %s is Python %s" % (sys.executable, sys.version.split()[0]))')"
    done
    fail "Python 3.11 or newer is needed${found:-, and none was found}; install one, or name it: PYTHON=/path/to/python"
}

# Whether this package and the pinned versions of its requirements are installed. A version's local part (+cpu, +cu130)
# is not compared.
is_installed() {
    "$PY" -I - "$ROOT/constraints.txt" "$1" <<'PYTHON' >/dev/null 2>&1
import sys
from importlib.metadata import version

version("tag-fer")
text = open(sys.argv[1], encoding="utf-8").read().split("# What those need.")[0]
if sys.argv[2] != "dev":
    text = text.split("# Extras")[0]
for line in text.splitlines():
    if line and not line.startswith("#"):
        name, wanted = line.split("==")
        assert version(name).split("+")[0] == wanted
PYTHON
}

need_venv() {
    local python
    if [ ! -e "$ROOT/.venv" ]; then
        python=$(find_python) || exit 2
        echo "making .venv with $("$python" --version)"
        if ! "$python" -m venv "$ROOT/.venv"; then
            rm -rf "$ROOT/.venv"
            fail "$python cannot make a virtual environment (on Debian and Ubuntu: apt install python3-venv)"
        fi
    fi
    PY="$ROOT/.venv/bin/python"
    [ -x "$PY" ] || PY="$ROOT/.venv/Scripts/python.exe" # Git Bash on Windows
    "$PY" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        fail "$ROOT/.venv holds no Python 3.11 or newer that runs; delete it and repeat"
    if ! is_installed "$1"; then
        echo "installing into .venv (once; PyTorch is a large download)"
        "$PY" -m pip install --quiet --disable-pip-version-check -c "$ROOT/constraints.txt" -e "$ROOT${1:+[$1]}" ||
            fail "the installation failed, see above; repeating the command goes on where it stopped"
    fi
}
