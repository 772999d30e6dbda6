"""The command `tune`: settings searched by Optuna in a storage that several processes share."""

import argparse
import contextlib
import json
import os
import platform
import shlex
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from slm_lib import data, runs, tokens, training
from slm_lib.ngrams import loss_units
from slm_lib.presets import PRESETS
from slm_lib.settings import CHOICES

SEARCHED = ("learning_rate=3e-4:3e-2", "weight_decay=0.01:1", "dropout=0:0.3")  # where nothing else is asked for
SETTLED = {"seed", "max_iters", "eval_interval", "gradient_accumulation", "precision"}  # what no search decides
TUNING_BLOCK = 50_000  # characters at most; the last tenth of the training text
LOOKS = 8  # how often a training shows its loss, and may be stopped for it
DONE = (TrialState.COMPLETE, TrialState.PRUNED)
PRUNERS = {
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    "halving": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "none": optuna.pruners.NopPruner,
}


def tune(args: argparse.Namespace) -> None:
    """Search until the study holds so many finished trials, and print the best as a command that trains it."""
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    search = Search.of(args)
    with _told(args.storage):
        study = open_study(args.storage, args.name, PRUNERS[args.pruner]())
    agree(study, search.about(), args.storage)
    try:
        while unfinished(study, args.trials):
            study.optimize(search.trial, n_trials=1, callbacks=[tell])
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on ({count(study)} of {args.trials} trials are done)")
    print(search.summary(study))


@dataclass
class Search:
    """What is searched, on which texts, on which device."""

    args: argparse.Namespace
    space: dict[str, str]
    corpus: data.Corpus
    tokenizer: tokens.Tokenizer
    fitted: Tensor  # ids of the text that trials are trained on
    held_out: Tensor  # ids of the tuning block, which lies in the training text too: the validation text is never read
    chars_per_token: float
    device: Any

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Search":
        """The search that the command line describes. Raises ValueError where it cannot be."""
        device = training.choose_device(args.device)
        space = read_space(args.search or SEARCHED)
        if double := [runs.option(name) for name in runs.given(args, space)]:
            raise ValueError(f"{', '.join(double)} is given and searched at once: leave one of the two out")
        corpus = data.load_corpus(args.corpus or PRESETS[args.preset].corpus)
        text, _ = data.split(corpus)
        held_out = text[-min(TUNING_BLOCK, len(text) // 10) :]
        fitted = text[: -len(held_out)]
        tokenizer = runs.make_tokenizer(args, corpus, fitted)
        ids = tokenizer.encode(held_out)
        return cls(args, space, corpus, tokenizer, tokenizer.encode(fitted), ids, len(held_out) / len(ids), device)

    def about(self) -> dict:
        """What all workers of a study must agree on."""
        fixed = runs.given(self.args, ["preset", "vocab_size", "design", *runs.SIZES, *runs.SETTINGS])
        return {"corpus": self.corpus.sha256, "fixed": fixed, "search": self.space}

    def trial(self, trial: optuna.Trial) -> float:
        """Train one setting; its loss on the tuning block at the end, nats per token."""
        trial.set_user_attr("worker", {"machine": platform.node(), "pid": os.getpid()})
        chosen = {name: suggest(trial, name, range) for name, range in self.space.items()}
        try:
            history = self.trainer(chosen).run(lambda trainer: self.look(trial, trainer), progress=False)
        except (ValueError, FloatingPointError, MemoryError) as error:  # such a setting has no loss
            trial.set_user_attr("reason", str(error))
            raise optuna.TrialPruned from None
        if history.interrupted:
            raise KeyboardInterrupt
        return trial.user_attrs["loss"]

    def trainer(self, chosen: dict) -> training.Trainer:
        """A fresh model and its training with the chosen settings."""
        config = runs.make_training(self.args, self.device)
        config = replace(config, **{name: value for name, value in chosen.items() if name in runs.SETTINGS})
        config = replace(config, eval_interval=max(1, -(-config.max_iters // LOOKS)))
        sizes = {name: value for name, value in chosen.items() if name in runs.SIZES}
        model = runs.make_model(self.args, self.tokenizer.vocab_size, config.seed, self.device, **sizes)
        return training.Trainer(model, self.fitted, config)

    def look(self, trial: optuna.Trial, trainer: training.Trainer) -> None:
        """Report the loss on the tuning block; raises TrialPruned where others were better at this step."""
        if not trainer.step:
            return
        loss = training.evaluate(trainer.model, self.held_out, start_id=tokens.start_id(self.tokenizer))
        if loss != loss or loss == float("inf"):
            raise FloatingPointError(f"the loss became {loss} at step {trainer.step}")
        trial.set_user_attr("loss", loss)
        trial.report(loss, trainer.step // trainer.config.eval_interval)
        if trainer.step < trainer.config.max_iters and trial.should_prune():
            raise optuna.TrialPruned

    def summary(self, study: optuna.Study) -> str:
        """The best trial so far, as a command that trains with its settings."""
        if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            reasons = [trial.user_attrs["reason"] for trial in study.trials if "reason" in trial.user_attrs]
            return "no trial has come to its end" + (f"; the last said: {reasons[-1]}" if reasons else "")
        best, args = study.best_trial, self.args
        options = runs.given(args, ["preset", "corpus", "vocab_size", "design", *runs.SIZES, *runs.SETTINGS])
        settings = {**options, **best.params}
        words = [f"{runs.option(name)} {shlex.quote(_short(value))}" for name, value in settings.items()]
        words += ["--compile"] * bool(args.compile)
        return (f"best of {count(study)} trials: number {best.number}, {loss_units(best.value, self.chars_per_token)} "
                f"on the tuning block; train it on the whole text:\n"
                f"python -m slm_lib train {' '.join(words)}")  # fmt: skip


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- the space --------------------------------------------------------------------------------------------------------


def read_space(words: list[str]) -> dict[str, str]:
    """The searched settings, name to range, from words such as learning_rate=1e-4:1e-2 or batch_size=8,16,32.

    >>> read_space(["beta2=0.9:0.99", "schedule=linear,cosine"])
    {'beta2': '0.9:0.99', 'schedule': 'linear,cosine'}
    """
    space = {}
    for word in words:
        name, _, range = word.partition("=")
        name = name.replace("-", "_")
        if name not in {*runs.SIZES, *runs.SETTINGS} - SETTLED:
            known = ", ".join(sorted({*runs.SIZES, *runs.SETTINGS} - SETTLED))
            raise ValueError(f"--search {word}: there is nothing called {name!r} to search, choose among {known}")
        read_range(name, range)
        space[name] = range
    return space


def read_range(name: str, range: str) -> list:
    """The values of a range, converted to the setting's kind: [low, high] of "low:high", all of "a,b,c"."""
    preset = PRESETS["shakespeare-cpu"]
    kind = type({"dropout": 0.0, **preset.sizes, **asdict(preset.training)}[name])
    try:
        values = [kind(value) for value in range.replace(":", ",").split(",")]
    except ValueError:
        values = []
    ordered = len(values) == 2 and values[0] < values[1] and name not in CHOICES if ":" in range else bool(values)
    if not ordered or (name in CHOICES and not set(values) <= set(CHOICES[name])):
        raise ValueError(f"--search {name}={range}: give {name}=LOW:HIGH or {name}=A,B,C")
    return values


def suggest(trial: optuna.Trial, name: str, range: str) -> Any:
    """The trial's value in a range; numbers that span a factor of ten or more are drawn by their logarithm."""
    values = read_range(name, range)
    if ":" not in range:
        return trial.suggest_categorical(name, values)
    low, high = values
    draw = trial.suggest_int if isinstance(low, int) else trial.suggest_float
    return draw(name, low, high, log=low > 0 and high >= 10 * low)


# --- the study --------------------------------------------------------------------------------------------------------


def open_study(storage: str, name: str, pruner: optuna.pruners.BasePruner) -> optuna.Study:
    """The study of that name in a journal file or a database, begun if it is not there."""
    sampler = optuna.samplers.TPESampler(constant_liar=True)  # workers that run side by side keep clear of each other
    begin = partial(optuna.create_study, study_name=name, sampler=sampler, pruner=pruner, load_if_exists=True)
    for patience in (0.5, 1, 2):
        with contextlib.suppress(sqlalchemy.exc.OperationalError):
            return begin(storage=_storage(storage))
        time.sleep(patience)  # two workers that begin one database at once get into each other's way
    return begin(storage=_storage(storage))


@contextlib.contextmanager
def _told(storage: str) -> Iterator[None]:
    """Within it, whatever a storage goes wrong with becomes a ValueError with a sentence; OSError stays."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # a damaged journal can make Optuna stumble anywhere
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{storage} is damaged, or no storage of Optuna's ({reason}): give another") from None


def _storage(place: str) -> BaseStorage:
    if "://" in place:
        return _database(place)
    path = Path(place).resolve()  # the lock is a link to the file, and a relative one would lead elsewhere
    _check_journal(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = (JournalFileOpenLock if os.name == "nt" else JournalFileSymlinkLock)(str(path))
    return JournalStorage(JournalFileBackend(str(path), lock))


def _check_journal(path: Path) -> None:
    """Raise ValueError for a file that Optuna would take for an empty journal, and then write into."""
    if path.exists() and path.stat().st_size:
        with open(path, "rb") as file:
            first = json.loads(file.readline())
            file.seek(-1, os.SEEK_END)
            if not (isinstance(first, dict) and "op_code" in first) or file.read() != b"\n":
                raise ValueError("its first or last line is not one of a journal")


def _database(url: str) -> RDBStorage:
    """A database that is empty or Optuna's; a worker on another machine that shows no life for minutes is given up."""
    waits = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
    engine = sqlalchemy.create_engine(url, **waits)
    tables = sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()
    if tables and "version_info" not in tables:
        raise ValueError("the database holds other tables")
    return RDBStorage(url, engine_kwargs=waits, heartbeat_interval=60, grace_period=300)


def agree(study: optuna.Study, about: dict, storage: str) -> None:
    """Raise ValueError where the study was begun with another text, other fixed settings or another space."""
    about = json.loads(json.dumps(about))
    begun = study.user_attrs.get("about")
    if begun is None and study.trials:
        raise ValueError(f"the study {study.study_name!r} in {storage} is not from this command: give another --name")
    for what in about if begun is not None else ():
        if begun.get(what) != about[what]:
            raise ValueError(f"the study {study.study_name!r} in {storage} has another {what} ({begun.get(what)}, not "
                             f"{about[what]}): use the same command, or give another --name")  # fmt: skip
    study.set_user_attr("about", about)


def count(study: optuna.Study) -> int:
    """How many trials came to an end of their own."""
    return len(study.get_trials(deepcopy=False, states=DONE))


def unfinished(study: optuna.Study, trials: int) -> bool:
    """Whether more trials are wanted; what dead workers left is cleared up first."""
    bury_the_dead(study)
    return count(study) < trials


def bury_the_dead(study: optuna.Study) -> None:
    """Mark as failed what workers of this machine had begun that are no longer alive. Not to be called in a trial."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        worker = trial.user_attrs.get("worker", {})
        if worker.get("machine") == platform.node() and not _other_process_lives(worker["pid"]):
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            print(f"trial {trial.number} was lost with its worker")


def _other_process_lives(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.name == "nt" or os.kill(pid, 0)  # signal 0 only asks; on Windows there is no such question
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def tell(study: optuna.Study, trial: FrozenTrial) -> None:
    """Print a line about a trial that has ended."""
    setting = " · ".join(f"{name} {_short(value)}" for name, value in trial.params.items())
    lost = trial.user_attrs.get("reason") or f"stopped early at {trial.user_attrs.get('loss', float('nan')):.4f}"
    print(f"trial {trial.number}: {f'{trial.value:.4f}' if trial.state == TrialState.COMPLETE else lost} · {setting}",
          flush=True)  # fmt: skip
