"""One training step of TRL's SFTTrainer, with PEFT's LoRA, on the models of models.py.

python run_trl.py OUT NAME...       one JSON line a model: the loss of the step
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any


def train(path: Path, image: Path) -> float:
    """The loss of one step on two short conversations, with an image each for a VLM."""
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import Image
    from transformers import AutoProcessor, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    vlm = (path / "processor_config.json").is_file()
    question: Any = [{"type": "image"}, {"type": "text", "text": "What is it?"}] if vlm else "What is it?"
    answer: Any = [{"type": "text", "text": "A street."}] if vlm else "A street."
    row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    rows = [{**row, "images": [Image.open(image)]} if vlm else row] * 2
    with tempfile.TemporaryDirectory() as folder:
        once = {"max_steps": 1, "per_device_train_batch_size": 1, "report_to": [], "max_length": None}
        config = SFTConfig(output_dir=folder, use_cpu=True, bf16=False, **once)
        trainer = SFTTrainer(
            model=str(path),
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoProcessor.from_pretrained(path) if vlm else AutoTokenizer.from_pretrained(path),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        return float(trainer.train().training_loss)


def main() -> None:
    """Every named model."""
    import trl

    out = Path(sys.argv[1])
    for name in sys.argv[2:]:
        row: dict[str, Any]
        try:
            loss = train(out / name, out / "image.png")
            row = {"loss": loss} if math.isfinite(loss) else {"error": "the loss is not a number"}
        except Exception as e:
            row = {"error": f"{type(e).__name__}: {' '.join(str(e).split())[-300:]}"}
        print(json.dumps({"runtime": f"TRL {trl.__version__}", "model": name, **row}), flush=True)


if __name__ == "__main__":
    main()
