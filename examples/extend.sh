#!/usr/bin/env bash
# Extend a context: the same needles before and after raising a language model's RoPE base, without training.
#   examples/extend.sh LM ESSAYS BASE LENGTHS
set -euo pipefail
lm=$1 essays=$2 base=$3 lengths=$4
lvctx extend-lm --model "$lm" --rope-theta "$base" --steps 0 -o lm-extended
for model in "$lm" lm-extended; do
  lvctx niah text --model "$model" --haystack "$essays" --lengths "$lengths" --depths 0,0.5,1 --trials 1 \
    -o "niah-$(basename "$model")"
done
lvctx niah report "niah-$(basename "$lm")" niah-lm-extended -o heatmap.png
