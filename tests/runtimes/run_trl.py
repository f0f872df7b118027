"""One training step of TRL's SFTTrainer, with PEFT's LoRA, on the models of models.py.

python run_trl.py OUT [NAME...]       one JSON line a model: the loss of the step
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from rows import Row, write_rows
from transformers import AutoProcessor, AutoTokenizer
from trl import SFTConfig, SFTTrainer


def measure(out: Path, name: str, reference: Row) -> Row:
    """One step on two short conversations, with an image each for a VLM."""
    path, vlm = out / name, "image" in reference["shown"]
    question: Any = [{"type": "image"}, {"type": "text", "text": "What is it?"}] if vlm else "What is it?"
    answer: Any = [{"type": "text", "text": "A street."}] if vlm else "A street."
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    rows = [{**row, "images": [Image.open(out / "image.png")]} if vlm else row] * 2
    with tempfile.TemporaryDirectory() as folder:
        one_step = {"max_steps": 1, "per_device_train_batch_size": 1, "report_to": [], "max_length": None}
        config = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, **one_step)
        trainer = SFTTrainer(
            model=str(path),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(path) if vlm else AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        return {"loss": float(trainer.train().training_loss)}


if __name__ == "__main__":
    write_rows(Path(sys.argv[1]), sys.argv[2:], f"TRL {trl.__version__}", measure)
