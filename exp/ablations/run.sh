#!/bin/sh
# The variants of the method side by side: pretrain a small encoder with each, and measure what it learned.
#     sh exp/ablations/run.sh [--seed N] [--only NAME,NAME...] [output folder, default exp/ablations/result]
#
# Data      the quickstart's 10,000 images; or DATA=/path/to/folder with train/CLASS/ and val/CLASS/, with the
#           flags that both programs need in FLAGS ('--in_chans 3 --input_size 64 --patch_size 2', split at blanks)
# Budget    the quickstart's, for every variant: 4 epochs without labels (1,000 steps of 32 images; with 3 images in a
#           mixture 968 of 33), or EPOCHS=N; then 15 epochs on at most 500 labels (150 steps of 50)
# Variants  all; with --only those that are named (an unknown name shows the list)
# Seeds     0, 1 and 2 one after another; with --seed, only that one
# Time      per variant and seed, 5 to 7 minutes of one core for 1,000 steps and fine-tuning. Steps are EPOCHS x images
#           in train/ / 32, of 32 x 32 patches an image (64 pixels / patches of 2, as above); more patches take longer.
#           Two variants run at a time. The first run also installs the requirements into .venv
# Resuming  with the same output folder, a run that was stopped continues
# Result    table.md and plot.png in the output folder, of all runs that are complete there
seeds='0 1 2'
here=$(cd -- "$(dirname -- "$0")" && pwd)

# count_classes SET: the number of its class folders in DATA.
count_classes() { find -L "$DATA/$1" -mindepth 1 -maxdepth 1 -type d 2>/dev/null | wc -l; }

EPOCHS=${EPOCHS:-4} # of pretraining
check_settings() {
    case $EPOCHS in
    0* | *[!0-9]*) refuse "EPOCHS=$EPOCHS must be a whole number of epochs of pretraining, from 1" ;;
    esac
    if [ -n "${DATA:-}" ]; then # before the work starts
        [ -d "$DATA" ] || refuse "DATA=$DATA is not a folder; one with train/CLASS/ and val/CLASS/ is needed"
        for set in train val; do
            [ "$(count_classes $set)" -gt 0 ] ||
                refuse "DATA=$DATA has no class folders in $set/; train/CLASS/ and val/CLASS/ are needed"
        done
        if [ "$(count_classes train)" -lt 2 ] || [ "$(count_classes train)" -gt 500 ]; then
            refuse "DATA=$DATA has $(($(count_classes train))) class folders in train/; 2 to 500 are needed"
        fi
        DATA=$(cd -- "$DATA" && pwd)
    fi
}

names=$(sed -n 's/^ *variant \([a-z_0-9]*\).*/\1/p' "$here/run.sh" | tr '\n' ' ') # the lines of matrix, below
names=${names% }
. "$here/../demonstration.sh" # takes the arguments; sets output, python and more
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two variants at a time

budget="EPOCHS=$EPOCHS DATA='${DATA:-}' FLAGS='${FLAGS:-}'"
set -- "$output"/*/seed*/done
if [ -e "$1" ] && [ -e "$output/budget" ] && [ "$budget" != "$(cat "$output/budget")" ]; then
    refuse "$output has runs with $(cat "$output/budget"), this is $budget: give another output folder"
fi
printf '%s\n' "$budget" >"$output/budget"
if [ -z "${DATA:-}" ]; then
    sh exp/quickstart/unpack.sh
    DATA=$PWD/exp/quickstart/data FLAGS="--in_chans 1 --mean 0.219 --std 0.332 ${FLAGS:-}"
fi
data=$DATA classes=$(count_classes train)
rm -rf "$output/labelled"
for class in "$data"/train/*/; do
    name=$(basename -- "$class")
    mkdir -p "$output/labelled/train/$name"
    find -L "$class" -maxdepth 1 -type f | LC_ALL=C sort | head -n $((500 / classes)) |
        while read -r file; do ln -s "$file" "$output/labelled/train/$name/"; done
done
ln -s "$data/val" "$output/labelled/val"

# Report that a variant failed, show the end of its output, and stop; the other process starts no further variant.
failed() {
    touch "$output/stopped"
    echo "$name, seed $seed, failed" >&3
    tail "$1" >&2
    exit 1
}

# variant NAME [flags]: one line of the table. Two processes share the lines, each taking every second one.
variant() {
    name=$1 folder=$output/$1/seed$seed
    shift
    case " $only " in *" $name "*) line=$((line + 1)) ;; *) return ;; esac
    if [ $((line % 2)) -ne "$worker" ] || [ -e "$folder/done" ] || [ -e "$output/stopped" ]; then return; fi
    mkdir -p "$folder"
    echo "$line of $runs: $name, seed $seed (output in $folder/output.txt)" >&3
    # shellcheck disable=SC2086 # FLAGS is split at blanks
    $python main_pretrain.py --data_path "$data" --output_dir "$folder/pretrain" --model mixmae_quickstart \
        --batch_size 32 --epochs "$EPOCHS" --warmup_epochs 0.5 --lr 2e-3 \
        --knn_every "$EPOCHS" --probe_every "$EPOCHS" --vis_every "$EPOCHS" \
        --num_workers 0 --keep_checkpoints 1 --resume auto --seed "$seed" ${FLAGS:-} "$@" \
        >>"$folder/output.txt" 2>&1 || failed "$folder/output.txt"
    # shellcheck disable=SC2086
    $python main_finetune.py --data_path "$output/labelled" --output_dir "$folder/finetune" \
        --finetune "$folder/pretrain/checkpoint.pth" --model swin_quickstart \
        --batch_size 50 --epochs 15 --warmup_epochs 1 --lr 2e-3 --layer_decay 1 --drop_path 0 --aa '' --reprob 0 \
        --eval_every 15 --num_workers 0 --keep_checkpoints 1 --resume auto --seed "$seed" ${FLAGS:-} \
        >>"$folder/output.txt" 2>&1 || failed "$folder/output.txt"
    touch "$folder/done"
}

# In the order of the table.
matrix() {
    worker=$1 line=0
    for seed in $seeds; do
        variant paper
        variant random --lr 0 --epochs 1 # fine-tuned, it is supervised training from scratch
        variant mix_embed --mix_embed
        variant mix_embed_unmasked --mix_embed --no_masked_attn
        variant unmasked --no_masked_attn
        variant partners_cycle --partners cycle --no_masked_attn # with masked attention, partners cannot matter
        variant single --reconstruct single
        variant single_unmasked --reconstruct single --no_masked_attn # like the fillings, which also see all tokens
        variant fill_mask_token --fill mask_token --no_masked_attn
        variant fill_zero --fill zero --no_masked_attn
        variant fill_noise --fill noise --no_masked_attn
        variant ratio_25 --mask_ratio 0.25
        variant ratio_75 --mask_ratio 0.75
        variant ratio_varied --range_mask_ratio 0.25
        variant mask_per_pair --mask_per_pair
        variant images_3 --mix_images 3 --mask_ratio 0.67 --batch_size 33
        variant images_4 --mix_images 4 --mask_ratio 0.75
        variant decoder_deep --decoder_depth 4
        variant decoder_narrow --decoder_dim 32
        variant plain_pixels --no-norm_pix_loss
    done
}

rm -f "$output/stopped"
trap 'touch "$output/stopped"; wait; exit 130' INT TERM
exec 3>&1 # where both processes announce what they start
runs=$(($(echo "$only" | wc -w) * $(echo "$seeds" | wc -w)))
images=$(find -L "$data/train" -mindepth 2 -type f | wc -l)
step "Pretraining and measuring two at a time: $runs runs, each of about $((EPOCHS * images / 32)) steps and fine-tuning"
beside "$output/second.txt" matrix 0
matrix 1
wait_for_it

step "Results after $(seconds) seconds"
# shellcheck disable=SC2086 # one argument for each seed
$python -m exp.ablations.table --runs "$output" --seeds $seeds
