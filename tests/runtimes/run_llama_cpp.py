"""What llama.cpp computes of the models of models.py.

    python run_llama_cpp.py SOURCE SERVER OUT NAME...

SOURCE is llama.cpp's source directory (its converter), SERVER its llama-server. One JSON line a model: the largest
difference of a greedy token's log-probability after the prompt of text, and whether the tokens are equal.
"""

import json
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def convert(source: Path, path: Path) -> Path:
    """A GGUF in float32 beside the model; a Qwen-VL model's is made before it was extended."""
    gguf = path.with_suffix(".gguf")
    command = [
        sys.executable,
        str(source / "convert_hf_to_gguf.py"),
        str(path),
        "--outtype",
        "f32",
        "--outfile",
        str(gguf),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("the converter: " + " ".join(done.stderr.split())[-300:])
    return gguf


def ask(port: int, ids: list[int], new: int) -> list[dict[str, Any]]:
    """The greedy tokens after a prompt, each with its log-probability."""
    body = {"prompt": ids, "n_predict": new, "temperature": 0, "n_probs": 1, "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())["completion_probabilities"]
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)  # it is still loading
    raise RuntimeError("the server does not answer")


def measure(source: Path, server: Path, out: Path, name: str, reference: dict[str, Any]) -> dict[str, Any]:
    """One model."""
    path = out / name
    flags = shlex.split((path / "llama.cpp.txt").read_text()) if (path / "llama.cpp.txt").is_file() else []
    kind = name.split("-")[0]
    gguf = convert(source, path if kind == "lm" else out / "parts" / kind)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(server),
        "-m",
        str(gguf),
        "-c",
        "1024",
        "-t",
        "2",
        "-fa",
        "off",
        "-ctk",
        "f32",
        "-ctv",
        "f32",
        *flags,
    ]
    with subprocess.Popen(
        [*command, "--port", str(port), "--host", "127.0.0.1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        try:
            found = ask(port, reference["ids"], len(reference["greedy"]))
        finally:
            running.terminate()
    off = max(abs(a["logprob"] - b) for a, b in zip(found, reference["greedy_logprobs"], strict=True))
    return {"difference": off, "tokens": [token["id"] for token in found] == reference["greedy"]}


def main() -> None:
    """Every named model."""
    source, server, out = map(Path, sys.argv[1:4])
    reference = json.loads((out / "reference.json").read_text())
    version = subprocess.run([server, "--version"], capture_output=True, text=True)
    build = (version.stderr + version.stdout).split("version:")[-1].split()[0]
    for name in sys.argv[4:]:
        try:
            row = measure(source, server, out, name, reference[name])
        except (RuntimeError, OSError, KeyError) as e:
            row = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"}
        print(json.dumps({"runtime": f"llama.cpp {build}", "model": name, **row}), flush=True)


if __name__ == "__main__":
    main()
