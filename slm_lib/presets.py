"""Named recipes for `python -m slm_lib train --preset`."""

from dataclasses import dataclass, replace

from slm_lib.blocks import GPTConfig
from slm_lib.training import TrainingConfig


@dataclass(frozen=True)
class Preset:
    """A named recipe: the corpus, the model's shape (but for its vocabulary) and how to train it."""

    corpus: str | None
    sizes: dict
    training: TrainingConfig

    def model_config(self, vocab_size: int) -> GPTConfig:
        """The model's configuration for a vocabulary."""
        return GPTConfig.modern(vocab_size=vocab_size, **self.sizes)


# Found by experiment on a block cut from the training text: results/cpu/LOG.md.
MUON = TrainingConfig(
    batch_size=16, max_iters=2_000, learning_rate=3e-3, weight_decay=0.2, warmup_iters=20, optimizer="muon"
)
# A first guess, for there was no GPU to search on yet: `python benchmarks/gpu.py --tune` searches around it.
ON_GPU = TrainingConfig(
    batch_size=64, max_iters=1_500, learning_rate=4e-3, warmup_iters=50, eval_interval=500, optimizer="muon"
)
QUICK = {"batch_size": 12, "max_iters": 600, "learning_rate": 3.5e-3, "weight_decay": 0.1}
PRESETS = {
    "shakespeare-cpu": Preset(None, {"block_size": 128, "n_layer": 4, "n_head": 4, "n_embd": 128}, MUON),
    "shakespeare-quick": Preset(  # for ten seconds
        None, {"block_size": 64, "n_layer": 2, "n_head": 4, "n_embd": 128}, replace(MUON, **QUICK)
    ),
    "shakespeare-gpu": Preset(
        None, {"block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.3}, ON_GPU
    ),
}
