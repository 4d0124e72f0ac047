"""Runs a kernel in Gluon on a CPU: as much of the language as kernels/attention/hopper.py speaks; all else raises.

Gluon has no interpreter. Here a block is a tensor, a layout is None, and a program's partitions are threads of which
one runs at a time: at every barrier one that can go on does, chosen by a seed. A Fault is raised where a GPU would err:

- where a partition reads what no barrier says has come, or writes what none says is no longer read. By vector clocks,
  not by what happened to come first, so in any order that the partitions run in;
- where a wgmma's result is taken before a wait has retired it; until then it also reads its operands;
- where a wgmma's operand was stored by its own partition with no fence after;
- where all wait, where nothing waits for what was loaded, and outside of a tensor or of what was written.

Not emulated: layouts, the fence between the barriers' beginning and their use, NaN that a maximum drops.
"""

from __future__ import annotations

import itertools
import linecache
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial, reduce
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class Fault(Exception):
    """What the kernel must not do."""


class Stopped(Exception):
    """Ends a partition when another one has failed."""


class Block:
    """Numbers in registers, or one; integers divide towards zero and are of 32 bits unless an operand has 64."""

    type = SimpleNamespace(layout=None)

    def __init__(self, data: Tensor):
        self.data = data
        self.dtype = data.dtype

    def __getitem__(self, key):
        return Block(self.data[key])

    def __int__(self):
        return int(self.data)

    __index__ = __int__

    def __bool__(self):
        raise Fault("branches on numbers that are not constants are not emulated")

    def to(self, dtype):
        return Block(self.data.to(dtype))


def apply(function: Callable[..., Tensor], *values: Any) -> Block:
    """The function of blocks of one dtype; a Python number takes that of the others, or fp32."""
    dtype = reduce(torch.promote_types, [value.dtype for value in values if isinstance(value, Block)])
    if any(isinstance(value, float) for value in values) and not dtype.is_floating_point:
        dtype = torch.float32
    return Block(function(*(value.data.to(dtype) if isinstance(value, Block) else torch.tensor(value, dtype=dtype)
                            for value in values)))  # fmt: skip


OPERATORS = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "truediv": torch.true_divide,
    "floordiv": partial(torch.div, rounding_mode="trunc"),
    "mod": torch.fmod,
    "and": torch.bitwise_and,
    "xor": torch.bitwise_xor,
    "eq": torch.eq,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
}
for name, function in OPERATORS.items():
    setattr(Block, f"__{name}__", lambda self, other, f=function: apply(f, self, other))
    setattr(Block, f"__r{name}__", lambda self, other, f=function: apply(f, other, self))


class Pointer:
    """Into a contiguous tensor."""

    def __init__(self, tensor: Tensor, offset: Any = 0):
        assert tensor.is_contiguous()
        self.tensor, self.offset = tensor, offset
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, other):
        return Pointer(self.tensor, self.offset + other)

    def places(self, mask: Block | None) -> tuple[Tensor, Tensor]:
        """Indices, 0 where masked, and the mask."""
        at = self.offset.data.long()
        inside = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.data.expand_as(at)
        used = at[inside]
        if used.numel() and (used.min() < 0 or used.max() >= self.tensor.numel()):
            raise Fault(f"places {int(used.min())} to {int(used.max())} of a tensor of {self.tensor.numel()}")
        return at.masked_fill(~inside, 0), inside


def load(pointer: Pointer, mask: Block | None = None, other: float | None = None) -> Block:
    at, inside = pointer.places(mask)
    found = pointer.tensor.view(-1)[at]
    return Block(found if mask is None else found.masked_fill(~inside, other))


def store(pointer: Pointer, block: Block, mask: Block) -> None:
    at, inside = pointer.places(mask)
    if block.dtype != pointer.tensor.dtype:
        raise Fault(f"a {block.dtype} is stored to {pointer.tensor.dtype}")
    pointer.tensor.view(-1)[at[inside]] = block.data.expand_as(at)[inside]


class Partition:
    """A thread of a program, and its clock: of each partition the last event that is known to lie before.

    Attributes:
        waits_for: a barrier and the phase whose end would let it go on.
        products: wgmmas begun, the oldest first.
        unfenced: histories of what it stored since its last fence.
    """

    def __init__(self, name: str, clock: dict[Partition, int]):
        self.name, self.clock = name, clock | {self: 1}
        self.waits_for: tuple[Barrier, int] | None = None
        self.products: list[Product] = []
        self.unfenced: set[History] = set()
        self.go = threading.Semaphore(0)
        self.done, self.error = False, None

    def join(self, clock: dict[Partition, int]) -> None:
        self.clock |= {who: max(at, self.clock.get(who, 0)) for who, at in clock.items()}

    def follows(self, who: Partition, at: int) -> bool:
        return self.clock.get(who, 0) >= at


class History:
    """Who wrote a slot of shared memory last, and who has read it since, each with the reader's time."""

    def __init__(self, name: str):
        self.name = name
        self.writer: tuple[Partition, int] | None = None
        self.readers: dict[Partition, int] = {}

    def read(self, by: Partition) -> None:
        if self.writer is None:
            raise Fault(f"{by.name} reads {self.name}, which nothing was written to")
        if not by.follows(*self.writer):
            raise Fault(f"{by.name} reads {self.name} before what {self.writer[0].name} writes has come")
        self.readers[by] = by.clock[by]

    def write(self, by: Partition) -> None:
        for who, at in [*self.readers.items(), *([self.writer] if self.writer else [])]:
            if not by.follows(who, at):
                raise Fault(f"{by.name} writes {self.name}, which {who.name} has not released")
        self.writer, self.readers = (by, by.clock[by]), {}


class Slot:
    """A block of shared memory, or another view of one."""

    def __init__(self, program: Program, history: History, data: Tensor):
        self.program, self.history, self.data = program, history, data

    def reshape(self, shape):
        return Slot(self.program, self.history, self.data.view(shape))

    def permute(self, order):
        return Slot(self.program, self.history, self.data.permute(order))

    def load(self, layout):
        self.history.read(self.program.current)
        return Block(self.data.clone())

    def store(self, block):
        partition = self.program.current
        if any(self.history in product.histories for product in partition.products):
            raise Fault(f"{partition.name} stores to {self.history.name} while a product reads it")
        if block.dtype != self.data.dtype or block.data.shape != self.data.shape:
            raise Fault(f"{block.dtype} {list(block.data.shape)} does not fit {self.history.name}")
        self.history.write(partition)
        partition.unfenced.add(self.history)
        self.data.copy_(block.data)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and every byte that was expected has come.

    Attributes:
        gathered: the joined clocks of those who arrived in this phase; `released` of the phase before.
    """

    def __init__(self, name: str):
        self.name, self.count = name, 0
        self.pending, self.bytes, self.phase = 0, 0, 0
        self.gathered: dict[Partition, int] = {}
        self.released: dict[Partition, int] = {}

    def take(self, by: Partition, arrivals: int, count: int) -> None:
        """Arrivals, and bytes that are expected, or, negative, have come."""
        self.pending -= arrivals
        self.bytes += count
        if not self.count or self.pending < 0:
            raise Fault(f"{by.name} arrives at {self.name}, which expects {self.count}, once more than that")
        self.gathered |= {who: max(at, self.gathered.get(who, 0)) for who, at in by.clock.items()}
        by.clock[by] += 1
        if self.pending == self.bytes == 0:
            self.phase ^= 1
            self.pending, self.released, self.gathered = self.count, self.gathered, {}


class Ring:
    """What was allocated: slots or barriers."""

    def __init__(self, entries: list[Any], dtype: torch.dtype):
        self.entries, self.dtype = entries, dtype

    def index(self, i):
        if not 0 <= int(i) < len(self.entries):
            raise Fault(f"there is no {int(i)} among {len(self.entries)} entries of shared memory")
        return self.entries[int(i)]


class Product:
    """A wgmma that was begun: the value of its accumulator once it is retired."""

    def __init__(self, a: Slot | Block, b: Slot, start: Block, use_acc: bool):
        self.a, self.b, self.start, self.use_acc = a, b, start, use_acc
        self.histories = [x.history for x in (a, b) if isinstance(x, Slot)]
        self.value: Block | None = None

    def retire(self, by: Partition) -> None:
        for history in self.histories:
            history.read(by)
        product = self.a.data.float() @ self.b.data.float()
        self.value = Block(self.start.data + product if self.use_acc else product)


class Program:
    """One program of a launch, and what its kernel finds under Gluon's names."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], chance: random.Random):
        self.place, self.grid, self.chance = place, grid, chance
        self.current = Partition("the program", {})
        self.histories: list[History] = []
        self.back = threading.Semaphore(0)
        self.stopped = False

    def names(self) -> dict[str, Any]:
        scalar = partial(torch.tensor, dtype=torch.int32)
        no_layout = {name: lambda *_: None for name in LAYOUTS}
        here = {
            "program_id": lambda axis: Block(scalar(self.place[axis])),
            "num_programs": lambda axis: Block(scalar(self.grid[axis])),
            "allocate_shared_memory": self.allocate,
            "warp_specialize": self.warp_specialize,
        }
        return {
            "__builtins__": {"float": float, "range": count_to},
            "gl": SimpleNamespace(**LANGUAGE, **no_layout, **here),
            "triton": SimpleNamespace(next_power_of_2=lambda n: 1 << (n - 1).bit_length()),
            "mbarrier": SimpleNamespace(
                MBarrierLayout=lambda: Barrier, init=self.init, expect=self.expect, arrive=self.arrive, wait=self.wait
            ),
            "tma": SimpleNamespace(async_copy_global_to_shared=self.copy),
            "fence_async_shared": lambda: self.current.unfenced.clear(),
            "warpgroup_mma": self.warpgroup_mma,
            "warpgroup_mma_wait": self.warpgroup_mma_wait,
        }

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Ring:
        """Entries that bear the name that the kernel gives them."""
        caller = sys._getframe(1)
        name = linecache.getline(caller.f_code.co_filename, caller.f_lineno).split("=")[0].strip()
        names = [f"{name}[{i}]" for i in range(shape[0])]
        if layout is Barrier:
            return Ring([Barrier(name) for name in names], dtype)
        blocks = torch.full(shape, torch.nan, dtype=dtype).unbind()
        histories = [History(name) for name in names]
        self.histories += histories
        return Ring([Slot(self, *pair) for pair in zip(histories, blocks, strict=True)], dtype)

    def warp_specialize(self, jobs: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
        """Runs the partitions to their ends."""
        assert len(warps) == len(registers) == len(jobs) - 1
        before = self.current
        partitions = [Partition(f"{f.__name__} ({i})", before.clock) for i, (f, _) in enumerate(jobs)]
        threads = [
            threading.Thread(target=self.run, args=(*pair,), daemon=True) for pair in zip(partitions, jobs, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self.schedule(partitions)
        finally:
            self.stopped = True
            for partition, thread in zip(partitions, threads, strict=True):
                partition.go.release()
                thread.join()
        self.current = before
        for partition in partitions:
            before.join(partition.clock)
        for history in self.histories:
            if history.writer and not before.follows(*history.writer):
                raise Fault(f"the program ends before what {history.writer[0].name} writes to {history.name} has come")

    def schedule(self, partitions: list[Partition]) -> None:
        """Lets one go on, to its next pause, until all are done."""
        while alive := [p for p in partitions if not p.done]:
            ready = [p for p in alive if p.waits_for is None or p.waits_for[0].phase != p.waits_for[1]]
            if not ready:
                raise Fault("deadlock: " + "; ".join(f"{p.name} waits for {p.waits_for[0].name}" for p in alive))
            self.current = self.chance.choice(ready)
            self.current.go.release()
            self.back.acquire()
            if self.current.error:
                raise self.current.error

    def run(self, partition: Partition, job: tuple[Callable, tuple]) -> None:
        partition.go.acquire()
        try:
            if not self.stopped:
                job[0](*job[1])
                if partition.products:
                    raise Fault(f"{partition.name} ends before a product of its own")
        except Stopped:
            pass
        except Exception as error:
            partition.error = error
        partition.done = True
        self.back.release()

    def pause(self) -> None:
        """Lets any partition go on in this one's place."""
        partition = self.current
        self.back.release()
        partition.go.acquire()
        if self.stopped:
            raise Stopped

    def init(self, barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    def wait(self, barrier: Barrier, phase: Any) -> None:
        partition, phase = self.current, int(phase)
        if phase not in (0, 1) or not barrier.count:
            raise Fault(f"{partition.name} waits for phase {phase} of {barrier.name}, which expects {barrier.count}")
        partition.waits_for = barrier, phase
        self.pause()
        partition.waits_for = None
        partition.join(barrier.released)

    def arrive(self, barrier: Barrier, count: int) -> None:
        barrier.take(self.current, count, 0)
        self.pause()

    def expect(self, barrier: Barrier, count: int) -> None:
        barrier.take(self.current, 1, count)
        self.pause()

    def copy(self, source: Any, corner: list[Any], barrier: Barrier, target: Slot) -> None:
        """TMA: zeros outside of the tensor.

        It writes on a clock of its own, since only its barrier tells that it is done.
        """
        writer = Partition(f"a copy by {self.current.name}", self.current.clock)
        if list(target.data.shape) != list(source.block_shape):
            raise Fault(f"a block of {source.block_shape} does not fit {target.history.name}")
        target.history.write(writer)
        ends = [(int(c), int(c) + n) for c, n in zip(corner, source.block_shape, strict=True)]
        there = [(max(low, 0), min(high, n)) for (low, high), n in zip(ends, source.shape, strict=True)]
        target.data.zero_()
        if all(low < high for low, high in there):
            here = tuple(slice(low - first, high - first) for (low, high), (first, _) in zip(there, ends, strict=True))
            target.data[here] = source.data[tuple(slice(*span) for span in there)]
        barrier.take(writer, 0, -target.data.numel() * target.data.element_size())
        self.pause()

    def warpgroup_mma(self, a: Slot | Block, b: Slot, start: Block, *, is_async: bool, use_acc: bool = True) -> Product:
        assert is_async
        partition, product = self.current, Product(a, b, start, use_acc)
        for history in product.histories:
            history.read(partition)
            if history in partition.unfenced:
                raise Fault(f"no fence lies between what {partition.name} stored to {history.name} and a product of it")
        if list(start.data.shape) != [a.data.shape[0], b.data.shape[1]]:
            raise Fault(f"{list(start.data.shape)} is not the shape of a product")
        partition.products.append(product)
        return product

    def warpgroup_mma_wait(self, outstanding: int, deps: list[Product | Block]) -> Any:
        partition = self.current
        while len(partition.products) > outstanding:
            partition.products.pop(0).retire(partition)
        values = [dep.value if isinstance(dep, Product) else dep for dep in deps]
        if any(value is None for value in values):
            raise Fault(f"{partition.name} waits for a product with {outstanding} after it, which it is among")
        return values[0] if len(values) == 1 else tuple(values)


def count_to(*bounds: Any) -> Iterator[Block]:
    """Python's range of numbers that are not constants."""
    return (Block(torch.tensor(i, dtype=torch.int32)) for i in range(*map(int, bounds)))


LAYOUTS = ("BlockedLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout", "SliceLayout")
LANGUAGE: dict[str, Any] = {
    "int32": torch.int32,
    "int64": torch.int64,
    "float32": torch.float32,
    "arange": lambda start, stop, layout: Block(torch.arange(start, stop, dtype=torch.int32)),
    "zeros": lambda shape, dtype, layout: Block(torch.zeros(shape, dtype=dtype)),
    "full": lambda shape, value, dtype, layout: Block(torch.full(shape, value, dtype=dtype)),
    "load": load,
    "store": store,
    "where": lambda condition, a, b: apply(partial(torch.where, condition.data), a, b),
    "maximum": partial(apply, torch.maximum),
    "minimum": partial(apply, torch.minimum),
    "ceil": partial(apply, torch.ceil),
    "sqrt": partial(apply, torch.sqrt),
    "exp2": partial(apply, torch.exp2),
    "log2": partial(apply, torch.log2),
    "cdiv": lambda a, b: (a + b - 1) // b,
    "max": lambda block, axis: Block(block.data.amax(axis)),
    "sum": lambda block, axis: Block(block.data.sum(axis)),
    "reshape": lambda block, shape: Block(block.data.reshape(shape)),
    "convert_layout": lambda block, layout: block,
    "static_range": range,
}


class Kernel:
    """A gluon.jit function that is launched as ever; the functions that it calls are those of its module."""

    def __init__(self, function: Any, seed: int = 0):
        self.function, self.chance = function, random.Random(seed)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self.launch, (*grid, 1, 1)[:3])

    def launch(self, grid: tuple[int, ...], *args: Any, num_warps: int, **kwargs: Any) -> None:
        from triton.experimental.gluon._runtime import GluonJITFunction
        from triton.experimental.gluon.language import constexpr

        bound = self.function.signature.bind(*args, **kwargs).arguments
        fixed = {p.name for p in self.function.params if p.is_constexpr}
        values = {name: value if name in fixed else argument(value) for name, value in bound.items()}
        module = self.function.fn.__globals__
        constants = {name: value.value for name, value in module.items() if isinstance(value, constexpr)}
        functions = {name: value.fn for name, value in module.items() if isinstance(value, GluonJITFunction)}
        for place in itertools.product(*map(range, grid)):
            names = constants | Program(place, grid, self.chance).names()
            names |= {name: FunctionType(f.__code__, names, name, f.__defaults__) for name, f in functions.items()}
            FunctionType(self.function.fn.__code__, names)(**values)


def argument(value: Any) -> Any:
    """What a launch makes of an argument that is not a constant."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return Pointer(value)
    if isinstance(value, int | float):
        return Block(torch.tensor(value, dtype=torch.int32 if isinstance(value, int) else torch.float32))
    data = value.base.as_strided(value.shape, value.strides)
    return SimpleNamespace(
        data=data, shape=value.shape, block_shape=value.block_shape, dtype=data.dtype, layout=value.layout
    )
