#!/bin/sh
# Mask R-CNN on MixMAE base: average precision of boxes and masks on COCO's validation images, and the detections.
#     sh exp/coco/eval.sh PARTITION|local|print GPUS DATA [further flags of exp/coco/mask_rcnn.py]
#
# DATA             as for finetune.sh
# GPUs             any number, 2 images each at a time; every image is evaluated exactly once
# Start            exp/coco/ckpt/checkpoint.pth, which finetune.sh writes (--finetune PATH: another file)
# Result           exp/coco/ckpt/detections.json, in COCO's result format; no number of ours or the paper's is known
# Origin           shorter side 800, longer at most 1333, recorded with the weights: Mask R-CNN's usual; the measures:
#                  pycocotools'
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/coco # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
launch exp/coco/mask_rcnn.py \
    --finetune "$here/ckpt/checkpoint.pth" \
    --eval --batch_size 2 --bad_boxes clip --ignore_exif --predictions "$here/ckpt/detections.json" \
    "$@"
