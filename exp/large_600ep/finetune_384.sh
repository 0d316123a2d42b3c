#!/bin/sh
# MixMAE large: fine-tuning on ImageNet-1K at 384 x 384, from the classifier fine-tuned at 224.
#     sh exp/large_600ep/finetune_384.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             32 x 16 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  512, so lr = 5e-5 * 512 / 256 = 1e-4
# Epochs           30, the first 2 of them warm-up
# Start            exp/large_600ep/ckpt_finetune/checkpoint.pth, which finetune.sh writes
#                  (--finetune large_600ep_ft: the authors' published weights; --finetune PATH: another file)
# Result           exp/large_600ep/ckpt_finetune_384/checkpoint.pth; 86.9% top-1 in the paper, whose recipe for 384
#                  was not published: these values may not reach it
# Origin           ours, except augmentation, weight decay and --ignore_exif: the authors' code for base at 224
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/large_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=512 launch main_finetune.py \
    --model swin_large_w16_384 --input_size 384 --in_chans 3 --nb_classes 1000 --ignore_exif \
    --finetune "$here/ckpt_finetune/checkpoint.pth" \
    --batch_size 16 --epochs 30 --warmup_epochs 2 \
    --blr 5e-5 --min_lr 1e-6 --layer_decay 0.75 --weight_decay 0.05 --drop_path 0.3 \
    --aa rand-m9-mstd0.5-inc1 --reprob 0.25 --remode pixel --recount 1 \
    --mixup 0.8 --cutmix 1.0 --smoothing 0.1 \
    --output_dir "$here/ckpt_finetune_384" --resume auto \
    "$@"
