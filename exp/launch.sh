#!/bin/sh
# The launching logic of every experiment: exp/*_600ep/*.sh run
#     EFFECTIVE_BATCH=2048 sh exp/launch.sh SCRIPT MAIN [flags of the recipe] -- "$@"
# where "$@" is what their user typed:
#     sh exp/base_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags of the main; the last one wins]
#
#   PARTITION  one process per GPU by srun on this Slurm partition; inside an allocation (salloc, sbatch) as a step of it
#   local      one process per GPU on this machine by torchrun; without a GPU, that many processes on the CPU
#   print      print the main and its flags, one per line, and start nothing
#
# As a batch job that is queued again before its time limit and after a preemption, from the repository's root:
#     sbatch -p PARTITION -n 16 --ntasks-per-node=8 --gres=gpu:8 --cpus-per-task=8 --requeue --open-mode=append \
#         --signal=USR2@120 exp/base_600ep/pretrain.sh PARTITION 16 DATA
#
# The effective batch stays the recipe's whatever GPUS is: --accum_iter is computed from it, unless you give --accum_iter.
#
# Environment:
#   PYTHON           interpreter (default: .venv/bin/python of this repository if it is there, else python3)
#   GPUS_PER_NODE    at most so many processes on a node (default: 8)
#   CPUS_PER_TASK    CPUs of each process (default: the allocation's, else 8)
#   SRUN_ARGS        site options for srun, split at blanks: "--account=lab --qos=long --time=3-00:00:00"
#   EFFECTIVE_BATCH  images per optimizer step (default: the recipe's)
#   OMP_NUM_THREADS  threads of each process (default: 1 on Slurm, else this machine's CPUs shared out)
set -eu

script=$1 main=$2
shift 2

fail() {
    echo "$script: $1" >&2
    echo "usage: sh $script PARTITION|local|print GPUS DATA [further flags of $main]" >&2
    exit 2
}

root=$(cd -- "$(dirname -- "$0")/.." && pwd)
if [ -z "${PYTHON:-}" ]; then
    if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=python3; fi
fi

# The arguments are: recipe... -- PARTITION GPUS DATA flags...  Rotate them until only "recipe... flags..." is left.
recipe_count=0
for argument in "$@"; do
    [ "$argument" = -- ] && break
    recipe_count=$((recipe_count + 1))
done
i=0
while [ "$i" -lt "$recipe_count" ]; do
    first=$1
    shift
    set -- "$@" "$first"
    i=$((i + 1))
done
shift # --
[ $(($# - recipe_count)) -ge 3 ] || fail "PARTITION, GPUS and DATA are needed"
where=$1 gpus=$2 data=$3
shift 3
i=$(($# - recipe_count))
while [ "$i" -gt 0 ]; do
    first=$1
    shift
    set -- "$@" "$first"
    i=$((i - 1))
done

case $gpus in
'' | *[!0-9]* | 0*) fail "GPUS must be a positive number, not '$gpus'" ;;
esac

# What the last of the repeated flags says.
batch_size='' accum_iter='' dataset='' previous=''
for argument in "$@"; do
    case $previous in
    --batch_size) batch_size=$argument ;;
    --accum_iter) accum_iter=$argument ;;
    --dataset) dataset=$argument ;;
    esac
    case $argument in
    --batch_size=*) batch_size=${argument#*=} ;;
    --accum_iter=*) accum_iter=${argument#*=} ;;
    --dataset=*) dataset=${argument#*=} ;;
    esac
    previous=$argument
done

# A named --dataset may live elsewhere than in a folder.
[ -e "$data" ] || [ -n "$dataset" ] || fail "the data folder (or list of images) '$data' does not exist"

if [ -n "${EFFECTIVE_BATCH:-}" ] && [ -z "$accum_iter" ]; then
    case $batch_size$EFFECTIVE_BATCH in
    '' | *[!0-9]*) fail "--batch_size '$batch_size' and EFFECTIVE_BATCH '$EFFECTIVE_BATCH' must be positive numbers" ;;
    esac
    [ "$batch_size" -gt 0 ] || fail "--batch_size must be a positive number, not '$batch_size'"
    if [ $((EFFECTIVE_BATCH % (gpus * batch_size))) -ne 0 ]; then
        works=$batch_size
        while [ "$works" -gt 0 ] && [ $((EFFECTIVE_BATCH % (gpus * works))) -ne 0 ]; do works=$((works - 1)); done
        if [ "$works" -gt 0 ]; then
            advice="--batch_size $works works"
        else
            advice="take a number of GPUs that divides $EFFECTIVE_BATCH"
        fi
        fail "the effective batch $EFFECTIVE_BATCH is not a multiple of $gpus GPUs x --batch_size $batch_size: \
$advice, or set EFFECTIVE_BATCH, or give --accum_iter"
    fi
    set -- --accum_iter "$((EFFECTIVE_BATCH / (gpus * batch_size)))" "$@"
fi
set -- --data_path "$data" "$@"

case $where in
print)
    printf '%s\n' "$main" "$@"
    ;;
local)
    if [ -z "${OMP_NUM_THREADS:-}" ]; then
        OMP_NUM_THREADS=$(($(getconf _NPROCESSORS_ONLN) / gpus))
        [ "$OMP_NUM_THREADS" -gt 0 ] || OMP_NUM_THREADS=1
    fi
    # Idle threads sleep: spinning, they take the CPU from the other processes here.
    export OMP_NUM_THREADS OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
    if [ "$gpus" -eq 1 ]; then exec "$PYTHON" "$root/$main" "$@"; fi
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "$gpus" "$root/$main" "$@"
    ;;
*)
    command -v srun >/dev/null || fail "srun is not installed here, so there is no partition '$where': use 'local'"
    if [ -z "$(sinfo --noheader --partition "$where" --format %P 2>/dev/null)" ]; then
        fail "Slurm knows no partition '$where', only: $(sinfo --noheader --format %R | sort -u | tr '\n' ' ')"
    fi
    per_node=${GPUS_PER_NODE:-8}
    case $per_node in
    '' | *[!0-9]* | 0) fail "GPUS_PER_NODE must be a positive number, not '$per_node'" ;;
    esac
    [ "$gpus" -ge "$per_node" ] || per_node=$gpus
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    # USR1 and USR2 ask to save and stop, but would end a process that has not got its handlers yet: hold them back until
    # then (util/preemption.py). SRUN_ARGS is split at blanks on purpose.
    hold='import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGUSR2])
os.execvp(sys.argv[1], sys.argv[1:])'
    # shellcheck disable=SC2086
    exec srun --partition="$where" --ntasks="$gpus" --ntasks-per-node="$per_node" --gres="gpu:$per_node" \
        --cpus-per-task="${CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-8}}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
        "$PYTHON" -c "$hold" "$PYTHON" -u "$root/$main" "$@"
    ;;
esac
