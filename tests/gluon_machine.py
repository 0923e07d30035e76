"""Runs the Gluon kernels on the CPU: every warp group a thread, every copy and product late.

Triton's interpreter knows no Gluon. This one knows the few operations that the kernels use, takes their
source as it stands and replaces what it imports. What hardware does asynchronously happens here at a
random moment between the earliest and the latest that the barriers allow: a bulk load poisons its
target at once and fills it later; a product reads its operands in shared memory only when it runs; a
bulk store reads shared memory late and reaches global memory later. A missing wait, a wrong phase or a
buffer released too early therefore ends in NaN, in a wrong number or in `Deadlock`.
"""

from __future__ import annotations
import __future__

import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import hf_expressive

FOLDER = Path(hf_expressive.__file__).parent / "ops" / "hopper"
_STEPS_WITHOUT_PROGRESS = 20_000


class Deadlock(AssertionError):
    """No thread can go on."""


class Machine:
    """Threads that run one at a time, and the asynchronous work that is under way."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        #: How often asynchronous work gets on before anything has to wait for it.
        self.haste = self.random.choice((0.02, 0.3))
        self.ready = threading.Condition()
        self.threads: dict[int, Callable[[], bool]] = {}
        self.pending: list[Any] = []
        self.running: int | None = None
        self.failure: BaseException | None = None
        self.polls = 0  # of counters, since anything else happened

    def run(self, bodies: list[Callable[[], None]]) -> None:
        """Runs all to their ends; raises what one of them raises."""

        def start(name: int, body: Callable[[], None]) -> None:
            try:
                with self.ready:
                    self.ready.wait_for(lambda: self.running == name or self.failure)
                if not self.failure:
                    body()
            except BaseException as error:
                self.failure = self.failure or error
            del self.threads[name]
            self._choose()

        self.running = None
        self.threads = {name: lambda: True for name in range(len(bodies))}
        workers = [
            threading.Thread(target=start, args=pair, daemon=True) for pair in enumerate(bodies)
        ]
        for worker in workers:
            worker.start()
        self._choose()
        for worker in workers:
            worker.join()
        while self.pending:
            self.advance()
        if self.failure:
            raise self.failure

    def advance(self) -> bool:
        """One piece of asynchronous work, if there is any."""
        if not self.pending:
            return False
        work = self.random.choice(self.pending)
        if work.advance():
            self.pending.remove(work)
        return True

    def _choose(self) -> None:
        """Hands over to a thread that can go on."""
        with self.ready:
            for _ in range(_STEPS_WITHOUT_PROGRESS):
                if self.failure or not self.threads:
                    break
                while self.random.random() < self.haste and self.advance():
                    pass
                able = [name for name, able in self.threads.items() if able()]
                if able:
                    self.running = self.random.choice(able)
                    self.ready.notify_all()
                    return
                if not self.advance():
                    self.failure = Deadlock(f"{len(self.threads)} threads wait for ever")
            else:
                self.failure = Deadlock("no progress")
            self.running = None
            self.ready.notify_all()

    def switch(self, able: Callable[[], bool] = lambda: True) -> None:
        """Lets others run, at least until `able`."""
        own = self.running
        assert own is not None
        self.threads[own] = able
        self._choose()
        with self.ready:
            self.ready.wait_for(lambda: self.running == own or self.failure)
        if self.failure:
            raise SystemExit


class Barrier:
    """An mbarrier."""

    def __init__(self) -> None:
        self.phase = self.arrived = self.missing_bytes = 0
        self.count = 1

    def update(self) -> None:
        assert self.arrived <= self.count, "more arrivals than the barrier expects"
        if self.arrived == self.count and self.missing_bytes == 0:
            self.phase += 1
            self.arrived = 0

    def index(self, _: int) -> Barrier:
        raise TypeError("this barrier is a single one")


class Barriers:
    def __init__(self, count: int) -> None:
        self.items = [Barrier() for _ in range(count)]

    def index(self, place: Any) -> Barrier:
        return self.items[int(place)]


class Shared:
    """A buffer in shared memory, or a view of one."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype, self.shape = data, data.dtype, data.shape

    def index(self, place: Any) -> Shared:
        return Shared(self.data[int(place)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def as_floats(self, rows: int, columns: int) -> Shared:
        return Shared(self.data.view(-1).view(torch.float32).view(1, rows, columns))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def load(self, _: Any) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        self.data.copy_(value)


class Pointer:
    """An address in global memory."""

    def __init__(self, data: Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.data, self.offset + other)


class Tiles:
    """A tile descriptor."""

    def __init__(self, descriptor: Any) -> None:
        self.data = descriptor.base.as_strided(descriptor.shape, descriptor.strides)
        self.block_shape, self.layout = descriptor.block_shape, None
        self.dtype = descriptor.base.dtype
        size = torch.Size(self.block_shape).numel() * self.data.element_size()
        self.block_type = SimpleNamespace(nbytes=size)

    def window(self, place: list[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tensor under a block, and where in the block it lies."""
        inside = [
            slice(int(start), min(int(start) + width, limit))
            for start, width, limit in zip(place, self.block_shape, self.data.shape, strict=True)
        ]
        inside = [slice(part.start, max(part.start, part.stop)) for part in inside]
        part = self.data[tuple(inside)]
        return part, tuple(slice(0, length) for length in part.shape)


class Load:
    """A bulk load."""

    def __init__(self, tiles: Tiles, place: list[Any], barrier: Barrier, target: Shared) -> None:
        self.tiles, self.place, self.barrier, self.target = (
            tiles,
            list(map(int, place)),
            barrier,
            target,
        )
        target.data.fill_(torch.nan)

    def advance(self) -> bool:
        part, inside = self.tiles.window(self.place)
        self.target.data.zero_()
        self.target.data[inside] = part
        self.barrier.missing_bytes -= self.tiles.block_type.nbytes
        self.barrier.update()
        return True


class Store:
    """A bulk store or addition: reads shared memory, then reaches global memory."""

    def __init__(self, tiles: Tiles, place: list[Any], source: Shared, *, add: bool) -> None:
        self.tiles, self.place, self.source, self.add = tiles, list(map(int, place)), source, add
        self.value: Tensor | None = None
        self.done = False

    def read(self) -> None:
        if self.value is None:
            self.value = self.source.data.clone()

    def advance(self) -> bool:
        if self.done:
            return True
        if self.value is None:
            self.read()
            return False
        part, inside = self.tiles.window(self.place)
        part.copy_(part + self.value[inside] if self.add else self.value[inside])
        self.done = True
        return True


class Product:
    """An asynchronous product of a warp group; those of one group run in order."""

    def __init__(self, left: Any, right: Shared, start: Any, queue: list[Product]) -> None:
        self.left, self.right, self.start, self.queue = left, right, start, queue
        self.value: Tensor | None = None
        queue.append(self)

    def run(self) -> None:
        assert self.queue.pop(0) is self
        left = self.left.data if isinstance(self.left, Shared) else self.left
        start = self.start.value if isinstance(self.start, Product) else self.start
        self.value = left.float() @ self.right.data.float() + start

    def advance(self) -> bool:
        if self.value is None:
            self.queue[0].run()
        return self.value is not None


def _load_memory(pointer: Pointer, mask: Any = True, other: float = 0) -> Tensor:
    place = torch.as_tensor(pointer.offset)
    inside = torch.as_tensor(mask).expand(place.shape)
    found = pointer.data.reshape(-1)[torch.where(inside, place, 0)]
    return torch.where(inside, found, torch.as_tensor(other, dtype=found.dtype))


def _multiply_pairs(one: Tensor, other: Tensor) -> Tensor:
    return (one.int().view(torch.bfloat16) * other.int().view(torch.bfloat16)).view(torch.int32)


def _store_memory(pointer: Pointer, value: Tensor, mask: Any = True) -> None:
    place = torch.as_tensor(pointer.offset)
    inside = torch.as_tensor(mask).expand(place.shape)
    pointer.data.view(-1)[place[inside]] = value.expand(place.shape)[inside].to(pointer.data.dtype)


class _Namespace:
    """The names that the kernel's source imports, for one of a number of programs."""

    def __init__(self, machine: Machine, program: int, programs: int) -> None:
        self.machine, self.program, self.programs = machine, program, programs
        self.products: dict[int | None, list[Product]] = {}
        self.stores: dict[int | None, list[Store]] = {}
        self.bodies: list[Callable[[], None]] = []

    def names(self) -> dict[str, Any]:
        def layout(*_: Any) -> None:
            return None

        def tensor(value: Any) -> Tensor:
            return torch.as_tensor(value)

        def constexpr(value: Any) -> Any:
            return value

        gl = SimpleNamespace(
            constexpr=constexpr, int32=torch.int32, int64=torch.int64, float32=torch.float32,
            bfloat16=torch.bfloat16, float16=torch.float16,
            SwizzledSharedLayout=layout, NVMMASharedLayout=layout, NVMMADistributedLayout=layout,
            SliceLayout=layout, DotOperandLayout=layout, BlockedLayout=layout,
            arange=lambda low, high, _: torch.arange(low, high),
            zeros=lambda shape, dtype, _: torch.zeros(shape, dtype=dtype),
            full=lambda shape, value, dtype, _: torch.full(shape, int(value), dtype=dtype),
            where=lambda choice, one, two: torch.where(tensor(choice), tensor(one), tensor(two)),
            minimum=lambda one, two: torch.minimum(tensor(one), tensor(two)),
            maximum=lambda one, two: torch.maximum(tensor(one), tensor(two)),
            max=lambda value, _: value.max(), cdiv=lambda one, two: -(-one // two),
            convert_layout=lambda value, _: value, static_range=range, load=_load_memory,
            allocate_shared_memory=self.allocate, atomic_add=self.atomic_add,
            warp_specialize=self.specialize, store=_store_memory,
            sum=lambda value, dim: value.sum(dim), split=lambda value: value.unbind(-1),
            exp2=torch.exp2, log2=torch.log2,
            program_id=lambda _: self.program, num_programs=lambda _: self.programs,
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: Barrier, init=self.initialise, wait=self.wait,
            arrive=self.arrive, expect=self.expect,
        )  # fmt: skip
        return self.operations() | {
            "gl": gl, "mbarrier": mbarrier, "tma": SimpleNamespace(store_wait=self.store_wait),
            "gluon": SimpleNamespace(jit=lambda *found, **_: found[0] if found else lambda f: f),
            "warpgroup_mma": self.multiply, "warpgroup_mma_wait": self.multiply_wait,
            "fence_async_shared": self.machine.switch,
        }  # fmt: skip

    def operations(self) -> dict[str, Any]:
        """Another form of each of `ops.hopper.operations`."""
        return {
            "load_tile": self.load, "store_tile": self.store, "add_tile": self.add,
            "arrivals": self.arrivals, "publish": self.publish, "complete": self.complete,
            "as_floats": lambda buffer, rows, columns, _: buffer.as_floats(rows, columns),
            "number": lambda buffer, place, _: buffer.index(place).load(None).max(),
            "nothing": lambda _: 0, "settled": lambda x: x, "reciprocal": lambda x: 1.0 / x,
            "lane_sums": lambda x, rows, keys: x.reshape(rows, keys // 8, 4, 2).sum((1, 3)),
            "packed": lambda x: x.bfloat16().view(torch.int32), "products": _multiply_pairs,
            "halves": lambda x, _: x.int().view(torch.bfloat16),
            "unsigned": lambda x: x.long() & 0xFFFFFFFF,
            "as_multiplied": lambda x, dtype, lift: (x * lift).to(dtype).float() / lift,
        }  # fmt: skip

    def specialize(self, functions: list[Any], _warps: list[int], _registers: list[int]) -> None:
        self.bodies = [lambda f=f, a=a: f(*a) for f, a in functions]

    def allocate(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if layout is Barrier:
            return Barrier() if shape == [1] else Barriers(shape[0])
        if dtype.is_floating_point:
            return Shared(torch.full(shape, torch.nan, dtype=dtype))
        return Shared(torch.full(shape, -77, dtype=dtype))

    def initialise(self, barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(self, barrier: Barrier, parity: int, pred: Any = True) -> None:
        self.machine.switch(lambda: not pred or barrier.phase % 2 != int(parity))

    def arrive(self, barrier: Barrier, count: int = 1, pred: Any = True) -> None:
        self.machine.switch()
        if not pred:
            return
        self.machine.polls = 0
        barrier.arrived += count
        barrier.update()

    def expect(self, barrier: Barrier, size: int) -> None:
        self.machine.switch()
        barrier.arrived += 1
        barrier.missing_bytes += size
        barrier.update()

    def load(self, tiles: Tiles, place: list[Any], barrier: Barrier, target: Shared) -> None:
        self.machine.pending.append(Load(tiles, place, barrier, target))
        self.machine.switch()

    def store(self, tiles: Tiles, place: list[Any], source: Shared, *, add: bool = False) -> None:
        work = Store(tiles, place, source, add=add)
        self.stores.setdefault(self.machine.running, []).append(work)
        self.machine.pending.append(work)
        self.machine.switch()

    def add(self, tiles: Tiles, place: list[Any], source: Shared) -> None:
        self.store(tiles, place, source, add=True)

    def store_wait(self, left: int) -> None:
        self.machine.switch()
        own = self.stores.get(self.machine.running, [])
        for work in own[: len(own) - left]:
            work.read()

    def arrivals(self, pointer: Pointer) -> Tensor:
        self.machine.polls += 1
        if self.machine.polls > _STEPS_WITHOUT_PROGRESS:
            raise Deadlock("only counters are polled")
        self.machine.switch()
        return _load_memory(pointer)

    def publish(self, pointer: Pointer, pending: str) -> None:
        self.complete(int(pending))
        self.atomic_add(pointer, 1)

    def complete(self, pending: int = 0) -> None:
        self.machine.switch()
        own = self.stores.setdefault(self.machine.running, [])
        while len(own) > pending:
            work = own.pop(0)
            while not work.advance():
                pass
        self.machine.switch()

    def atomic_add(self, pointer: Pointer, value: int, sem: str = "acq_rel") -> Tensor:
        self.machine.switch()
        self.machine.polls = 0
        cell = pointer.data.view(-1)
        before = cell[int(pointer.offset)].clone()
        cell[int(pointer.offset)] += value
        return before

    def multiply(
        self, left: Any, right: Shared, start: Any, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        assert is_async
        self.machine.switch()
        queue = self.products.setdefault(self.machine.running, [])
        start = start if use_acc else 0.0
        product = Product(left, right, start, queue)
        self.machine.pending.append(product)
        return product

    def multiply_wait(self, left: int, deps: list[Any]) -> Any:
        self.machine.switch()
        queue = self.products.setdefault(self.machine.running, [])
        while len(queue) > left:
            queue[0].run()
        # One that is still under way stays a `Product`, of which only another product can make use.
        values = tuple(
            dep.value if isinstance(dep, Product) and dep.value is not None else dep for dep in deps
        )
        return values if len(values) > 1 else values[0]


def _body(path: Path) -> str:
    """The source of a kernel's file without its imports."""
    source = path.read_text()
    imports = re.search(r"^_[A-Z0-9_]+ = gl\.constexpr", source, re.MULTILINE)
    assert imports is not None
    return source[imports.start() :]


def launcher(kernel: str, seed: int, change: Callable[[str], str] = lambda source: source) -> Any:
    """What takes the place of a kernel where it is launched.

    Args:
        kernel: `"forward_kernel"` or `"backward_kernel"`.
        seed: of the order in which things happen.
        change: applied to the kernel's source.
    """
    from hf_expressive.ops.hopper.plan import FIELDS, ROWS

    path = FOLDER / f"tiled_{kernel.removesuffix('_kernel')}.py"
    body = _body(FOLDER / "work.py") + change(_body(path))

    class Launcher:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
                def convert(value: Any) -> Any:
                    if hasattr(value, "block_shape"):
                        return Tiles(value)
                    return Pointer(value) if isinstance(value, Tensor) else value

                machine = Machine(seed)
                bodies = []
                for number in range(grid[0]):
                    program = _Namespace(machine, number, grid[0])
                    names = program.names() | {"FIELDS": FIELDS, "ROWS": ROWS}
                    exec(
                        compile(body, path, "exec", flags=__future__.annotations.compiler_flag),
                        names,
                    )
                    machine.threads, machine.running = {0: lambda: True}, 0
                    names[kernel](*map(convert, arguments), **constants)
                    bodies += program.bodies
                machine.run(bodies)

            return launch

    return Launcher()
