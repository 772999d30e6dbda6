"""Is a token table worth taking over? The same small GPT from five tables: python benchmarks/starting_vectors.py.

"counted" vectors come from the training text alone: how much more often than by chance two characters stand side by
side (positive pointwise mutual information), factorised. "trained" vectors are the token table of
models/shakespeare-small. Each is also tried with its rows shuffled: the same numbers, given to the wrong characters.
Within a deviation all tables have as many columns as the model, so that content alone is compared: first 0.02, with
which this project's models begin, then 0.15, about that of the trained table. Within a seed all else is equal: the
other weights, and the batches. It takes seven minutes.
"""

from itertools import product

import record
import torch
from torch import Tensor

from slm_lib import checkpoints, data, training
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.ngrams import count_ngrams

SEEDS, MAX_ITERS, MEASURED = 5, 150, (25, 50, 100, 150)
SIZES = {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 64, "position": "rotary", "tie_weights": False}
KINDS = {
    0.02: ("random", "counted", "trained"),
    0.15: ("random", "counted", "counted, shuffled", "trained", "trained, shuffled"),
}


def principal(vectors: Tensor, n_embd: int) -> Tensor:
    """Centred vectors in their first n_embd principal directions; of 65 vectors 64 directions keep everything."""
    centred = vectors - vectors.mean(0)
    directions = torch.linalg.svd(centred, full_matrices=False).Vh[:n_embd]
    return centred @ directions.T


def counted_vectors(ids: Tensor, vocab_size: int) -> Tensor:
    """PPMI of each symbol with what follows it and with what stands before it, factorised (V, V)."""
    pairs = count_ngrams(ids, 2, vocab_size).double()
    chance = pairs.sum(1, keepdim=True) * pairs.sum(0, keepdim=True) / pairs.sum()
    gain = (pairs / chance.clamp(min=1e-9)).clamp(min=1).log()  # (V, V), no less than 0
    left, sizes, _ = torch.linalg.svd(torch.cat([gain, gain.T], dim=1), full_matrices=False)
    return left * sizes.sqrt()


def tables(ids: Tensor, vocab_size: int) -> dict[str, Tensor]:
    trained = checkpoints.load_model(record.ROOT / "models" / "shakespeare-small")[0].embedding.token.weight.detach()
    return {
        name: principal(vectors, SIZES["n_embd"])
        for name, vectors in {"counted": counted_vectors(ids, vocab_size), "trained": trained.double()}.items()
    }


def build(kind: str, deviation: float, seed: int, vocab_size: int, vectors: dict[str, Tensor]) -> GPT:
    """A model whose weights depend on the seed alone, but for its token table."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(vocab_size=vocab_size, **SIZES))
    table = model.embedding.token.weight.detach()
    if kind != "random":
        table = vectors[kind.split(",")[0]]
    if kind.endswith("shuffled"):
        table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))]
    with torch.no_grad():
        model.embedding.token.weight.copy_(table * deviation / table.std())
    return model


def measure(model: GPT, seed: int, train_ids: Tensor, val_ids: Tensor) -> dict[str, list]:
    config = training.TrainingConfig(
        batch_size=16, max_iters=MAX_ITERS, learning_rate=3e-3, eval_interval=min(MEASURED), seed=seed
    )
    losses = {}

    def note(trainer: training.Trainer) -> None:
        if trainer.step in MEASURED:
            losses[trainer.step] = training.evaluate(trainer.model, val_ids)

    training.train(model, train_ids, config, note, progress=False)
    return {"steps": list(losses), "losses": list(losses.values())}


def main() -> None:
    corpus = data.load_corpus("shakespeare")
    tokenizer = data.CharTokenizer(corpus.symbols)
    train_ids, val_ids = (tokenizer.encode(text) for text in data.split(corpus))
    vectors, rows = tables(train_ids, tokenizer.vocab_size), []
    for seed, (deviation, kinds) in product(range(SEEDS), KINDS.items()):
        for kind in kinds:
            model = build(kind, deviation, seed, tokenizer.vocab_size, vectors)
            row = {"variant": kind, "deviation": deviation, "seed": seed}
            rows.append(row | measure(model, seed, train_ids, val_ids))
            print(f"seed {seed}: {deviation} {kind:18}", *(f"{loss:.3f}" for loss in rows[-1]["losses"]), flush=True)
    config = {**SIZES, "batch_size": 16, "max_iters": MAX_ITERS, "learning_rate": 3e-3, "seeds": SEEDS}
    print(record.save("starting_vectors", config, rows, corpus="shakespeare"))


if __name__ == "__main__":
    main()
