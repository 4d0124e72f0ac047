"""The wheel holds `longscan/` alone, with every sub-package and every preset."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "models", "data", "parallel", "launcher")


def packages_on_disk() -> set[str]:
    folders = {path.parent for top in FOLDERS for path in (ROOT / top).rglob("__init__.py")}
    return {"longscan"} | {"longscan." + ".".join(f.relative_to(ROOT).parts) for f in folders}


def test_pyproject_lists_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == packages_on_disk()


def test_wheel_contents(tmp_path):
    source = tmp_path / "another-name"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in tracked.stdout.split("\n") if name and (ROOT / name).is_file()]
    for name in names:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = archive.namelist()
    code = [name for name in held if ".dist-info/" not in name]
    assert all(name.startswith("longscan/") for name in code), code
    assert {str(Path(name).parent).replace("/", ".") for name in code if name.endswith("__init__.py")} == (
        packages_on_disk()
    )
    presets = {p.relative_to(ROOT).as_posix() for top in FOLDERS for p in (ROOT / top).rglob("*.yaml")}
    assert {f"longscan/{name}" for name in presets} == {name for name in code if name.endswith(".yaml")}
    assert not any(name.startswith(("longscan/tests", "longscan/benchmarks")) for name in code)
