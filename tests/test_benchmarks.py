"""What the programs in benchmarks/ rest on: that what they plant is there, and that what they measure is true."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = str(Path(__file__).parents[1] / "benchmarks")


@pytest.fixture(scope="module")
def skew():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import skew

        yield skew
    for name in ("skew", "sizes", "record"):
        sys.modules.pop(name, None)


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
