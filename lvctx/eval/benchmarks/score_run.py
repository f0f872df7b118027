"""The score of a run of any benchmark, with its warnings, its protocol and its costs. No torch."""

from types import ModuleType
from typing import Any

from lvctx.artifacts.schemas import SCORE
from lvctx.eval.benchmarks.accuracy import BenchmarkRun, to_reply
from lvctx.eval.benchmarks.protocol import protocol_of_rows
from lvctx.eval.benchmarks.responses import Responses
from lvctx.eval.cost_summary import summarize_costs


def score_run(run: BenchmarkRun, bench: ModuleType, *, seed: int = 0) -> dict[str, Any]:
    """What `bench.score` computes; `seed` is that of rules that draw random letters."""
    if bench.NAME == "videomme":
        result = bench.score(as_responses(run, bench.NAME))
    else:
        seeded = getattr(bench, "SEEDED", False)
        result = bench.score(run.rows, seed=seed) if seeded else bench.score(run.rows)
    result["warnings"] = [*run.warnings, *result["warnings"]]
    result = {"schema": SCORE, "bench": bench.NAME, "failed": run.failed, **result, **summarize_costs(run.rows)}
    protocol = protocol_of_rows(run.rows)
    return result if protocol is None else {**result, "protocol": protocol}


def as_responses(run: BenchmarkRun, name: str) -> Responses:
    """The replies of a run as the content of a responses file, which Video-MME's scores are computed from."""
    return Responses(name=name, replies=[to_reply(row) for row in run.rows], leniencies={}, warnings=[])
