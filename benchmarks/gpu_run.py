"""The full run behind models/shakespeare-gpu, filmed: its loss, and what it writes, at stored steps.

    python benchmarks/gpu_run.py            (a minute or two on a GPU)
    python benchmarks/gpu_run.py --dry      (the whole path on a CPU at toy size, kept in runs/dry)

This is `python -m slm_lib train --preset shakespeare-gpu`, with a look from time to time: the loss on the whole
validation text, which nothing is chosen by, and 400 characters. The clock is the loop's own, so looks do not count. The
model of the last step is kept in half precision, in files below 16 MB, with its provenance. Further options are those
of `train`.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import record
from gpu_contestants import PRESET
from gpu_steps import device_name

from slm_lib import data, generation, runs, training
from slm_lib.__main__ import build_parser
from slm_lib.settings import learning_rate_at

LOOKS = [0, 10, 20, 50, 100, 200, 300, 500, 700, 1_000, 1_500, 2_000, 3_000, 5_000]  # and the last step
LENGTH, LARGEST = 400, 16_000_000  # characters of a sample, bytes of a file
TINY = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=32", "--batch-size=4", "--max-iters=20",
        "--warmup-iters=2", "--device=cpu"]  # fmt: skip


@dataclass
class Filmed(runs.Run):
    """A run that keeps what the model knows and writes at some steps, in place of checkpoints."""

    rows: list[dict] = field(default_factory=list)
    length: int = LENGTH

    def keep_checkpoint(self, trainer: training.Trainer) -> None:
        last = trainer.step >= trainer.config.max_iters
        if (trainer.step in LOOKS or last) and trainer.step not in [row["step"] for row in self.rows]:
            self.rows.append(self.look(trainer))
            print(f"step {trainer.step:,}: {self.rows[-1]['loss']}", flush=True)

    def look(self, trainer: training.Trainer) -> dict:
        """A row: what the model knows and writes now."""
        done, since = trainer.step, self.rows[-1]["step"] if self.rows else 0
        losses, config = trainer.history.losses[since:done], trainer.config
        loss, _ = runs.validation_loss(trainer.model, self.tokenizer, self.corpus)
        return {
            "step": done, "seconds": round(trainer.history.seconds, 3),
            "characters_seen": done * config.batch_size * trainer.block_size, "loss": round(loss, 4),
            "train_loss": round(statistics.fmean(losses), 4) if losses else None,
            "learning_rate": round(learning_rate_at(done, config), 8),
            "sample": generation.generate(trainer.model, self.tokenizer, "\n", self.length),
        }  # fmt: skip


def film(options: list[str], target: Path, name: str, dry: bool) -> None:
    """Train, keep the rows, and publish the model in `target`."""
    if target.exists():
        raise FileExistsError(f"{target} is there already: move it away first")
    with tempfile.TemporaryDirectory() as place:
        args = build_parser().parse_args(["train", "--preset", PRESET, "--out", f"{place}/run", *options])
        with runs.processes(args.device) as device:
            corpus = data.load_corpus(args.corpus or runs.PRESETS[PRESET].corpus)
            run = Filmed(**vars(runs._start(args, corpus, device)), length=40 if dry else LENGTH)
            run.commands.append(record.command())
            run.trainer.config = replace(run.trainer.config, eval_interval=10)  # the least of what lies between looks
            run.go()
        large = [path.name for path in (run.folder / "model").iterdir() if path.stat().st_size > LARGEST]
        assert not large, f"{', '.join(large)}: above 16 MB"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run.folder / "model", target)
    about, losses = json.loads((target / "provenance.json").read_text()), run.trainer.history.losses
    config = {"preset": PRESET, "options": options, "training": about["training"], "looks": LOOKS}
    facts = {"device": device_name(device), "dry": dry, "model": f"models/{target.name}",
             "parameters": about["parameters"], "block_size": run.trainer.block_size, "loss": about["validation_loss"],
             "losses": [round(statistics.fmean(losses[i : i + 10]), 4) for i in range(0, len(losses), 10)]}  # fmt: skip
    record.save(name, config, run.rows, **facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry", type=Path, nargs="?", const=record.ROOT / "runs" / "dry", metavar="FOLDER",
                        help="the whole path at toy size on a CPU, kept in FOLDER (runs/dry)")  # fmt: skip
    args, options = parser.parse_known_args()
    try:
        if args.dry:
            folder = args.dry.resolve()
            film([*TINY, *options], folder / "models" / PRESET, str(folder / "gpu_run"), dry=True)
        else:
            film(["--device", "cuda", *options], record.ROOT / "models" / PRESET, "gpu_run", dry=False)
    except (ValueError, OSError) as error:
        sys.exit(f"gpu_run: {error}")


if __name__ == "__main__":
    main()
