#!/bin/sh
# Find trees in aerial photographs, with and without pretraining, on a CPU: one encoder is pretrained, and two detectors are
# trained with each of three seeds, from it and from scratch.
#     sh exp/trees/run.sh [--seeds "0 1 2"] [output folder, default exp/trees/result]
#
# Data      122 tiles of five photographs, included in the repository (exp/trees/README.md)
# Time      about 15 minutes on 2 idle CPU cores (estimated); the first run also installs the requirements into .venv
# Resuming  with the same output folder, a run that was stopped continues
set -eu

seeds='0 1 2' output=''
while [ $# -gt 0 ]; do
    case $1 in
    --seeds)
        seeds=${2:?--seeds needs numbers}
        shift 2
        ;;
    -*)
        echo "usage: sh $0 [--seeds \"0 1 2\"] [output folder]" >&2
        exit 2
        ;;
    *)
        output=$1
        shift
        ;;
    esac
done
here=$(cd -- "$(dirname -- "$0")" && pwd)
mkdir -p "${output:=$here/result}"
output=$(cd -- "$output" && pwd)
cd -- "$here/../.."
sh exp/setup.sh pycocotools
python=.venv/bin/python
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # idle threads should not spin while others need the CPU

step() { printf '\n=== %s\n' "$1"; }

# What both programs are given; mean and standard deviation are those of the tiles.
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

start=$(date +%s)
seed=0
step "Pretraining on all tiles, without labels"
common 2 pretrained_encoder main_pretrain.py --data_path exp/trees/tiles/images --model mixmae_quickstart \
    --batch_size 30 --epochs 300 --warmup_epochs 20 --lr 2e-3 --num_workers 1 --vis_every 100
for seed in $seeds; do
    step "Seed $seed: training detectors, from the pretrained encoder and from scratch, both at once"
    detect "scratch_$seed" >"$output/scratch_$seed.txt" 2>&1 &
    scratch=$!
    trap 'kill "$scratch" 2>/dev/null || :' EXIT # if the other fails
    detect "pretrained_$seed" --finetune "$output/pretrained_encoder/checkpoint.pth"
    wait "$scratch" || {
        tail "$output/scratch_$seed.txt" >&2
        exit 1
    }
done

step "Results on the held-out tiles, after $(($(date +%s) - start)) seconds"
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
