#!/bin/sh
# Unpack the quickstart's images (exp/quickstart/README.md) to exp/quickstart/data, unless they are there. In the
# repository's root, with its environment made:
#     sh exp/quickstart/unpack.sh
set -eu

data=exp/quickstart/data
[ ! -e $data/500_labels/val ] || exit 0
rm -rf $data
.venv/bin/python -m tarfile -e exp/quickstart/fashion_mnist.tar.xz $data
for class in "$data"/train/*; do
    mkdir -p "$data/500_labels/train/${class##*/}"
    find "$class" -name '*.png' | sort | head -n 50 | xargs -I{} cp {} "$data/500_labels/train/${class##*/}"
done
ln -s ../val $data/500_labels/val
