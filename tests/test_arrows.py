"""Imports go down only, one package uses torch.distributed, the library prints nothing."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "lvctx"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = (
    ("cli",),
    ("eval",),
    ("training",),
    ("inference",),
    ("data",),
    ("vlm",),
    ("models",),
    ("video",),
    ("rope", "parallel"),
    ("artifacts",),
)
"""Packages from the top down: each may import from its own layer and from those below."""
MAY_IMPORT = {
    name: {other for below in LAYERS[i:] for other in below} - ({"parallel"} if name == "models" else set())
    for i, layer in enumerate(LAYERS)
    for name in layer
}
"""Package -> packages it may import from. Modules of the package itself, such as `errors`, are open to all."""


def imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    package = path.relative_to(PACKAGE).parts[0]
    if package not in MAY_IMPORT:
        return
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lvctx" and parts[1] in MAY_IMPORT:
            assert parts[1] in MAY_IMPORT[package], f"{package} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_parallel_uses_torch_distributed(path: Path) -> None:
    if "parallel" not in path.relative_to(PACKAGE).parts:
        assert not any(name.startswith("torch.distributed") for name in imports(path))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_library_never_prints_exits_or_reads_the_environment(path: Path) -> None:
    if path.relative_to(PACKAGE).parts[0] in ("cli", "__main__.py"):
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # A worker process may set a variable for a library it loads; what the user set is for cli/ to read.
    set_here = {n.value for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"print", "sys.exit", "exit", "os.getenv", "os.environ.get"}, f"{path}:{node.lineno}"
        if isinstance(node, ast.Attribute) and node not in set_here:
            assert ast.unparse(node) != "os.environ", f"{path}:{node.lineno}"


def test_no_pickle() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert "pickle" not in imports(path), path
        assert "torch.load(" not in text, path


@pytest.mark.alone
def test_help_answers_at_once_without_torch() -> None:
    """The bound is 0.25 s; the best of five keeps a busy machine from failing what it did not break."""
    code = "import sys; sys.argv = ['lvctx', '--help']\nfrom lvctx.__main__ import main\n"
    code += "try: main()\nfinally: print('TORCH' if 'torch' in sys.modules else 'LIGHT')"
    times = []
    for _ in range(5):
        began = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        times.append(time.monotonic() - began)
        assert "LIGHT" in done.stdout
    assert min(times) < 0.25


MODULE_PROTOCOLS = ("eval/benchmarks", "rope")
"""Packages whose modules define the same names: one benchmark, or one position scheme, each."""


def test_sizes_and_names() -> None:
    """A module has at most 350 lines, a function 80 lines and 10 parameters, and no name is defined twice."""
    defined: dict[str, list[str]] = {}
    for path in FILES:
        name = str(path.relative_to(PACKAGE))
        source = path.read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 350, name
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 80, f"{name}: {node.name}"
                parameters = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([p for p in parameters if p not in ("self", "cls")]) <= 10, f"{name}: {node.name}"
        if name.startswith(MODULE_PROTOCOLS):
            continue
        for node in tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else []
            names += [target.id for target in targets if isinstance(target, ast.Name)]
            for one in names:
                if not one.startswith("_") and one != "log":
                    defined.setdefault(one, []).append(name)
    assert {name: files for name, files in defined.items() if len(files) > 1} == {}
    stems = [path.stem for path in FILES if not path.stem.startswith("_")]
    assert {stem for stem in stems if stems.count(stem) > 1} == set()
