"""Licences and known vulnerabilities of what `pip install lvctx` installs: a part of `make lint`.

Licences are those of the installed packages' metadata. Vulnerabilities are pip-audit's, from PyPI's advisories; where
these cannot be reached, the check is skipped with its reason on stderr.
"""

import json
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ALLOWED = {
    "0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0",
    "CNRI-Python", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "Zlib",
    # Names in older metadata.
    "Apache 2.0 License", "Apache Software License", "BSD License", "ISC License (ISCL)", "MIT License",
    "Python Software Foundation License",
}  # fmt: skip
"""Licences that ask for no more than a notice."""
EXPLAINED_LICENCES = {
    "tqdm": "MPL-2.0 AND MIT: its own files stay under the MPL, which is met by using it unchanged",
    "nvidia-": "NVIDIA's own licence: part of torch's builds for CUDA, which their user installs",
    "cuda-": "NVIDIA's own licence: part of torch's builds for CUDA, which their user installs",
}
"""Package, or prefix that ends in a hyphen -> the reason why another licence is accepted, which begins with it."""
EXPLAINED_VULNERABILITIES: dict[str, str] = {}
"""Advisory, such as GHSA-xxxx-xxxx-xxxx -> the reason why it does not affect lvctx."""
ADVISORIES = "https://pypi.org/pypi/pip/json"
"""A page of the database of advisories that exists always."""


def runtime_dependencies(root: str = "lvctx") -> dict[str, Distribution]:
    """The installed distributions that `root` needs without extras, by canonical name."""
    found: dict[str, Distribution] = {}
    pending = [root]
    while pending:
        name = canonicalize_name(pending.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            sys.exit(f"dependencies: {name} is not installed; run make setup")
        needed = [Requirement(text) for text in found[name].requires or ()]
        pending += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    found.pop(canonicalize_name(root))
    return found


def licence_of(package: Distribution) -> str:
    """The licence in the metadata: an SPDX expression, else classifiers, else the first line of free text."""
    metadata: Any = package.metadata
    classifiers = [c.rpartition(" :: ")[2] for c in metadata.get_all("Classifier") or () if c.startswith("License ::")]
    text = (metadata.get("License") or "").strip().partition("\n")[0]
    return str(metadata.get("License-Expression") or " AND ".join(classifiers) or text or "not stated")


def is_allowed(licence: str) -> bool:
    """Whether one alternative of an expression has allowed licences only; with parentheses, all of them."""
    if licence in ALLOWED:
        return True
    alternatives = [one.split(" AND ") for one in licence.split(" OR ")]
    if "(" in licence:
        return all(part.strip("()") in ALLOWED for parts in alternatives for part in parts)
    return any(all(part in ALLOWED for part in parts) for parts in alternatives)


def refused_licences(licences: Mapping[str, str]) -> list[str]:
    """A line for each package whose licence is neither allowed nor explained."""
    return [
        f"{name}: {licence}"
        for name, licence in sorted(licences.items())
        if not is_allowed(licence) and not _is_explained(name, licence)
    ]


def _is_explained(name: str, licence: str) -> bool:
    return any(
        name.startswith(key) if key.endswith("-") else name == key and reason.startswith(f"{licence}: ")
        for key, reason in EXPLAINED_LICENCES.items()
    )


def unreachable(url: str = ADVISORIES) -> str:
    """Why the database of advisories cannot be asked; empty if it answers."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            found = json.load(answer)
    except (OSError, ValueError) as e:
        return str(e)
    return "" if isinstance(found, dict) and "vulnerabilities" in found else "no advisories in its answer"


def audit(packages: Mapping[str, Distribution]) -> tuple[list[str], list[str]]:
    """What `judge` gives for pip-audit's report; one reason if there is none."""
    if reason := unreachable():
        return [], [f"{ADVISORIES}: {reason}"]
    with tempfile.TemporaryDirectory() as folder:
        pinned = Path(folder) / "requirements.txt"
        # A build of torch for one device is that of its version: 2.13.0+cpu.
        lines = [f"{name}=={package.version.partition('+')[0]}\n" for name, package in sorted(packages.items())]
        pinned.write_text("".join(lines), encoding="utf-8")
        options = ["--requirement", str(pinned), "--disable-pip", "--no-deps", "--format", "json"]
        command = [sys.executable, "-m", "pip_audit", *options, "--progress-spinner", "off", "--timeout", "5"]
        done = subprocess.run(command, capture_output=True, text=True)
    try:
        report = json.loads(done.stdout)
    except ValueError:
        return [], [done.stderr.strip().rpartition("\n")[2] or "pip-audit gave no report"]
    return judge(report["dependencies"])


def judge(dependencies: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """From pip-audit's report: a line for each vulnerability that is not explained, and why packages were left out."""
    lines, skipped = [], []
    for package in dependencies:
        skipped += [package["skip_reason"]] if "skip_reason" in package else []
        for found in package.get("vulns", ()):
            if not {found["id"], *found["aliases"]} & EXPLAINED_VULNERABILITIES.keys():
                fixed = ", ".join(found["fix_versions"]) or "no version"
                lines.append(f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}")
    return lines, skipped


def main() -> None:
    """Check both; exits with 1 if there is a finding."""
    packages = runtime_dependencies()
    findings = refused_licences({name: licence_of(package) for name, package in packages.items()})
    vulnerable, skipped = audit(packages)
    if skipped:
        more = f"; {len(skipped) - 1} more" if skipped[1:] else ""
        print(f"dependencies: vulnerabilities are not checked: {skipped[0]}{more}", file=sys.stderr)
    findings += vulnerable
    for line in findings:
        print(f"dependencies: {line}; explain it in {Path(__file__).name} or choose another version", file=sys.stderr)
    if findings:
        sys.exit(1)
    print(f"{len(packages)} dependencies have allowed licences")


if __name__ == "__main__":
    main()
