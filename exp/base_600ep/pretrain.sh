#!/bin/sh
# MixMAE base: pretraining on ImageNet-1K at 224 x 224, without labels.
#     sh exp/base_600ep/pretrain.sh PARTITION|local|print GPUS DATA [further flags of main_pretrain.py]
#
# GPUs             16 x 128 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  2048, so lr = 1.5e-4 * 2048 / 256 = 1.2e-3
# Epochs           600, the first 40 of them warm-up
# Start            random weights
# Result           exp/base_600ep/ckpt/checkpoint.pth; fine-tuned, 85.1% top-1 in the paper
# Origin           every value: the authors' script; 600 epochs and mask ratio 0.5 are also in the paper;
#                  --ignore_exif: like their data loader. Only the precision differs: bf16 by default,
#                  theirs fp16 with a loss scaler (--precision fp16)
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/base_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=2048 launch main_pretrain.py \
    --model mixmae_base --input_size 224 --in_chans 3 --ignore_exif \
    --mask_ratio 0.5 --norm_pix_loss \
    --batch_size 128 --epochs 600 --warmup_epochs 40 \
    --blr 1.5e-4 --min_lr 0 --weight_decay 0.05 \
    --output_dir "$here/ckpt" --resume auto \
    "$@"
