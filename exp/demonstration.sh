# shellcheck shell=sh
# How the demonstrations begin: exp/quickstart/run.sh, exp/trees/run.sh, exp/garments/run.sh and exp/ablations/run.sh
# source this file. Each is started by
#     sh exp/NAME/run.sh [--seed N] [output folder, default exp/NAME/result]
#
# They have set
#   here     their folder
#   seeds    what they run with where no --seed is given
#   extras   packages that they need besides the requirements; may be missing
# and get, in the root of the repository and with its environment made,
#   seeds, output (a full path), python, start (seconds)
set -eu

output=''
while [ $# -gt 0 ]; do
    case $1 in
    --seed)
        # shellcheck disable=SC2034 # for the demonstration
        seeds=${2:?--seed needs a number}
        shift 2
        ;;
    -*)
        echo "usage: sh $0 [--seed N] [output folder]" >&2
        exit 2
        ;;
    *)
        output=$1
        shift
        ;;
    esac
done
mkdir -p "${output:=$here/result}"
output=$(cd -- "$output" && pwd)
cd -- "$here/../.."
sh exp/setup.sh ${extras:+"$extras"}
# shellcheck disable=SC2034 # for the demonstration
python=.venv/bin/python
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # idle threads should not spin while others need the CPU
start=$(date +%s)

step() { printf '\n=== %s\n' "$1"; }

seconds() { echo $(($(date +%s) - start)); }

# beside LOG COMMAND...: start a command in the background, with its output in LOG.
beside() {
    log=$1
    shift
    "$@" >"$log" 2>&1 &
    other=$!
    trap wait EXIT # also where what runs beside it fails
}

# Wait for it; where it fails, show the end of its log, and end.
wait_for_it() {
    wait "$other" || {
        tail "$log" >&2
        exit 1
    }
}
