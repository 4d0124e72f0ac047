"""Imports run one way; heavy libraries have one importer; the relative form is kept."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "models", "data", "parallel", "launcher")

# Which folders each folder may import. `errors`, `durable` and the version are open to all.
ALLOWED = {
    "kernels": set(),
    "data": set(),
    "models": {"kernels"},
    "parallel": {"kernels", "models", "data"},
    "launcher": {"kernels", "models", "data", "parallel"},
}
# Where alone a library may be imported: patterns under the root.
OWNERS = {
    "triton": (
        "kernels/*/kernel.py",
        "kernels/attention/hopper.py",
        "kernels/linear_attention/grouped.py",
        "kernels/linear_attention/walks.py",
        "kernels/linear_scan/chain.py",
        "kernels/partials.py",
        "kernels/precompile.py",
    ),
    "liger_kernel": ("models/fused.py",),
    "megatron": ("parallel/**/*.py",),
    "deepspeed": ("parallel/**/*.py",),
    "ray": ("launcher/**/*.py",),
    "omegaconf": ("launcher/**/*.py",),
    "webdataset": ("data/**/*.py",),
}


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def imports(path: Path, text: str):
    """Yields (absolute dotted target or None, relative target parts or None, line)."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - (node.level - 1)]
            module = tuple(node.module.split(".")) if node.module else ()
            for target in [base + module] if base + module else [(alias.name,) for alias in node.names]:
                yield None, target, node.lineno


def violations(path: Path, text: str) -> list[str]:
    folder = path.relative_to(ROOT).parts[0]
    found = []
    for absolute, relative, line in imports(path, text):
        if relative is not None:
            target = relative[0]
            if target in FOLDERS and target != folder and target not in ALLOWED[folder]:
                found.append(f"line {line}: {folder} must not import {target}")
            continue
        top = absolute.split(".")[0]
        if top in FOLDERS or top == "longscan":
            found.append(f"line {line}: import {absolute} relatively")
        if top in OWNERS and not any(path in set(ROOT.glob(pattern)) for pattern in OWNERS[top]):
            found.append(f"line {line}: {top} is imported only in {', '.join(OWNERS[top])}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_edges(path):
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    "statement",
    ["from ..launcher import cli", "from .. import models", "import triton", "import longscan.data", "import ray"],
)
def test_a_wrong_edge_is_seen(statement):
    assert len(violations(ROOT / "kernels" / "sample.py", statement)) == 1


def test_every_folder_has_a_docstring():
    for package in {path.parent for path in sources()}:
        init = package / "__init__.py"
        assert init.exists(), f"{package.relative_to(ROOT)} lacks __init__.py"
        text = ast.get_docstring(ast.parse(init.read_text()))
        assert text and len(text) > 40, f"{init.relative_to(ROOT)} does not say what the folder is"
