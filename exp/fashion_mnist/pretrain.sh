#!/bin/sh
# Fashion-MNIST: what a normal run looks like (exp/README.md, "Is my loss normal?").
#     sh exp/fashion_mnist/pretrain.sh [output folder, default exp/fashion_mnist/result]
#
# Data      Fashion-MNIST's four files from the folder $FASHION_MNIST, else from Debian's package dataset-fashion-mnist,
#           installed or fetched with apt-get (31 MB); https://github.com/zalandoresearch/fashion-mnist has them too.
#           For training the first 2,000 images of each class (PER_CLASS=6000: all), for validation all 10,000, with a
#           border of 2 black pixels as in exp/quickstart
# Settings  those that main_pretrain.py chooses by itself, except epochs, and mean and std of the training images
# Time      200,000 images: some 30 minutes at the 120 images/s of one core, without other work beside it
# Result    OUTPUT/report.html, and OUTPUT/fashion_mnist.json, which is kept as figures/reference/fashion_mnist.json
# Resuming  with the same output folder, a run that was stopped continues
# PYTHON    the interpreter (default: that of .venv, which is created if it is missing)
set -eu

output=${1:-}
here=$(cd -- "$(dirname -- "$0")" && pwd)
mkdir -p "${output:=$here/result}"
output=$(cd -- "$output" && pwd)
cd -- "$here/../.."
python=${PYTHON:-.venv/bin/python}
[ -n "${PYTHON:-}" ] || sh exp/setup.sh
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"

if [ ! -e "$output/data/val" ]; then
    origin=${FASHION_MNIST:-/usr/share/datasets/fashion-mnist}
    if [ ! -e "$origin/train-images-idx3-ubyte.gz" ]; then
        if [ -n "${FASHION_MNIST:-}" ] || ! command -v apt-get >/dev/null; then
            echo "$0: $origin has no train-images-idx3-ubyte.gz: put the four files of" \
                "https://github.com/zalandoresearch/fashion-mnist into a folder, and its path into FASHION_MNIST" >&2
            exit 2
        fi
        mkdir -p "$output/package"
        (cd -- "$output/package" && apt-get download dataset-fashion-mnist && dpkg-deb -x ./*.deb .)
        origin=$output/package/usr/share/datasets/fashion-mnist
    fi
    rm -rf "$output/data"
    $python - "$origin" "$output/data" "${PER_CLASS:-2000}" <<'END'
import gzip, pathlib, sys
import numpy as np
from PIL import Image

origin, data, per_class = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
CLASSES = "t_shirt trouser pullover dress coat sandal shirt sneaker bag ankle_boot".split()
for split, stem, most in (("train", "train", per_class), ("val", "t10k", None)):  # val is last: all is there
    images = np.frombuffer(gzip.decompress((origin / f"{stem}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((origin / f"{stem}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    images = np.pad(images.reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
    part = data / f"{split}.part"
    for number, name in enumerate(CLASSES):
        (part / name).mkdir(parents=True)
        for index in np.flatnonzero(labels == number)[:most]:
            Image.fromarray(images[index]).save(part / name / f"{index:05d}.png")
    part.rename(data / split)
END
fi

$python main_pretrain.py --data_path "$output/data" --output_dir "$output/fashion_mnist" --resume auto \
    --model mixmae_quickstart --in_chans 1 --mean 0.219 --std 0.332 --epochs 10 --num_workers 1 \
    --vis_every 2 --rank_every 1 --knn_every 10 --save_steps 500 --keep_checkpoints 1 --print_freq 100
$python -m util.report "$output/fashion_mnist" --out "$output/report.html" --save_reference "$output/fashion_mnist.json"
