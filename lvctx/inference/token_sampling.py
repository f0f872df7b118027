"""The next token: greedy, or sampled by temperature, top-k and top-p as transformers and vLLM sample it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lvctx.inference.sampling_params import SamplingParams


def filter_logits(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Logits (V,) over the temperature, with -inf for the tokens that are not sampled: top-k first, then top-p.

    Of top-p's tokens the first whose probabilities reach it is the last that is kept, so at least one is.
    """
    logits_V = logits_V / params.temperature
    if 0 < params.top_k < len(logits_V):
        smallest = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    if params.top_p < 1:
        sorted_V, order_V = logits_V.sort(descending=True)
        before_V = sorted_V.softmax(0).cumsum(0) - sorted_V.softmax(0)
        removed_V = torch.zeros_like(order_V, dtype=torch.bool).scatter(0, order_V, before_V >= params.top_p)
        logits_V = logits_V.masked_fill(removed_V, -torch.inf)
    return logits_V


class TokenSampler:
    """Chooses the tokens of one reply. It samples on the CPU, where a seed means the same on every device."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        """`prompt` are the text tokens that a repetition penalty counts, beside those that are chosen."""
        self.params, self._seen = params, torch.tensor(list(prompt), dtype=torch.long).unique()
        self._generator = torch.Generator().manual_seed(params.seed)

    def __call__(self, logits_V: Tensor) -> int:
        """The next token's id for logits (V,)."""
        penalized = self.params.repetition_penalty != 1
        if penalized:
            logits_V = self._penalize(logits_V)
        if not self.params.temperature:
            token = int(logits_V.argmax())
        else:
            probabilities_V = filter_logits(logits_V.float().cpu(), self.params).softmax(0)
            token = int(torch.multinomial(probabilities_V, 1, generator=self._generator))
        if penalized:
            self._seen = torch.cat([self._seen, torch.tensor([token])]).unique()
        return token

    def _penalize(self, logits_V: Tensor) -> Tensor:
        """As CTRL's authors (Keskar et al. 2019) and transformers: towards less probable, whatever the sign."""
        seen, penalty = self._seen.to(logits_V.device), self.params.repetition_penalty
        picked = logits_V[seen]
        return logits_V.scatter(0, seen, torch.where(picked < 0, picked * penalty, picked / penalty))
