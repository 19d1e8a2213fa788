# Sourced by scripts/test and scripts/demo: one private environment in .venv, made once, reused while its inputs stand.
# Sets `root` and `venv`, and holds a shared lock on the environment until the calling script's process ends, so that
# no other invocation rebuilds it underfoot.
#
# Environment variables: PYTHON (interpreter to build with), and pip's own PIP_* (mirrors, certificates, caches).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# The first interpreter that starts and is new enough. Versions that constraints.txt was resolved for come first.
find_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3.13 python3.10 python3 python; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
    [ "$candidate" != "${PYTHON:-}" ] || fail "PYTHON=$PYTHON is not a Python >= 3.10 with venv and ensurepip; correct or unset it"
  done
  fail "no Python >= 3.10 with venv and ensurepip found; install one (Debian: also python3-venv), or name it: PYTHON=/path/to/python3 $0"
}

# What the environment is made from. The [tool.*] tables of pyproject.toml (lint, tests) install nothing.
fingerprint() {
  "$1" - "$root" <<'PY'
import hashlib, pathlib, platform, sys
root = pathlib.Path(sys.argv[1])
project = (root / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.")[0]
constraints = (root / "constraints.txt").read_text(encoding="utf-8")
parts = (str(root), platform.python_version(), platform.machine(), project, constraints)
print(hashlib.sha256("\0".join(parts).encode()).hexdigest())
PY
}

# A lock on file descriptor 9, through Python because not every system has flock(1). It stays with the descriptor.
lock() {
  "$python" - "$1" <<'PY'
import fcntl, sys
kind = fcntl.LOCK_EX if sys.argv[1] == "exclusive" else fcntl.LOCK_SH
try:
    fcntl.flock(9, kind | fcntl.LOCK_NB)
except OSError:
    print(f"Waiting for another ./scripts/* that uses .venv ...", file=sys.stderr)
    fcntl.flock(9, kind)
PY
}

is_ready() { [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$wanted" ] && "$venv/bin/python" -c "" 2>/dev/null; }

build_environment() {
  if [ -e "$venv" ] && [ ! -e "$venv/.made-by-scripts" ]; then
    fail "$venv exists and was not made by these scripts: move it away (they keep their own environment there)"
  fi
  rm -rf "$venv"
  local needed_gb=3 free_kb
  [ "$(uname -s)" != Linux ] || needed_gb=10 # torch brings CUDA
  free_kb=$(df -Pk "$root" | awk 'NR == 2 { print $4 }')
  if [ "$free_kb" -lt $((needed_gb * 1024 * 1024)) ]; then
    fail "$((free_kb / 1024 / 1024)) GB free at $root, but building the environment needs $needed_gb GB: free some space"
  fi
  say "Building the environment in .venv with $("$python" -V) (once; a few minutes, up to 7 GB) ..."
  mkdir "$venv"
  : >"$venv/.made-by-scripts"
  "$python" -m venv "$venv"
  if ! (cd "$root" && "$venv/bin/python" -m pip install --progress-bar off -c constraints.txt -e ".[dev,docs,issues,onnx,tabular,tracking]") \
    >"$venv/install.log" 2>&1; then
    tail -n 15 "$venv/install.log" >&2
    fail "pip could not install the packages (above; whole log: $venv/install.log); mend that and run $0 again"
  fi
  printf '%s\n' "$wanted" >"$venv/.stamp"
  say "Environment ready."
}

python=$(find_python)
wanted=$(fingerprint "$python")
exec 9>>"$root/.venv.lock"
lock shared
while ! is_ready; do
  lock exclusive
  is_ready || build_environment
  lock shared
done
