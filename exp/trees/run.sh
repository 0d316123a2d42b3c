#!/bin/sh
# Find trees in aerial photographs, with and without pretraining, on a CPU: one encoder is pretrained, and two detectors
# are trained with each of three seeds, from it and from scratch.
#     sh exp/trees/run.sh [--seed N] [output folder, default exp/trees/result]
#
# Data      122 tiles of five photographs, included in the repository (exp/trees/README.md)
# Time      about 15 minutes on 2 idle CPU cores; the first run also installs the requirements into .venv
# Seeds     0, 1 and 2 one after another; with --seed, only that one
# Resuming  with the same output folder, a run that was stopped continues
seeds='0 1 2' extras=pycocotools
here=$(cd -- "$(dirname -- "$0")" && pwd)
. "$here/../demonstration.sh" # takes the arguments; sets output, python and more

# Flags of both programs; mean and standard deviation are those of the tiles.
common() {
    threads=$1 folder=$2
    shift 2
    OMP_NUM_THREADS=$threads $python "$@" --output_dir "$output/$folder" --seed "$seed" --resume auto \
        --patch_size 4 --input_size 128 --mean 0.518 0.571 0.479 --std 0.229 0.213 0.161 \
        --keep_checkpoints 1 --save_every 10 --print_freq 50
}
# The same budget with and without pretraining.
detect() {
    folder=$1
    shift
    common 1 "$folder" -m exp.coco.mask_rcnn --data_path exp/trees/tiles --model swin_quickstart \
        --detector faster_rcnn --head_channels 32 --sampled_boxes 64 --min_size 192 --batch_size 4 --epochs 20 \
        --warmup_epochs 1 --lr 1e-3 --layer_decay 1 --drop_path 0 --num_workers 0 --eval_every 10 "$@"
}

seed=0
step "Pretraining on all tiles, without labels"
common 2 pretrained_encoder main_pretrain.py --data_path exp/trees/tiles/images --model mixmae_quickstart \
    --batch_size 30 --epochs 300 --warmup_epochs 20 --lr 2e-3 --num_workers 1 --vis_every 100
for seed in $seeds; do
    step "Seed $seed: training detectors, from the pretrained encoder and from scratch, both at once"
    beside "$output/scratch_$seed.txt" detect "scratch_$seed"
    detect "pretrained_$seed" --finetune "$output/pretrained_encoder/checkpoint.pth"
    wait_for_it
done

step "Results on the held-out tiles, after $(seconds) seconds"
$python - "$output" "$seeds" <<'END'
import json, pathlib, shutil, sys

folder, seeds = pathlib.Path(sys.argv[1]), sys.argv[2].split()
print("AP50 of boxes      pretrained   from scratch")
for seed in seeds:
    logs = [(folder / f"{name}_{seed}" / "log.txt").read_text().splitlines() for name in ("pretrained", "scratch")]
    print("seed {}           {:10.1f}%   {:10.1f}%".format(seed, *(json.loads(log[-1])["test_box_AP50"] for log in logs)))
shutil.copy(max((folder / f"pretrained_{seeds[0]}" / "detections").glob("*.png")), folder / "detections.png")
print(f"\nLook at {folder}/detections.png. Logs and checkpoints are in {folder}.")
END
