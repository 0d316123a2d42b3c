#!/bin/sh
# MixMAE large: pretraining on ImageNet-1K at 224 x 224, without labels.
#     sh exp/large_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags of main_pretrain.py]
#
# GPUs             32 x 64 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  2048, so lr = 1.5e-4 * 2048 / 256 = 1.2e-3
# Epochs           600, the first 40 of them warm-up
# Start            random weights
# Result           exp/large_600ep/ckpt/checkpoint.pth; fine-tuned, 85.9% top-1 in the paper
# Origin           ours: the base recipe (the authors' script) with another model, split into 32 x 64;
#                  no recipe for this size was published
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/large_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=2048 launch main_pretrain.py \
    --model mixmae_large --input_size 224 --in_chans 3 --ignore_exif \
    --mask_ratio 0.5 --norm_pix_loss \
    --batch_size 64 --epochs 600 --warmup_epochs 40 \
    --blr 1.5e-4 --min_lr 0 --weight_decay 0.05 \
    --output_dir "$here/ckpt" --resume auto \
    "$@"
