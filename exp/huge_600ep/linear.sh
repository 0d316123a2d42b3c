#!/bin/sh
# MixMAE huge: linear probe on ImageNet-1K at 224 x 224 (only the head is trained).
#     sh exp/huge_600ep/linear.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             8 x 128 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  2048, so lr = 1e-3 * 2048 / 256 = 8e-3
# Epochs           90, the first 10 of them warm-up
# Start            exp/huge_600ep/ckpt/checkpoint.pth, which pretrain.sh writes (--finetune PATH: another file)
# Result           exp/huge_600ep/ckpt_linear/checkpoint.pth; no number was published
# Origin           ours: neither the paper nor the authors' code has one (--ignore_exif: like their data loader)
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/huge_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=2048 launch main_finetune.py \
    --model swin_huge_w14 --input_size 224 --in_chans 3 --nb_classes 1000 --ignore_exif \
    --finetune "$here/ckpt/checkpoint.pth" --freeze_encoder \
    --batch_size 128 --epochs 90 --warmup_epochs 10 \
    --blr 1e-3 --min_lr 0 --layer_decay 1.0 --weight_decay 0 --drop_path 0 \
    --aa '' --reprob 0 --mixup 0 --cutmix 0 --smoothing 0 \
    --output_dir "$here/ckpt_linear" --resume auto \
    "$@"
