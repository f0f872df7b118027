"""What llama.cpp computes of the models of models.py, with the flags of llama.cpp.txt.

    python run_llama_cpp.py SOURCE OUT [NAME...]

SOURCE is llama.cpp's source directory (its converter). One JSON line a model: the largest difference of a greedy
token's log-probability after the prompt of text, and whether the tokens are equal.
"""

import ctypes
import functools
import shlex
import subprocess
import sys
from pathlib import Path

import xllamacpp
from rows import Row, refusal, write_rows

CONVERT = Path(__file__).with_name("convert_gguf.py")
SERVER = 12
"""LLAMA_EXAMPLE_SERVER of llama.cpp's common.h: whose flags these are."""


@functools.cache
def convert(source: Path, path: Path) -> Path:
    """A GGUF in float32 beside the model."""
    gguf = path.with_suffix(".gguf")
    command = [sys.executable, str(CONVERT), str(source), str(path), "--outtype", "f32", "--outfile", str(gguf)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError("its converter: " + done.stderr.strip().splitlines()[-1])
    return gguf


def parse(flags: list[str]) -> xllamacpp.CommonParams:
    """What llama.cpp's own parser makes of a command line: the package has it, but no name for it."""
    params = xllamacpp.CommonParams()
    words = [word.encode() for word in ("llama-server", *flags)]
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    parser = library["_Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E"]
    parser.restype = ctypes.c_bool
    # The struct begins where the head of the Python object ends.
    struct = ctypes.c_void_p(id(params) + object.__basicsize__)
    if not parser(len(words), (ctypes.c_char_p * (len(words) + 1))(*words, None), struct, SERVER, None):
        raise ValueError(f"it does not know these flags: {shlex.join(flags)}")
    return params


def measure(source: Path, out: Path, name: str, reference: Row) -> Row:
    """One model. A Qwen-VL model's flags are for a GGUF of the model before it was extended."""
    path = out / name
    reason = refusal(path, "llama.cpp")
    if reason is not None:
        return {"refusal": reason}
    flags = shlex.split((path / "llama.cpp.txt").read_text()) if (path / "llama.cpp.txt").is_file() else []
    gguf = convert(source, path if "lm-" in name else out / "parts" / name.split("-")[0])
    params = parse(["-m", str(gguf), "-c", "1024", "-fa", "off", "-ctk", "f32", "-ctv", "f32", *flags])
    body = {
        "prompt": reference["ids"],
        "n_predict": len(reference["greedy"]),
        "temperature": 0,
        "n_probs": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    tokens = xllamacpp.Server(params).handle_completions(body)["choices"][0]["logprobs"]["content"]
    pairs = zip(tokens, reference["greedy_logprobs"], strict=True)
    return {
        "difference": max(abs(token["logprob"] - logprob) for token, logprob in pairs),
        "tokens": [token["id"] for token in tokens] == reference["greedy"],
    }


def main() -> None:
    """Every named model."""
    source, out = map(Path, sys.argv[1:3])
    build = xllamacpp.__version__.split(".")[-1]
    write_rows(out, sys.argv[3:], f"llama.cpp {build}", functools.partial(measure, source))


if __name__ == "__main__":
    main()
