"""llama.cpp's converter for models whose tokenizer, bytes without merges, it does not know. Prompts are token ids.

python convert_gguf.py SOURCE ARGUMENT...       SOURCE is llama.cpp's source directory, the rest is for its converter
"""

import sys

sys.path.insert(0, sys.argv.pop(1))

import convert_hf_to_gguf
import gguf
from conversion.base import TextModel
from conversion.llama import LlamaModel


class Vocab(gguf.SpecialVocab):
    """Has a merge, since llama.cpp loads no vocabulary of this kind without one."""

    def add_to_gguf(self, *args, **options) -> None:
        self.merges = self.merges or ["a b"]
        super().add_to_gguf(*args, **options)


gguf.SpecialVocab = Vocab
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
LlamaModel.set_vocab = (
    TextModel._set_vocab_gpt2
)  # its own first asks for a package, to look for a tokenizer of another kind
convert_hf_to_gguf.main()
