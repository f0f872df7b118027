"""Compare RoPE schemes on the nano Qwen2-VL: what each does to every channel, and its needles, over several trainings.

`RUNS/SCHEME-SEED` are the results of `lvctx niah video` for the schemes below, with the same needles everywhere.
Printed are the factors by which a scheme multiplies the frequencies of time, height and width, the right answers and
the mean log-probability of the answer, and two schemes' paired differences with two 95% intervals. The first is over
needles, for these trainings: the cells of a needle are one cluster, over all lengths and trainings. The second is over
trainings, by Student's t: what another training would give.

    python recipes/nano/giraffe_schemes.py runs/schemes
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lvctx.artifacts.result_log import read_results
from lvctx.eval.statistics import Z
from lvctx.rope.mrope import Method, Mrope, Ramp, RopeScaling, inv_freq

MODEL = Mrope(head_dim=64, theta=1e3, sections=(8, 12, 12), interleaved=False)
ORIGINAL, SCALE = 256, 8.0
SCHEMES: dict[str, tuple[Method, Ramp]] = {
    "none": ("none", "index"),
    "pi": ("pi", "index"),
    "ntk": ("ntk", "index"),
    "yarn": ("yarn", "index"),
    "yarn-plain": ("yarn", "index"),
    "index": ("mrope++", "index"),
    "wavelength": ("mrope++", "wavelength"),
}
"""Name in RUNS -> method and ramp of `lvctx mrope-extend`; yarn-plain is YaRN with an attention factor of 1."""
PAIRS = (
    ("index", "yarn"),
    ("wavelength", "yarn"),
    ("index", "yarn-plain"),
    ("wavelength", "yarn-plain"),
    ("index", "wavelength"),
    ("index", "ntk"),
)
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Number of trainings -> the 0.975 quantile of Student's t with one degree of freedom less."""


def factors(scheme: str) -> np.ndarray:
    """Scaled over unscaled frequency of each channel (head_dim / 2,), float64."""
    method, ramp = SCHEMES[scheme]
    plain = inv_freq(MODEL, RopeScaling(method="none", ramp="index", factor=1.0, original=ORIGINAL))
    scaled = inv_freq(MODEL, RopeScaling(method=method, ramp=ramp, factor=SCALE, original=ORIGINAL))
    ratio: np.ndarray = (scaled / plain).numpy()
    return ratio


def read_cells(runs: Path, scheme: str) -> dict[tuple[Any, ...], tuple[float, float]]:
    """(seed, length, depth, trial) -> right or not, log-probability of the answer."""
    return {
        (folder.name.rpartition("-")[2], row["length"], row["point"], row["trial"]): (
            float(row["correct"]),
            row["log_prob"],
        )
        for folder in sorted(runs.glob(f"{scheme}-[0-9]*"))
        for row in read_results(folder).values()
        if "log_prob" in row
    }


def clustered(values: Sequence[float], clusters: Sequence[Any]) -> tuple[float, float]:
    """The mean and half of its 95% interval, clustered (Cochran, Sampling Techniques, section 6.3)."""
    x, (_, which) = np.asarray(values), np.unique(np.asarray(clusters), return_inverse=True)
    sums = np.bincount(which, weights=x - x.mean())
    return float(x.mean()), float(Z * np.sqrt(len(sums) / (len(sums) - 1) * (sums @ sums)) / len(x))


def print_factors() -> None:
    """The schemes' factors, by channel and as means of the sections."""
    for scheme in SCHEMES:
        ratio = factors(scheme)
        parts = np.split(ratio, np.cumsum(MODEL.sections)[:-1])
        means = ", ".join(f"{axis} {part.mean():.2f}" for axis, part in zip("thw", parts, strict=True))
        print(f"{scheme}: {means}; channels " + " ".join(f"{value:.2f}" for value in ratio))


def print_results(runs: Path) -> None:
    """Right answers and log-probabilities of each scheme, then the differences."""
    cells = {scheme: found for scheme in SCHEMES if (found := read_cells(runs, scheme))}
    for scheme, found in cells.items():
        for length in sorted({key[1] for key in found}):
            at = {key: value for key, value in found.items() if key[1] == length}
            seeds = sorted({key[0] for key in at})
            groups = [[value for key, value in at.items() if key[0] == seed] for seed in seeds]
            right = " ".join(f"{sum(v[0] for v in group):.0f}/{len(group)}" for group in groups)
            log_prob = " ".join(f"{np.mean([v[1] for v in group]):.2f}" for group in groups)
            total = np.mean(list(at.values()), axis=0)
            print(f"{scheme} at {length}: {right}, all {total[0]:.3f}; log-probability {log_prob}, all {total[1]:.2f}")
    for first, second in PAIRS:
        shared = sorted(cells.get(first, {}).keys() & cells.get(second, {}).keys(), key=str)
        for length in [*sorted({key[1] for key in shared}), "all lengths"]:
            keys = [key for key in shared if length in (key[1], "all lengths")]
            if len({key[3] for key in keys}) < 2:
                continue
            for i, what in enumerate(("right", "log-probability")):
                gaps = {key: cells[first][key][i] - cells[second][key][i] for key in keys}
                seeds = sorted({key[0] for key in keys})
                by_seed = [float(np.mean([gaps[key] for key in keys if key[0] == seed])) for seed in seeds]
                mean, half = clustered(list(gaps.values()), [key[3] for key in keys])
                line = f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f}), n {len(keys)}; by seed "
                line += " ".join(f"{value:+.2f}" for value in by_seed)
                if len(seeds) in STUDENT:
                    middle, half = np.mean(by_seed), STUDENT[len(seeds)] * np.std(by_seed, ddof=1) / len(seeds) ** 0.5
                    line += f", over trainings {middle - half:+.2f} to {middle + half:+.2f}"
                print(f"{first} - {second} at {length}, {what}: {line}")


def main() -> None:
    """Print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    args = parser.parse_args()
    print_factors()
    print_results(args.runs)


if __name__ == "__main__":
    main()
