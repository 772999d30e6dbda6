"""Named recipes for `python -m slm_lib train --preset`."""

from dataclasses import dataclass

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


PRESETS = {
    "shakespeare-cpu": Preset(
        None,
        {"block_size": 64, "n_layer": 4, "n_head": 4, "n_embd": 128},
        TrainingConfig(batch_size=32, max_iters=1_000, learning_rate=4e-3),
    ),
}
