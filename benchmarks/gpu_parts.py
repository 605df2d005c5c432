"""The single operations that `benchmarks.gpu` measures before it trains: launches, products, attention alone.

An item is a name and a call that gives a row. Each row has the host's seconds until its last launch beside the seconds
until the work is done. Where both are equal, the host sets the pace; where the host's are far fewer, the kernels do.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness import spread
from benchmarks.models import Shape

Row = dict[str, Any]
Item = tuple[str, Callable[[], list[Row]]]

REPEATS = 5
RANK = 8
KINDS = {
    "products": ("gemm", "nvjet", "cutlass", "xmma", "::mm", "addmm", "linear"),
    "attention": ("fmha", "flash", "attention"),
    "copies": ("copy", "cat", "memcpy", "memset", "fill"),
    "random numbers": ("dropout", "philox", "random"),
}
"""Parts of kernels' names, by kind; all else is elementwise."""


def host_and_total(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Seconds of one call until the host has launched all, and until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    host = time.perf_counter() - started
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return host, time.perf_counter() - started


def measured(work: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> Row:
    """Host's and all seconds of `repeats` calls, after two that do not count."""
    for _ in range(2):
        work()
    taken = [host_and_total(work, device) for _ in range(repeats)]
    return {"host_seconds": spread([host for host, _ in taken]), "seconds": spread([total for _, total in taken])}


def kernels(work: Callable[[], object], device: torch.device) -> Row:
    """Seconds of the kernels of one call by kind, and their number; on a CPU those of the operators."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        host_and_total(work, device)
    spent: dict[str, float] = {}
    count = 0
    for event in found.key_averages():
        own = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        # An operator of the host has no time of its own on the device, apart from its kernels.
        if not own or (on_gpu and event.device_type != torch.autograd.DeviceType.CUDA):
            continue
        name = event.key.lower()
        kind = next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "elementwise")
        spent[kind] = spent.get(kind, 0.0) + own / 1e6
        count += event.count
    return {"kernel_seconds": spent, "kernels": count}


def replayed(work: Callable[[], object]) -> Callable[[], None]:
    """`work` captured as one CUDA graph. It writes into tensors that stay, and needs no gradients."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def launches(device: torch.device, *, small: bool) -> Iterator[Item]:
    """Tiny additions in place: is Python slow, or the driver? And the bandwidth of copies."""
    count = 100 if small else 10_000
    one = torch.zeros(1, device=device)

    def add() -> None:
        for _ in range(count):
            one.add_(1)

    def row(what: str, prepare: Callable[[], Callable[[], object]]) -> list[Row]:
        return [{"what": f"{count:,} additions in place, {what}", **measured(prepare(), device)}]

    yield "launches, eager", partial(row, "eager", lambda: add)
    if device.type == "cuda":
        yield "launches, graph", partial(row, "a graph's replay", lambda: replayed(add))

    def copies() -> list[Row]:
        size = 2**20 if small else 2**30
        source = torch.zeros(size, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        found = measured(lambda: target.copy_(source), device)
        return [{"what": "copy", **found, "gigabytes_per_second": 2 * size / found["seconds"]["median"] / 1e9}]

    yield "copies", copies


def products(shape: Shape, dtype: torch.dtype, device: torch.device, *, small: bool) -> Iterator[Item]:
    """Products of matrices: large, of a layer's shapes, in FP8, and those of rank 8 in both orientations."""

    def row(what: str, m: int, n: int, k: int, work: Callable[[], object]) -> list[Row]:
        found = measured(work, device)
        return [{"what": what, "m": m, "n": n, "k": k, **found, "tflops": tflops(2 * m * n * k, found)}]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device).to(dtype)

    def plain(what: str, m: int, n: int, k: int) -> list[Row]:
        x, weight = random(m, k), random(n, k)
        return row(what, m, n, k, lambda: functional.linear(x, weight))

    def fp8(m: int, n: int, k: int) -> list[Row]:
        kind, one = torch.float8_e4m3fn, torch.ones((), device=device)
        x, weight = random(m, k).to(kind), random(n, k).to(kind)
        tensorwise = functional.ScalingType.TensorWise
        multiply = partial(
            functional.scaled_mm, x, weight.T, one, tensorwise, one, tensorwise, output_dtype=torch.bfloat16
        )
        return row("a layer's, FP8", m, n, k, multiply)

    def thin(m: int, n: int) -> list[Row]:
        wide, low = random(m, n), random(m, RANK)
        return [
            *row("of rank 8, wide.T @ low", n, RANK, m, lambda: wide.T @ low),
            *row("of rank 8, (low.T @ wide).T", n, RANK, m, lambda: (low.T @ wide).T),
        ]

    size = 256 if small else 8192
    yield "products, large", partial(plain, "large", size, size, size)
    layer = {
        "q, k, v, o": (shape.hidden, shape.hidden),
        "q, k, v in one": (3 * shape.hidden, shape.hidden),
        "gate, up": (shape.intermediate, shape.hidden),
        "down": (shape.hidden, shape.intermediate),
    }
    tokens = (64, 128) if small else (2600, 4000, 9400, 16000)
    for m in tokens:
        for name, (n, k) in layer.items():
            yield f"products, {name}, {m}", partial(plain, f"a layer's, {name}", m, n, k)
    for n in (shape.hidden, shape.intermediate):
        yield f"products of rank 8, {n}", partial(thin, tokens[-2], n)
    if device.type == "cuda" and hasattr(functional, "scaled_mm"):
        m = tokens[-2] // 16 * 16
        yield "products, FP8", partial(fp8, m, shape.intermediate, shape.hidden)


def tflops(flops: float, found: Row) -> float:
    """10^12 operations a second."""
    return float(flops / found["seconds"]["median"] / 1e12)


def attention(shape: Shape, dtype: torch.dtype, device: torch.device, *, small: bool) -> Iterator[Item]:
    """Attention alone, forward and backward, over lines of two documents each."""
    lines, length = (2, 64) if small else (18, 512)
    size = shape.hidden // shape.heads
    segments = torch.arange(length, device=device) * 2 // length
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = (causal & (segments[:, None] == segments))[None, None].expand(lines, 1, length, length)

    def states() -> list[torch.Tensor]:
        made = (torch.randn(lines, length, shape.heads, size, device=device).to(dtype) for _ in range(3))
        return [each.transpose(1, 2).requires_grad_() for each in made]

    def rows(what: str, compute: Callable[..., torch.Tensor], *, backward: bool = True) -> list[Row]:
        given = states()

        def both() -> None:
            out = compute(*given)
            if backward:
                out.backward(torch.ones_like(out))
                for each in given:
                    each.grad = None

        passes = "forward and backward" if backward else "forward"
        return [{"what": f"{what}, {passes}", "lines": lines, "length": length, **measured(both, device)}]

    def masked(backend: SDPBackend) -> Callable[..., torch.Tensor]:
        def compute(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel(backend):
                return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

        return compute

    def varlen(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.varlen import varlen_attn

        queries, keys, values = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
        starts = torch.arange(0, lines * length + 1, length // 2, dtype=torch.int32, device=device)
        longest = length // 2
        made = varlen_attn(queries, keys, values, starts, starts, longest, longest, window_size=(-1, 0))
        assert isinstance(made, torch.Tensor)
        return made

    def flexible() -> list[Row]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def sees(_line: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (query >= key) & (segments[query] == segments[key])

        blocks = create_block_mask(sees, None, None, length, length, device=device)
        compiled: Any = torch.compile(flex_attention)
        # It has no backward on a CPU.
        backward = device.type == "cuda"
        with torch.set_grad_enabled(backward):
            return rows("FlexAttention", partial(compiled, block_mask=blocks), backward=backward)

    if device.type == "cuda":
        backends = {"memory-efficient": SDPBackend.EFFICIENT_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items():
            yield f"attention, {name}", partial(rows, f"{name}, dense mask", masked(backend))
        yield "attention, varlen", partial(rows, "varlen", varlen)
        yield "attention, FlexAttention", flexible
    else:
        yield "attention, flash", partial(rows, "flash of a CPU, dense mask", masked(SDPBackend.FLASH_ATTENTION))
