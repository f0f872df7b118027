"""llama.cpp's server with a language model of models.py, whose tokens are bytes.

    python serve_llama_cpp.py MODEL GGUF --host HOST --port PORT [FLAG...]

MODEL is converted to GGUF first. Needs llama.cpp's package and source directory on the path.
"""

import sys
import time
from pathlib import Path

import convert_gguf
import gguf
import xllamacpp
from conversion.base import TextModel
from run_llama_cpp import parse
from transformers import AutoTokenizer

EXACT = ("-c", "1024", "-np", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
"""Nothing is rounded, and one request at a time has the whole context."""


def set_bytes(model: TextModel) -> None:
    """The tokenizer's own tokens, which llama.cpp's converter does not know, and a merge that no text needs."""
    tokenizer = AutoTokenizer.from_pretrained(model.dir_model)
    names = {i: token for token, i in tokenizer.get_vocab().items()}
    special = tokenizer.get_added_vocab().values()
    size = model.hparams["vocab_size"]
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.NORMAL}
    writer = model.gguf_writer
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds[i in special] if i in names else gguf.TokenType.UNUSED for i in range(size)])
    writer.add_token_merges(["Ā Ā"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def main() -> None:
    """Until the process is ended."""
    model, out, flags = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    link = out.with_suffix("")  # the converter writes beside its input
    link.symlink_to(model.resolve())
    convert_gguf.set_vocab = set_bytes
    convert_gguf.convert(link)
    server = xllamacpp.Server(parse(["-m", str(out), *EXACT, *flags]))
    print(server.listening_address, flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
