"""What is kept about where a model comes from is true."""

import json
import subprocess

import pytest
import torch

from slm_lib import provenance
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import Corpus
from slm_lib.training import Trainer, TrainingConfig

CORPUS = Corpus("mine", "abc\n" * 300, "mine.txt", "0" * 64, None, "\nabc", 1080)


def trained() -> Trainer:
    model = GPT(GPTConfig.modern(vocab_size=4, block_size=8, n_layer=1, n_head=2, n_embd=8))
    trainer = Trainer(model, torch.arange(400) % 4, TrainingConfig(batch_size=2, max_iters=15))
    trainer.run(progress=False)
    return trainer


def test_a_model_knows_its_code_data_settings_and_result():
    trainer = trained()
    about = json.loads(json.dumps(provenance.provenance(trainer, CORPUS, 1.25, 1.0)))
    assert about["corpus"] == {"name": "mine", "sha256": "0" * 64, "floor": None}
    assert TrainingConfig(**about["training"]) == trainer.config
    assert about["tokens_seen"] == 15 * 2 * 8 and about["validation_loss"] == 1.25
    first, last = about["training_loss_every_10_steps"]
    assert first == pytest.approx(sum(trainer.history.losses[:10]) / 10, abs=1e-4)
    assert last == pytest.approx(sum(trainer.history.losses[10:]) / 5, abs=1e-4)
    assert about["machine"]["torch"] == torch.__version__ and about["machine"]["device"] == "cpu"


def repository(folder):
    """A small repository with the folders that `commit` looks at."""
    for name in ("slm_lib", "benchmarks"):
        (folder / name).mkdir()
        (folder / name / "code.py").write_text("x = 1\n")
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *words], check=True)
    return subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()


def test_the_commit_is_named_and_marked_where_code_differs_from_it(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "slm_lib" / "provenance.py"))
    head = repository(tmp_path)
    assert provenance.commit() == head
    (tmp_path / "note.txt").write_text("not code")
    assert provenance.commit() == head
    (tmp_path / "slm_lib" / "code.py").write_text("x = 2\n")
    assert provenance.commit() == head + " with changes"


def test_without_git_or_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "slm_lib" / "provenance.py"))
    (tmp_path / "slm_lib").mkdir()
    assert provenance.commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit() is None
