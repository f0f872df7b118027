#!/usr/bin/env bash
# The program of an environment ENV that has the wheel alone, without the sources, on the small model in NANO.
#   tests/wheel.sh ENV NANO
set -euo pipefail
lvctx=$(cd "$1" && pwd)/bin/lvctx nano=$(cd "$2" && pwd)
cd "$(mktemp -d)"
"$lvctx" --version
"$lvctx" --help > help.txt
"$lvctx" info "$nano/lm" --json
cat > responses.json <<'JSON'
[{"video_id": "001", "duration": "short", "domain": "Knowledge", "sub_category": "History", "questions": [
  {"question_id": "001-1", "task_type": "Counting", "question": "How many?", "options": ["A. 1", "B. 2", "C. 3", "D. 4"],
   "answer": "B", "response": "B"}]}]
JSON
"$lvctx" videomme score responses.json --json
"$lvctx" bench protocols --json
"$lvctx" niah text --model "$nano/lm" --haystack "$nano/essays" --lengths 256 --depths 0,1 --trials 1 -o needles
test -s needles/heatmap.png
"$lvctx" report needles responses.json -o report.html
grep -q '<script type="application/json" id="content">{"runs":' report.html
