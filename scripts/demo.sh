#!/usr/bin/env bash
# Show what parckpt is for: train on 4 ranks, kill the job, go on with 2, kill it again, end with 3, and compare the final
# weights with those of a run that nobody disturbed. Needs Python 3.10 or newer with pip, and Linux; MPI comes from a wheel.
#
#   scripts/demo.sh                     under two minutes, installation included
#   PYTHON=python3.12 scripts/demo.sh   with another Python
#   KEEP=1 scripts/demo.sh              leave the checkpoints there to be looked at
#
# Ends with status 0 only if the two runs agree in every bit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
bin=.venv/bin

say() { printf '\n== %3d s  %s\n' "$SECONDS" "$*"; }
fail() { printf 'demo.sh: %s\n' "$*" >&2; exit 1; }

# -- the environment ---------------------------------------------------------------------------------------------------

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$python is older than Python 3.10"
# Isolated: what is installed counts, not what lies in this directory. A clone that was moved needs a new environment.
complete() {
    [[ -x $bin/mpiexec ]] && "$bin/python" -I - "$PWD" 2>/dev/null <<'END'
import sys, mpi4py.MPI, parckpt, sklearn.datasets
sys.exit(not parckpt.__file__.startswith(sys.argv[1] + "/"))
END
}
if complete; then
    say "using the environment in .venv"
else
    say "making .venv with $("$python" --version), installing parckpt, MPICH and scikit-learn into it"
    # Debian's Python comes without ensurepip; then the pip outside does the installing.
    if "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv --clear .venv
        pip=("$bin/python" -m pip)
    else
        "$python" -m venv --clear --without-pip .venv
        pip=("$python" -m pip --python "$bin/python")
    fi
    # Compiling all of scikit-learn and SciPy takes longer than installing it; `complete` compiles what is used.
    "${pip[@]}" install --quiet --disable-pip-version-check --no-compile --editable '.[mpich,demo]'
    complete || fail "the installation is not complete"
fi

# -- running and killing -----------------------------------------------------------------------------------------------

work=$(mktemp -d "${TMPDIR:-/tmp}/parckpt demo XXXXXX")  # with spaces, since they must not matter
job=""
# All ranks are on this machine, and they share its cores; inside a Slurm allocation as well.
export HYDRA_LAUNCHER=fork HYDRA_RMK=user HYDRA_IFACE=lo OPENBLAS_NUM_THREADS=1

# The launcher and each rank lead sessions of their own, so they are found by the mark in their environment.
kill_job() {
    local pids
    while pids=$(grep -lszxF "PARCKPT_DEMO_JOB=$job" /proc/[0-9]*/environ | cut -d/ -f3); [[ -n $pids ]]; do
        # shellcheck disable=SC2086  # one word per process
        kill -KILL $pids 2>/dev/null || true
    done
}

clean_up() {
    local status=$?
    [[ -z $job ]] || kill_job
    if [[ $status -eq 0 && -z ${KEEP:-} ]]; then
        rm -rf "$work"
    else
        printf '\nthe checkpoints and logs are in %s\n' "$work"
    fi
}
trap clean_up EXIT

# train <name> <ranks> [<step>]: run until the end, or kill all processes with SIGKILL as soon as this step was made.
# Sets `last` to the last step that was made.
train() {
    local name=$1 ranks=$2 stop=${3:-} line killed="" status=0 output
    job=$$.$RANDOM.$RANDOM
    last=0
    exec {output}< <(PARCKPT_DEMO_JOB=$job exec "$bin/mpiexec" -n "$ranks" "$bin/python" -m mpi4py \
        examples/digits/train.py --directory "$work/$name" </dev/null 2>&1)
    local launcher=$!
    while IFS= read -r -t 60 line <&"$output" || { status=$?; false; }; do
        printf '%s\n' "$line" >> "$work/$name.log"
        case $line in
            step\ *) last=${line#step } last=${last%% *} ;;
            *) printf '    %s\n' "${line//"$work/"/}" ;;
        esac
        if [[ -n $stop && -z $killed && $line == "step $stop "* ]]; then
            killed=1
            kill_job
        fi
    done
    kill_job  # nobody is left unless a minute has passed without a line
    exec {output}<&-
    [[ $status -le 128 ]] || fail "$name on $ranks ranks: no output for a minute"
    status=0
    wait "$launcher" || status=$?
    job=""
    if [[ -n $killed ]]; then
        printf '    killed with SIGKILL after step %s; the next save was due at step %d\n' "$last" $(((last / 20 + 1) * 20))
    elif [[ $status -ne 0 ]]; then
        fail "$name on $ranks ranks ended with status $status, see $work/$name.log"
    elif [[ -n $stop ]]; then
        fail "$name on $ranks ranks was done before it could be killed"
    fi
}

# -- the demonstration -------------------------------------------------------------------------------------------------

say "120 steps on 4 ranks, undisturbed: what the weights should be"
train undisturbed 4

say "the same on 4 ranks, killed between two saves"
train killed 4 50
"$bin/python" examples/digits/report.py saved "$work/killed" "$work/killed.log"

say "going on with 2 ranks, killed again"
train killed 2 90
"$bin/python" examples/digits/report.py saved "$work/killed" "$work/killed.log"

say "going on with 3 ranks, until the end"
train killed 3
"$bin/python" examples/digits/report.py saved "$work/killed" "$work/killed.log"

if "$bin/python" -c 'import parckpt.cli.main' 2>/dev/null; then
    say "what the command line says: parckpt ls, parckpt verify"
    "$bin/parckpt" ls "$work/killed"
    "$bin/parckpt" verify "$work/killed"
fi

say "is the run that was killed twice, and saved by 4, 2 and 3 ranks, the same as the undisturbed one?"
"$bin/python" examples/digits/report.py compare "$work/undisturbed" "$work/killed"
first=$(grep '^done' "$work/undisturbed.log") second=$(grep '^done' "$work/killed.log")
[[ $first == "$second" ]] || fail "they end with different words: '$first' and '$second'"
say "yes, in every bit; ${second#done: }"
