#!/usr/bin/env bash
# TRL, PEFT and `transformers serve` in an environment ENV, and what they do with the tiny models:
# OUT/serve.jsonl, OUT/trl.jsonl and OUT/peft.jsonl, for table.py.
#   tests/runtimes/trl.sh OUT ENV       OUT as reference.py wrote it
#   tests/runtimes/trl.sh - ENV        the environment alone
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 env=$2
if [ ! -f "$env/.ready" ]; then
	"${PYTHON:-python3}" -m venv "$env"
	"$env/bin/python" -m pip install --disable-pip-version-check -q -c "$here/constraints-trl.txt" \
		trl peft 'transformers[serving]' datasets torchvision pillow
	touch "$env/.ready"
fi
[ "$out" != - ] || exit 0
for runner in serve trl peft; do
	"$env/bin/python" "$here/run_$runner.py" "$out" 2> "$out/$runner.log"
done
