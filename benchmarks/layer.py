"""One decoder layer of Llama-7B's real width: time, memory and FLOPs of LoRA, PEFT's DoRA and raycv's.

A measurement is one optimizer step of four micro-batches, forward and backward under gradient checkpointing, with
AdamW's update at its end, after which raycv refreshes its norms: once per step, as in training. `--compile`
adds raycv's under torch.compile, which wants a C++ compiler.
"""

import argparse
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import ON_A_GPU, Bar, Result, interleaved, parser, spread
from benchmarks.models import ADAPTERS, LLAMA_7B, Shape, base_weights, default_dtype, flop_counter
from raycv.model.dora import prepared

MICRO_BATCHES = 4
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BAR_TOKENS = 256
COMPILED = "dora_raycv_compiled"


class Step:
    """One optimizer step of one variant on one layer."""

    def __init__(self, variant: str, shape: Shape, dtype: torch.dtype, tokens: int, device: torch.device) -> None:
        from transformers import LlamaModel

        self.tokens = tokens
        self._compiled = variant == COMPILED
        self._adapter = ADAPTERS["dora_raycv" if self._compiled else variant]
        torch.manual_seed(0)
        with default_dtype(dtype), device:
            self.model = self._adapter.on(LlamaModel(shape.config()))
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)  # as trained: B is zero at the start
        # In a whole model the input comes from an adapted layer, so it has a gradient.
        self._input = torch.randn(1, tokens, shape.hidden, device=device, dtype=dtype, requires_grad=True)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-4)
        self._block = ExitStack()
        self._refresh = self._block.enter_context(prepared(self.model, dtype))
        if self._compiled:
            self.model.compile()

    def __call__(self, micro_batches: int = MICRO_BATCHES) -> None:
        for _ in range(micro_batches):
            with self._adapter.context(self.model):
                states = self.model(inputs_embeds=self._input).last_hidden_state
            states.float().square().mean().backward()
        self._optimizer.step()
        self._refresh()
        self._optimizer.zero_grad()

    def flops(self) -> float | None:
        """FLOPs of a step of one micro-batch in units of N·tokens: raycv's norm counts in full, as if for that one.

        Attention's own are counted on a GPU only; of compiled code none are counted.
        """
        if self._compiled:
            self()  # compiles
            return None
        with flop_counter() as counter:
            self(micro_batches=1)
        return counter.get_total_flops() / (base_weights(self.model) * self.tokens)


def gemm_gflops(dtype: torch.dtype, shape: Shape, device: torch.device) -> float:
    """GFLOP/s of the layer's up projection on 256 tokens: which type suits this processor."""
    x = torch.randn(256, shape.hidden, device=device).to(dtype)
    weight = torch.randn(shape.intermediate, shape.hidden, device=device).to(dtype)
    multiply = partial(torch.nn.functional.linear, x, weight)
    seconds = interleaved({"gemm": multiply}, 5, device=device)["gemm"]
    return 2 * x.shape[0] * weight.numel() / spread(seconds)["median"] / 1e9


def peak_bytes(step: Step, device: torch.device) -> int:
    """Peak memory of a process (on a GPU: of its tensors) that built the layer and ran two micro-batches."""
    step(micro_batches=2)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_resident()


def _peak_resident() -> int:
    """Of this process alone, in bytes: `getrusage` would count its parent's peak."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def peak_in_a_process(variant: str, dtype: str, tokens: int, *, small: bool) -> int:
    """`peak_bytes` of a variant, measured in a fresh process: a process's peak never falls."""
    command = [sys.executable, "-m", "benchmarks.layer", "--peak", variant, dtype, str(tokens)]
    done = subprocess.run([*command, *(["--small"] if small else [])], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(steps: dict[str, Step], repeats: int, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds of a micro-batch and FLOPs of each variant, interleaved."""
    flops = {variant: step.flops() for variant, step in steps.items()}  # the warm-up too
    seconds = interleaved(steps, repeats, device=device, warm_up=False)
    return {
        variant: {"seconds": spread([value / MICRO_BATCHES for value in values]), "flops_per_n_token": flops[variant]}
        for variant, values in seconds.items()
    }


def bars(rows: list[dict[str, Any]], main: str) -> list[Bar]:
    """The claims, on the type that suits this machine."""
    seconds = {
        row["variant"]: row["seconds"]["median"] for row in rows if (row["dtype"], row["tokens"]) == (main, BAR_TOKENS)
    }
    ours, peft = seconds["dora_raycv"], min(seconds[name] for name in seconds if name.startswith("dora_peft"))
    return [
        Bar(f"times faster than the better PEFT DoRA, {BAR_TOKENS} tokens, {main}", peft / ours, 3),
        Bar(f"times the time of PEFT's LoRA, {BAR_TOKENS} tokens, {main}", ours / seconds["lora"], 1.15, at_most=True),
    ]


def main() -> None:
    arguments = parser(__doc__, repeats=3)
    arguments.add_argument("--peak", nargs=3, metavar=("VARIANT", "DTYPE", "TOKENS"), help=argparse.SUPPRESS)
    arguments.add_argument("--both", action="store_true", help="measure bf16 and fp32, not only the faster product")
    arguments.add_argument("--compile", action="store_true", help="raycv's layer under torch.compile too")
    options = arguments.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Shape(64, 172, 4, 1) if options.small else Shape(LLAMA_7B.hidden, LLAMA_7B.intermediate, LLAMA_7B.heads, 1)
    if options.peak:
        variant, dtype, tokens = options.peak
        print(peak_bytes(Step(variant, shape, DTYPES[dtype], int(tokens), device), device))  # noqa: T201
        return
    rates = {name: gemm_gflops(dtype, shape, device) for name, dtype in DTYPES.items()}
    main_dtype = max(rates, key=lambda name: rates[name])
    result = Result(
        f"layer{ON_A_GPU if device.type == 'cuda' else ''}", options, **vars(shape), micro_batches=MICRO_BATCHES,
        dropout=0.05, gradient_checkpointing=True,
        gemm_gflops=rates, main_dtype=main_dtype,
        titles={name: adapter.title for name, adapter in ADAPTERS.items()} | {COMPILED: "DoRA, raycv, compiled"},
    )  # fmt: skip
    others = [(dtype, BAR_TOKENS) for dtype in DTYPES if dtype != main_dtype] if options.both else []
    for dtype, tokens in [(main_dtype, 64), (main_dtype, BAR_TOKENS), *others]:
        # In fp32 there is no autocast and no bf16 adapter: PEFT's DoRA is its default.
        variants = [name for name in ADAPTERS if dtype == "bf16" or name != "dora_peft_bf16"]
        if options.compile and (dtype, tokens) == (main_dtype, BAR_TOKENS):
            variants.append(COMPILED)
        steps = {variant: Step(variant, shape, DTYPES[dtype], tokens, device) for variant in variants}
        for variant, values in measure(steps, options.repeats, device).items():
            with_peak = (dtype, tokens) == (main_dtype, BAR_TOKENS) and variant != COMPILED
            with_peak &= not options.small or variant == "dora_raycv"
            peak = {"peak_bytes": peak_in_a_process(variant, dtype, tokens, small=options.small)} if with_peak else {}
            result.add({"dtype": dtype, "tokens": tokens, "variant": variant, **values, **peak})
    result.add(bars=bars(result.value["rows"], main_dtype))
    result.report()


if __name__ == "__main__":
    main()
