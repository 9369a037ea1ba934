#!/usr/bin/env bash
# ibis-nano from image-mask pairs to its figures, in one command: recipes/nano.sh DATA OUT
# DATA as in README, "Own data", with splits "train" and "val". A run that was stopped goes on where it stopped.
# Use the result as --policy mllm:OUT/own-turns/ibis-nano. LICENCE= (empty) takes rows of every licence class,
# SEED=1 draws otherwise.
set -euo pipefail
data=${1:?usage: recipes/nano.sh DATA OUT}
out=${2:?usage: recipes/nano.sh DATA OUT}
licence=${LICENCE-ok}
recipes=$(dirname "$0")
seed=${SEED:-0}

# What needs no segmenter's turns: names, places, sizes, what is absent, one correction at a time.
ibisagent train-nano "$recipes/ibis-nano.toml" --set "data=$data" --set "out=$out/pretrained" \
    --set "licence_class=$licence" --set "seed=$seed"
# Whether to correct, what to take back, when to stop.
ibisagent train-nano "$recipes/ibis-nano-own-turns.toml" --set "data=$data" --set "out=$out/own-turns" \
    --set "start=$out/pretrained/ibis-nano" --set "cache=$out/pretrained" --set "licence_class=$licence" --set "seed=$seed"
ibisagent evaluate "$data" --split val --policy "mllm:$out/own-turns/ibis-nano" -o "$out/val"
