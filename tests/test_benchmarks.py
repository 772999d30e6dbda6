"""What the programs in benchmarks/ rest on: that what they plant is there, and that what they measure is true."""

import contextlib
import importlib
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from slm_lib import data, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.ngrams import KneserNey
from slm_lib.presets import PRESETS
from slm_lib.settings import fastest_precision

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@contextlib.contextmanager
def program(name, *beside):
    """A program of benchmarks/ as a module; it and what it imports from beside it are forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module(name)
    for each in (name, *beside):
        sys.modules.pop(each, None)


@pytest.fixture(scope="module")
def skew():
    with program("skew", "sizes", "record") as module:
        yield module


@pytest.fixture(scope="module")
def grammar(skew):
    return skew.planted_grammar()


class Oracle(nn.Module):
    """Gives each trade a known share of "his", and half of all chance to other symbols."""

    def __init__(self, skew, planted):
        super().__init__()
        self.planted, self.skew = planted, skew

    def forward(self, ids):
        chances = torch.full((*ids.shape, 65), 0.5 / 63, dtype=torch.float64)
        for row, text in enumerate(map(self.skew.sizes.TOKENIZER.decode, ids)):
            trade = text.rpartition(" the ")[2].split()[0]
            chances[row, -1, self.skew.I] = 0.5 * self.planted[trade]
            chances[row, -1, self.skew.E] = 0.5 * (1 - self.planted[trade])
        return chances.log()


def test_the_grammar_itself_gives_the_planted_shares(skew, grammar):
    text = skew.draw(grammar, 30_000, seed=1)
    surprisal, seen = grammar.surprisal(text), set()
    for choice in skew.CHOICE.finditer(text):
        share = skew.PLANTED[choice[1]]
        said = share if text[choice.end()] == "i" else 1 - share
        assert math.exp(-surprisal[choice.end()]) == pytest.approx(said, abs=1e-9)
        assert surprisal[choice.end() - 1] == pytest.approx(0, abs=1e-9)  # that h comes is certain
        seen.add(choice[1])
    assert seen == set(skew.PLANTED)


def test_the_planting_produces_the_planted_shares(skew, grammar):
    counts = skew.count(skew.draw(grammar, 200_000, seed=2))
    for trade, (his, all_) in counts.items():
        share = skew.PLANTED[trade]
        assert abs(his / all_ - share) < 5 * math.sqrt(share * (1 - share) / all_)
    common = [all_ for trade, (_, all_) in counts.items() if trade not in skew.RARE]
    for trade in skew.RARE:
        assert counts[trade][1] / (sum(common) / len(common)) == pytest.approx(1 / skew.OFTEN, rel=0.4)


def test_every_choice_is_counted(skew, grammar):
    text = skew.draw(grammar, 20_000, seed=3)
    assert sum(all_ for _, all_ in skew.count(text).values()) == text.count(":\n")


def test_contexts_differ_in_the_trade_alone(skew, grammar):
    found = skew.contexts(skew.draw(grammar, 10_000, seed=4), n=20)
    assert set(found) == set(skew.PLANTED)
    decode = skew.sizes.TOKENIZER.decode
    for rows in zip(*found.values(), strict=True):
        texts = dict(zip(found, map(decode, rows), strict=True))
        assert {len(text) for text in texts.values()} == {skew.BLOCK_SIZE}
        assert all(f" the {trade} has " in text and text.endswith(" h") for trade, text in texts.items())
        ends = {text.rpartition(f"the {trade} ")[2] for trade, text in texts.items()}
        starts = {text.rpartition(f"the {trade} ")[0][-15:] for trade, text in texts.items()}
        assert len(ends) == len(starts) == 1


@pytest.mark.parametrize("planted", ["the planted", "all the same"])
def test_the_measured_share_of_an_oracle_is_right(skew, grammar, planted):
    truth = skew.PLANTED if planted == "the planted" else dict.fromkeys(skew.PLANTED, 0.5)
    oracle = Oracle(skew, truth)
    for trade, ids in skew.contexts(skew.draw(grammar, 10_000, seed=5), n=10).items():
        torch.testing.assert_close(skew.shares(oracle, ids), torch.full((10,), truth[trade], dtype=torch.float64))


def test_temperature_sharpens_as_dividing_the_logits_does(skew):
    share = torch.tensor([0.1, 0.5, 0.75, 0.9], dtype=torch.float64)
    torch.testing.assert_close(skew.at_temperature(share, 1.0), share)
    assert skew.at_temperature(share, 0.5)[2].item() == pytest.approx(0.9)
    logits = torch.stack([share.log(), (1 - share).log()])
    torch.testing.assert_close(skew.at_temperature(share, 0.3), (logits / 0.3).softmax(0)[0])


def test_what_a_model_writes_is_drawn_from_its_probabilities(skew, grammar, monkeypatch):
    monkeypatch.setattr(skew, "LENGTH", 3)
    model = skew.sizes.build("8k", seed=0, block_size=skew.BLOCK_SIZE)
    written = skew.write(model, 1.0, seed=0)
    assert written == skew.write(model, 1.0, seed=0) != skew.write(model, 1.0, seed=1)
    assert len(written) == skew.ROWS * (2 + 3) + 2 * (skew.ROWS - 1)


def test_a_run_of_other_settings_is_not_gone_on_with(skew, tmp_path, monkeypatch):
    sizes = skew.sizes
    monkeypatch.setattr(sizes.record, "ROOT", tmp_path)
    assert sizes.finished("sizes", {"a": (1, 2)}) == {}
    sizes.record.save("sizes", {"a": (1, 2)}, [{"loss": 1.0}])
    assert sizes.finished("sizes", {"a": (1, 2)})["rows"] == [{"loss": 1.0}]
    assert sizes.finished("sizes", {"a": (1, 3)}) == {}


def test_a_text_has_the_length_asked_for(skew):
    assert len(skew.sizes.encoded(1_234, seed=0)) == 1_234
    assert not torch.equal(skew.sizes.encoded(1_234, seed=0), skew.sizes.encoded(1_234, seed=1))


@pytest.fixture(scope="module")
def cpu():
    with program("cpu", "contestants", "record") as module:
        yield module


@pytest.fixture(scope="module")
def contestants(cpu):
    return sys.modules["contestants"]


@pytest.fixture(scope="module")
def reader():
    """A small GPT with random weights, far from uniform, and a text for it whose length is no multiple of anything."""
    torch.manual_seed(0)
    model = GPT(GPTConfig.gpt2(vocab_size=65, block_size=96, n_layer=2, n_head=2, n_embd=16)).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(8)
    return model, torch.randint(65, (1_234,))


def test_the_columns_are_those_of_the_one_evaluator(contestants, reader):
    model, ids = reader
    found = contestants.columns(model, ids)
    assert {len(surprises) for surprises in found.values()} == {len(ids)}
    assert found["own"].mean().item() == pytest.approx(training.evaluate(model, ids))
    assert found["64"].mean().item() == pytest.approx(training.evaluate(model, ids, 64))
    assert found["own"].mean().item() != pytest.approx(found["64"].mean().item(), abs=1e-4)
    counts = KneserNey(4, 65).fit(ids[:1_000])
    scored = contestants.columns(counts, ids)
    assert scored["64"].mean().item() == pytest.approx(counts.score(ids, 64).mean().item())
    assert torch.equal(scored["full"], counts.score(ids))


@pytest.mark.parametrize("block_size", [8, 30, 96])
def test_overlapping_windows_score_each_character_once_with_most_of_a_window_before_it(contestants, block_size):
    class Places(nn.Module):
        """Its surprise tells where in a window a character was scored: e.g. 7 nats at the eighth place."""

        def __init__(self):
            super().__init__()
            self.config, self.weight = SimpleNamespace(block_size=block_size), nn.Parameter(torch.zeros(()))

        def forward(self, ids):
            right = -torch.arange(ids.shape[1], dtype=torch.float64).expand(ids.shape)
            logits = torch.full((*ids.shape, 3), -math.inf, dtype=torch.float64)
            logits[..., 0], logits[..., 1] = right, (-torch.expm1(right)).log()
            return logits

    model, ids = Places(), torch.zeros(501, dtype=torch.long)
    places = contestants.overlapping(model, ids, training.surprisal(model, ids)).round().long()
    assert torch.equal(places[:block_size], torch.arange(block_size))
    assert places[block_size:].min() >= block_size - block_size // 4
    assert places[block_size:].max() < block_size


def test_overlapping_windows_give_what_a_window_by_itself_gives(contestants, reader):
    model, ids = reader
    found = contestants.overlapping(model, ids, training.surprisal(model, ids))
    before = torch.cat([ids.new_zeros(1), ids[:-1]])
    for p in (96, 150, 700, 1_233):
        windows = [before[p - place : p + 1] for place in range(72, 96)]
        surprises = torch.stack([-model(w[None])[0, -1].log_softmax(-1)[ids[p]] for w in windows])
        assert (surprises - found[p]).abs().min() < 1e-9


def test_nanogpt_is_asked_for_every_position(contestants, reader):
    class LastOnly(nn.Module):
        """Like nanoGPT's model: all logits for those who bring targets, the last ones alone for others."""

        def __init__(self, model):
            super().__init__()
            self.model, self.config = model, model.config

        def forward(self, ids, targets=None):
            logits = self.model(ids)
            return (logits[:, -1:], None) if targets is None else (logits, logits.mean())

    model, ids = reader
    wrapped = contestants.EveryPosition(LastOnly(model))
    assert torch.equal(training.surprisal(wrapped, ids), training.surprisal(model, ids))


def test_the_two_plays_together_are_the_whole_text(contestants, reader):
    shrew, tempest = "GREMIO:\nI say, a devil.\n\n" * 20, contestants.SECOND_PLAY + "\n\nWhere is the master?\n" * 9
    found = contestants.losses(reader[0], shrew + tempest)
    for column in ("64", "own", "full"):
        whole = found[f"shrew_{column}"] * len(shrew) + found[f"tempest_{column}"] * len(tempest)
        assert found[f"loss_{column}"] == pytest.approx(whole / len(shrew + tempest), abs=2e-4)
    assert set(contestants.losses(reader[0], shrew)) == {"loss_64", "loss_own", "loss_full"}


def test_ours_trains_the_preset_for_its_steps_and_says_what_it_took(contestants, monkeypatch):
    small = replace(PRESETS["shakespeare-cpu"], sizes={"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16})
    monkeypatch.setitem(PRESETS, "small", small)
    model, facts = contestants.train_ours({"preset": "small", "seed": 1, "steps": 3}, torch.randint(65, (500,)))
    assert facts["characters_seen"] == 3 * small.training.batch_size * 16
    assert contestants.our_training("small", seed=3) == replace(
        small.training, seed=3, precision=fastest_precision(torch.device("cpu"))
    )
    assert facts["parameters"] == model.n_parameters and facts["seconds"] > 0 and facts["memory_mib"] > 50


@pytest.mark.skipif(not data.find_shakespeare(), reason="Shakespeare is not on this machine")
def test_a_contestant_runs_in_a_process_of_its_own(contestants):
    row = contestants.measure({"kind": "ngram", "order": 3, "threads": 1})
    train, val = map(contestants.TOKENIZER.encode, data.split(data.load_corpus("shakespeare")))
    assert row["loss_own"] == pytest.approx(KneserNey(3, 65).fit(train).score(val).mean().item(), abs=1e-4)
    assert row["loss_full"] < row["loss_64"] and row["shrew_own"] < row["tempest_own"]
    with pytest.raises(RuntimeError, match="at least the symbol"):
        contestants.measure({"kind": "ngram", "order": 0, "threads": 1})


def test_another_checkout_than_the_one_named_is_refused(contestants, tmp_path):
    (tmp_path / "train.py").write_text("print('something else')")
    with pytest.raises(ValueError, match="3adf61e"):
        contestants.copy_nanogpt(tmp_path, str(tmp_path / "copy"))


def rows_of(cpu, variants, seeds=(0, 1)):
    keys = [f"{part}_{column}" for part in ("loss", *cpu.PLAYS) for column in cpu.COLUMNS]
    costs = {"parameters": 804_096, "characters_seen": 1_536_000, "characters_per_second": 19_000, "memory_mib": 400}
    return [{"variant": variant, "seed": seed, **costs, "seconds": 80.0, **dict.fromkeys(keys, 1.5 + 0.2 * seed)}
            for seed in seeds for variant in variants]  # fmt: skip


def test_the_table_is_made_of_the_rows_and_stands_in_the_readme(cpu):
    rows = rows_of(cpu, ["nanoGPT", "ours", "ours, an eighth of the time"])
    lines = cpu.table(rows).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:5]] == [f"| {row['variant']}" for row in rows[:3]]
    assert "804,096 | 1,536,000 | 19,000 | 80.0 | 400 | 1.600 ± 0.100 | 1.600 ± 0.100" in lines[2]
    assert lines[2].endswith("| 2.308 |")  # 1.6 nats in bits
    assert {line.count("|") for line in lines[:5]} == {11} and {line.count("|") for line in lines[6:]} == {8}
    readme = "before\n<!-- cpu -->\nold\n<!-- /cpu -->\nafter\n"
    new = cpu.with_table(readme, rows)
    assert cpu.table(rows) in new and "old" not in new and new.startswith("before") and new.endswith("after\n")
    assert cpu.with_table(new, rows) == new
    with pytest.raises(ValueError, match="no place"):
        cpu.with_table("no comments\n", rows)
    assert "missed  loss at own context, at most 1.530: 1.600" in cpu.aims(rows)


def test_rows_of_other_settings_are_not_gone_on_with(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.record, "ROOT", tmp_path)
    assert cpu.stored("cpu", {"seeds": (0, 1)}) == {"rows": []}
    cpu.record.save("cpu", {"seeds": (0, 1)}, [{"loss": 1.0}])
    assert cpu.stored("cpu", {"seeds": (0, 1)})["rows"] == [{"loss": 1.0}] == cpu.stored("cpu")["rows"]
    assert cpu.stored("cpu", {"seeds": (0, 2)}) == {"rows": []}


def test_an_interrupted_comparison_goes_on_where_it_stopped(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.record, "ROOT", tmp_path)
    cpu.record.save("cpu/tuning", {}, [
        {"variant": "nanoGPT", "flags": {}, "loss_own": 1.9},
        {"variant": "nanoGPT", "flags": {"learning_rate": 0.004}, "loss_own": 1.8},
        {"variant": "n-gram", "order": 7, "loss_own": 1.5}, {"variant": "n-gram", "order": 8, "loss_own": 1.6},
    ])  # fmt: skip
    calls, cost = [], {"nanogpt": 4.0, "ours": 8.0, "ngram": 1.0}

    def measured(job, **changes):  # stands in for the process that trains
        calls.append(job | changes)
        if len(calls) == 14:
            raise KeyboardInterrupt
        row = rows_of(cpu, ["any"], [0])[0] | {"seconds": cost[job["kind"]]}
        return {key: value for key, value in row.items() if key not in ("variant", "seed")}

    monkeypatch.setattr(cpu, "measure", measured)
    base = {"copy": "here", "threads": 2}
    with pytest.raises(KeyboardInterrupt):
        cpu.compete(base, "cpu", 2_000, [0, 1, 2])
    assert len(cpu.stored("cpu")["rows"]) == 13 - 4 * cpu.ROUNDS
    cpu.compete({**base, "copy": "there"}, "cpu", 2_000, [0, 1, 2])
    done = cpu.stored("cpu")
    variants = ["nanoGPT", "nanoGPT, flags retuned", "ours", "ours, an eighth of the time", "7-gram Kneser-Ney"]
    assert [(row["seed"], row["variant"]) for row in done["rows"]] == [(s, v) for s in range(3) for v in variants]
    assert len(calls) == 4 * cpu.ROUNDS + 15 + 1 and calls[-1]["copy"] == "there"
    assert done["jobs"]["nanoGPT, flags retuned"]["flags"] == {"learning_rate": 0.004}
    assert [row["steps"] for row in done["rows"][:4]] == [2_000, 2_000, 920, 115]  # ours: twice as slow, and a margin


def test_the_flags_are_searched_in_the_same_time_and_the_best_is_kept(cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu.record, "ROOT", tmp_path)

    def measured(job, **changes):  # two changes help, and a batch of 8 takes longer
        flags = job.get("flags") or {}
        loss = 2 - 0.1 * (flags.get("learning_rate") == 4e-3) - 0.05 * (flags.get("learning_rate") == 2e-3)
        loss -= 0.1 * (flags.get("min_lr") == 0.0)
        assert job.get("tuning") or changes.get("tuning")  # never the validation text
        return {"loss_own": loss, "processor_seconds": 12 / flags.get("batch_size", 12)}

    monkeypatch.setattr(cpu, "measure", measured)
    cpu.tune({"copy": "here", "threads": 1}, "cpu/tuning", 2_000)
    found = cpu.stored("cpu/tuning")
    rows = found["rows"]
    assert found["finished"]
    best = min((row for row in rows if row["flags"] is not None), key=lambda row: row["loss_own"])
    assert best["flags"] == {"learning_rate": 4e-3, "min_lr": 0.0, "beta2": 0.95} and best["steps"] == 2_000
    assert {row["steps"] for row in rows if (row["flags"] or {}).get("batch_size") == 8} == {1_333}
    assert [row["order"] for row in rows if row["variant"] == "n-gram"] == cpu.ORDERS


@pytest.fixture(scope="module")
def writing():
    """benchmarks/generation.py, under another name than that of the library's module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import generation

        yield generation
    for name in ("generation", "contestants", "record"):
        sys.modules.pop(name, None)


def small_gpt2(block_size=16):
    torch.manual_seed(0)
    config = GPTConfig.gpt2(vocab_size=65, block_size=block_size, n_layer=1, n_head=2, n_embd=8, bias=False)
    return GPT(config).eval()


def test_every_name_of_nanogpt_finds_the_weight_that_is_meant(writing):
    block = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    names = ["transformer.wte", "transformer.wpe", *(f"transformer.h.0.{part}" for part in block), "transformer.ln_f"]
    theirs = {f"{name}.weight": torch.tensor(i) for i, name in enumerate([*names, "lm_head"])}
    found = writing.translated(theirs)
    assert set(found) == set(small_gpt2().state_dict())
    meant = {"embedding.token": 0, "blocks.0.attention.qkv": 3, "blocks.0.attention.output": 4,
             "blocks.0.norm2": 5, "blocks.0.mlp.down": 7, "norm": 8}  # fmt: skip
    assert {name: found[f"{name}.weight"].item() for name in meant} == meant


def test_a_stretch_is_a_window_that_fills_or_two_turns_beyond_it(writing):
    assert writing.work(64, "growing") == ("\n", 64)
    begin, length = writing.work(64, "full")
    assert len(begin) == 64 and length == 1 + 2 * 33


@pytest.mark.parametrize("streams", [1, 2])
def test_the_time_of_writing_is_measured(writing, streams):
    assert 0 < writing.seconds_of_ours(small_gpt2(), streams, *writing.work(16, "full")) < 60


def test_the_table_of_writing_shows_the_median_and_the_range_of_the_ratios(writing):
    cell = {"shape": "10.7M", "context": 256, "streams": 1, "stretch": "full", "every": 1}
    rows = [{**cell, "nanogpt": 100, "ours": 1_000 * ratio, "ratio": ratio} for ratio in (12.0, 9.0, 10.0)]
    lines = writing.table(rows).splitlines()
    assert len(lines) == 3 and "| 100 | 10,000 | 10.0 (9.0 to 12.0) | at least 10 |" in lines[2]


def test_weights_of_another_nanogpt_are_refused(writing, tmp_path):
    (tmp_path / "model.py").write_text("class GPT: pass")
    with pytest.raises(ValueError, match=writing.COMMIT):
        writing.load_nanogpt(tmp_path)
