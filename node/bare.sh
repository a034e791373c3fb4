#!/usr/bin/env bash
# On a machine with one GPU and the packages of requirements.txt but vLLM, without a network: ten minutes at most.
# What node.check can check there, the tables of cost in bfloat16, and the memory formula. Copy the repository and run it.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
status=0
python -m node.check --engine torch || status=1
python -m examples.bench --lengths 1024 4096 16384 32768 --repeats 3 --maps_to 4096 || status=1
python -m examples.bench --table layer --lengths 1024 4096 16384 32768 --repeats 5 --maps_to 4096 || status=1
python -m node.memory || status=1
exit $status
