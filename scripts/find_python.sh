#!/usr/bin/env bash
# Prints the first python of the versions asked for (scripts/find_python.sh 3.11 3.10) that really starts, or fails.
set -euo pipefail
for version in "$@"; do
    # pyenv's `python3.x` may be a shim that only complains.
    for candidate in "$(command -v "python$version" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$version".*/bin/python; do
        if [[ -x $candidate ]] && "$candidate" -c "import sys, venv; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            printf '%s\n' "$candidate"
            exit 0
        fi
    done
done
exit 1
