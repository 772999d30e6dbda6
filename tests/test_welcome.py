"""The graders of the first notebook: what they accept, and the wrong answers that they must catch."""

import math

from exercises import assert_graded


def bits_instead_of_nats(probabilities):
    return math.exp(sum(-math.log2(p) for p in probabilities) / len(probabilities))


def the_sum_and_not_the_mean(probabilities):
    return math.exp(sum(-math.log(p) for p in probabilities))


def one_over_the_mean_probability(probabilities):
    return len(probabilities) / sum(probabilities)


def only_the_loss(probabilities):
    return sum(-math.log(p) for p in probabilities) / len(probabilities)


def looks_inside_words(written, known):
    mine = [word.lower().strip(".,;:!?'-") for word in written.split()]
    return sum(word in known.lower() for word in mine if word) / max(1, len(mine))


def forgets_commas_and_capitals(written, known):
    mine = written.split()
    return sum(word in set(known.split()) for word in mine) / max(1, len(mine))


def counts_each_word_once(written, known):
    mine, vocabulary = ({word.lower().strip(".,;:!?'-") for word in text.split()} - {""} for text in (written, known))
    return len(mine & vocabulary) / max(1, len(mine))


def divides_by_nothing(written, known):
    mine, vocabulary = ([word.lower().strip(".,;:!?'-") for word in text.split()] for text in (written, known))
    return sum(word in vocabulary for word in mine if word) / len([word for word in mine if word])


def does_not_normalise(probabilities, temperature):
    return probabilities ** (1 / temperature)


def the_wrong_way_round(probabilities, temperature):
    return probabilities**temperature / (probabilities**temperature).sum()


def softmax_of_probabilities(probabilities, temperature):
    return (probabilities / temperature).softmax(-1)


def test_graders():
    assert_graded("welcome", {
        "perplexity": [bits_instead_of_nats, the_sum_and_not_the_mean, one_over_the_mean_probability, only_the_loss],
        "share_of_words": [looks_inside_words, forgets_commas_and_capitals, counts_each_word_once, divides_by_nothing],
        "at_temperature": [does_not_normalise, the_wrong_way_round, softmax_of_probabilities],
    })  # fmt: skip
