#!/bin/sh
# MixMAE base: top-1 and top-5 of the fine-tuned classifier on ImageNet-1K's validation set at 224 x 224.
#     sh exp/base_600ep/eval.sh PARTITION|local|print GPUS DATA [further flags of main_finetune.py]
#
# GPUs             any number, 128 images each at a time; every image is evaluated exactly once
# Start            exp/base_600ep/ckpt_finetune/checkpoint.pth, which finetune.sh writes
#                  (--finetune base_600ep_ft: the authors' published weights; --finetune PATH: another file)
# Result           85.1% top-1 in the paper
# Origin           resize to 256 (bicubic), centre crop of 224, --ignore_exif: the authors' code.
#                  Only the precision differs: bf16 by default, theirs fp16 (--precision fp16)
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/base_600ep # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
launch main_finetune.py \
    --model swin_base_w14 --input_size 224 --in_chans 3 --nb_classes 1000 --ignore_exif \
    --finetune "$here/ckpt_finetune/checkpoint.pth" \
    --eval --batch_size 128 \
    "$@"
