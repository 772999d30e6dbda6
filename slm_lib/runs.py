"""A run of `python -m slm_lib train`: its command line, its processes, its folder of checkpoints, its end."""

import argparse
import contextlib
import copy
import io
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist

from slm_lib import checkpoints, data, generation, gpu, tokens, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.faults import enough_memory
from slm_lib.ngrams import loss_units
from slm_lib.presets import PRESETS
from slm_lib.provenance import provenance
from slm_lib.settings import CHOICES, TrainingConfig, fastest_precision

RUNS, LONG_WORK = Path("runs"), 1e15  # operations that take more than an hour without a GPU
SIZES = {
    "block_size": "how many tokens (by default characters) the model sees at once",
    "n_layer": "how many blocks are stacked",
    "n_head": "how many heads of attention share n_embd",
    "n_embd": "how many numbers describe one position",
    "dropout": "share of activations dropped in training, 0 to 1",
}
SETTINGS = {
    "batch_size": "how many pieces of text are read side by side in one step",
    "max_iters": "how many steps to train",
    "learning_rate": "the highest step size",
    "weight_decay": "how strongly weights are pulled towards zero",
    "warmup_iters": "steps over which the learning rate climbs to its highest",
    "beta1": "how long Adam remembers gradients",
    "beta2": "how long Adam remembers their squares",
    "grad_clip": "the longest gradient that is taken as it is",
    "eval_interval": "steps between checkpoints",
    "seed": "the same seed trains the same model",
    "gradient_accumulation": "cut each batch into so many pieces, to take less memory",
    "schedule": "how the learning rate goes on after the warm-up",
    "precision": "of matrix products; auto is bfloat16 where this machine is faster with it, and float32 elsewhere",
    "optimizer": "muon moves the matrices inside the blocks by Muon, and all else by AdamW",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `train` and `tune` have in common: the recipe, the text, and every size and setting."""
    parser.add_argument("--preset", default="shakespeare-cpu", choices=PRESETS, help="the recipe")
    parser.add_argument("--corpus", help="shakespeare, playhouse or a text file; otherwise what is here")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default): the best one found")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="learn N byte-pair tokens (default: characters)")
    parser.add_argument("--design", choices=["modern", "gpt2"], help="the model's design (default modern)")
    preset = PRESETS["shakespeare-cpu"]
    defaults = {"dropout": 0.0, **preset.sizes, **asdict(preset.training)}
    for name, meaning in {**SIZES, **SETTINGS}.items():
        help = f"{meaning} ({defaults[name]} in shakespeare-cpu)"
        kind = {"choices": CHOICES[name]} if name in CHOICES else {"type": type(defaults[name]), "metavar": "N"}
        parser.add_argument(option(name), help=help, **kind)
    parser.add_argument("--compile", action="store_true", default=None, help="compile the model: slow first, fast then")


def option(name: str) -> str:
    """The option of the command line for a setting."""
    return "--" + name.replace("_", "-")


@dataclass
class Run:
    """A training with its folder: checkpoints on the way, the model at the end."""

    trainer: training.Trainer
    tokenizer: tokens.Tokenizer
    corpus: data.Corpus
    folder: Path
    commands: list[str]

    def keep_checkpoint(self, trainer: training.Trainer) -> None:
        """Keep the present step, and the newest before it; earlier ones are deleted."""
        place = self.folder / f"step-{trainer.step:06d}"
        if trainer.step and not place.exists():
            about = {"commands": self.commands, "corpus": {"name": self.corpus.name, "sha256": self.corpus.sha256}}
            try:
                trainer.save(place, self.tokenizer, about)
            except OSError as error:  # a full disk must not cost the training that is under way
                print(f"\ngoing on without this checkpoint: {error}", file=sys.stderr)
            for old in kept_checkpoints(self.folder)[:-2]:
                shutil.rmtree(old)

    def go(self) -> None:
        """Train to the end or an interrupt. Only the first of several processes keeps and prints something."""
        trainer, folder = self.trainer, self.folder
        if trainer.step >= trainer.config.max_iters and (folder / "model").exists():
            print(f"this training is at its end, and {folder / 'model'} is its model: a higher --max-iters goes on")
            return
        try:
            history = trainer.run(self.keep_checkpoint)
            if trainer.ranks.rank == 0:
                self.keep_checkpoint(trainer)
        except FloatingPointError as error:
            resume = f"--resume {folder} --learning-rate {trainer.config.learning_rate / 3:.2g}"
            advice = f"; the last checkpoint is good: python -m slm_lib train {resume}" * bool(kept_checkpoints(folder))
            raise FloatingPointError(f"{error}{advice}") from None
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = str(error).splitlines()[0]
            raise ValueError(f"this machine cannot compile the model ({reason}): leave out --compile") from None
        if history.interrupted:
            print(f"stopped after step {trainer.step:,}, and saved: python -m slm_lib train --resume {folder}")
        elif trainer.ranks.rank == 0:
            self.finish()

    def finish(self) -> None:
        """Keep the model, and print its loss on the whole validation text and a sample."""
        trainer, corpus = self.trainer, self.corpus
        model = trainer.model.half().float()  # it is kept in half precision: its loss is measured after that rounding
        loss, chars_per_token = validation_loss(model, self.tokenizer, corpus)
        if not math.isfinite(loss):
            raise FloatingPointError("the weights have grown beyond half precision: start anew, learning_rate lower")
        about = {"commands": self.commands, **provenance(trainer, corpus, loss, chars_per_token)}
        saved = checkpoints.save_model(_new_folder(self.folder / "model"), model, self.tokenizer, about, torch.float16)
        floor = f"; floor {corpus.floor:.4f} nats per character" if corpus.floor else ""
        print(f"trained for {trainer.history.seconds:.0f} s; loss on the whole validation text of {corpus.name}: "
              f"{loss_units(loss, chars_per_token)}{floor}")
        print(f"saved: {saved}   (python -m slm_lib generate --model {saved})\n")
        print(generation.generate(model, self.tokenizer, "\n", 400))


def train(args: argparse.Namespace) -> None:
    """Train, with checkpoints on the way, and end with the loss on the whole validation text and a sample."""
    with processes(args.device) as device:
        corpus = data.load_corpus(args.corpus or PRESETS[args.preset].corpus)
        run = _resume(args, corpus, device) if args.resume else _start(args, corpus, device)
        run.commands.append(" ".join(["python -m slm_lib", *sys.argv[1:]]))
        model, config, count = run.trainer.model, run.trainer.config, run.trainer.ranks.count
        place = str(device) if count == 1 else f"{count} processes ({device.type})"
        print(f"model: {model.n_parameters:,} parameters, a vocabulary of {run.tokenizer.vocab_size:,}, on {place} in "
              f"{config.precision}; {config.max_iters:,} steps of {config.batch_size} x {run.trainer.block_size} "
              f"tokens; checkpoints in {run.folder}")
        if run.trainer.ranks.rank == 0:
            checkpoints.sweep(run.folder)  # it belongs to this run: what a killed process left unfinished is of no use
        _make_ready(run.trainer)
        run.go()


def _make_ready(trainer: training.Trainer) -> None:
    """On CUDA let the updates be replayed; on a processor say how long work takes that was meant for CUDA."""
    device, config = trainer.device, trainer.config
    step = sum(gpu.step_flops(trainer.model.config, config.batch_size, config.optimizer).values())
    if device.type == "cuda":
        try:
            gpu.capture(trainer)
        except ValueError as error:
            print(f"each operation is launched on its own: {error}")
    elif device.type == "cpu" and (flops := step * (config.max_iters - trainer.step)) > LONG_WORK:
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        fastest = gpu.measure_roof(device, dtype).peak
        print(f"on this processor that takes {flops / fastest / 3600:.1f} hours or more: it is meant for a GPU, and "
              "--preset shakespeare-cpu for a processor")


@contextlib.contextmanager
def processes(name: str) -> Iterator[torch.device]:
    """The device by name; within it, the processes that torchrun started are joined, and only the first one prints."""
    device = training.choose_device(name)
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    if device.type == "cuda":
        place, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if place >= here:
            raise ValueError(f"{here} GPUs are on this machine: take --nproc-per-node={here}")
        device = torch.device("cuda", place)
        torch.cuda.set_device(device)
    elif device.type != "cpu":
        raise ValueError(f"several processes train together on cuda or cpu, not on {device}: add --device cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with contextlib.redirect_stdout(io.StringIO()) if dist.get_rank() else contextlib.nullcontext():
        yield device
    dist.destroy_process_group()


def _start(args: argparse.Namespace, corpus: data.Corpus, device: torch.device) -> Run:
    if args.minutes is not None and args.max_iters is not None:
        raise ValueError("--minutes and --max-iters both say when to end: leave one of the two out")
    folder = args.out or _new_folder(RUNS / args.preset)
    if kept_checkpoints(folder) or (folder / "model").exists():
        raise FileExistsError(f"{folder} is in use: go on with it by --resume {folder}, or name another --out")
    text, _ = data.split(corpus)
    tokenizer = make_tokenizer(args, corpus, text)
    config = make_training(args, device)
    model = make_model(args, tokenizer.vocab_size, config.seed, device)
    trainer = training.Trainer(model, tokenizer.encode(text), config)
    if args.minutes is not None:
        trainer.config = replace(config, max_iters=steps_within(trainer, 60 * args.minutes))
        print(f"{args.minutes:g} minutes are {trainer.config.max_iters:,} steps here, as timed on a copy of the model")
    return Run(trainer, tokenizer, corpus, folder, [])


def make_training(args: argparse.Namespace, device: torch.device) -> TrainingConfig:
    """The preset's settings, changed by those of the command line; "auto" precision becomes the one that is fast here.

    So what is stored says it outright, and a run that is resumed elsewhere goes on as it began.
    """
    config = replace(PRESETS[args.preset].training, **given(args, [*SETTINGS, "compile"]))
    return replace(config, precision=fastest_precision(device)) if config.precision == "auto" else config


def steps_within(trainer: training.Trainer, seconds: float) -> int:
    """How many steps of a training fit into a time, its own few timed steps included; the trainer stays as it is.

    Those steps are made by a copy of the model. Several processes agree on the number.
    """
    if not 0 < seconds < 1e8:
        raise ValueError(f"{seconds / 60:g} minutes are no time to train in: give more than 0, less than three years")
    with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []):
        model, config = copy.deepcopy(trainer.model), replace(trainer.config, max_iters=4)
        probe = training.Trainer(model, trainer.ids, config, trainer.block_size)
        _make_ready(probe)
        first = _timed(probe, 1)  # compiles, where that is asked for
        few = _timed(probe, 3)  # the last of them is recorded, on CUDA
        count = max(3, min(100, int(seconds / 40 / (few / 3))))
        last = _timed(probe, count)
    step = last / count
    return max(1, int((seconds - 2 * (first + few) - last) / step + 4))  # its own first four take longer too


def _timed(trainer: training.Trainer, steps: int) -> float:
    """Seconds for so many steps, on average over the processes."""
    before = trainer.history.seconds
    trainer.config = replace(trainer.config, max_iters=trainer.step + steps)
    if trainer.run(progress=False).interrupted:
        sys.exit("stopped before the training began")
    return trainer.ranks.mean(torch.tensor(trainer.history.seconds - before, device=trainer.device))


def make_tokenizer(args: argparse.Namespace, corpus: data.Corpus, text: str) -> tokens.Tokenizer:
    """Characters, or as many byte pairs as the command line asks for, learned from a text."""
    if args.vocab_size is None:
        return data.CharTokenizer(corpus.symbols)
    return tokens.BytePairTokenizer.train(text, args.vocab_size)


def make_model(args: argparse.Namespace, vocab_size: int, seed: int, device: torch.device, **sizes) -> GPT:
    """A fresh model: the preset's sizes, changed by those of the command line, and by `sizes`."""
    torch.manual_seed(seed)
    design = getattr(GPTConfig, args.design or "modern")
    with enough_memory("lower n_layer, n_embd or vocab_size"):
        sizes = {**PRESETS[args.preset].sizes, **given(args, SIZES), **sizes}
        return GPT(design(vocab_size=vocab_size, **sizes)).to(device)


def given(args: argparse.Namespace, names) -> dict:
    """What was given on the command line, of these names."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _resume(args: argparse.Namespace, corpus: data.Corpus, device: torch.device) -> Run:
    """The run as the newest whole checkpoint in a folder has it."""
    if late := given(args, [*SIZES, "vocab_size", "design", "out", "minutes", *sorted(training.KEPT)]):
        raise ValueError(f"{', '.join(map(option, late))} cannot change half-way: leave it out, or start anew")
    text, _ = data.split(corpus)
    for checkpoint in reversed(kept_checkpoints(args.resume)):
        try:
            _, tokenizer, about = checkpoints.load_model(checkpoint)
        except (ValueError, FileNotFoundError) as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        learned = about.get("corpus", {})
        if learned.get("sha256") != corpus.sha256:
            name = learned.get("name", "another text")
            raise ValueError(f"{checkpoint} was trained on {name}, not on {corpus.name}: name it with --corpus")
        changes = given(args, [*SETTINGS, "compile"])
        trainer = training.Trainer.resume(checkpoint, tokenizer.encode(text), device, **changes)
        return Run(trainer, tokenizer, corpus, args.resume, about["commands"])
    raise FileNotFoundError(f"{args.resume} holds no whole checkpoint: give a folder that `train` named, or start anew")


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def validation_loss(model: GPT, tokenizer: tokens.Tokenizer, corpus: data.Corpus, block_size: int | None = None):
    """The loss on the whole validation text, in nats per token, and how many characters a token of it holds."""
    _, text = data.split(corpus)
    ids = tokenizer.encode(text)
    return training.evaluate(model, ids, block_size, tokens.start_id(tokenizer)), len(text) / len(ids)


def _new_folder(wanted: Path) -> Path:
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10_000))]
    return next(name for name in names if not name.exists())
