# shellcheck shell=sh
# How the demonstrations begin: exp/quickstart/run.sh, exp/trees/run.sh, exp/garments/run.sh and exp/ablations/run.sh
# source this file. Each is started by
#     sh exp/NAME/run.sh [--seed N] [output folder, default exp/NAME/result]
# and shows the comment at its top for --help.
#
# They have set
#   here     their folder
#   seeds    what they run with if no --seed is given
#   extras   packages that they need besides the requirements; may be missing
#   names    what --only chooses from, separated by blanks; if it is missing, there is no --only
#   check_settings  a function that refuses wrong settings before the work starts; may be missing
# and get, in the root of the repository and with its environment made,
#   seeds, output (a full path), python, start (seconds), only (the names that are chosen, in the order of names)
set -eu

refuse() {
    echo "$0: $*" >&2
    exit 2
}

output='' chosen=''
while [ $# -gt 0 ]; do
    case $1 in
    --seed)
        # shellcheck disable=SC2034 # for the demonstration
        seeds=${2:?--seed needs a number}
        shift 2
        ;;
    -h | --help)
        sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    -*)
        if [ "$1" != --only ] || [ -z "${names:-}" ]; then
            echo "usage: sh $0 [--seed N]${names:+ [--only NAME,NAME...]} [output folder] (--help: more)" >&2
            exit 2
        fi
        chosen="$chosen $(echo "${2:?--only needs names}" | tr , ' ')"
        shift 2
        ;;
    *)
        output=$1
        shift
        ;;
    esac
done
only=''
for name in ${names:-}; do
    case " ${chosen:-$names} " in *" $name "*) only="$only $name" ;; esac
done
for name in $chosen; do
    case " $only " in *" $name "*) ;; *) refuse "--only $name is not one of $names" ;; esac
done
[ -n "$only" ] || [ -z "$chosen" ] || refuse "--only needs names from $names"
if command -v check_settings >/dev/null; then check_settings; fi
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
    trap wait EXIT # also if what runs beside it fails
}

# Wait for it; if it fails, show the end of its log and exit.
wait_for_it() {
    wait "$other" || {
        tail "$log" >&2
        exit 1
    }
}
