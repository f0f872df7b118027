"""lvctx models in lmms-eval: `lmms-eval --model lvctx --model_args pretrained=DIR,frames=32 --tasks ...`.

lmms-eval finds them through the entry-point group `lmms_eval.models`; this project does not depend on lmms-eval.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from lvctx.errors import LvctxError, OutOfMemory, UsageError
from lvctx.inference.engine import EngineGone
from lvctx.inference.engine_config import EngineConfig
from lvctx.inference.open_engine import open_checked_vlm, open_engine
from lvctx.inference.sampling_params import SamplingParams
from lvctx.video.frame_list import FrameList
from lvctx.video.hybrid import Hybrid
from lvctx.video.sampling import VideoSampling

log = logging.getLogger(__name__)


def manifest() -> ModelManifest:
    """The model manifest for lmms-eval's entry point."""
    return ModelManifest(model_id="lvctx", simple_class_path=f"{__name__}.Lvctx")


class Lvctx(lmms):
    """A VLM directory or hub id of any family. A video has 32 evenly spread frames by default.

    Under accelerate or torchrun every process loads the model and gets a share of the samples.
    """

    is_simple = True

    def __init__(self, pretrained: str, device: str | None = None, batch_size: int | str = 1, **options: Any) -> None:
        """Find the model; `options` are those of `VideoSampling` as text, hybrid as `L:M:S`, and `prefill_chunk`.

        Raises InputError if there is no such model, UsageError for options that its family does not support,
        ValueError for unknown arguments.
        """
        super().__init__()
        accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        self.accelerator = accelerator  # lmms-eval gathers results with it
        # lmms-eval passes cuda:0 by default; each process has its own device.
        target_device = str(accelerator.device) if device is None or device.startswith("cuda") else device
        vlm = open_checked_vlm(pretrained, target_device, None, options)
        chunk = options.pop("prefill_chunk", None)
        self.sampling = _sampling(options)
        vlm.resolve(self.sampling)
        self.engine = open_engine(
            vlm, EngineConfig(device=target_device, prefill_chunk=None if chunk is None else int(chunk))
        )
        self.device = torch.device(target_device)
        self._current_visuals: Any = None

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Replies, cut before the first string of the request's `until`; empty if a visual cannot be read.

        They are greedy unless the task has `do_sample` and a temperature.
        """
        replies = []
        for request in requests:
            context, options, visuals = request.args[0], request.args[1], self._visuals(request)
            try:
                self._show(visuals)
                reply = self.engine.reply([context], _params(options)).text
            except (OutOfMemory, EngineGone):
                raise  # an empty reply would count as a wrong answer
            except LvctxError as e:
                log.warning("no reply to %s: %s", request.args[3], e)
                reply = ""
            until = options.get("until") or []
            for end in [until] if isinstance(until, str) else until:
                reply = reply.split(end)[0] if end else reply
            replies.append(reply)
        return replies

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, in nats, and whether greedy decoding would generate it."""
        scores = []
        for request in requests:
            context, target = request.args[:2]
            _, _, visuals, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            self._show(visuals(doc))
            score = self.engine.score([context], target if isinstance(target, str) else target(doc))
            scores.append((score.log_prob, score.is_greedy))
        return scores

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Raises UsageError: continuing from an answer is not supported."""
        raise UsageError("lmms-eval's tasks of several rounds are not supported", fix="leave them out of --tasks")

    def _visuals(self, request: Any) -> list[Any]:
        _, _, visuals, doc_id, task, split = request.args
        items: list[Any] = visuals(self.task_dict[task][split][doc_id]) or []
        return items

    def _show(self, visuals: list[Any]) -> None:
        """Show videos and images, unless they are the current input, whose keys and values are cached."""
        if self._current_visuals is not None and self._current_visuals == visuals:
            return
        self._current_visuals = None
        if not visuals:
            raise LvctxError("a question without an image or a video")
        items = [Path(item) if isinstance(item, str | Path) else item.convert("RGB") for item in visuals]
        has_video = any(isinstance(item, Path) for item in items)
        self.engine.show(items, self.sampling if has_video else VideoSampling())
        self._current_visuals = visuals


def _params(options: dict[str, Any]) -> SamplingParams:
    """The sampling parameters of a task's `generation_kwargs`."""
    longest = int(options.get("max_new_tokens", 1024))
    if not options.get("do_sample"):
        return SamplingParams(max_new_tokens=longest)
    given = {name: options[name] for name in ("temperature", "top_p", "top_k") if options.get(name) is not None}
    return SamplingParams(max_new_tokens=longest, **given)


def _sampling(options: dict[str, Any]) -> VideoSampling:
    """The sampling from model arguments, which lmms-eval passes as text or numbers."""
    fields = VideoSampling.__dataclass_fields__
    if unknown := [name for name in options if name not in fields]:
        raise ValueError(f"unknown model arguments: {', '.join(unknown)}")
    values = dict(options)
    for name in ("frames", "max_frames"):
        if name in values:
            values[name] = int(values[name])
    for name in ("start", "end", "change_threshold"):
        if name in values:
            values[name] = float(values[name])
    if values.get("fps") not in (None, "native"):
        values["fps"] = float(values["fps"])
    if "hybrid" in values:
        values["hybrid"] = Hybrid.parse(str(values["hybrid"]).replace(":", ","))
    if "allow_partial" in values:
        values["allow_partial"] = str(values["allow_partial"]).lower() in ("true", "1")
    if "frames_from" in values:
        values["frames_from"] = FrameList.read(str(values["frames_from"]))
    if not {"fps", "frames", "frames_from"} & values.keys():
        values["frames"] = 32
    return VideoSampling(**values)
