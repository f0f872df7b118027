"""`transformers serve` with the VLMs of models.py: its greedy answer about an image.

python run_serve.py OUT NAME...     one JSON line a model: whether the answer is transformers' own
"""

import base64
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any


def ask(port: int, model: Path, image: Path) -> str:
    """The server's answer to one turn with an image."""
    url = "data:image/png;base64," + base64.b64encode(image.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {
        "model": str(model),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
        "stream": False,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    for _ in range(120):
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as e:
            raise RuntimeError(e.read().decode()[:300]) from e
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)  # it is still starting
    raise RuntimeError("the server does not answer")


def measure(out: Path, name: str, reference: dict[str, Any]) -> dict[str, Any]:
    """One model."""
    from transformers import AutoTokenizer

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--port", str(port), "--device", "cpu"]
    command += ["--dtype", "float32"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            answer = ask(port, out / name, out / "image.png")
        finally:
            running.terminate()
    tokenizer = AutoTokenizer.from_pretrained(out / name)
    return {"image": answer == tokenizer.decode(reference["shown"]["image"]["greedy"], skip_special_tokens=True)}


def main() -> None:
    """Every named model."""
    import transformers

    out = Path(sys.argv[1])
    reference = json.loads((out / "reference.json").read_text())
    for name in sys.argv[2:]:
        try:
            row = measure(out, name, reference[name])
        except (RuntimeError, OSError, KeyError) as e:
            row = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"}
        print(
            json.dumps({"runtime": f"transformers serve {transformers.__version__}", "model": name, **row}), flush=True
        )


if __name__ == "__main__":
    main()
