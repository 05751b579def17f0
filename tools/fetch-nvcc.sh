#!/usr/bin/env bash
# Fetches NVIDIA's compiler from PyPI into target/cuda-toolkit, for machines without the CUDA toolkit: enough to compile the
# kernels, which needs no GPU. Afterwards: CUDA_HOME=target/cuda-toolkit/nvidia/cu13 cargo build --release
set -euo pipefail
cd "$(dirname "$0")/.."

packages="nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85"
folder=target/cuda-toolkit
[ "$(cat $folder/packages.txt 2>/dev/null)" = "$packages" ] && exit
rm -rf $folder.partial
# shellcheck disable=SC2086
python3 -m pip install --quiet --target $folder.partial $packages
echo "$packages" > $folder.partial/packages.txt
rm -rf $folder
mv $folder.partial $folder
