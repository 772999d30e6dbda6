"""The command line: python -m slm_lib download | train | evaluate | generate | run-notebooks | record-notebooks."""

import argparse
import dataclasses
import shutil
import sys
from pathlib import Path

import torch

from slm_lib import checkpoints, data, generation, tokens, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.faults import enough_memory
from slm_lib.ngrams import loss_units
from slm_lib.presets import PRESETS
from slm_lib.provenance import provenance
from slm_lib.settings import CHOICES

RUNS = Path("runs")
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
    "precision": "of matrix products; auto is bfloat16 on CUDA",
}


def add_train(commands) -> None:
    parser = commands.add_parser("train", help="train a model from nothing, or go on with one (--resume)")
    parser.set_defaults(call=train)
    parser.add_argument("--preset", default="shakespeare-cpu", choices=PRESETS, help="the recipe")
    parser.add_argument("--corpus", help="shakespeare, playhouse or a text file; otherwise what is here")
    parser.add_argument("--out", type=Path, help="where checkpoints and model go; by default a new folder in runs/")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from the newest checkpoint in FOLDER")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps or auto (default): the best one found")
    parser.add_argument("--vocab-size", type=int, metavar="N", help="learn N byte-pair tokens (default: characters)")
    parser.add_argument("--design", default="modern", choices=["modern", "gpt2"], help="the model's design")
    preset = PRESETS["shakespeare-cpu"]
    defaults = {"dropout": 0.0, **preset.sizes, **dataclasses.asdict(preset.training)}
    for name, meaning in {**SIZES, **SETTINGS}.items():
        help = f"{meaning} ({defaults[name]} in shakespeare-cpu)"
        kind = {"choices": CHOICES[name]} if name in CHOICES else {"type": type(defaults[name]), "metavar": "N"}
        parser.add_argument("--" + name.replace("_", "-"), help=help, **kind)
    parser.add_argument("--compile", action="store_true", default=None, help="compile the model: slow first, fast then")


def train(args: argparse.Namespace) -> None:
    """Train, with checkpoints on the way, and end with the loss on the whole validation text and a sample."""
    device = training.choose_device(args.device)
    corpus = data.load_corpus(args.corpus or PRESETS[args.preset].corpus)
    if args.resume:
        folder = args.resume
        trainer, tokenizer, commands = _resume(folder, corpus, device)
    else:
        folder = args.out or _new_folder(RUNS / args.preset)
        trainer, tokenizer, commands = *_start(args, corpus, device), []
    commands.append(" ".join(["python -m slm_lib", *sys.argv[1:]]))
    model, config = trainer.model, trainer.config
    print(f"model: {model.n_parameters:,} parameters, a vocabulary of {tokenizer.vocab_size:,}, on {device}; "
          f"{config.max_iters:,} steps of {config.batch_size} x {trainer.block_size} tokens; checkpoints in {folder}")

    def keep_checkpoint(trainer: training.Trainer) -> None:
        if trainer.step and not (folder / f"step-{trainer.step:06d}").exists():
            about = {"commands": commands, "corpus": {"name": corpus.name, "sha256": corpus.sha256}}
            try:
                trainer.save(folder / f"step-{trainer.step:06d}", tokenizer, about)
            except OSError as error:  # a full disk must not cost the training that is under way
                print(f"\ngoing on without this checkpoint: {error}", file=sys.stderr)
            for old in sorted(folder.glob("step-*"))[:-2]:
                shutil.rmtree(old)

    history = trainer.run(keep_checkpoint)
    keep_checkpoint(trainer)
    if history.interrupted:
        print(f"stopped after step {trainer.step:,}, and saved: python -m slm_lib train --resume {folder}")
        return
    model.half().float()  # the model is kept in half precision, so its loss is measured after that rounding
    loss, chars_per_token = _validation_loss(model, tokenizer, corpus)
    about = {"commands": commands, **provenance(trainer, corpus, loss, chars_per_token)}
    saved = checkpoints.save_model(folder / "model", model, tokenizer, about, torch.float16)
    floor = f"; floor {corpus.floor:.4f} nats per character" if corpus.floor else ""
    print(f"trained for {history.seconds:.0f} s; loss on the whole validation text of {corpus.name}: "
          f"{loss_units(loss, chars_per_token)}{floor}")
    print(f"saved: {saved}   (python -m slm_lib generate --model {saved})\n")
    print(generation.generate(model, tokenizer, "\n", 400))


def _validation_loss(model: GPT, tokenizer: tokens.Tokenizer, corpus: data.Corpus, block_size=None):
    """The loss on the whole validation text, in nats per token, and how many characters a token of it holds."""
    _, text = data.split(corpus)
    ids = tokenizer.encode(text)
    return training.evaluate(model, ids, block_size, tokens.start_id(tokenizer)), len(text) / len(ids)


def _start(args: argparse.Namespace, corpus: data.Corpus, device) -> tuple[training.Trainer, tokens.Tokenizer]:
    text, _ = data.split(corpus)
    if args.vocab_size is None:
        tokenizer = data.CharTokenizer(corpus.symbols)
    else:
        tokenizer = tokens.BytePairTokenizer.train(text, args.vocab_size)
    preset = PRESETS[args.preset]
    config = dataclasses.replace(preset.training, **_given(args, [*SETTINGS, "compile"]))
    torch.manual_seed(config.seed)
    design = getattr(GPTConfig, args.design)
    sizes = {**preset.sizes, **_given(args, SIZES)}
    with enough_memory("lower n_layer or n_embd"):
        model = GPT(design(vocab_size=tokenizer.vocab_size, **sizes)).to(device)
    return training.Trainer(model, tokenizer.encode(text), config), tokenizer


def _given(args: argparse.Namespace, names) -> dict:
    """What was given on the command line, of these names."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def _resume(folder: Path, corpus: data.Corpus, device) -> tuple[training.Trainer, tokens.Tokenizer, list[str]]:
    """The trainer of the newest whole checkpoint in `folder`, its tokenizer, and the commands that led to it."""
    text, _ = data.split(corpus)
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        try:
            _, tokenizer, about = checkpoints.load_model(checkpoint)
            same_text = about["corpus"]["sha256"] == corpus.sha256
            trainer = training.Trainer.resume(checkpoint, tokenizer.encode(text), device) if same_text else None
        except (ValueError, FileNotFoundError) as error:
            print(f"passed over: {error}", file=sys.stderr)
            continue
        if trainer is None:
            name = about["corpus"]["name"]
            raise ValueError(f"{checkpoint} was trained on {name}, not on {corpus.name}: name it with --corpus")
        return trainer, tokenizer, about["commands"]
    raise FileNotFoundError(f"{folder} holds no whole checkpoint: give the folder that `train` printed, or start anew")


def _new_folder(wanted: Path) -> Path:
    names = [wanted, *(wanted.with_name(f"{wanted.name}-{i}") for i in range(2, 10_000))]
    return next(name for name in names if not name.exists())


def evaluate(args: argparse.Namespace) -> None:
    """Print the loss of a stored model on the whole validation text of a corpus."""
    model, tokenizer, _ = checkpoints.load_model(args.model, training.choose_device(args.device))
    corpus = data.load_corpus(args.corpus)
    units = loss_units(*_validation_loss(model, tokenizer, corpus, args.block_size))
    length = len(corpus.text) - corpus.split_at
    print(f"{args.model} on the {length:,} validation characters of {corpus.name}: {units}")


def generate(args: argparse.Namespace) -> None:
    """Let a stored model go on with a prompt, printing as it writes."""
    model, tokenizer, _ = checkpoints.load_model(args.model, training.choose_device(args.device))
    pieces = generation.stream(model, tokenizer, args.prompt, args.length, args.temperature, args.top_k, args.seed)
    first = next(pieces, "")
    print(args.prompt + first, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def download(args: argparse.Namespace) -> None:
    """Bring tiny Shakespeare onto this machine, once."""
    found = data.find_shakespeare()
    try:
        print(f"Shakespeare is here: {found}" if found else f"Shakespeare is here now: {data.download_shakespeare()}")
    except (ConnectionError, ValueError) as error:
        if not args.if_online:
            raise
        reason = "no network" if isinstance(error, ConnectionError) else "it arrived damaged"
        print(f"Shakespeare could not be fetched ({reason}), so the notebooks will learn from playhouse")


def run_notebooks(args: argparse.Namespace) -> None:
    from slm_lib import notebooks  # imported late: Jupyter's machinery is not needed by the other commands

    sys.exit(notebooks.run())


def record_notebooks(args: argparse.Namespace) -> None:
    from slm_lib import notebooks

    sys.exit(notebooks.record())


def build_parser() -> argparse.ArgumentParser:
    about = "Train a small language model, and let it write."
    parser = argparse.ArgumentParser(prog="python -m slm_lib", description=about)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_train(commands)
    newest = Path("models/shakespeare-cpu")
    command = commands.add_parser("evaluate", help="the loss of a model on the whole validation text")
    command.set_defaults(call=evaluate)
    command.add_argument("--model", type=Path, default=newest, help=f"a model's folder (default {newest})")
    command.add_argument("--corpus", help="shakespeare, playhouse or a text file")
    command.add_argument("--block-size", type=int, help="length of the windows; the model's own by default")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    command = commands.add_parser("generate", help="let a model continue a prompt")
    command.set_defaults(call=generate)
    command.add_argument("--model", type=Path, default=newest, help=f"a model's folder (default {newest})")
    command.add_argument("--prompt", default="\n", help="what the model continues")
    command.add_argument("--length", type=int, default=400, help="how many tokens to write (default 400)")
    command.add_argument("--temperature", type=float, default=0.8, help="0 the likeliest, 1 as trained (default 0.8)")
    command.add_argument("--top-k", type=int, help="draw only from the k likeliest tokens")
    command.add_argument("--seed", type=int, help="the same seed writes the same text; none: always another")
    command.add_argument("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    command = commands.add_parser("download", help="fetch tiny Shakespeare into your cache, once")
    command.set_defaults(call=download)
    command.add_argument("--if-online", action="store_true", help="without a network say so and succeed")
    run = commands.add_parser("run-notebooks", help="execute every notebook into runs/notebooks")
    run.set_defaults(call=run_notebooks)
    record = commands.add_parser("record-notebooks", help="execute every notebook and store its outputs (for authors)")
    record.set_defaults(call=record_notebooks)
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        args.call(args)
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"slm_lib: {error}")


if __name__ == "__main__":
    main()
