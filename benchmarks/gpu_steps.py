"""What each step of speed-up buys on a GPU, what float16 loses, and what both devices do with the same products.

    python benchmarks/gpu_steps.py            (about 3 minutes on a GPU)
    python benchmarks/gpu_steps.py --dry      (the whole path on a CPU at toy size, kept in runs/dry)

Five studies, told apart by the `study` of a row. "speed": the preset shakespeare-gpu is trained in ways that each add
one thing to the one before, from a plain loop in float32 to a step that is replayed as a CUDA graph; all take turns,
round by round. "precision" trains with AdamW in formats of 32 and 16 bits, and "gradients" looks at one gradient, of
the same weights and batch, in each of them. "products" and "bandwidth" are points for a roofline: products of square
matrices, and of this model's own shapes, and a copy, on the CPU and on the GPU. "memory" is what training took at its
peak, beside what `slm_lib.gpu` says.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import record
import torch
from contestants import TOKENIZER
from gpu_contestants import settings
from torch import Tensor, nn

from slm_lib import data, gpu, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.settings import TrainingConfig, make_optimizer

PLAIN = {"tf32": False, "precision": "float32", "resident": False, "optimizer": "adamw", "fused": False,
         "compile": False, "graph": False}  # fmt: skip
SPEED = {  # a way to train: what it changes in the one before, and that in words
    "float32": ({}, "a plain loop: batches are cut on the CPU, and every weight has its own small steps of AdamW"),
    "TF32": ({"tf32": True}, "matrix products round what goes in to 10 bits after the point"),
    "bfloat16": ({"precision": "bfloat16"}, "autocast: products read and write numbers of half the size"),
    "text on the GPU": ({"resident": True}, "the text lies in the GPU's memory, and batches are cut there"),
    "fused AdamW": ({"fused": True}, "one program moves all weights"),
    "torch.compile": ({"compile": True}, "the model's many small programs are made into fewer"),
    "CUDA graph": ({"compile": False, "graph": True}, "the whole step is recorded once and replayed, without Python"),
    "Muon": ({"optimizer": "muon"}, "Muon in place of AdamW for the matrices inside the blocks"),
}
FORMATS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
MORE = ["float16, loss scaled", "all in float16"]  # beyond autocast alone
FULL = {"dry": False, "changes": {}, "characters": None, "rounds": 5, "steps": 20, "seeds": [0, 1, 2],
        "precision_steps": 200,
        "sides": [2**k for k in range(5, 14)], "cpu_sides": [2**k for k in range(5, 12)], "copy": 2**30,
        "positions": [1, 16, 256, 4_096, 16_384], "batches": [4, 16, 64], "seconds": 0.2}  # fmt: skip
DRY = {**FULL, "dry": True, "changes": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4},
       "characters": 20_000, "rounds": 2, "steps": 2, "seeds": [0, 1], "precision_steps": 40, "sides": [16, 64],
       "cpu_sides": [16, 64], "copy": 2**20, "positions": [1, 128], "batches": [2, 4], "seconds": 0.01}  # fmt: skip


def wait(device: torch.device) -> float:
    """The time, after all that the device still had to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# --- what each step buys ----------------------------------------------------------------------------------------------


class FromTheHost(training.Trainer):
    """The loop with its text in the CPU's memory: each batch is cut there and brought over."""

    def draw(self) -> tuple[Tensor, Tensor]:
        batch = data.draw_batch(self.host, self.config.batch_size, self.block_size, self.generator)
        return tuple(side.to(self.device) for side in batch)


def ways(device: torch.device) -> dict[str, dict]:
    """The ways to train that a device has, each as all of its switches."""
    only_cuda, found, switches = {"TF32", "torch.compile", "CUDA graph"}, {}, PLAIN
    for name, (change, _) in SPEED.items():
        if device.type == "cuda" or name not in only_cuda:
            switches = {**switches, **change}
            found[name] = switches
    return found


def trainer_of(way: dict, ids: Tensor, changes: dict, device: torch.device) -> training.Trainer:
    """A trainer that trains in one of the ways."""
    sizes, config = settings(changes)
    config = replace(config, **{name: way[name] for name in ("precision", "optimizer", "compile")}, max_iters=10_000)
    torch.manual_seed(config.seed)
    model = GPT(GPTConfig.modern(vocab_size=TOKENIZER.vocab_size, **sizes)).to(device)
    optimizer = make_optimizer(model, config)
    if not way["fused"]:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=config.weight_decay, foreach=False)
    trainer = (training.Trainer if way["resident"] else FromTheHost)(model, ids, config, optimizer=optimizer)
    trainer.host = ids
    if way["graph"]:
        gpu.capture(trainer)
    return trainer


def turn(trainer: training.Trainer, way: dict, steps: int) -> tuple[float, float]:
    """Seconds for each of so many updates, and the last one's batch loss."""
    torch.backends.cuda.matmul.allow_tf32 = way["tf32"]
    trainer.model.train()
    began = wait(trainer.device)
    for _ in range(steps):
        loss = trainer.update()
    return (wait(trainer.device) - began) / steps, float(loss)


def speed(ids: Tensor, plan: dict, device: torch.device, keep: Callable) -> None:
    """A row for each way and round; in the first the trainer is built and warms up, which is its start."""
    trainers, facts = {}, {}
    for number in range(plan["rounds"]):
        for name, way in ways(device).items():
            if not number:
                before, began = taken(device), wait(device)
                trainers[name] = trainer_of(way, ids, plan["changes"], device)
                turn(trainers[name], way, 1)
                facts[name] = {"start_seconds": round(wait(device) - began, 3)}
                turn(trainers[name], way, plan["steps"])
                facts[name]["memory_mib"] = before and round((peak(device) - before) / 2**20)
            trainer = trainers[name]
            seconds, loss = turn(trainer, way, plan["steps"])
            tokens = trainer.config.batch_size * trainer.block_size
            keep({"study": "speed", "variant": name, "round": number, "milliseconds_per_step": round(1e3 * seconds, 4),
                  "tokens_per_second": round(tokens / seconds), **facts[name], "loss": round(loss, 4)})  # fmt: skip


def taken(device: torch.device) -> int | None:
    """Bytes that PyTorch holds of a GPU now; from here on a new peak is looked for. None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak(device: torch.device) -> int | None:
    """The most bytes that PyTorch held since then."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def memory(ids: Tensor, plan: dict, device: torch.device, keep: Callable) -> None:
    """What training takes at its peak, in both precisions and for several batches, and what the formula says."""
    for precision in ("float32", "bfloat16"):
        way = {**PLAIN, "tf32": True, "precision": precision, "resident": True, "fused": True, "optimizer": "muon"}
        for batch_size in plan["batches"]:
            before = taken(device)
            trainer = trainer_of(way, ids, {**plan["changes"], "batch_size": batch_size}, device)
            turn(trainer, way, 3)
            said = gpu.training_memory(trainer.model.config, batch_size, way["optimizer"], precision)
            keep({"study": "memory", "precision": precision, "batch_size": batch_size, "predicted": said,
                  "measured": None if before is None else peak(device) - before})  # fmt: skip
            del trainer


# --- what float16 loses -----------------------------------------------------------------------------------------------


def fresh(ids: Tensor, plan: dict, seed: int, device: torch.device) -> tuple[nn.Module, TrainingConfig, Callable]:
    """A model, its settings under AdamW without dropout, and what draws its batches."""
    sizes, config = settings({**plan["changes"], "dropout": 0.0, "optimizer": "adamw", "learning_rate": 1e-3})
    torch.manual_seed(seed)
    model = GPT(GPTConfig.modern(vocab_size=TOKENIZER.vocab_size, **sizes)).to(device)
    generator, ids = torch.Generator().manual_seed(seed), ids.to(device)
    return model, config, lambda: data.draw_batch(ids, config.batch_size, sizes["block_size"], generator)


def loss_in(model: nn.Module, batch: tuple[Tensor, Tensor], format: str, device: torch.device) -> Tensor:
    """The loss of a batch with matrix products in a format, by autocast."""
    dtype = FORMATS[format]
    with torch.autocast(device.type, dtype) if dtype else nullcontext():
        logits = model(batch[0])  # (B, T, V)
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[1].flatten())


def precision(ids: Tensor, plan: dict, device: torch.device, keep: Callable) -> None:
    """Train in every format, with and without what rescues float16; a loss that is not finite is None."""
    for seed in plan["seeds"]:
        for variant in [*FORMATS, *MORE]:
            losses = train_in(variant, ids, plan, seed, device)
            curve = [[step, loss if math.isfinite(loss) else None] for step, loss in enumerate(losses)]
            last = statistics.fmean(losses[-20:])
            keep({"study": "precision", "variant": variant, "seed": seed, "curve": curve[::5],
                  "loss": round(last, 4) if math.isfinite(last) else None})  # fmt: skip


def train_in(variant: str, ids: Tensor, plan: dict, seed: int, device: torch.device) -> list[float]:
    """The batch losses of a training in a format."""
    model, config, draw = fresh(ids, plan, seed, device)
    model = model.half() if variant == "all in float16" else model
    format = "float16" if variant == "float16, loss scaled" else variant if variant in FORMATS else "float32"
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, (config.beta1, config.beta2))
    scaler = torch.amp.GradScaler(device.type, enabled=variant == "float16, loss scaled")
    losses = []
    for _ in range(plan["precision_steps"]):
        loss = loss_in(model, draw(), format, device)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.detach())
    return [round(loss, 4) for loss in torch.stack(losses).tolist()]


def gradients(ids: Tensor, plan: dict, device: torch.device, keep: Callable) -> None:
    """One gradient, of a model that has trained a little, computed in every format: what becomes zero, and how wrong.

    Sizes are counted by their power of two, those of zero apart.
    """
    model, config, draw = fresh(ids, plan, 0, device)
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate)
    for _ in range(20):
        optimizer.zero_grad()
        loss_in(model, draw(), "float32", device).backward()
        optimizer.step()
    batch, exact = draw(), None
    for format in FORMATS:
        optimizer.zero_grad()
        loss_in(model, batch, format, device).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
        exact = gradient if exact is None else exact
        powers, counts = gradient[gradient != 0].abs().log2().floor().int().unique(return_counts=True)
        keep({"study": "gradients", "variant": format, "zero": round((gradient == 0).double().mean().item(), 6),
              "error": round(((gradient - exact).norm() / exact.norm()).item(), 6), "exponents": powers.tolist(),
              "shares": [round(n / len(gradient), 8) for n in counts.tolist()]})  # fmt: skip


# --- points for a roofline --------------------------------------------------------------------------------------------


def seconds_of(work: Callable, device: torch.device, least: float) -> float:
    """The median time of a piece of work, of repetitions that together take at least so long, after one to warm up."""
    work()
    times, began = [], wait(device)
    while not times or wait(device) - began < least:
        count, start = (10 if device.type == "cuda" else 1), wait(device)
        for _ in range(count):
            work()
        times.append((wait(device) - start) / count)
    return statistics.median(times)


def products(plan: dict, device: torch.device, changes: dict, keep: Callable) -> None:
    """Products (m, k) @ (k, n), square ones and those of this model's first MLP matrix, in each precision."""
    C = settings(changes)[0]["n_embd"]
    sides = plan["sides"] if device.type == "cuda" else plan["cpu_sides"]
    shapes = [("square", side, side, side) for side in sides]
    shapes += [("this model's MLP", positions, C, 4 * C) for positions in plan["positions"]]
    precisions = {"float32": torch.float32, "TF32": torch.float32, "bfloat16": torch.bfloat16}
    for precision, dtype in precisions.items():
        if precision == "TF32" and device.type != "cuda":
            continue
        torch.backends.cuda.matmul.allow_tf32 = precision == "TF32"
        for what, m, k, n in shapes:
            left, right = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
            seconds = seconds_of(lambda left=left, right=right: left @ right, device, plan["seconds"])
            keep({"study": "products", "device": device_name(device), "what": what, "precision": precision,
                  "m": m, "k": k, "n": n, "seconds": seconds, "flops_per_second": 2 * m * k * n / seconds,
                  "intensity": gpu.intensity(m, n, k, dtype.itemsize)})  # fmt: skip


def bandwidth(plan: dict, device: torch.device, keep: Callable) -> None:
    """How fast a tensor is copied within a device's memory: its bytes are read once and written once."""
    source = torch.randn(plan["copy"] // 4, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), device, plan["seconds"])
    keep({"study": "bandwidth", "device": device_name(device), "bytes": 2 * plan["copy"], "seconds": seconds,
          "bytes_per_second": 2 * plan["copy"] / seconds})  # fmt: skip


def device_name(device: torch.device) -> str:
    """What a device is called in the results."""
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(plan: dict, device: torch.device, name: str) -> list[dict]:
    """Run all studies, and keep each row as soon as it is there."""
    train, _ = data.split(data.load_corpus())
    ids, rows = TOKENIZER.encode(train[: plan["characters"]]), []
    sizes, config = settings(plan["changes"])
    facts = {"device": device_name(device), "dry": plan["dry"], "batch_size": config.batch_size, "sizes": sizes,
             "steps_of_speed": {name: SPEED[name][1] for name in ways(device)}}  # fmt: skip

    def keep(row: dict) -> None:
        rows.append(row)
        record.save(name, plan, rows, **facts)

    for study in (speed, precision, gradients, memory):
        print(study.__name__, flush=True)
        study(ids, plan, device, keep)
    for each in dict.fromkeys((device, torch.device("cpu"))):
        print(f"products and copies on {each}", flush=True)
        products(plan, each, plan["changes"], keep)
        bandwidth(plan, each, keep)
    return rows


def table(rows: list[dict]) -> str:
    """What each step of speed-up buys, as Markdown: medians over the rounds, and times the first."""
    mine = [row for row in rows if row["study"] == "speed"]
    lines, first = [], None
    for name in dict.fromkeys(row["variant"] for row in mine):
        these = [row for row in mine if row["variant"] == name]
        milliseconds = statistics.median(row["milliseconds_per_step"] for row in these)
        rate, first = statistics.median(row["tokens_per_second"] for row in these), first or milliseconds
        memory = "–" if these[0]["memory_mib"] is None else f"{these[0]['memory_mib']:,}"
        lines.append([name, f"{milliseconds:.2f}", f"{rate:,.0f}", f"{first / milliseconds:.1f}", memory,
                      f"{these[0]['start_seconds']:.1f}"])  # fmt: skip
    return record.markdown(["", "ms / step", "characters / s", "times", "memory, MiB", "start, s"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", type=Path, nargs="?", const=record.ROOT / "runs" / "dry", metavar="FOLDER",
                        help="the whole path at toy size on a CPU, kept in FOLDER (runs/dry)")  # fmt: skip
    args = parser.parse_args()
    try:
        device = training.choose_device("cpu" if args.dry else "cuda")
    except ValueError as error:
        parser.error(f"{error}; --dry shows the whole path at toy size")
    plan, name = (DRY, str(args.dry.resolve() / "gpu_steps")) if args.dry else (FULL, "gpu_steps")
    print(table(measure(plan, device, name)))


if __name__ == "__main__":
    main()
