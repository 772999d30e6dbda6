"""Does a larger model amplify, keep or even out a skew in its text? A skew is planted, and measured in the model.

    OMP_NUM_THREADS=1 python benchmarks/skew.py        (about 7 minutes on one core)

The text is drawn from a corner of playhouse, one sentence to a scene, in its own notation and with its own words. Each
trade goes with "his" or "her" at a share that is planted and known: a line `pronoun.smith = 9* his | 1* her`. Two
trades are rare. Every size learns from much text and from little, over five seeds. What a model does with the skew is
measured on scenes that nobody trained on, the same for each trade: only the word for the trade is exchanged, and the
share of "his" is read off the model's probabilities after the letter h, where the choice falls. The grammar itself,
asked in the same way, answers with the planted share: it is what a perfect model says. Learning rates are those that
`benchmarks/sizes.py` chose.
"""

import os
import random
import re
import time
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path

import record
import sizes
import torch
from tqdm.auto import tqdm

from slm_lib import check, playhouse, training

SEEDS = [0, 1, 2, 3, 4]
PLANTED = {"smith": 0.9, "baker": 0.75, "miller": 0.5, "weaver": 0.25, "nurse": 0.1, "cooper": 0.9, "brewer": 0.1}
RARE, OFTEN = ("cooper", "brewer"), 10  # every other trade is drawn so many times as often
TEXTS = {"little": 20_000, "much": 1_000_000}  # characters
BLOCK_SIZE, CONTEXTS, FRESH_SEED = 48, 150, 900
TEMPERATURES = [1.0, 0.5]
ROWS, LENGTH = 32, 120  # of what each model writes, at each temperature
TRAINING = training.TrainingConfig(batch_size=16, max_iters=600, warmup_iters=60, eval_interval=100)
CHOICE = re.compile(rf"\bthe ({'|'.join(PLANTED)}) has \w+ h(?=is |er )")
WORDS = ("hero", "on", "hero-end", "sold", "tool")  # the rules taken over from playhouse
I, E = sizes.TOKENIZER.encode("ie").tolist()


def planted_grammar(planted: dict[str, float] = PLANTED, rare: tuple[str, ...] = RARE) -> playhouse.Grammar:
    """A corner of playhouse in which each trade says "his" with its planted share, and "her" otherwise."""
    whole = Path(playhouse.__file__).with_name("playhouse.grammar").read_text(encoding="utf-8")
    rules = ["scene = <me:hero>:/{<Said> the <t:trade> has <sold> <pronoun.t> <tool>.}//",
             "Said = They say | I hear | Men swear | I doubt not",
             "trade = " + " | ".join(trade if trade in rare else f"{OFTEN}* {trade}" for trade in planted)]
    for trade, share in planted.items():
        his = Fraction(share).limit_denominator(100)
        rules.append(f"pronoun.{trade} = {his.numerator}* his | {his.denominator - his.numerator}* her")
    rules += [re.search(rf"^{word} =.*\n(?: .*\n)*", whole, re.M)[0] for word in WORDS]
    return playhouse.Grammar("\n".join(rules))


def draw(grammar: playhouse.Grammar, characters: int, seed: int) -> str:
    """Whole scenes that hold at least so many characters."""
    rng, drawn, length = random.Random(seed), [], 0
    while length < characters:
        drawn.append(grammar.draw(rng).text)
        length += len(drawn[-1])
    return "".join(drawn)


def count(text: str) -> dict[str, list[int]]:
    """How often each trade says "his", and how often it says either."""
    found = {trade: [0, 0] for trade in PLANTED}
    for choice in CHOICE.finditer(text):
        found[choice[1]][0] += text[choice.end()] == "i"
        found[choice[1]][1] += 1
    return found


def contexts(text: str, n: int = CONTEXTS) -> dict[str, torch.Tensor]:
    """Trade to ids (n, T) that end where the choice falls; they differ from trade to trade in that one word."""
    places = [choice for choice in CHOICE.finditer(text) if choice.start() > 2 * BLOCK_SIZE][:n]
    ends = {trade: [text[: at.start(1)][-BLOCK_SIZE:] + trade + text[at.end(1) : at.end()] for at in places]
            for trade in PLANTED}
    return {trade: torch.stack([sizes.TOKENIZER.encode(end[-BLOCK_SIZE:]) for end in found])
            for trade, found in ends.items()}


@torch.no_grad()
def shares(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The share of "his" that a model gives in each context of ids (n, T): (n,), float64."""
    model.eval()
    chances = model(ids)[:, -1].double().softmax(-1)  # (n, V)
    return chances[:, I] / (chances[:, I] + chances[:, E])


def at_temperature(share: torch.Tensor, temperature: float) -> torch.Tensor:
    """The share once both chances are raised to the power 1 / temperature, which is what dividing the logits does."""
    his, her = share ** (1 / temperature), (1 - share) ** (1 / temperature)
    return his / (his + her)


@torch.no_grad()
def write(model: torch.nn.Module, temperature: float, seed: int) -> str:
    """What a model writes after the end of a scene: ROWS texts of LENGTH characters, joined."""
    generator = torch.Generator().manual_seed(seed)
    ids = sizes.TOKENIZER.encode("\n\n").repeat(ROWS, 1)
    for _ in range(LENGTH):
        logits = model(ids[:, -BLOCK_SIZE:])[:, -1].double()
        drawn = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
    return "\n\n".join(sizes.TOKENIZER.decode(row) for row in ids)


def run(size: str, text: str, fresh: str, learning_rate: float, seed: int, writes: bool) -> dict:
    """Train one model on a text, and measure what it does with the skew."""
    model = sizes.build(size, seed, BLOCK_SIZE)
    ids, fresh_ids = sizes.TOKENIZER.encode(text), sizes.TOKENIZER.encode(fresh)
    config = replace(TRAINING, learning_rate=learning_rate, seed=seed)
    places, curve = contexts(fresh), []

    def glance(trainer):
        curve.append([trainer.step, *(round(shares(model, ids[:50]).mean().item(), 3) for ids in places.values())])

    began = time.process_time()
    training.train(model, ids, config, glance, progress=False)
    seconds = time.process_time() - began
    found = {trade: shares(model, ids) for trade, ids in places.items()}
    given = {trade: {str(t): round(at_temperature(share, t).mean().item(), 4) for t in TEMPERATURES}
             for trade, share in found.items()}
    return {
        "size": size, "seed": seed, "learning_rate": learning_rate, "parameters": model.n_parameters,
        "train_loss": round(training.evaluate(model, ids[:20_000]), 4),
        "held_out_loss": round(training.evaluate(model, fresh_ids), 4), "seconds": round(seconds, 2),
        "text": count(text), "given": given,
        "decided": {trade: round((share > 0.5).double().mean().item(), 4) for trade, share in found.items()},
        "deviation": {trade: round(share.std().item(), 4) for trade, share in found.items()},
        "written": {str(t): count(write(model, t, seed)) for t in TEMPERATURES} if writes else {}, "curve": curve,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    grammar, rates = planted_grammar(), sizes.chosen_rates(check.result("sizes")["rows"])
    fresh = draw(grammar, 20_000, FRESH_SEED)
    config = {"planted": PLANTED, "rare": RARE, "often": OFTEN, "texts": TEXTS, "sizes": sizes.SIZES, "seeds": SEEDS,
              "block_size": BLOCK_SIZE, "training": asdict(TRAINING), "learning_rates": rates, "contexts": CONTEXTS,
              "temperatures": TEMPERATURES, "written": [ROWS, LENGTH]}  # fmt: skip
    rows = sizes.finished("skew", config).get("rows", [])
    facts = {"floor": round(-grammar.log_prob(fresh) / len(fresh), 4), "curve": ["step", *PLANTED]}
    done = {(row["size"], row["amount"], row["seed"]) for row in rows}
    plan = [(size, amount, seed) for size in sizes.SIZES for amount in reversed(TEXTS) for seed in SEEDS]
    for size, amount, seed in tqdm([one for one in plan if one not in done]):
        row = run(size, draw(grammar, TEXTS[amount], seed), fresh, rates[size], seed, writes=amount == "much")
        rows.append({"amount": amount, **row})
        record.save("skew", config, rows, **facts)


if __name__ == "__main__":
    main()
