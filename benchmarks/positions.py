"""The same small GPT with each way to tell positions, and with none: python benchmarks/positions.py (ten minutes).

Within a seed all variants start from the same weights (but for learned positions, which the others lack) and see the
same batches, so that they can be compared seed by seed. They train on contexts of 64 characters of Shakespeare; the
loss is that of the whole validation text in windows of 64. Then the text is read in windows of 128, twice as far as
any of them was trained to look, and `by_place` holds the mean loss for each 16 places of the window.
"""

import record
import torch

from slm_lib import data, training
from slm_lib.blocks import GPT, GPTConfig

# "sinusoidal" adds waves of height 1 to vectors of deviation 0.02; in "sinusoidal, balanced" both are equally large.
VARIANTS = ("none", "learned", "sinusoidal", "sinusoidal, balanced", "rotary")
SEEDS, TRAINED, READ, BINS = 5, 64, 128, 8
SIZES = {"block_size": READ, "n_layer": 2, "n_head": 4, "n_embd": 64, "tie_weights": False}


def build(variant: str, seed: int, vocab_size: int) -> GPT:
    """A model whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    start = GPT(GPTConfig(vocab_size=vocab_size, position="none", **SIZES)).state_dict()
    model = GPT(GPTConfig(vocab_size=vocab_size, position=variant.split(",")[0], **SIZES))
    model.load_state_dict(start, strict=False)
    if variant == "sinusoidal, balanced":
        with torch.no_grad():
            model.embedding.token.weight.mul_(0.5**0.5 / 0.02)
    return model


def measure(variant: str, seed: int, train_ids: torch.Tensor, val_ids: torch.Tensor, vocab_size: int) -> dict:
    model = build(variant, seed, vocab_size)
    config = training.TrainingConfig(batch_size=16, max_iters=800, learning_rate=3e-3, seed=seed)
    history = training.Trainer(model, train_ids, config, block_size=TRAINED).run(progress=False)
    far = training.surprisal(model, val_ids, READ)
    places = far[: len(far) // READ * READ].view(-1, READ).double().mean(0)
    return {
        "variant": variant,
        "seed": seed,
        "loss": training.evaluate(model, val_ids, TRAINED),
        "by_place": places.view(BINS, -1).mean(1).tolist(),
        "seconds": round(history.seconds, 1),
    }


def main() -> None:
    corpus = data.load_corpus("shakespeare")
    tokenizer = data.CharTokenizer(corpus.symbols)
    train_ids, val_ids = (tokenizer.encode(text) for text in data.split(corpus))
    rows = []
    for seed in range(SEEDS):
        for variant in VARIANTS:
            rows.append(measure(variant, seed, train_ids, val_ids, tokenizer.vocab_size))
            print(f"seed {seed}: {variant:22} {rows[-1]['loss']:.4f} nats, {rows[-1]['seconds']} s", flush=True)
    config = {**SIZES, "batch_size": 16, "max_iters": 800, "learning_rate": 3e-3, "trained_on": TRAINED, "seeds": SEEDS}
    print(record.save("positions", config, rows, corpus="shakespeare"))


if __name__ == "__main__":
    main()
