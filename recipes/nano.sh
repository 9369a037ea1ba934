#!/usr/bin/env bash
# ibis-nano from image-mask pairs to its results, in one command: recipes/nano.sh OUT DATA...
# DATA as in docs/guide/data.md, with splits "train" and "val"; more than one are learned from together and judged apart. A run
# that was stopped resumes. Use the result as --policy mllm:OUT/on-policy/ibis-nano. LICENCE= (empty) takes rows of every
# licence class, SEED=1 draws otherwise.
set -euo pipefail
usage="usage: recipes/nano.sh OUT DATA..."
out=${1:?$usage}
: "${2:?$usage}"
shift
recipes=$(dirname "$0")
data=$(printf "'%s'," "$@")
shared=(--set "data=[$data]" --set "licence_class=${LICENCE-ok}" --set "seed=${SEED:-0}")

# What needs no segmenter's turns: names, places, sizes, what is absent, one correction at a time.
ibisagent train nano "$recipes/ibis-nano.toml" --set "out=$out/pretrained" "${shared[@]}"
# Whether to correct, what to take back, when to stop.
ibisagent train nano "$recipes/ibis-nano-on-policy.toml" --set "out=$out/on-policy" \
    --set "start=$out/pretrained/ibis-nano" --set "cache=$out/pretrained" "${shared[@]}"
for one in "$@"; do
    ibisagent eval run "$one" --split val --policy "mllm:$out/on-policy/ibis-nano" -o "$out/val-$(basename "$one")"
done
