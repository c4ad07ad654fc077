# Sourced by the scripts beside it: makes .venv in the repository's root and installs into it.
#
#   ensure_venv           the program
#   ensure_venv dev       the program and what its tests need
#
# Does nothing when the same set was installed from the same pyproject.toml and constraints.txt before.

python_bin=""
for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python_bin=$candidate
    break
  fi
done
if [ -z "$python_bin" ]; then
  echo "tprt needs Python 3.11 or newer; none found. Name one with PYTHON=/path/to/python3" >&2
  exit 2
fi

ensure_venv() {
  local extra=${1:-} target="." wanted stamp
  [ -n "$extra" ] && target=".[$extra]"
  wanted=$(cat pyproject.toml constraints.txt | sha256sum | cut -d' ' -f1)
  # What dev installs contains what the plain set installs.
  for stamp in ".venv/.tprt-$extra" .venv/.tprt-dev; do
    [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return 0
  done
  # A first run without the system's venv package leaves a python without pip behind.
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python_bin" -m venv --clear .venv
  echo "installing $target into .venv ..." >&2
  # PIP_CONSTRAINT also pins what pip fetches to build the package itself.
  PIP_CONSTRAINT=$PWD/constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
    .venv/bin/python -m pip install --quiet --editable "$target"
  echo "$wanted" >".venv/.tprt-$extra"
}
