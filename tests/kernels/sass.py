"""Kernels compiled for a Hopper GPU on a machine that has none, and what ptxas made of them.

Under pytest triton may be in interpreter mode, where nothing compiles; so what compiles is a script, run by `printed`.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path


def printed(script: str, cache: Path) -> list[str]:
    """The lines that a Python script prints in a process of its own, where it can import this module as `sass`."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(Path(__file__).parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def compiled(jitted, constants, kind, even=(), **options):
    """A kernel with its `constants` by name, other arguments typed by `kind` of their name; `even` ones are 16 n."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    names = jitted.arg_names
    signature = {name: "constexpr" if name in constants else kind(name) for name in names}
    values = {(names.index(name),): value for name, value in constants.items() if name in names}
    divisible = [["tt.divisibility", 16]]
    aligned = {(i,): divisible for i, name in enumerate(names) if signature[name][0] == "*" or name in even}
    source = (GluonASTSource if jitted.is_gluon() else ASTSource)(jitted, signature, values, aligned)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def loops(ptx: str) -> list[str]:
    """The loops of PTX: from each label to a branch back to it."""
    lines = ptx.splitlines()
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$\w+):", line))}
    jumps = [(found[1], i) for i, line in enumerate(lines) if (found := re.search(r"\bbra(?:\.uni)?\s+(\$\w+);", line))]
    return ["\n".join(lines[labels[to] : i]) for to, i in jumps if labels[to] < i]


def spilled(cubin: bytes) -> int:
    """The bytes a thread of local memory: what its registers did not hold."""
    return int(re.findall(r"STACK:(\d+)", _listed(cubin, "-res-usage"))[0])


def lost(cubin: bytes) -> list[int]:
    """The uniform registers that the machine code reads before anything writes them: ptxas dropped a copy."""
    return unwritten(_listed(cubin, "-sass"))


def _listed(cubin: bytes, what: str) -> str:
    """What cuobjdump prints of it."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, what, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def unwritten(listing: str) -> list[int]:
    """The uniform registers that a listing of cuobjdump reads above the first line that writes them."""
    written, found = set(), []
    for operation, operands in re.findall(r"[*]/ +(?:@!?U?P\w+ )?([A-Z][\w.]+) *([^;]*);", listing):
        target = re.match(r"(?:UP\w+, )?UR(\d+)", operands)
        sources = operands[target.end() :] if target else operands
        # gdesc[n] names four registers, the last two those of the second operand.
        reads = {int(n) + 2 * bool(four) for four, n in re.findall(r"(gdesc\[)?UR(\d+)", sources)}
        found += sorted(reads - written)
        if target:
            written |= {int(target[1]), int(target[1]) + bool(re.search("64|WIDE", operation))}
    assert written, listing
    return found
