#!/bin/sh
# Mask R-CNN with a feature pyramid on MixMAE base: fine-tuning on COCO, boxes and masks.
#     sh exp/coco/finetune.sh PARTITION|local|print GPUS DATA [further flags of exp/coco/mask_rcnn.py]
#
# DATA             a folder with annotations/instances_train2017.json and instances_val2017.json, train2017/, val2017/;
#                  or any other in COCO's format (util/data/coco.py)
# GPUs             8 x 2 images; for another number, exp/launch.sh sets --accum_iter
# Effective batch  16, so lr = 1.6e-3 * 16 / 256 = 1e-4
# Epochs           12, the first 0.07 of them warm-up; the rate is divided by 10 after 8 and after 11
# Start            exp/base_600ep/ckpt/checkpoint.pth, which pretrain.sh writes
#                  (--finetune base_600ep: the authors' published weights; --finetune PATH: another file)
# Result           exp/coco/ckpt/checkpoint.pth; not run, so no number of ours is known, and none of the paper's is quoted
# Origin           The authors published no recipe for COCO. From Mask R-CNN's usual 1x schedule: 16 images a step, 12
#                  epochs, steps at 8 and 11, shorter side 800, longer at most 1333. As usual for Swin in it: AdamW,
#                  lr 1e-4, weight decay 0.05, 500 steps of warm-up (of 7,392 in an epoch), shorter sides of 480
#                  to 800 in training. The detector's own settings: torchvision's. Ours: layer decay, drop path,
#                  --bad_boxes clip (a few of COCO's boxes have no area). --ignore_exif: COCO annotates stored pixels
here=$(dirname -- "$0") && [ -f "$here/../launch.sh" ] || here=exp/coco # sbatch runs a copy of this file
. "$here/../launch.sh" # takes PARTITION, GPUS and DATA
effective_batch=16 launch exp/coco/mask_rcnn.py \
    --model swin_base_w14 --in_chans 3 --detector mask_rcnn --bad_boxes clip --ignore_exif \
    --finetune "$root/exp/base_600ep/ckpt/checkpoint.pth" \
    --min_size 480 512 544 576 608 640 672 704 736 768 800 --max_size 1333 \
    --batch_size 2 --epochs 12 --warmup_epochs 0.07 --lr_steps 8 11 \
    --blr 1.6e-3 --layer_decay 0.8 --weight_decay 0.05 --drop_path 0.2 \
    --output_dir "$here/ckpt" --resume auto \
    "$@"
