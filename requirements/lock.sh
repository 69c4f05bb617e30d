#!/bin/sh
# Makes cpu.lock, gpu.lock and dev.lock (the development tools on top of either) for Linux x86-64 and Python 3.11.
# Needs uv. Packages come from wherever uv is set up to look, and from PIP_FIND_LINKS for the CPU build of torch.
set -eu
cd "$(dirname "$0")"

compile() { # output, further arguments
    output=$1
    shift
    uv pip compile ../pyproject.toml build.in "$@" --constraint pins.in --output-file "$output" --upgrade --quiet \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links
}

echo "torch==2.13.0+cpu" | compile cpu.lock - ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}
grep -v '^torch==' cpu.lock >same.txt # the GPU set differs from the CPU set in torch and what torch brings, in nothing else
echo "torch==2.13.0" | compile gpu.lock - --constraint same.txt
compile dev.all dev.in --constraint cpu.lock ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"}
grep -vxFf cpu.lock dev.all >dev.lock
rm same.txt dev.all
