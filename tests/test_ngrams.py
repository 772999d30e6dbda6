"""The counting models: against a textbook Kneser-Ney in dictionaries, a naive tally, and what probability demands."""

import copy
import math
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from exercises import code_cells, lesson_path, notices
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lib import check
from slm_lib.ngrams import KneserNey, count_ngrams, loss_units, sample, score, smooth


@st.composite
def small_texts(draw, most=80):
    """A vocabulary of 1 to 5 symbols and a short text in it, as (vocab_size, ids)."""
    vocab_size = draw(st.integers(1, 5))
    ids = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=most))
    return vocab_size, torch.tensor(ids)


class TextbookKneserNey:
    """Modified interpolated Kneser-Ney straight from Chen and Goodman (1999), slow, in dictionaries and recursion."""

    def __init__(self, order, vocab_size, ids):
        self.order, self.vocab_size = order, vocab_size
        text = [0] * (order - 1) + list(ids)
        self.count = {n: Counter() for n in range(1, order + 1)}
        for end in range(order, len(text) + 1):
            self.count[order][tuple(text[end - order : end])] += 1
        for n in range(order - 1, 0, -1):  # N1+(. w): how many different symbols stand before each shorter gram
            before = defaultdict(set)
            for gram in self.count[n + 1]:
                before[gram[1:]].add(gram[0])
            self.count[n] = Counter({gram: len(symbols) for gram, symbols in before.items()})

    def discount(self, n, count):
        how_many = Counter(self.count[n].values())
        n1, n2, n3, n4 = (how_many[k] for k in (1, 2, 3, 4))
        k = min(count, 3)
        if 0 in (n1, n2, n3, n4):
            return k / 2
        y = n1 / (n1 + 2 * n2)
        taken = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
        return taken[k - 1] if min(taken) > 0 else k / 2

    def probability(self, context, symbol):
        if len(context) == 0:
            below = 1 / self.vocab_size
        else:
            below = self.probability(context[1:], symbol)
        n = len(context) + 1
        followers = {gram[-1]: c for gram, c in self.count[n].items() if gram[:-1] == context}
        if not followers:
            return below
        total = sum(followers.values())
        own = followers[symbol] - self.discount(n, followers[symbol]) if symbol in followers else 0
        return own / total + sum(self.discount(n, c) for c in followers.values()) / total * below


@settings(max_examples=60, deadline=None)
@given(small_texts(), st.integers(1, 6), st.lists(st.integers(0, 4), max_size=8))
def test_kneser_ney_equals_the_textbook(text, order, context):
    vocab_size, ids = text
    context = [symbol % vocab_size for symbol in context]
    textbook = TextbookKneserNey(order, vocab_size, ids.tolist())
    known = tuple(context[-(order - 1) :]) if order > 1 else ()
    expected = [textbook.probability(known, symbol) for symbol in range(vocab_size)]
    found = KneserNey(order, vocab_size).fit(ids).probabilities(torch.tensor(context, dtype=torch.long))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("order", [2, 3])
def test_kneser_ney_equals_the_textbook_where_discounts_are_estimated(order):
    generator = torch.Generator().manual_seed(order)
    ids = (40 * torch.rand(1500, generator=generator) ** 3).long()
    textbook, model = TextbookKneserNey(order, 40, ids.tolist()), KneserNey(order, 40).fit(ids)
    assert (model.discounts[1:] != torch.tensor([0.5, 1.0, 1.5])).all()
    for context in torch.randint(4, (2, order - 1), generator=generator):
        expected = [textbook.probability(tuple(context.tolist()), symbol) for symbol in range(0, 40, 4)]
        np.testing.assert_allclose(model.probabilities(context)[::4], expected, rtol=0, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(small_texts(), st.integers(1, 6), st.lists(st.integers(0, 4), max_size=8))
def test_probabilities_sum_to_one_and_none_is_zero(text, order, context):
    vocab_size, ids = text
    context = torch.tensor([symbol % vocab_size for symbol in context], dtype=torch.long)
    p = KneserNey(order, vocab_size).fit(ids).probabilities(context)
    assert p.dtype == torch.float64 and p.shape == (vocab_size,)
    assert abs(p.sum().item() - 1) < 1e-12
    assert (p > 0).all()


@settings(max_examples=30, deadline=None)
@given(small_texts(), small_texts(most=20), st.integers(1, 5), st.one_of(st.none(), st.integers(1, 9)))
def test_score_is_the_surprise_of_each_symbol_in_its_window(text, other, order, context):
    vocab_size, ids = text
    model = KneserNey(order, vocab_size).fit(ids)
    scored = other[1] % vocab_size
    reads = torch.cat([torch.zeros(order, dtype=torch.long), scored])  # what stands before the text is START_ID
    for t, surprise in enumerate(model.score(scored, context)):
        seen = order - 1 if context is None else min(order - 1, t % context + 1)
        p = model.probabilities(reads[order + t - seen : order + t])[scored[t]]
        assert abs(surprise + torch.log(p)) < 1e-12


@settings(max_examples=30, deadline=None)
@given(small_texts())
def test_order_one_is_the_smoothed_unigram(text):
    vocab_size, ids = text
    model = KneserNey(1, vocab_size).fit(ids)
    counts = torch.bincount(ids, minlength=vocab_size)
    loses = model.discounts[0][counts.clamp(1, 3) - 1] * (counts > 0)
    expected = (counts - loses) / len(ids) + loses.sum() / len(ids) / vocab_size
    np.testing.assert_allclose(model.probabilities(ids[:3]), expected, rtol=0, atol=1e-12)


def test_discounts_follow_chen_and_goodman():
    ids = torch.tensor([0] * 1 + [1] * 1 + [2] * 1 + [3] * 2 + [4] * 3 + [5] * 4)  # n1 = 3, n2 = n3 = n4 = 1
    y = 3 / (3 + 2 * 1)
    expected = [1 - 2 * y / 3, 2 - 3 * y, 3 - 4 * y]
    np.testing.assert_allclose(KneserNey(1, 6).fit(ids).discounts[0], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("period", [1, 2, 3, 7])
def test_the_longer_a_text_repeats_the_less_it_surprises(period):
    once = torch.arange(1, period + 1)
    surprise = [KneserNey(4, period + 2).fit(once.repeat(n)).score(once.repeat(9))[4:].mean() for n in (5, 20, 80, 320)]
    assert all(later < earlier for earlier, later in zip(surprise, surprise[1:], strict=False))
    assert surprise[-1] < 0.02


@settings(max_examples=30, deadline=None)
@given(small_texts(), st.integers(1, 5))
def test_longest_context_is_what_the_training_text_holds(text, order):
    vocab_size, ids = text
    train, scored = [0] * (order - 1) + ids[: len(ids) // 2 + 1].tolist(), ids[len(ids) // 2 :]
    model = KneserNey(order, vocab_size).fit(torch.tensor(train[order - 1 :]))
    reads = [0] * (order - 1) + scored.tolist()
    held = {tuple(train[i : i + k]) for k in range(order) for i in range(len(train) - k)}
    for t, found in enumerate(model.longest_context(scored).tolist()):
        end = t + order - 1
        assert found == max(k for k in range(order) if tuple(reads[end - k : end]) in held)


def test_an_order_beyond_any_packed_integer_still_counts():
    ids = torch.randint(0, 1000, (500,), generator=torch.Generator().manual_seed(0))
    model = KneserNey(12, 1000).fit(ids)  # 1000^12 is far above 2^63
    assert (model.score(ids)[12:] < math.log(1000)).all()
    assert abs(model.probabilities(ids[:11]).sum() - 1) < 1e-12


def test_fit_forgets_the_text_before():
    one, other = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 1, 0])
    again = KneserNey(3, 3).fit(one).fit(other)
    assert torch.equal(again.score(one), KneserNey(3, 3).fit(other).score(one))


@settings(max_examples=30, deadline=None)
@given(small_texts(), st.integers(1, 3))
def test_counts_equal_a_naive_tally(text, order):
    vocab_size, ids = text
    padded = [0] * (order - 1) + ids.tolist()
    tally = Counter(tuple(padded[i : i + order]) for i in range(len(ids)))
    counts = count_ngrams(ids, order, vocab_size)
    assert counts.shape == (vocab_size,) * order and counts.dtype == torch.int64
    assert counts.sum() == len(ids)
    assert all(counts[place] == n for place, n in tally.items())


@settings(max_examples=30, deadline=None)
@given(small_texts(), st.floats(0.01, 100))
def test_smoothing_sums_to_one_and_moves_towards_the_prior(text, strength):
    vocab_size, ids = text
    counts = count_ngrams(ids, 2, vocab_size)
    prior = smooth(count_ngrams(ids, 1, vocab_size), strength=1)
    p = smooth(counts, strength, prior)
    assert torch.allclose(p.sum(-1), torch.ones(vocab_size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.allclose(p[counts.sum(-1) == 0], prior, rtol=0, atol=1e-12)  # never seen: the prior alone speaks
    assert torch.allclose(smooth(counts, 1e12, prior), prior.expand(vocab_size, -1), rtol=0, atol=1e-9)


def test_add_one_is_a_uniform_prior_of_strength_v():
    counts = torch.tensor([[2, 0, 1], [0, 0, 0], [5, 5, 5]])
    expected = (counts + 1) / (counts.sum(-1, keepdim=True) + 3)
    assert torch.allclose(smooth(counts, strength=3), expected.double(), rtol=0, atol=1e-7)
    assert torch.equal(smooth(counts, strength=0)[1], torch.zeros(3, dtype=torch.float64))


def test_plain_shares_are_the_best_table_for_their_own_text():
    ids = torch.randint(0, 4, (300,), generator=torch.Generator().manual_seed(1))
    best = score(smooth(count_ngrams(ids, 2, 4), strength=0), ids).mean()
    for seed in range(5):
        other = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        assert score(other / other.sum(-1, keepdim=True), ids).mean() > best


def test_a_table_scores_what_was_never_counted_as_infinitely_surprising():
    table = smooth(count_ngrams(torch.tensor([1, 1, 1]), 1, 3), strength=0)
    assert score(table, torch.tensor([1, 2])).tolist() == [0, math.inf]


def test_samples_follow_the_table():
    table = torch.tensor([[0.0, 0.5, 0.5], [0.1, 0.0, 0.9], [1.0, 0.0, 0.0]], dtype=torch.float64)
    ids = sample(table, 6000, torch.Generator().manual_seed(0))
    drawn = smooth(count_ngrams(ids, 2, 3), strength=0)
    assert torch.allclose(drawn, table, rtol=0, atol=0.03)
    assert torch.equal(drawn == 0, table == 0)


def test_samples_of_kneser_ney_follow_its_probabilities():
    model = KneserNey(3, 4).fit(torch.tensor([0, 1, 2, 3, 1, 2, 0, 1, 3, 3, 0, 1, 2]))
    prompt = torch.tensor([0, 1])
    first = torch.cat([model.sample(1, torch.Generator().manual_seed(s), prompt) for s in range(3000)])
    shares = torch.bincount(first, minlength=4) / len(first)
    assert torch.allclose(shares.double(), model.probabilities(prompt), rtol=0, atol=0.03)


def test_the_same_seed_writes_the_same_text_and_a_prompt_is_read():
    model = KneserNey(4, 5).fit(torch.tensor([1, 2, 3, 4, 1, 2, 3, 4] * 40))
    one, two = (model.sample(30, torch.Generator().manual_seed(3), torch.tensor([4, 1, 2])) for _ in range(2))
    assert torch.equal(one, two) and len(one) == 30
    assert one[0] == 3


@pytest.mark.parametrize("loss, chars", [(0.0, 1.0), (1.5, 1.0), (3.2, 4.0)])
def test_loss_units_agree_with_each_other(loss, chars):
    units = loss_units(torch.tensor(loss), chars)
    assert math.isclose(units.perplexity, 2 ** (units.bits_per_character * chars), rel_tol=1e-6)
    assert math.isclose(units.perplexity, math.exp(units.nats), rel_tol=1e-12)


def test_loss_units_bear_an_infinite_loss():
    assert loss_units(math.inf) == (math.inf, math.inf, math.inf)
    assert loss_units(1e4).perplexity == math.inf


IDS = torch.tensor([0, 1, 2, 1, 0])
BAD_INPUT = {
    "order is 0": lambda: KneserNey(0, 3),
    "order is 1.5": lambda: KneserNey(1.5, 3),
    "vocab_size is 0": lambda: KneserNey(2, 0),
    r"shape \(0,\)": lambda: KneserNey(2, 3).fit(torch.tensor([], dtype=torch.long)),
    r"shape \(1, 5\)": lambda: KneserNey(2, 3).fit(IDS[None]),
    "0 to 2 .int64., but the vocabulary": lambda: KneserNey(2, 2).fit(IDS),
    "-1 to 1": lambda: KneserNey(2, 2).fit(IDS - 1),
    "float32": lambda: KneserNey(2, 3).fit(IDS.float()),
    "1 to 9": lambda: KneserNey(2, 3).fit(IDS).score(torch.tensor([1, 9])),
    "5 to 5": lambda: KneserNey(2, 3).fit(IDS).probabilities(torch.tensor([5])),
    "context is 0": lambda: KneserNey(2, 3).fit(IDS).score(IDS, context=0),
    "length is -1": lambda: KneserNey(2, 3).fit(IDS).sample(-1),
    "too many to write down": lambda: count_ngrams(IDS, 9, 65),
    "strength is -1": lambda: smooth(torch.tensor([1, 2]), strength=-1),
    r"shape \(2, 3\)": lambda: score(torch.ones(2, 3), IDS),
    "was never counted": lambda: sample(torch.zeros(3, 3), 2),
    "loss of -1.0 nats": lambda: loss_units(-1.0),
    "loss of nan": lambda: loss_units(math.nan),
    "chars_per_token is 0.0": lambda: loss_units(1.0, 0),
}


@pytest.mark.parametrize("message", BAD_INPUT)
def test_bad_input_is_refused_with_one_sentence(message):
    with pytest.raises(ValueError, match=message) as refusal:
        BAD_INPUT[message]()
    sentence = str(refusal.value)
    assert sentence.endswith(".") and ". " not in sentence and "\n" not in sentence


@pytest.mark.parametrize("ask", [lambda m: m.score(IDS), lambda m: m.probabilities(IDS), lambda m: m.sample(2)])
def test_a_model_that_counted_nothing_says_so(ask):
    with pytest.raises(RuntimeError, match="call fit"):
        ask(KneserNey(2, 3))


# --- the lesson: break a thing of the library once, and each proof that rests on it fails -----------------------------

LESSON = lesson_path("ngrams")


class BrokenKneserNey(KneserNey):
    def fit(self, ids):
        super().fit(ids)
        self.discounts = self.discounts * 1.000001
        return self

    def score(self, ids, context=None):
        return super().score(ids, context) * 1.000001

    def probabilities(self, context_ids):
        return super().probabilities(context_ids) * 1.000001

    def longest_context(self, ids):
        return super().longest_context(ids) - 1


BROKEN = {
    "count_ngrams": lambda ids, order, vocab_size: count_ngrams(ids.roll(1), order, vocab_size),
    "smooth": lambda *args, **kwargs: smooth(*args, **kwargs) * 1.000001,
    "score": lambda probabilities, ids: score(probabilities, ids) * 1.000001,
    "sample": lambda *args: sample(*args).roll(1),
    "loss_units": lambda *args: loss_units(*args)._replace(bits_per_character=1.0),
    "KneserNey": BrokenKneserNey,
}


LONG_COUNTS = r"_losses|evenly|worth|foretold|load_corpus\(\)|models|seen\[|by_length|corpus[._]|scene|called|rungs"


def proofs():
    """Walk through the lesson, leaving out the long counts; yield each proof and the names that it can see."""
    sources = code_cells(LESSON)
    last = max(i for i, source in enumerate(sources) if "check.same(" in source)
    names = {}
    for source in sources[: last + 1]:
        if "check.same(" in source:
            yield source, names
        elif re.search(LONG_COUNTS, source) or "grade_" in source:
            continue
        exec(source, names)
        names["plt"].close("all")


def with_broken(name, names):
    """The names with one thing broken, in the model that was fitted before too."""
    broken = {**names, name: BROKEN[name]}
    if name == "KneserNey" and "model" in names:
        broken["model"] = copy.copy(names["model"])
        broken["model"].__class__ = BrokenKneserNey
    return broken


def test_each_proof_fails_when_the_library_is_broken():
    caught = set()
    for source, names in proofs():
        used = {name for name in BROKEN if f"{name}(" in source or (name == "KneserNey" and "model." in source)}
        here = {name for name in used if notices(source, with_broken(name, names))}
        assert here, f"no broken thing is noticed by this proof:\n{source}"
        caught |= here
    assert caught == set(BROKEN)


# --- the exercises of 02_ngrams: each grader accepts a right answer, knows a stub, says what is wrong with others -----


def stub(*args):
    raise NotImplementedError


def right_followers(text, context):
    found = Counter(text[i + len(context)] for i in range(len(text) - len(context)) if text[i:].startswith(context))
    return found or right_followers(text, context[1:])


def shortened_at_the_back(text, context):
    found = Counter(text[i + len(context)] for i in range(len(text) - len(context)) if text[i:].startswith(context))
    return found or shortened_at_the_back(text, context[:-1])


def without_overlaps(text, context):
    if not context:
        return Counter(text)
    found = Counter(piece[0] for piece in text.split(context)[1:] if piece)
    return found or without_overlaps(text, context[1:])


def only_the_whole_context(text, context):
    return Counter(text[i + len(context)] for i in range(len(text) - len(context)) if text[i:].startswith(context))


def choose_strength(pick, part):
    def answer(ids, vocab_size, strengths):
        cut = len(ids) * 9 // 10
        counts = count_ngrams(ids[:cut], 2, vocab_size)
        return pick(strengths, key=lambda s: score(smooth(counts, s), part(ids, cut)).mean())

    return answer


EXERCISES = {
    "grade_bits": (
        lambda p: -torch.log2(p).mean(),
        {
            "which logarithm": lambda p: -torch.log(p).mean(),
            "turn its sign": lambda p: torch.log2(p).mean(),
            "before the mean": lambda p: -torch.log2(p.mean()),
            "is it per character": lambda p: -torch.log2(p).sum(),
        },
    ),
    "grade_followers": (
        right_followers,
        {
            "from the front": shortened_at_the_back,
            "runs overlap": without_overlaps,
            "only the ending": only_the_whole_context,
        },
    ),
    "grade_strength": (
        choose_strength(min, lambda ids, cut: ids[cut:]),
        {
            "measure on the rest": choose_strength(min, lambda ids, cut: ids[:cut]),
            "lowest mean surprise": choose_strength(max, lambda ids, cut: ids[cut:]),
            "one of the strengths": lambda ids, vocab_size, strengths: 2.0,
        },
    ),
}


@pytest.fixture(scope="module")
def graders():
    return check.graders(LESSON)


def strength_with_the_context_before_the_cut(ids, vocab_size, strengths):
    cut = len(ids) * 9 // 10
    counts = count_ngrams(ids[:cut], 2, vocab_size)
    return min(strengths, key=lambda s: score(smooth(counts, s), ids)[cut:].mean())


def test_strength_may_be_measured_with_the_context_before_the_cut(graders):
    assert check.exercise(strength_with_the_context_before_the_cut, graders["grade_strength"]) == "right"


@pytest.mark.parametrize("grader", EXERCISES)
def test_graders_accept_a_right_answer_and_know_a_stub(graders, grader):
    assert check.exercise(EXERCISES[grader][0], graders[grader]) == "right"
    assert check.exercise(stub, graders[grader]) == "not attempted"


@pytest.mark.parametrize(("grader", "message"), [(name, said) for name in EXERCISES for said in EXERCISES[name][1]])
def test_graders_say_what_is_wrong(graders, grader, message):
    verdict = check.exercise(EXERCISES[grader][1][message], graders[grader])
    assert verdict.startswith("not yet") and message in verdict


def test_every_grader_is_tested(graders):
    assert {name for name in graders if name.startswith("grade_")} == set(EXERCISES)
