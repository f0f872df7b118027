"""What `make soak` takes for growth, and what it counts; the long run itself is no test."""

import random
import subprocess
import sys

import pytest
from soak import growth, sample

SECONDS = list(range(200))


@pytest.mark.parametrize(
    ("level", "per_hour", "noise", "grows"),
    [
        (800, 0, 5, False),
        (800, 720, 5, True),  # 20 MiB in the second half of 200 s
        (800, 720, 200, False),  # less than three standard errors
        (800, 180, 1, False),  # 5 MiB are less than 2 %
        (20, 36, 0, True),  # one file more in 100 s
        (3, 0, 0, False),
        (800, -720, 5, False),
    ],
)
def test_growth_is_told_from_noise(level: float, per_hour: float, noise: float, grows: bool) -> None:
    rng = random.Random(0)
    values = [level + per_hour * second / 3600 + rng.gauss(0, noise) for second in SECONDS]
    assert growth(SECONDS, values)["grows"] == grows


def test_the_beginning_does_not_count() -> None:
    found = growth(SECONDS, [min(10.0 * second, 900) for second in SECONDS])
    assert (found["mean"], found["rise"], found["grows"]) == (900, 0, False)


def test_all_descendants_are_counted() -> None:
    before = sample()
    code = "import subprocess; subprocess.run(['cat'])"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        child.stdin.write(b"x")
        child.stdin.flush()
        child.stdout.read(1)  # cat runs
        after = sample()
        child.stdin.close()
    assert after["processes"] - before["processes"] == 2
    assert after["files"] - before["files"] >= 6
    assert after["rss_mib"] > before["rss_mib"]
