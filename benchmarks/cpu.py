"""On the same cores, in the same time: nanoGPT, nanoGPT with its flags retuned, ours, and a model that counts.

    python benchmarks/cpu.py --nanogpt PATH                    (about 28 minutes on two idle cores)
    python benchmarks/cpu.py --nanogpt PATH --tune-nanogpt     (about 20 minutes; done once, before)
    python benchmarks/cpu.py --table                           (prints what is stored; --readme puts it into README.md)

PATH is a checkout of github.com/karpathy/nanoGPT; contestants.py says how it is run and what the clock counts. The
first contestant has the flags of its README for a CPU, the second those that did best on a block cut from the end of
the training text, in the same time. Ours are two presets: that behind `make train`, in that time, and one that is made
for ten seconds, in an eighth of it.

Each trains alone in a fresh process on the same two pinned cores, by turns, seed by seed, and its last step is what
counts, not its best. nanoGPT's time is the budget: from speeds measured once, before all else, everyone gets a number
of steps that fits into it. All are scored alike, every character of the validation text once, in three columns: in
disjoint windows of 64, in disjoint windows as long as the model can read, and in windows of that length that overlap,
so that each character has at least three quarters of one before it, or all there is. The text holds two plays, shown
apart: most of The Taming of the Shrew, whose first acts end the training text, and The Tempest, of which nobody has
seen a word. An interrupted run goes on where it stopped.
"""

import argparse
import os
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path

import contestants
import record
import torch
from contestants import RECIPE, TUNING_CHARACTERS, climb, copy_nanogpt, measure
from record import spread, stored

from slm_lib.ngrams import loss_units
from slm_lib.presets import PRESETS

SEEDS, TUNING_SEED = [0, 1, 2, 3, 4], 100
THREADS = 2
STAGES = [  # each change is tried on top of the best so far; a stage ends with the first that does not help
    [{"learning_rate": 2e-3}, {"learning_rate": 4e-3}, {"learning_rate": 8e-3}],
    [{"batch_size": 8}],
    [{"batch_size": 24}],
    [{"block_size": 128, "batch_size": 6}],
    [{"min_lr": 0.0, "beta2": 0.95}],
]
EIGHTH = "ours, an eighth of the time"
OURS = {"ours": "shakespeare-cpu", EIGHTH: "shakespeare-quick"}  # presets
COSTLY = {"batch_size", "block_size"}  # the flags that change how long a step takes
ORDERS = [5, 6, 7, 8, 9]
MARGIN, PROBE, ROUNDS = 0.92, 16, 3  # of nanoGPT's time; speed is measured on 1 / PROBE of the steps, so many times
COLUMNS = {"64": "windows of 64", "own": "own context", "full": "full context"}
PLAYS = {"shrew": "The Taming of the Shrew", "tempest": "The Tempest"}


# --- the two programs -------------------------------------------------------------------------------------------------


def tune(base: dict, name: str, recipe_steps: int) -> None:
    """Search nanoGPT's flags, and the n-gram's order, on the tuning block; every trial has the same processor time."""
    config = {"recipe": RECIPE, "tuning_characters": TUNING_CHARACTERS, "seed": TUNING_SEED,
              "recipe_steps": recipe_steps, "threads": base["threads"]}  # fmt: skip
    rows = stored(name, config)["rows"]

    def attempt(flags: dict) -> dict:
        for row in rows:
            if row["flags"] == flags:
                return row
        job, steps = {**base, "kind": "nanogpt", "flags": flags, "tuning": True}, recipe_steps
        if COSTLY & set(flags):
            few = {"steps": recipe_steps // PROBE, "score": False}
            theirs, here = (measure(job | {"flags": f}, **few)["processor_seconds"] for f in ({}, flags))
            steps = round(recipe_steps * theirs / here)
        rows.append({"variant": "nanoGPT", "scored": "tuning block", "flags": flags, "seed": TUNING_SEED,
                     "steps": steps, **measure(job, steps=steps, seed=TUNING_SEED)})  # fmt: skip
        print(f"{rows[-1]['loss_own']:.4f}  {steps:,} steps  {flags}", flush=True)
        record.save(name, config, rows, stages=STAGES, finished=False)
        return rows[-1]

    for order in ORDERS:
        if order not in [row.get("order") for row in rows]:
            found = measure({**base, "kind": "ngram", "order": order}, tuning=True)
            rows.append({"variant": "n-gram", "scored": "tuning block", "flags": None, "order": order, **found})
            record.save(name, config, rows, stages=STAGES, finished=False)
    climb(lambda flags: attempt(flags)["loss_own"], STAGES)
    record.save(name, config, rows, stages=STAGES, finished=True)


def plan(base: dict, name: str, recipe_steps: int) -> tuple[dict[str, dict], dict[str, float]]:
    """The contestants as jobs by name, with their steps, and the seconds per step that these rest on."""
    tried = stored(f"{name}/tuning")["rows"]
    if not tried:
        raise FileNotFoundError(f"results/{name}/tuning is not there: search the flags first, with --tune-nanogpt")
    best = {kind: min((row for row in tried if row["variant"] == kind), key=lambda row: row["loss_own"])
            for kind in ("nanoGPT", "n-gram")}  # fmt: skip
    jobs = {"nanoGPT": {"kind": "nanogpt", "flags": {}},
            "nanoGPT, flags retuned": {"kind": "nanogpt", "flags": best["nanoGPT"]["flags"]},
            **{variant: {"kind": "ours", "preset": preset} for variant, preset in OURS.items()}}  # fmt: skip
    few = recipe_steps // PROBE
    turns = [{kind: measure({**base, **job}, steps=few, score=False)["seconds"] for kind, job in jobs.items()}
             for _ in range(ROUNDS)]  # fmt: skip
    speeds = {kind: round(statistics.median(turn[kind] for turn in turns) / few, 5) for kind in jobs}
    fits = {kind: int(recipe_steps * speeds["nanoGPT"] / speed) for kind, speed in speeds.items()}
    fits["ours"], fits[EIGHTH] = int(MARGIN * fits["ours"]), int(MARGIN * fits[EIGHTH] / 8)
    if not COSTLY & set(best["nanoGPT"]["flags"]):
        fits["nanoGPT, flags retuned"] = recipe_steps
    jobs = {kind: {**base, **job, "steps": fits[kind]} for kind, job in sorted(jobs.items())}
    jobs[f"{best['n-gram']['order']}-gram Kneser-Ney"] = {**base, "kind": "ngram", "order": best["n-gram"]["order"]}
    return jobs, speeds


def compete(base: dict, name: str, recipe_steps: int, seeds: list[int]) -> None:
    """Train and score every contestant with every seed, by turns, and keep each row as soon as it is there."""
    nanogpt = {"commit": contestants.COMMIT, "files": contestants.NANOGPT, "flags": RECIPE, "steps": recipe_steps}
    ours = {preset: {"sizes": PRESETS[preset].sizes, "training": asdict(contestants.our_training(preset))}
            for preset in OURS.values()}  # fmt: skip
    config = {"nanogpt": nanogpt, "ours": ours, "seeds": seeds, "threads": base["threads"], "margin": MARGIN,
              "columns": COLUMNS, "plays": PLAYS, "second_play": contestants.SECOND_PLAY}  # fmt: skip
    found = stored(name, config)
    jobs, speeds = (found["jobs"], found["seconds_per_step"]) if found["rows"] else plan(base, name, recipe_steps)
    for seed in seeds:
        for variant, job in jobs.items():
            if (variant, seed) in [(row["variant"], row["seed"]) for row in found["rows"]]:
                continue
            row = {"variant": variant, "scored": "validation text", "seed": seed, "steps": job.get("steps", 1)}
            found["rows"].append(row | measure(job, seed=seed, copy=base["copy"]))
            print(f"seed {seed}  {variant:28}  {found['rows'][-1]['loss_64']:.4f}  "
                  f"{found['rows'][-1]['seconds']:.1f} s", flush=True)  # fmt: skip
            places = {variant: {**job, "copy": None} for variant, job in jobs.items()}
            record.save(name, config, found["rows"], jobs=places, seconds_per_step=speeds)


# --- what is shown ----------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> str:
    """Two Markdown tables of a result's rows: what each contestant took and reached, and the two plays apart."""
    took = ["parameters", "characters seen", "characters / s", "seconds", "memory, MiB"]
    heads = [["", *took, *(f"loss, {name}" for name in COLUMNS.values()), "bits, windows of 64"],
             ["", *(f"{play}, {name}" for play in PLAYS.values() for name in COLUMNS.values())]]  # fmt: skip
    bodies = [[], []]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == variant]
        bits = loss_units(statistics.fmean(row["loss_64"] for row in mine)).bits_per_character
        cost = [spread(mine, key, 0) for key in ("parameters", "characters_seen", "characters_per_second")]
        cost += [spread(mine, "seconds", 1), spread(mine, "memory_mib", 0)]
        bodies[0].append([variant, *cost, *(spread(mine, f"loss_{c}") for c in COLUMNS), f"{bits:.3f}"])
        bodies[1].append([variant, *(spread(mine, f"{play}_{c}") for play in PLAYS for c in COLUMNS)])
    return "\n\n".join(record.markdown(head, body) for head, body in zip(heads, bodies, strict=True))


def aims(rows: list[dict]) -> str:
    """What ours is meant to reach, one line each, beside what it reached."""

    def mean(variant: str, key: str) -> float:
        return statistics.fmean(row[key] for row in rows if row["variant"] == variant)

    budget = mean("nanoGPT", "seconds")
    lines = [("loss in windows of 64, at most", 1.60, mean("ours", "loss_64")),
             ("loss at own context, at most", 1.53, mean("ours", "loss_own")),
             ("seconds, at most nanoGPT's", budget, mean("ours", "seconds")),
             ("loss in windows of 64 in an eighth of the time, at most nanoGPT's", mean("nanoGPT", "loss_64"),
              mean(EIGHTH, "loss_64")),
             ("those seconds, at most an eighth of nanoGPT's", budget / 8, mean(EIGHTH, "seconds")),
             ("memory in MiB, at most", 1_144, mean("ours", "memory_mib"))]  # fmt: skip
    return "\n".join(f"{'met   ' if value <= aim else 'missed'}  {name} {aim:,.3f}: {value:,.3f}"
                     for name, aim, value in lines)  # fmt: skip


def with_table(readme: str, rows: list[dict]) -> str:
    """The text of a README with the tables between its two `cpu` comments."""
    return record.with_table(readme, "cpu", table(rows))


def command_line() -> argparse.ArgumentParser:
    """What the program may be asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of nanoGPT")
    parser.add_argument("--tune-nanogpt", action="store_true", help="search its flags on a block of the training text")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"processors for each contestant ({THREADS})")
    parser.add_argument("--quick", action="store_true", help="few steps, 1 seed, kept in runs/: to see that it runs")
    parser.add_argument("--table", action="store_true", help="print the stored table")
    parser.add_argument("--readme", action="store_true", help="put the stored table into README.md")
    return parser


def main() -> None:
    parser = command_line()
    args = parser.parse_args()
    name, steps = ("../runs/cpu", 160) if args.quick else ("cpu", RECIPE["max_iters"])  # a shortened run is no result
    if args.nanogpt:
        torch.set_num_threads(args.threads)
        if hasattr(os, "sched_setaffinity") and not args.tune_nanogpt:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
        with tempfile.TemporaryDirectory() as place:
            base = {"copy": copy_nanogpt(args.nanogpt, place), "threads": args.threads}
            if args.tune_nanogpt:
                tune(base, f"{name}/tuning", steps)
            else:
                compete(base, name, steps, SEEDS[:1] if args.quick else SEEDS)
    if not args.tune_nanogpt:
        rows = stored(name)["rows"]
        if not {"nanoGPT", "ours", EIGHTH} <= {row["variant"] for row in rows}:
            parser.error("nothing is measured yet: name a checkout of nanoGPT with --nanogpt PATH")
        print(table(rows), aims(rows), sep="\n\n")
        if args.readme:
            path = record.ROOT / "README.md"
            path.write_text(with_table(path.read_text(encoding="utf-8"), rows), encoding="utf-8")


if __name__ == "__main__":
    main()
