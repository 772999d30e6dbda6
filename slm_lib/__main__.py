"""The command line: python -m slm_lib download | train | tune | evaluate | generate | run- or record-notebooks."""

import argparse
import os
import sys
from pathlib import Path

from slm_lib import checkpoints, data, generation, runs, training
from slm_lib.ngrams import loss_units


def evaluate(args: argparse.Namespace) -> None:
    """Print the loss of a stored model on the whole validation text of a corpus."""
    model, tokenizer, _ = checkpoints.load_model(args.model, training.choose_device(args.device))
    corpus = data.load_corpus(args.corpus)
    units = loss_units(*runs.validation_loss(model, tokenizer, corpus, args.block_size))
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


def tune(args: argparse.Namespace) -> None:
    """Search for better settings, together with every other process that was started with the same storage and name."""
    from slm_lib import study  # imported late: Optuna is not needed by the other commands

    study.tune(args)


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
    command = commands.add_parser("train", help="train a model from nothing, or go on with one (--resume)")
    command.set_defaults(call=runs.train)
    command.add_argument("--out", type=Path, help="where checkpoints and model go; by default a new folder in runs/")
    command.add_argument("--resume", type=Path, metavar="FOLDER", help="go on from the newest checkpoint in FOLDER")
    command.add_argument("--minutes", type=float, metavar="M", help="train for so long: instead of --max-iters")
    runs.add_arguments(command)
    command = commands.add_parser("tune", help="search for better settings; start it several times to search faster")
    command.set_defaults(call=tune)
    command.add_argument("--trials", type=int, default=30, help="how many finished trials to end with (default 30)")
    command.add_argument("--search", action="append", metavar="NAME=RANGE", help="a setting to search, and where: "
                         "learning_rate=1e-4:1e-2 or n_layer=2,4,6; may be repeated (default: learning_rate, "
                         "weight_decay and dropout)")  # fmt: skip
    command.add_argument("--storage", default="runs/study.log", help="a journal file or the URL of a database, such as "
                         "sqlite:///study.db (default runs/study.log)")  # fmt: skip
    command.add_argument("--name", default="study", help="the study's name in the storage (default study)")
    command.add_argument("--pruner", default="median", choices=["median", "halving", "none"], help="what stops a trial "
                         "early: worse than half of the others, not among the better half, nothing")  # fmt: skip
    runs.add_arguments(command)
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
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        rank = os.environ.get("RANK", "0")
        sys.exit(f"slm_lib{'' if rank == '0' else f' (process {rank})'}: {error}")


if __name__ == "__main__":
    main()
