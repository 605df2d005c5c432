"""Libraries that multiply in 8 bits on a CPU, on the seven projections of a Llama-7B layer: speed and error.

torchao and OpenVINO are not among raycv's packages: `pip install torchao openvino` in an environment of its own. What
is not installed is left out and named. `--compile` adds torchao under torch.compile, which wants a C++ compiler.
docs/int8.md draws the conclusions.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Clock, Result, add_one_core, clock, interleaved, parser, spread
from benchmarks.latency import SMALL
from benchmarks.models import LLAMA_7B, Shape
from raycv.model.int8 import Int8Linear

Product = Callable[[torch.Tensor], torch.Tensor]
TOKENS = (64, 128, 256, 512)
LIBRARIES = ("torchao", "openvino")


def layer(shape: Shape) -> list[nn.Linear]:
    """The projections of one decoder layer, float32 and random."""
    torch.manual_seed(0)
    sizes = [(shape.hidden, shape.hidden)] * 4
    sizes += [(shape.hidden, shape.intermediate)] * 2 + [(shape.intermediate, shape.hidden)]
    return [nn.Linear(*size, bias=False) for size in sizes]


def plain(linear: nn.Linear, dtype: torch.dtype) -> Product:
    """The product in `dtype` without rounding."""
    weight = linear.weight.detach().to(dtype)
    return lambda x: torch.nn.functional.linear(x.to(dtype), weight)


def torch_ao(linear: nn.Linear) -> Product:
    """`torch.ao.quantization.quantize_dynamic`, with a scale per row of weights."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    model = quantize_dynamic(nn.Sequential(linear), {nn.Linear: per_channel_dynamic_qconfig}, dtype=torch.qint8)
    return lambda x: model(x.float())


def torchao(linear: nn.Linear, *, compiled: bool = False) -> Product:
    """torchao's dynamic int8, eager or under torch.compile with frozen weights."""
    from torch._inductor import config
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16))
    model[0].weight.data = linear.weight.detach().bfloat16()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    config.freezing = True
    return torch.compile(model.eval(), dynamic=True) if compiled else model.eval()


def openvino(linear: nn.Linear) -> Product:
    """OpenVINO's CPU plugin: int8 weights, activations rounded dynamically by its own default."""
    import openvino as ov

    ops: Any = __import__("openvino.opset13", fromlist=["parameter"])
    rounded = Int8Linear(linear)
    x = ops.parameter([-1, linear.in_features], ov.Type.f32)
    weight = ops.multiply(ops.convert(ops.constant(rounded.codes.numpy()), "f32"), rounded.scale[:, None].numpy())
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    model = ov.Core().compile_model(ov.Model([ops.matmul(x, weight, False, True)], [x]), "CPU", hints)
    request = model.create_infer_request()
    return lambda x: torch.from_numpy(request.infer([x.float().numpy()], share_inputs=True, share_outputs=True)[0])


def candidates(*, with_compile: bool) -> dict[str, Callable[[nn.Linear], Product]]:
    """How each candidate is made of a float32 layer."""
    found: dict[str, Callable[[nn.Linear], Product]] = {
        "bf16, torch (not int8)": partial(plain, dtype=torch.bfloat16),
        "int8, raycv on torch._int_mm": Int8Linear,
        "int8, torch.ao quantize_dynamic": torch_ao,
    }
    if version("torchao"):
        found["int8, torchao"] = torchao
        if with_compile:
            found["int8, torchao, torch.compile"] = partial(torchao, compiled=True)
    if version("openvino"):
        found["int8, OpenVINO"] = openvino
    return found


def version(library: str) -> str | None:
    """Its version; None if it is not installed."""
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return None


@torch.no_grad()
def measure(
    shape: Shape,
    tokens: int,
    products: dict[str, list[Product]],
    exact: list[nn.Linear],
    repeats: int,
    seconds_of: Clock,
) -> Iterator[dict[str, Any]]:
    """A row for each candidate: seconds of the layer's products on `tokens` tokens, and their error."""
    inputs = {width: torch.randn(tokens, width) for width in (shape.hidden, shape.intermediate)}
    given = [inputs[linear.in_features].bfloat16() for linear in exact]
    wanted = [linear(x.float()) for linear, x in zip(exact, given, strict=True)]

    def multiply(name: str) -> list[torch.Tensor]:
        return [product(x) for product, x in zip(products[name], given, strict=True)]

    seconds = interleaved({name: partial(multiply, name) for name in products}, repeats, clock=seconds_of)
    flops = 2 * tokens * sum(linear.weight.numel() for linear in exact)
    for name, values in seconds.items():
        got = multiply(name)
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(got, wanted, strict=True)]
        taken = spread(values)
        gflops = flops / taken["median"] / 1e9
        yield {"variant": name, "tokens": tokens, "seconds": taken, "gflops": gflops, "error": max(errors)}


def main() -> None:
    arguments = parser(__doc__, repeats=7)
    arguments.add_argument("--compile", action="store_true", help="torchao under torch.compile too: a minute or more")
    add_one_core(arguments)
    options = arguments.parse_args()
    seconds_of = clock(one_core=options.one_core)
    warnings.simplefilter("ignore", DeprecationWarning)
    shape = SMALL if options.small else LLAMA_7B
    exact = layer(shape)
    versions = {library: version(library) for library in LIBRARIES}
    result = Result(
        "int8",
        options,
        hidden=shape.hidden,
        intermediate=shape.intermediate,
        libraries=versions,
        one_core=options.one_core,
    )
    products, built = {}, {}
    for name, make in candidates(with_compile=options.compile).items():
        started = time.perf_counter()
        products[name] = [make(linear) for linear in exact]
        with torch.no_grad():  # torch.compile compiles on the first call
            for linear, product in zip(exact, products[name], strict=True):
                product(torch.zeros(TOKENS[0], linear.in_features, dtype=torch.bfloat16))
        built[name] = time.perf_counter() - started
    for tokens in TOKENS[:1] if options.small else TOKENS:
        result.add(*measure(shape, tokens, products, exact, options.repeats, seconds_of), seconds_to_build=built)
    result.report()


if __name__ == "__main__":
    main()
