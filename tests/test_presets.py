"""Every recipe can be built and trained."""

import pytest

from slm_lib.blocks import GPT
from slm_lib.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_that_can_be_built(name):
    preset = PRESETS[name]
    model = GPT(preset.model_config(vocab_size=65))
    assert model.config.vocab_size == 65 and model.config.block_size == preset.sizes["block_size"]
    assert preset.training.warmup_iters < preset.training.max_iters


def test_shakespeare_on_a_cpu_is_small_enough_for_two_minutes():
    preset = PRESETS["shakespeare-cpu"]
    tokens = preset.training.max_iters * preset.training.batch_size * preset.sizes["block_size"]
    flops = 6 * GPT(preset.model_config(vocab_size=65)).n_parameters * tokens
    assert flops < 2.4e13  # two cores do about 2e11 a second in bfloat16


def test_shakespeare_on_a_gpu_has_as_many_parameters_as_it_may():
    preset = PRESETS["shakespeare-gpu"]
    model = GPT(preset.model_config(vocab_size=65))
    assert 10_000_000 < model.n_parameters <= 10_700_000 and model.config.block_size == 256
