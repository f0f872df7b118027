"""What llama.cpp computes of the models of models.py, with the flags of llama.cpp.txt.

    python run_llama_cpp.py OUT [NAME...]

One JSON line a model: the largest difference of a greedy token's log-probability after the prompt of text, and whether
the tokens are equal.
"""

import ctypes
import shlex
import sys
from pathlib import Path

import xllamacpp
from convert_gguf import convert
from rows import Row, refusal, write_rows

SERVER = 12
"""LLAMA_EXAMPLE_SERVER of llama.cpp's common.h: whose flags these are."""


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


def measure(out: Path, name: str, reference: Row) -> Row:
    """One model. A Qwen-VL model's flags are for a GGUF of the model before it was extended."""
    path = out / name
    reason = refusal(path, "llama.cpp")
    if reason is not None:
        return {"refusal": reason}
    flags = shlex.split((path / "llama.cpp.txt").read_text()) if (path / "llama.cpp.txt").is_file() else []
    gguf = convert(path if "lm-" in name else out / "parts" / name.split("-")[0])
    params = parse(["-m", str(gguf), "-c", "1024", "-fa", "off", "-ctk", "f32", "-ctv", "f32", *flags])
    body = {
        "prompt": reference["ids"],
        "n_predict": len(reference["greedy"]),
        "temperature": 0,
        "n_probs": 1,
        "ignore_eos": True,
        "cache_prompt": False,
    }
    answer = xllamacpp.Server(params).handle_completions(body)
    if "error" in answer:
        raise RuntimeError(answer["error"]["message"])
    tokens = answer["choices"][0]["logprobs"]["content"]
    pairs = zip(tokens, reference["greedy_logprobs"], strict=True)
    return {
        "difference": max(abs(token["logprob"] - logprob) for token, logprob in pairs),
        "tokens": [token["id"] for token in tokens] == reference["greedy"],
    }


if __name__ == "__main__":
    build = xllamacpp.__version__.split(".")[-1]
    write_rows(Path(sys.argv[1]), sys.argv[2:], f"llama.cpp {build}", measure)
