#!/bin/sh
# The variants of the method beside each other: pretrain a small encoder with each, and measure what it learned.
#     sh exp/ablations/run.sh [--seed N] [output folder, default exp/ablations/result]
#
# Data      the quickstart's 10,000 images; or DATA=/path/to/folder with train/ and val/, with what both programs need
#           for it in FLAGS ('--in_chans 3 --input_size 64 --patch_size 2'; blanks divide)
# Budget    the quickstart's, for every variant: 4 epochs without labels (1,000 steps of 32 images; with 3 images in a
#           mixture 968 of 33), then 15 epochs of at most 500 labels (150 steps of 50)
# Seeds     0, 1 and 2 one after another; with --seed that one alone
# Time      see exp/ablations/README.md; the first run also installs the requirements into .venv
# Resuming  with the same output folder, a run that was stopped continues
# Result    table.md and plot.png in the output folder
seeds='0 1 2'
here=$(cd -- "$(dirname -- "$0")" && pwd)
. "$here/../demonstration.sh" # takes the arguments; sets output, python and more
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # two variants at a time

if [ -z "${DATA:-}" ]; then
    sh exp/quickstart/unpack.sh
    DATA=exp/quickstart/data FLAGS='--in_chans 1 --mean 0.219 --std 0.332'
fi
data=$(cd -- "$DATA" && pwd)
classes=$(find -L "$data/train" -mindepth 1 -maxdepth 1 -type d | wc -l)
if [ "$classes" -lt 2 ] || [ "$classes" -gt 500 ]; then
    echo "$0: 2 to 500 folders of classes are needed in $data/train, there are $classes" >&2
    exit 2
fi
rm -rf "$output/labelled"
for class in "$data"/train/*/; do
    name=$(basename -- "$class")
    mkdir -p "$output/labelled/train/$name"
    find -L "$class" -maxdepth 1 -type f | LC_ALL=C sort | head -n $((500 / classes)) |
        while read -r file; do ln -s "$file" "$output/labelled/train/$name/"; done
done
ln -s "$data/val" "$output/labelled/val"

# Show the end of a variant's output, and stop.
failed() {
    tail "$1" >&2
    exit 1
}

# variant NAME [flags]: one line of the table. Two processes share the lines, each takes every second one.
variant() {
    name=$1 folder=$output/$1/seed$seed line=$((line + 1))
    shift
    if [ $((line % 2)) -ne "$worker" ] || [ -e "$folder/done" ]; then return; fi
    mkdir -p "$folder"
    echo "$name, seed $seed"
    # shellcheck disable=SC2086 # FLAGS is divided at blanks
    $python main_pretrain.py --data_path "$data" --output_dir "$folder/pretrain" --model mixmae_quickstart \
        --batch_size 32 --epochs 4 --warmup_epochs 0.5 --lr 2e-3 --knn_every 4 --probe_every 4 --vis_every 4 \
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
    worker=$1
    for seed in $seeds; do
        line=0
        variant paper
        variant random --lr 0 --epochs 1 # fine-tuned, it is supervised training from scratch
        variant mix_embed --mix_embed
        variant mix_embed_unmasked --mix_embed --no_masked_attn
        variant unmasked --no_masked_attn
        variant single --reconstruct single
        variant fill_mask_token --fill mask_token --no_masked_attn
        variant fill_zero --fill zero --no_masked_attn
        variant fill_noise --fill noise --no_masked_attn
        variant ratio_25 --mask_ratio 0.25
        variant ratio_75 --mask_ratio 0.75
        variant ratio_varied --range_mask_ratio 0.25
        variant mask_per_pair --mask_per_pair
        variant partners_cycle --partners cycle
        variant images_3 --mix_images 3 --mask_ratio 0.67 --batch_size 33
        variant images_4 --mix_images 4 --mask_ratio 0.75
        variant decoder_deep --decoder_depth 4
        variant decoder_narrow --decoder_dim 32
        variant plain_pixels --no-norm_pix_loss
    done
}

step "Pretraining and measuring every variant, two at a time"
beside "$output/second.txt" matrix 1
matrix 0
wait_for_it

step "Results after $(seconds) seconds"
# shellcheck disable=SC2086 # one argument for each seed
$python -m exp.ablations.table --runs "$output" --seeds $seeds
