"""What kills, damaged files and silly settings do to training: python benchmarks/reliability.py [--part kills ...]

Three parts. *kills*: `python -m slm_lib train` with a checkpoint after every step is killed (SIGKILL) at 100 random
moments, and started again with --resume each time; in the end every run must equal an undisturbed one bit for bit.
*damage*: 100 copies of a checkpoint, each with a file cut short, a bit flipped, or a file of another checkpoint in its
place, must all be refused by name. *settings*: 1,000 random configurations of model and training, silly ones among
them, must train two steps or be refused with a sentence.

All workers are forked from this process, which has imported PyTorch and trained a little, in one thread: a kill
therefore never falls into Python's own imports, which touch no file of ours. A part that is done is not done again
without --anew.
"""

import argparse
import collections
import contextlib
import io
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import record
import torch

from slm_lib import __main__ as command_line
from slm_lib import checkpoints, runs, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer
from slm_lib.faults import enough_memory
from slm_lib.settings import TrainingConfig

STEPS, KILLS, DAMAGED, CONFIGURATIONS = 40, 100, 100, 1_000
MEMORY = 6 * 2**30  # bytes of address space for a configuration
SECONDS = 120  # after which a configuration counts as hanging
PHASES = ["starting or resuming", "training", "saving", "clearing old checkpoints", "evaluating and writing"]
TINY = ["--corpus", "mine.txt", "--device", "cpu"]
MODEL = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16", "--dropout", "0.1",
         "--batch-size", "4", "--gradient-accumulation", "2", "--max-iters", str(STEPS),
         "--eval-interval", "1"]  # fmt: skip
phase = mmap.mmap(-1, 1)  # shared with the workers, which write in it what they are doing


def forked(work) -> int:
    """Start `work` in a process of its own; it exits with what `work` returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        code = work()
    finally:
        os._exit(code)


# --- kills ------------------------------------------------------------------------------------------------------------


def marked(number: int, function):
    """The function, with its phase told while it runs."""

    def wrapper(*args, **options):
        before, phase[0] = phase[0], number
        try:
            return function(*args, **options)
        finally:
            phase[0] = before

    return wrapper


def worker(folder: Path) -> int:
    """The command `train`, as a user types it: from nothing, or with --resume where there is a checkpoint."""
    checkpoints.publish = marked(2, checkpoints.publish)
    training.Trainer.update = marked(1, training.Trainer.update)
    runs.Run.finish = marked(4, runs.Run.finish)
    runs.shutil.rmtree = marked(3, runs.shutil.rmtree)
    resume = bool(runs.kept_checkpoints(folder))
    sys.argv = ["slm_lib", "train", *TINY, *(["--resume", str(folder)] if resume else ["--out", str(folder), *MODEL])]
    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        try:
            command_line.main()
        except SystemExit as error:
            errors.write(str(error.code))
    folder.with_suffix(".errors").write_text(errors.getvalue())
    return int("slm_lib:" in errors.getvalue() or "passed over" in errors.getvalue())


def final_state(folder: Path) -> dict[str, bytes]:
    """All that a run ended with, bit for bit, but for the times and commands it took."""
    files = checkpoints.verify(folder / f"step-{STEPS:06d}")
    state = json.loads(files["training.json"])
    state["history"].pop("seconds")
    files["training.json"] = json.dumps(state).encode()
    del files["provenance.json"]
    model = checkpoints.verify(folder / "model")["model.safetensors"]
    return {**files, "the model": model}


def kills(place: Path, generator: random.Random) -> list[dict]:
    """Kill runs at random moments until there were enough; each run goes on until it ends."""
    Path("mine.txt").write_text("Now is the winter of our discontent\nMade glorious summer;\n" * 60)
    begin = time.perf_counter()
    pid = forked(lambda: worker(Path("straight")))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, Path("straight.errors").read_text()
    print(f"undisturbed: {time.perf_counter() - begin:.1f} s", flush=True)
    whole, expected = time.perf_counter() - begin, final_state(Path("straight"))
    rows = []
    while len(rows) < KILLS:
        rows += killed_run(Path(f"run-{len(rows)}"), generator, whole / 3, KILLS - len(rows), expected)
        print(f"{len(rows)} kills", flush=True)
    return rows


def killed_run(folder: Path, generator: random.Random, span: float, most: int, expected: dict) -> list[dict]:
    """One run with at most so many kills, each within `span` seconds of a start; a row for each kill."""
    rows = []
    while True:
        phase[0] = 0
        pid = forked(lambda: worker(folder))
        ended = wait(pid, generator.uniform(0, span) if len(rows) < most else math.inf)
        if ended is not None:
            break
        now = phase[0]
        kept = runs.kept_checkpoints(folder)
        published = [*kept[-2:], *folder.glob("model")]
        damaged = [path.name for path in published if not whole_folder(path)]
        left = len(list(folder.glob(f".*{checkpoints.UNFINISHED}")))
        rows.append({"part": "kills", "phase": PHASES[now], "newest": kept[-1].name if kept else None,
                     "damaged": damaged, "unfinished": left})  # fmt: skip
    same = ended == 0 and final_state(folder) == expected
    swept = not list(folder.glob(f".*{checkpoints.UNFINISHED}"))
    for row in rows:
        row.update(run=folder.name, resumed=ended == 0, identical=same, swept=swept)
    shutil.rmtree(folder)
    return rows


def wait(pid: int, seconds: float) -> int | None:
    """The exit status of a worker that ends within so many seconds; else it is killed, and there is none."""
    end = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.0005)


def whole_folder(folder: Path) -> bool:
    with contextlib.suppress(ValueError, FileNotFoundError):
        return bool(checkpoints.verify(folder))
    return False


# --- damage -----------------------------------------------------------------------------------------------------------


def cut_short(content: bytes, other: bytes, generator: random.Random) -> bytes:
    return content[: generator.randrange(len(content))]


def flipped(content: bytes, other: bytes, generator: random.Random) -> bytes:
    place = generator.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << generator.randrange(8)]) + content[place + 1 :]


def swapped(content: bytes, other: bytes, generator: random.Random) -> bytes:
    return other


DAMAGE = {"cut short": cut_short, "a bit flipped": flipped, "another checkpoint's file": swapped}


def damage(place: Path, generator: random.Random) -> list[dict]:
    """Damage one file of a copy of a checkpoint, and try to resume from it and to load it as a model."""
    ids, folders = checkpoint_pair(place)
    rows = []
    for i in range(DAMAGED):
        kind = list(DAMAGE)[i % len(DAMAGE)]
        copy = place / f"copy-{i:03d}"
        shutil.copytree(folders[0], copy)
        name = generator.choice(sorted(path.name for path in copy.iterdir() if other_content(path, folders[1])
                                       or kind != "another checkpoint's file"))  # fmt: skip
        content, other = (copy / name).read_bytes(), (folders[1] / name).read_bytes()
        (copy / name).write_bytes(DAMAGE[kind](content, other, generator))
        told = [refusal(lambda copy=copy: training.Trainer.resume(copy, ids)),
                refusal(lambda copy=copy: checkpoints.load_model(copy))]  # fmt: skip
        named = all(words is not None and copy.name in words for words in told)
        rows.append({"part": "damage", "kind": kind, "file": name, "refused": named, "told": told[0]})
        shutil.rmtree(copy)
    return rows


def other_content(path: Path, folder: Path) -> bool:
    return path.read_bytes() != (folder / path.name).read_bytes()


def checkpoint_pair(place: Path) -> tuple[torch.Tensor, list[Path]]:
    """Two checkpoints of two trainings of one shape, and the text they learn."""
    tokenizer = training_text_tokenizer()
    ids = tokenizer.encode("Now is the winter of our discontent\n" * 30)
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = GPT(GPTConfig.modern(vocab_size=tokenizer.vocab_size, block_size=16, n_layer=1, n_head=2, n_embd=16))
        trainer = training.Trainer(model, ids, TrainingConfig(batch_size=4, max_iters=9, seed=seed))
        for _ in range(3):
            trainer.update()
        folders.append(trainer.save(place / f"whole-{seed}", tokenizer, {"seed": seed}))
    return ids, folders


def training_text_tokenizer():
    return CharTokenizer("".join(sorted(set("Now is the winter of our discontent\n"))))


def refusal(load) -> str | None:
    """What the refusal said; None where there was none."""
    try:
        load()
    except (ValueError, FileNotFoundError) as error:
        return str(error).replace(os.getcwd(), ".")
    return None


# --- settings ---------------------------------------------------------------------------------------------------------

SILLY = [0, -1, 1, 2.5, 1e-300, 1e300, math.nan, math.inf, -math.inf, True, None, "", "many", [1], 3 + 0j]
SILLY += [10**4, 10**6, 10**9, 10**13, 2**63, 10**30, 10**400]
SANE_MODEL = {
    "vocab_size": lambda g: g.choice([2, 65, 300, 300]),
    "block_size": lambda g: g.choice([1, 2, 8, 32, 100]),
    "n_layer": lambda g: g.choice([1, 2, 5]),
    "n_head": lambda g: g.choice([1, 2, 3, 4]),
    "n_embd": lambda g: g.choice([6, 12, 24, 48, 96]),
    "dropout": lambda g: g.choice([0.0, 0.1, 0.9]),
    "bias": lambda g: g.random() < 0.5,
    "norm": lambda g: g.choice(["layer", "rms"]),
    "position": lambda g: g.choice(["learned", "sinusoidal", "rotary", "none"]),
    "activation": lambda g: g.choice(["gelu", "gelu_tanh", "relu2", "swiglu"]),
    "qk_norm": lambda g: g.random() < 0.5,
    "zero_init": lambda g: g.random() < 0.5,
    "tie_weights": lambda g: g.random() < 0.5,
}
SANE_TRAINING = {
    "batch_size": lambda g: g.choice([1, 2, 6, 12, 32]),
    "max_iters": lambda g: g.choice([1, 2, 100, 10**6]),
    "learning_rate": lambda g: 10 ** g.uniform(-6, 1),
    "weight_decay": lambda g: g.choice([0.0, 0.1, 10.0]),
    "warmup_iters": lambda g: g.choice([0, 1, 50, 10**9]),
    "beta1": lambda g: g.choice([0.0, 0.9, 0.999]),
    "beta2": lambda g: g.choice([0.0, 0.95, 0.9999]),
    "grad_clip": lambda g: 10 ** g.uniform(-6, 6),
    "eval_interval": lambda g: g.choice([1, 100]),
    "seed": lambda g: g.choice([0, 1, 2**62]),
    "gradient_accumulation": lambda g: g.choice([1, 1, 1, 2, 3]),
    "schedule": lambda g: g.choice(["linear", "cosine", "constant"]),
    "precision": lambda g: g.choice(["auto", "float32", "bfloat16"]),
    "compile": lambda g: False,  # it costs half a minute each time
}


def drawn(sane: dict, generator: random.Random) -> dict:
    """A value for every setting, one in fifty of them silly."""
    return {name: generator.choice(SILLY) if generator.random() < 1 / 50 else draw(generator)
            for name, draw in sane.items()}  # fmt: skip


def try_configuration(seed: int) -> str:
    """Train two steps and evaluate; what came of it, in a line."""
    generator = random.Random(seed)
    model, recipe = drawn(SANE_MODEL, generator), drawn(SANE_TRAINING, generator)
    symbols, length = generator.choice([2, 65, 65, 300]), generator.choice([1, 50, *[2_000] * 8])
    ids = torch.randint(symbols, (length,), generator=torch.Generator().manual_seed(seed))
    try:
        config = TrainingConfig(**recipe)
        torch.manual_seed(config.seed)
        with enough_memory("lower n_layer, n_embd or vocab_size"):
            built = GPT(GPTConfig(**model))
        trainer = training.Trainer(built, ids, config)
        for _ in range(2):
            trainer.update()
        loss = training.evaluate(built, ids[:200])
        return f"trained|{loss:.4f}"
    except (ValueError, FloatingPointError, MemoryError, OSError) as error:
        return f"refused|{type(error).__name__}|{error}"
    except BaseException as error:  # these are what we look for
        return f"broken|{type(error).__name__}|{error}"


def settings(place: Path, generator: random.Random) -> list[dict]:
    """Try every configuration in a process of its own, with a bounded memory and a bounded time."""
    rows = []
    for seed in range(CONFIGURATIONS):
        told = place / "told.txt"
        told.write_text("")
        pid = forked(lambda seed=seed, told=told: bounded(seed, told))
        begin = time.perf_counter()
        status = wait(pid, SECONDS)
        outcome, *words = told.read_text().split("|", 2)
        if status != 0 or not outcome:
            outcome, words = "broken", ["hung" if status is None else f"ended with status {status}"]
        rows.append({"part": "settings", "seed": seed, "outcome": outcome, "told": ": ".join(words)[:160],
                     "seconds": round(time.perf_counter() - begin, 2)})  # fmt: skip
        if outcome == "broken":
            print(rows[-1], flush=True)
        if seed % 100 == 99:
            print(f"{seed + 1} configurations", flush=True)
    return rows


def bounded(seed: int, told: Path) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    told.write_text(try_configuration(seed))
    return 0


# --- all of it --------------------------------------------------------------------------------------------------------

PARTS = {"kills": kills, "damage": damage, "settings": settings}


def summary(rows: list[dict]) -> dict:
    """The figures that the rows come to."""
    parts = {name: [row for row in rows if row["part"] == name] for name in PARTS}
    found = {}
    if parts["kills"]:
        found["kills"] = {"kills": len(parts["kills"]), "runs": len({row["run"] for row in parts["kills"]}),
                          "in phase": dict(collections.Counter(row["phase"] for row in parts["kills"])),
                          "that left an unfinished folder": sum(row["unfinished"] > 0 for row in parts["kills"]),
                          "resumed": sum(row["resumed"] for row in parts["kills"]),
                          "identical at the end": sum(row["identical"] for row in parts["kills"]),
                          "published folders damaged": sum(len(row["damaged"]) for row in parts["kills"]),
                          "leftovers swept": all(row["swept"] for row in parts["kills"])}  # fmt: skip
    if parts["damage"]:
        found["damage"] = {kind: {"copies": len(of_kind), "refused by name": sum(row["refused"] for row in of_kind)}
                           for kind in DAMAGE
                           for of_kind in [[row for row in parts["damage"] if row["kind"] == kind]]}  # fmt: skip
    if parts["settings"]:
        kinds = [row["told"].split(":")[0] if row["outcome"] != "trained" else "" for row in parts["settings"]]
        outcomes = [f"{row['outcome']} {kind}".strip() for row, kind in zip(parts["settings"], kinds, strict=True)]
        found["settings"] = dict(collections.Counter(outcomes))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--anew", action="store_true", help="do parts again that are done")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint_pair(Path(folder))  # what PyTorch loads late is loaded now, not in every worker
    assert len(os.listdir("/proc/self/task")) == 1, "a fork would lose the other threads"
    config = {"steps": STEPS, "kills": KILLS, "damaged": DAMAGED, "configurations": CONFIGURATIONS,
              "memory": MEMORY, "seconds": SECONDS, "train": " ".join(MODEL)}  # fmt: skip
    stored = record.ROOT / "results" / "reliability" / "result.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else []
    for name in args.part or PARTS:
        if not args.anew and any(row["part"] == name for row in rows):
            print(f"{name}: done already, see {stored.relative_to(record.ROOT)}")
            continue
        begin, home = time.perf_counter(), os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                found = PARTS[name](Path("."), random.Random(0))
            finally:
                os.chdir(home)
        rows = [row for row in rows if row["part"] != name] + found
        figures = summary(rows)
        print(f"{name}: {time.perf_counter() - begin:.0f} s, {json.dumps(figures[name])}", flush=True)
        record.save("reliability", config, rows, figures=figures)


if __name__ == "__main__":
    main()
