#!/bin/sh
# MixMAE base: mIoU and pixel accuracy of UPerNet on ADE20K's 2,000 validation images.
#     sh exp/ade20k/eval.sh PARTITION|local|print GPUS DATA [further flags of exp/ade20k/upernet.py]
#
# DATA             ADEChallengeData2016, with images/ and annotations/ in it
# GPUs             any number, one image each at a time; every pixel is counted exactly once
# Start            exp/ade20k/ckpt_finetune/checkpoint.pth, which finetune.sh writes (--finetune PATH: another file)
# Result           not measured by us
# Origin           short side of 512 pixels, windows of 512 x 512 two thirds apart, label maps at their own sizes: usual
#                  for UPerNet on ADE20K
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/ade20k # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
launch exp/ade20k/upernet.py \
    --finetune "$here/ckpt_finetune/checkpoint.pth" --ignore_exif \
    --eval --slide \
    "$@"
