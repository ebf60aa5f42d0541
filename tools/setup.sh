#!/usr/bin/env bash
# Makes .venv and installs the package there: `setup.sh core` (what the program needs), `serve` (the server too)
# or `dev` (tests too).
# Does nothing when pyproject.toml and constraints.txt have not changed since it last succeeded.
set -euo pipefail
cd "$(dirname "$0")/.."

kind=${1:-core}
venv=${VENV:-.venv}
python=$venv/bin/python
case $kind in
  core) target=. ;;
  serve) target='.[serve]' ;;
  dev) target='.[dev]' ;;
  *) echo "usage: tools/setup.sh [core|serve|dev]" >&2; exit 2 ;;
esac

# The editable install records this folder's path: a moved checkout is set up again.
want=$(cat pyproject.toml constraints.txt <(pwd) | cksum)
stamped() { [ -x "$python" ] && [ "$(cat "$venv/.$1.stamp" 2>/dev/null)" = "$want" ]; }
if stamped "$kind" || stamped dev || { [ "$kind" = core ] && stamped serve; }; then exit 0; fi

if [ ! -x "$python" ]; then
  base=${PYTHON:-python3}
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "OpenChameleon needs Python 3.11 or newer; set PYTHON to one, for example PYTHON=python3.12 make demo." >&2
    exit 1
  fi
  "$base" -m venv "$venv"
fi

echo "Installing OpenChameleon ($kind) into $venv ..." >&2
if [ -x "$venv/bin/uv" ] || "$python" -m pip install -q -c constraints.txt uv 2>/dev/null; then
  # uv does not read pip's configuration, where a machine may name a folder of local wheels.
  links=()
  for place in ${PIP_FIND_LINKS:-$("$python" -m pip config get global.find-links 2>/dev/null || true)}; do
    links+=(--find-links "$place")
  done
  # Compiled now: torch is imported in half the time, also where Python may not write it later.
  UV_PYTHON_DOWNLOADS=never "$venv/bin/uv" pip install -q --compile-bytecode --python "$python" \
    ${links[@]+"${links[@]}"} -c constraints.txt -e "$target"
else
  "$python" -m pip install -q -c constraints.txt -e "$target"
fi
echo "$want" > "$venv/.$kind.stamp"
