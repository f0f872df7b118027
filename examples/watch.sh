#!/usr/bin/env bash
# Ask one question about every video of a folder; frame features are cached, and each answer is a JSON line.
#   examples/watch.sh VLM FOLDER 'What happens?'
set -euo pipefail
vlm=$1 folder=$2 question=$3
find "$folder" -name '*.mp4' | sort \
  | lvctx encode-video - --model "$vlm" --frames 8 -o frames \
  | lvctx vqa --model "$vlm" --ask "$question"
