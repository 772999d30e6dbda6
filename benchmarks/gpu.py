"""On the same GPU, in one call: nanoGPT with its config for Shakespeare, and ours.

    python benchmarks/gpu.py --nanogpt PATH --tune      (at most 7 minutes; done once, before)
    python benchmarks/gpu.py --nanogpt PATH             (at most 9 minutes on a GPU)
    python benchmarks/gpu.py --table                    (prints what is stored; --readme puts it into README.md)
    python benchmarks/gpu.py --nanogpt PATH --dry       (the whole path on a CPU at toy size, kept in runs/dry)

PATH is a checkout of github.com/karpathy/nanoGPT; gpu_contestants.py says how both are run and what the clocks count.
Three are ours: the preset with the changes that a search found on a block cut from the end of the training text; the
same in as few steps as get below nanoGPT's best loss on that block; and the same with a longer context. Each trains
alone in a fresh process, by turns, seed by seed. The time to nanoGPT's published loss, 1.4697, is when a look at the
whole validation text first finds it; nothing else rests on these looks, and the losses shown are those after the last
step. All are scored alike, every character of the validation text once: in disjoint windows of 256, in disjoint
windows as long as the model can read, and in windows of that length that overlap.

A row is kept as soon as it is there. A run that was interrupted, or whose minutes were over, goes on where it stopped;
rows that were measured in one call say so by the same `call`.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import contestants
import gpu_contestants
import record
import torch
from contestants import TUNING_CHARACTERS, climb, copy_nanogpt, measure
from gpu_contestants import TARGET, WINDOW

from slm_lib import gpu, training

NANOGPT = {**contestants.NANOGPT, "config/train_shakespeare_char.py":
           "9b41cdfb2c917259d796a8184d835221a349c23cd18a0a63b46da431d95d9c05"}  # fmt: skip
TUNING_SEED = 100
SAFE = 0.01  # nats: what luck alone makes of one seed
SHORT, LONG = "ours, short", "ours, long context"
FULL = {  # what is run: on a GPU, and at toy size anywhere
    "dry": False, "corpus": "shakespeare", "characters": None, "flags": {}, "ours": {},
    "every": {"nanoGPT": 25, "ours": 25, SHORT: 5, LONG: 50}, "every_in_search": 100,
    "stages": [[{"max_iters": 2_500}, {"max_iters": 4_000}], [{"dropout": 0.4}, {"dropout": 0.5}], [{"dropout": 0.2}],
               [{"learning_rate": 6e-3}], [{"learning_rate": 2.5e-3}], [{"weight_decay": 0.3}]],
    "short": [{"max_iters": steps, "dropout": 0.1} for steps in (300, 400, 500, 600, 700, 850, 1_000)],
    "long": [{"block_size": 512, "batch_size": 32}, {"block_size": 1_024, "batch_size": 16}],
    "seeds": {"nanoGPT": [0, 1, 2], "ours": [0, 1, 2, 3, 4]},
}  # fmt: skip
TINY = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 4, "max_iters": 15}
DRY = FULL | {
    "dry": True, "corpus": None, "characters": [20_000, 2_000],
    "every": {"nanoGPT": 5, "ours": 5, SHORT: 5, LONG: 5}, "every_in_search": 5,
    "flags": {**TINY, "device": "cpu", "compile": False}, "ours": {**TINY, "warmup_iters": 2},
    "stages": [[{"dropout": 0.1}]], "short": [{"max_iters": 8}, {"max_iters": 12}],
    "long": [{"block_size": 64, "batch_size": 2}], "seeds": {"nanoGPT": [0], "ours": [0, 1]},
}  # fmt: skip
COLUMNS = {"256": "windows of 256", "own": "own context", "full": "full context"}
PLAYS = {"shrew": "The Taming of the Shrew", "tempest": "The Tempest"}


# --- the search -------------------------------------------------------------------------------------------------------


def tune(base: dict, plan: dict, name: str, minutes: float) -> None:
    """Search our settings on the tuning block, as far as the minutes go; nanoGPT's best loss there is the short one's.

    Our trials run in this very process, one after the other: only losses are compared, not times.
    """
    config = {"plan": plan, "preset": as_changed(plan["ours"]), "tuning_characters": TUNING_CHARACTERS,
              "seed": TUNING_SEED}  # fmt: skip
    rows = record.stored(name, config)["rows"]
    facts, until, took = {"device": base["name"], "dry": plan["dry"]}, time.monotonic() + 60 * minutes, {}

    def attempt(variant: str, changes: dict) -> dict:
        for row in rows:
            if (row["variant"], row["changes"]) == (variant, changes):
                return row
        if (began := time.monotonic()) + took.get(variant, 0) > until:
            raise TimeoutError
        job = {**base, **job_of(variant, plan, changes), "seed": TUNING_SEED, "tuning": True,
               "every": plan["every_in_search"]}  # fmt: skip
        rows.append({"variant": variant, "scored": "tuning block", "changes": changes, "seed": TUNING_SEED,
                     **(measure(job, gpu_contestants.__file__) if variant == "nanoGPT" else trial(job))})  # fmt: skip
        took[variant] = time.monotonic() - began
        print(f"{rows[-1]['loss_256']}  {variant}  {changes}", flush=True)
        record.save(name, config, rows, **facts, chosen=chosen(rows, plan), finished=False)
        return rows[-1]

    try:
        search(attempt, plan, rows)
    except TimeoutError:
        print("the minutes are over: the same command goes on with the search")
        return
    record.save(name, config, rows, **facts, chosen=chosen(rows, plan), finished=True)


def search(attempt, plan: dict, rows: list[dict]) -> None:
    """The search: ours, stage by stage; nanoGPT, where it is at hand; then ours in few steps, and reading far."""
    climb(lambda changes: finite(attempt("ours", {**plan["ours"], **changes})["loss_256"]), plan["stages"])
    best = chosen(rows, plan)["ours"]
    if plan["flags"] is not None:
        bar = attempt("nanoGPT", {})["best_loss"]
        for changes in plan["short"]:
            if finite(attempt(SHORT, {**best, **changes})["loss_256"]) <= bar - SAFE:
                break
    for changes in plan["long"]:
        attempt(LONG, {**best, **changes})


def trial(job: dict) -> dict:
    """The row of one trial of ours, in this process; one that breaks down has no losses."""
    try:
        return gpu_contestants.contend({**job, "began": time.perf_counter()})
    except FloatingPointError:
        return {"loss_256": None, "loss_own": None}


def finite(loss: float | None) -> float:
    """A loss that can be compared: what diverged is worse than all else."""
    return math.inf if loss is None else loss


def chosen(rows: list[dict], plan: dict) -> dict[str, dict]:
    """The changes to the preset that the rows of a search speak for, for each of ours.

    The short one is the first that is safely below nanoGPT's best, or the best there is; what was not tried is taken
    from the plan.
    """
    names = ("nanoGPT", "ours", SHORT, LONG)
    tried = {name: [row for row in rows if row["variant"] == name] for name in names}
    bar = min((row["best_loss"] for row in tried["nanoGPT"]), default=-math.inf) - SAFE
    best = {"ours": min(tried["ours"], key=lambda row: finite(row["loss_256"]), default={"changes": plan["ours"]}),
            LONG: min(tried[LONG], key=lambda row: finite(row["loss_own"]), default=None),
            SHORT: next((row for row in tried[SHORT] if finite(row["loss_256"]) <= bar),
                        min(tried[SHORT], key=lambda row: finite(row["loss_256"]), default=None))}  # fmt: skip
    first = {"ours": {}, SHORT: plan["short"][len(plan["short"]) // 2], LONG: plan["long"][0]}
    return {variant: row["changes"] if row else {**best["ours"]["changes"], **first[variant]}
            for variant, row in best.items()}  # fmt: skip


# --- the contest ------------------------------------------------------------------------------------------------------


def as_changed(changes: dict) -> dict:
    """The preset with changes, as it is stored."""
    sizes, config = gpu_contestants.settings(changes)
    return {"sizes": sizes, "training": asdict(config)}


def job_of(variant: str, plan: dict, changes: dict) -> dict:
    """What a contestant's process has to know of its variant."""
    kind = "nanogpt" if variant == "nanoGPT" else "ours"
    job = {"kind": kind, "corpus": plan["corpus"], "characters": plan["characters"], "every": plan["every"][variant]}
    return job | ({"flags": plan["flags"]} if kind == "nanogpt" else {"changes": changes})


def turns(plan: dict) -> list[tuple[str, int]]:
    """Who trains when: nanoGPT once, ours by turns, seed by seed; then nanoGPT's further seeds."""
    theirs = [("nanoGPT", seed) for seed in plan["seeds"]["nanoGPT"] if plan["flags"] is not None]
    return theirs[:1] + [(v, s) for s in plan["seeds"]["ours"] for v in ("ours", SHORT, LONG)] + theirs[1:]


def compete(base: dict, plan: dict, name: str, minutes: float) -> None:
    """Train and score all, by turns, as far as the minutes go, and keep each row as soon as it is there."""
    searched = record.stored(f"{name}/tuning")
    ours = searched.get("chosen", chosen([], plan))
    if not searched.get("finished"):
        print("the search is not finished: ours have the settings that it came to, or the preset's")
    nanogpt = {"commit": contestants.COMMIT, "files": NANOGPT, "flags": plan["flags"], **gpu_contestants.QUIETLY}
    config = {"nanogpt": nanogpt, "ours": {variant: as_changed(changes) for variant, changes in ours.items()},
              "plan": plan, "window": WINDOW, "columns": COLUMNS, "plays": PLAYS}  # fmt: skip
    rows = record.stored(name, config)["rows"]
    facts = {"device": base["name"], "dry": plan["dry"], "target": TARGET, "roof": base["roof"], "chosen": ours}
    call, until, took = time.strftime("%Y-%m-%d %H:%M:%S"), time.monotonic() + 60 * minutes, {}
    for variant, seed in turns(plan):
        if (variant, seed) in [(row["variant"], row["seed"]) for row in rows]:
            continue
        if (began := time.monotonic()) + took.get(variant, 0) > until:
            print(f"no time is left for {variant} with seed {seed}: the same command goes on")
            continue
        job = {**base, **job_of(variant, plan, ours.get(variant)), "seed": seed}
        row = {"variant": variant, "scored": "validation text", "seed": seed, "call": call}
        rows.append(row | measure(job, gpu_contestants.__file__))
        took[variant] = time.monotonic() - began
        print(f"seed {seed}  {variant:18}  {rows[-1]['loss_256']:.4f}  {rows[-1]['seconds']:.1f} s", flush=True)
        record.save(name, config, rows, **facts)


# --- what is shown ----------------------------------------------------------------------------------------------------


def cell(rows: list[dict], key: str, digits: int = 0) -> str:
    """The mean of a column, of the rows that have it; how many these are, where it is not all."""
    there = [row for row in rows if row[key] is not None]
    if not there:
        return "never" if "target" in key else "–"
    return record.spread(there, key, digits) + (f" ({len(there)} of {len(rows)})" if len(there) < len(rows) else "")


COSTS = {"seeds": None, "parameters": 0, "block_size": 0, "steps": 0, "tokens_per_second": 0, "utilisation": 3,
         "memory_mib": 0, "seconds": 1, "seconds_all_in": 1, "seconds_to_target": 2,
         "seconds_to_target_all_in": 1, "best_loss": 3}  # fmt: skip
HEADS = {"block_size": "context", "tokens_per_second": "characters / s", "memory_mib": "memory, MiB",
         "seconds": "seconds, loop", "seconds_all_in": "seconds, all", "seconds_to_target": f"to {TARGET}, loop",
         "seconds_to_target_all_in": f"to {TARGET}, all", "best_loss": "best on the way"}  # fmt: skip


def table(rows: list[dict]) -> str:
    """Two Markdown tables of a result's rows: what each took, and the losses after the last step, the plays apart."""
    parts = {"loss": "whole text", **PLAYS}
    heads = [["", *(HEADS.get(name, name) for name in COSTS)],
             ["", *(f"{part}, {column}" for part in parts.values() for column in COLUMNS.values())]]  # fmt: skip
    bodies = [[], []]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        costs = (str(len(mine)) if digits is None else cell(mine, key, digits) for key, digits in COSTS.items())
        bodies[0].append([variant, *costs])
        keys = [f"{part}_{column}" for part in parts for column in COLUMNS]
        bodies[1].append([variant, *(cell(mine, key, 3) if key in mine[0] else "–" for key in keys)])
    return "\n\n".join(record.markdown(head, body) for head, body in zip(heads, bodies, strict=True))


def aims(rows: list[dict], writing: list[dict]) -> str:
    """What ours is meant to reach, one line each, beside what it reached; open where something was not measured."""

    def mean(variant: str, key: str) -> float | None:
        values = [row[key] for row in rows if row["variant"] == variant]
        return statistics.fmean(map(finite, values)) if values else None  # a seed that never came there: infinite

    def share(key: str) -> float | None:
        theirs, ours = mean("nanoGPT", key), mean(SHORT, key)
        return None if None in (theirs, ours) or theirs == math.inf else ours / theirs

    ratio = statistics.median(row["ratio"] for row in writing) if writing else None
    lines = [(f"time to {TARGET} in the loop, of nanoGPT's, at most", 1 / 5, share("seconds_to_target")),
             (f"time to {TARGET} with all, of nanoGPT's, at most", 1 / 3, share("seconds_to_target_all_in")),
             ("loss in windows of 256, at most", 1.44, mean("ours", "loss_256")),
             ("parameters, at most", 10_700_000, mean("ours", "parameters")),
             ("loss at own context, at most", 1.41, mean(LONG, "loss_own")),
             ("characters written in a second, times nanoGPT's, at least", 5, ratio)]  # fmt: skip
    said = (f"{verdict(name, aim, value)}  {name} {number(aim)}: {number(value)}" for name, aim, value in lines)
    return "\n".join(said)


def number(value: float | None) -> str:
    """A number as short as three digits after the point allow."""
    return "–" if value is None else f"{value:,.3f}".rstrip("0").rstrip(".")


def verdict(name: str, aim: float, value: float | None) -> str:
    """Whether an aim is met."""
    if value is None:
        return "open  "
    return "met   " if (value >= aim if "at least" in name else value <= aim) else "missed"


def command_line() -> argparse.ArgumentParser:
    """What the program may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--tune", action="store_true", help="search our settings on a block of the training text")
    parser.add_argument("--minutes", type=float, help="begin nothing that would end later (7 to tune, 9 to compete)")
    parser.add_argument("--dry", type=Path, nargs="?", const=record.ROOT / "runs" / "dry", metavar="FOLDER",
                        help="search and compete at toy size on a CPU, kept in FOLDER (runs/dry)")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="print the stored table")
    parser.add_argument("--readme", action="store_true", help="put the stored table into README.md")
    return parser


def measured(args: argparse.Namespace, name: str) -> None:
    """Search or compete, as the command line asks."""
    plan = DRY if args.dry else FULL
    plan = plan if args.nanogpt else {**plan, "flags": None}
    device = training.choose_device("cpu" if args.dry else "cuda")
    roof = asdict(gpu.measure_roof(device, torch.bfloat16)) if device.type == "cuda" else None
    base = {"device": device.type, "name": torch.cuda.get_device_name() if roof else "CPU", "roof": roof,
            "peak": roof and roof["peak"], "threads": 1 if args.dry else os.cpu_count()}  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        base["copy"] = copy_nanogpt(args.nanogpt, place, NANOGPT) if args.nanogpt else None
        if args.tune or args.dry:
            tune(base, plan, f"{name}/tuning", args.minutes or 7)
        if not args.tune:
            compete(base, plan, name, args.minutes or 9)


def main() -> None:
    parser = command_line()
    args = parser.parse_args()
    name = str(args.dry.resolve() / "gpu") if args.dry else "gpu"
    if (args.nanogpt or args.dry) and not args.table:
        try:
            measured(args, name)
        except (ValueError, OSError) as error:
            parser.error(f"{error}")
    if not args.tune:
        rows = record.stored(name)["rows"]
        if not rows:
            parser.error("nothing is measured yet: name a checkout of nanoGPT with --nanogpt PATH, on a GPU")
        print(table(rows), aims(rows, record.stored(f"{name}/generation")["rows"]), sep="\n\n")
        if args.readme:
            path = record.ROOT / "README.md"
            path.write_text(record.with_table(path.read_text(encoding="utf-8"), "gpu", table(rows)), encoding="utf-8")


if __name__ == "__main__":
    main()
