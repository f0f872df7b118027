"""`transformers serve` with the models of models.py: its greedy answer to a text, or about an image.

python run_serve.py OUT [NAME...]     one JSON line a model: whether the answer is the reference's
"""

import base64
import functools
import sys
from pathlib import Path
from typing import Any

import transformers
from rows import Row, write_rows
from served import post, served


def measure(address: str, out: Path, name: str, reference: Row) -> Row:
    """One model, which the server loads when it is asked for."""
    kind = "image" if "image" in reference["shown"] else "text"
    shown = reference["shown"][kind]
    content: Any = shown["content"]
    if kind == "image":
        url = "data:image/png;base64," + base64.b64encode((out / "image.png").read_bytes()).decode()
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": shown["content"]}]
    body = {
        "model": str(out / name),
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": len(shown["greedy"]),
        "stream": False,
    }
    answer = post(f"{address}/v1/chat/completions", body)["choices"][0]["message"]["content"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / name)
    wanted = shown["greedy"]
    if tokenizer.eos_token_id in wanted:  # the server stops there, the reference goes on
        wanted = wanted[: wanted.index(tokenizer.eos_token_id)]
    return {kind: answer == tokenizer.decode(wanted, skip_special_tokens=True)}


def main() -> None:
    """Every named model, by one server."""
    out = Path(sys.argv[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--device", "cpu", "--dtype", "float32"]
    with served(command, out / "server.log") as address:
        runtime = f"transformers serve {transformers.__version__}"
        write_rows(out, sys.argv[2:], runtime, functools.partial(measure, address))


if __name__ == "__main__":
    main()
