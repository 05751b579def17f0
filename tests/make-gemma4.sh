#!/bin/sh
# Writes small Gemma 4 files with random weights (180 MB) for tests/golden.rs and tests/gemma.rs, by make_gemma4.py, into
# target/test-models/gemma4. Needs python3 with pip. Does nothing where the files are there already.
set -eu
cd "$(dirname "$0")/.."

folder=target/test-models/gemma4
sums=$PWD/tests/data/gemma4.sha256
if [ -d $folder ] && (cd $folder && sha256sum --check --status "$sums"); then
    exit 0
fi
packages=target/gguf-0.19.0
if [ ! -d $packages ]; then
    rm -rf $packages.partial
    python3 -m pip install --quiet --target $packages.partial gguf==0.19.0 numpy
    mv $packages.partial $packages
fi
rm -rf $folder.partial
mkdir -p $folder.partial
PYTHONPATH=$packages python3 tests/make_gemma4.py $folder.partial
# The references were computed for these very bytes. Another NumPy, or another machine, might make others.
(cd $folder.partial && sha256sum --check --quiet "$sums")
rm -rf $folder
mv $folder.partial $folder
