"""llama.cpp's converter, in this process, with a vocabulary of its own making.

It does not know the tiny models' tokenizer. The prompts are token ids, so any tokens will do; ASCII ones, because
llama.cpp's server holds back the log-probability of a token that is no whole character. Needs llama.cpp's source
directory on the path.
"""

import functools
import sys
from pathlib import Path

import convert_hf_to_gguf
import gguf
from conversion.base import TextModel


def set_vocab(model: TextModel) -> None:
    """Names instead of the tokenizer's tokens, and a merge, since llama.cpp loads none of this kind without one."""
    names = [f"t{i}" for i in range(model.hparams["vocab_size"])]
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types([gguf.TokenType.NORMAL] * len(names))
    writer.add_token_merges(["t 1"])


find_model_class = convert_hf_to_gguf.get_model_class


def get_model_class(*args, **options) -> type[TextModel]:
    """The converter's class for an architecture, with that vocabulary."""
    found = find_model_class(*args, **options)
    found.set_vocab = set_vocab
    return found


convert_hf_to_gguf.get_model_class = get_model_class


@functools.cache
def convert(path: Path) -> Path:
    """A GGUF in float32 beside the model directory. Raises RuntimeError where the converter gives up."""
    out = path.with_suffix(".gguf")
    sys.argv = ["convert_hf_to_gguf.py", str(path), "--outtype", "f32", "--outfile", str(out)]
    try:
        convert_hf_to_gguf.main()
    except SystemExit as e:
        raise RuntimeError("its converter does not know this architecture") from e
    return out
