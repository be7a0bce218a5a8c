#!/usr/bin/env bash
# Style and tests, as continuous integration runs them. Needs Python >= 3.11.
#
#     bash tools/test.sh                     # everything
#     bash tools/test.sh --fast              # without the tests marked slow
#     bash tools/test.sh tests/test_grpo.py  # arguments go to pytest; -n 0 runs in one process
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"
. tools/venv.sh
need_venv dev

arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then arguments+=(-m "not slow"); else arguments+=("$argument"); fi
done

# Two test processes of one thread each: the tensors are far too small for more threads to pay, and tests that start
# processes of their own leave a core idle half of the time. conftest.py sets torch's own threads to 1 likewise.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
workers=()
[ "$("$PY" -c 'import os; print(os.cpu_count() or 1)')" -lt 2 ] || workers=(-n 2)

"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m pytest -q ${workers[@]+"${workers[@]}"} ${arguments[@]+"${arguments[@]}"}
