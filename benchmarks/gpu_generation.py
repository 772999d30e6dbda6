"""Characters per second on a GPU, one stream: `slm_lib` against nanoGPT's own `generate`, with the same weights.

    python benchmarks/gpu_generation.py --nanogpt PATH          (about a minute on a GPU)
    python benchmarks/gpu_generation.py --nanogpt PATH --dry    (the whole path on a CPU at toy size, kept in runs/dry)

As benchmarks/generation.py, whose twins, prompts and stretches these are: in the shape of nanoGPT's Shakespeare model
and with its context of 256. nanoGPT writes in float32, with TF32 allowed, and under autocast to bfloat16, as its
sample.py does; the faster of both is what ours, `slm_lib.gpu.Writer` in float32, is compared with. All take turns
within a round, and a ratio is formed within a round; the first round, in which ours records its steps, warms up.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import generation as twins
import record
import torch
from gpu_steps import device_name, wait
from torch import nn

from slm_lib import gpu, training

SHAPE, CONTEXT, ROUNDS = "10.7M", 256, 5
DRY_SHAPE, DRY_CONTEXT = {"n_layer": 1, "n_head": 2, "n_embd": 16}, 32


def seconds_of_nanogpt(model: nn.Module, begin: str, length: int, lower: bool = False) -> float:
    """How long nanoGPT takes to write `length` characters, in bfloat16 where a lower precision is asked for."""
    device = next(model.parameters()).device
    ids = twins.TOKENIZER.encode(begin)[None].to(device)
    with torch.autocast(device.type, torch.bfloat16) if lower else nullcontext():
        began = wait(device)
        model.generate(ids, length, twins.TEMPERATURE)
        return wait(device) - began


def seconds_of_ours(write: Callable[..., str], begin: str, length: int) -> float:
    """How long the library takes for the same."""
    began = time.perf_counter()
    assert len(write(twins.TOKENIZER, begin, length, twins.TEMPERATURE)) == length
    return time.perf_counter() - began


def measure(theirs: nn.Module, ours: nn.Module, rounds: int) -> list[dict]:
    """Rows: all three by turns, for each stretch and round, after a round that warms up."""
    rows, write = [], gpu.Writer(ours).generate
    for number in range(rounds + 1):
        for stretch in twins.STRETCHES:
            begin, length = twins.work(ours.config.block_size, stretch)
            full, half = (seconds_of_nanogpt(theirs, begin, length, lower) for lower in (False, True))
            mine = seconds_of_ours(write, begin, length)
            rows.append({"stretch": stretch, "round": number, "characters": length, "nanogpt": round(length / full, 1),
                         "nanogpt_bfloat16": round(length / half, 1), "ours": round(length / mine, 1),
                         "ratio": round(min(full, half) / mine, 2)})  # fmt: skip
    return [row for row in rows if row["round"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help=f"a checkout of nanoGPT at commit {twins.COMMIT}")
    parser.add_argument("--dry", type=Path, nargs="?", const=record.ROOT / "runs" / "dry", metavar="FOLDER",
                        help="the whole path at toy size on a CPU, kept in FOLDER (runs/dry)")  # fmt: skip
    args = parser.parse_args()
    try:
        device, nanogpt = training.choose_device("cpu" if args.dry else "cuda"), twins.load_nanogpt(args.nanogpt)
    except ValueError as error:
        parser.error(str(error))
    torch.backends.cuda.matmul.allow_tf32 = True
    twins.SHAPES["dry"] = DRY_SHAPE
    pair = twins.twins(nanogpt, *(("dry", DRY_CONTEXT) if args.dry else (SHAPE, CONTEXT)))
    rows = measure(*(model.to(device) for model in pair), rounds=1 if args.dry else ROUNDS)
    config = {"shape": twins.SHAPES[SHAPE], "context": CONTEXT, "temperature": twins.TEMPERATURE, "rounds": ROUNDS}
    name = str(args.dry.resolve() / "gpu" / "generation") if args.dry else "gpu/generation"
    record.save(name, config, rows, device=device_name(device), dry=bool(args.dry), nanogpt=twins.COMMIT)
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
