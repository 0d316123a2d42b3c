# shellcheck shell=sh
# How every experiment is started. The recipes (exp/base_600ep/*.sh, ...) source this file and call `launch`; you type
#     sh exp/base_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags]
#
#   PARTITION  on this Slurm partition, one process per GPU by srun; inside salloc or sbatch, as a step of that job
#   local      on this machine, one process per GPU by torchrun; without a GPU, as many processes on the CPU
#   print      print the script and its flags, one per line, and start nothing
#
# Further flags are passed to the script (main_pretrain.py, exp/coco/mask_rcnn.py, ...) and override the recipe.
# The effective batch stays the recipe's for any GPUS: --accum_iter is computed from it, unless you give --accum_iter.
#
# As a batch job that is queued again after preemption and before its time limit, from the repository's root:
#     sbatch -p PARTITION -n 16 --ntasks-per-node=8 --gres=gpu:8 --cpus-per-task=12 --requeue --open-mode=append \
#         --signal=USR2@120 exp/base_600ep/pretrain.sh PARTITION 16 DATA
#
# Environment:
#   PYTHON           interpreter (default: .venv/bin/python of this repository if it exists, else python3)
#   GPUS_PER_NODE    processes per node, at most (default: 8)
#   CPUS_PER_TASK    CPUs per process, of which all but one load its images (default: the allocation's, else 12)
#   SRUN_ARGS        your site's options for srun, split at blanks: "--account=lab --qos=long --time=3-00:00:00"
#   EFFECTIVE_BATCH  images per optimizer step (default: the recipe's)
#   OMP_NUM_THREADS  threads per process (default: 1 on Slurm; locally, this machine's CPUs divided by GPUS)
set -eu

fail() {
    echo "$0: $1" >&2
    echo "usage: sh $0 PARTITION|local|print GPUS DATA [further flags]" >&2
    exit 2
}

check_positive() {
    case $2 in
    '' | *[!0-9]* | 0*) fail "$1 must be a positive number, not '$2'" ;;
    esac
}

[ $# -ge 3 ] || fail "PARTITION, GPUS and DATA are needed"
where=$1 gpus=$2 data=$3
shift 3 # the recipe passes on what is left: the further flags
check_positive GPUS "$gpus"

here=$(cd -- "$here" && pwd) # the recipe's folder
root=${here%/*/*}
if [ -z "${PYTHON:-}" ]; then
    PYTHON=$root/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
effective_batch='' # recipes that train set it

# launch MAIN [flags]: start MAIN, a path from the repository's root, where the user asked; the last of a repeated flag
# applies.
launch() {
    main=$1
    shift
    read_flags "$@"
    # A --dataset, such as hfds/food101, need not be a folder.
    [ "$where" = print ] || [ -e "$data" ] || [ -n "$dataset" ] ||
        fail "the data folder (or list of images) '$data' does not exist"
    if [ -n "$effective_batch" ] && [ -z "$accum_iter" ]; then
        compute_accum_iter "${EFFECTIVE_BATCH:-$effective_batch}"
        set -- --accum_iter "$accum_iter" "$@"
    fi
    set -- --data_path "$data" "$@"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # for scripts in folders
    case $where in
    print) printf '%s\n' "$main" "$@" ;;
    local) launch_locally "$@" ;;
    *) launch_on_slurm "$@" ;;
    esac
}

# Set batch_size, accum_iter and dataset to the values of the last of their flags; '' without one.
read_flags() {
    batch_size='' accum_iter='' dataset='' flag=''
    for argument in "$@"; do
        argument=$flag$argument flag=''
        case $argument in
        --batch_size | --accum_iter | --dataset) flag=$argument= ;; # its value is the next argument
        --batch_size=*) batch_size=${argument#*=} ;;
        --accum_iter=*) accum_iter=${argument#*=} ;;
        --dataset=*) dataset=${argument#*=} ;;
        esac
    done
}

compute_accum_iter() {
    check_positive EFFECTIVE_BATCH "$1"
    check_positive --batch_size "$batch_size"
    works=$batch_size # the largest --batch_size, not above the one given, that divides the effective batch
    while [ "$works" -gt 0 ] && [ $(($1 % (gpus * works))) -ne 0 ]; do works=$((works - 1)); done
    if [ "$works" -ne "$batch_size" ]; then
        advice="--batch_size $works works"
        [ "$works" -gt 0 ] || advice="take a number of GPUs that divides $1"
        fail "the effective batch $1 is not a multiple of $gpus GPUs x --batch_size $batch_size: $advice, \
or set EFFECTIVE_BATCH, or give --accum_iter"
    fi
    accum_iter=$(($1 / (gpus * batch_size)))
}

launch_locally() {
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$(($(getconf _NPROCESSORS_ONLN) / gpus))
        [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
    fi
    # Idle threads sleep: spinning, they would take the CPU from the other processes.
    export OMP_NUM_THREADS OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    if [ "$gpus" -eq 1 ]; then exec "$PYTHON" "$root/$main" "$@"; fi
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$gpus" "$root/$main" "$@"
}

launch_on_slurm() {
    command -v srun >/dev/null || fail "srun is not installed here, so there is no partition '$where': use 'local'"
    if [ -z "$(sinfo --noheader --partition "$where" --format %P 2>/dev/null)" ]; then
        known=$(sinfo --noheader --format %R) || fail "Slurm does not answer (its message is above): use 'local' to run here"
        fail "Slurm knows no partition '$where', only: $(echo "$known" | sort -u | tr '\n' ' ')"
    fi
    per_node=${GPUS_PER_NODE:-8}
    check_positive GPUS_PER_NODE "$per_node"
    [ "$gpus" -ge "$per_node" ] || per_node=$gpus
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # USR1 and USR2 ask a run to save and stop, but would kill a process that has not set its handlers yet:
    # they are blocked until it has (util/run/preemption.py).
    block='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
os.execvp(sys.argv[1], sys.argv[1:])'
    # shellcheck disable=SC2086 # SRUN_ARGS is split at blanks on purpose
    exec srun --partition="$where" --ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-12}}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "$PYTHON" -c "$block" "$PYTHON" -u "$root/$main" "$@"
}
