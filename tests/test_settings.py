"""What cannot train is refused by name, and the learning rate goes the way its schedule says."""

import math

import pytest
import torch

from slm_lib import adam
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.settings import MUON_LR_SCALE, TrainingConfig, fastest_precision, learning_rate_at, make_optimizer
from slm_lib.training import Trainer

IDS = torch.tensor([(i * i + i // 7) % 5 for i in range(600)])


@pytest.mark.parametrize("wrong", [
    {"gradient_accumulation": 0}, {"gradient_accumulation": 5}, {"schedule": "step"}, {"schedule": 3},
    {"precision": "float16"}, {"precision": None}, {"compile": 1}, {"batch_size": True}, {"seed": 2**63},
    {"max_iters": 10**400}, {"grad_clip": math.inf}, {"learning_rate": True}, {"weight_decay": 10**400},
    {"optimizer": "sgd"},
])  # fmt: skip
def test_a_setting_that_cannot_train_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TrainingConfig(**wrong)


@pytest.mark.parametrize("wrong", [
    {"n_layer": 10**400}, {"n_layer": 10**4}, {"vocab_size": 2**63}, {"norm": ["rms"]}, {"activation": {}},
])  # fmt: skip
def test_a_model_of_impossible_settings_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GPTConfig.gpt2(**{"vocab_size": 5, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16, **wrong})


def test_a_text_with_tokens_that_the_model_does_not_know_is_refused():
    model = GPT(GPTConfig.gpt2(vocab_size=4, block_size=8, n_layer=1, n_head=2, n_embd=16))
    for ids in (IDS, -IDS):
        with pytest.raises(ValueError, match=r"the text holds tokens from -?\d to \d, not all of vocab_size 4"):
            Trainer(model, ids, TrainingConfig())


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_every_schedule_climbs_the_same_way_and_ends_its_own(schedule):
    config = TrainingConfig(max_iters=100, warmup_iters=10, learning_rate=0.02, schedule=schedule)
    rates = [learning_rate_at(step, config) for step in range(101)]
    assert rates[:11] == pytest.approx([0.02 * (i + 1) / 11 for i in range(11)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    halfway, end = {"linear": (0.01, 0.0), "cosine": (0.01, 0.0), "constant": (0.02, 0.02)}[schedule]
    assert rates[55] == pytest.approx(halfway) and rates[100] == pytest.approx(end)
    if schedule == "cosine":  # slow, fast, slow
        assert rates[10] - rates[20] < rates[50] - rates[60] > rates[90] - rates[100]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_warm_up_longer_than_the_training_never_overshoots(schedule):
    config = TrainingConfig(max_iters=5, warmup_iters=50, learning_rate=0.02, schedule=schedule)
    rates = [learning_rate_at(step, config) for step in range(5)]
    assert all(0 < rate < 0.02 for rate in rates)


def train(dtype=torch.float64, **changes) -> Trainer:
    torch.manual_seed(0)
    model = GPT(GPTConfig.modern(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=16)).to(dtype)
    settings = {"batch_size": 12, "max_iters": 8, "warmup_iters": 2, "learning_rate": 0.01, "grad_clip": 0.2}
    trainer = Trainer(model, IDS, TrainingConfig(**{**settings, **changes}))
    trainer.run(progress=False)
    return trainer


@pytest.mark.parametrize("pieces", [2, 3, 12])
def test_gradient_accumulation_equals_the_big_batch(pieces):
    whole, cut = train(), train(gradient_accumulation=pieces)
    assert cut.history.losses == pytest.approx(whole.history.losses, abs=1e-12)
    assert cut.history.gradient_norms == pytest.approx(whole.history.gradient_norms, rel=1e-11)
    for mine, theirs in zip(cut.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-11, rtol=0)


def test_one_seed_gives_one_history_to_the_last_bit_with_dropout_and_pieces_too():
    def run(seed):
        torch.manual_seed(seed)
        model = GPT(GPTConfig.modern(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=16, dropout=0.2))
        config = TrainingConfig(batch_size=12, max_iters=20, gradient_accumulation=3, seed=seed, schedule="cosine")
        history = Trainer(model, IDS, config).run(progress=False)
        return history.losses, history.gradient_norms

    assert run(1) == run(1) != run(2)


def test_the_norm_is_the_one_before_clipping():
    trainer = train(grad_clip=1e-3)
    assert len(trainer.history.gradient_norms) == 8 and min(trainer.history.gradient_norms) > 0.01
    final = math.sqrt(sum(p.grad.square().sum().item() for p in trainer.model.parameters()))
    assert final == pytest.approx(1e-3, rel=1e-3)


def test_lower_precision_changes_the_losses_a_little():
    exact, rough = (train(torch.float32, precision=name).history.losses for name in ("float32", "bfloat16"))
    assert exact == train(torch.float32).history.losses  # "auto" on a CPU
    assert exact != rough and exact == pytest.approx(rough, abs=0.02)


def test_an_optimizer_of_ones_own_takes_the_schedule_and_its_scale():
    torch.manual_seed(0)
    model = GPT(GPTConfig.modern(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=16))
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    groups = [{"params": matrices, "lr_scale": 10.0}, {"params": vectors}]
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    trainer = Trainer(model, IDS, TrainingConfig(max_iters=20, warmup_iters=3, batch_size=4), optimizer=optimizer)
    before = model.head.weight.clone()
    trainer.update()
    assert not torch.equal(before, model.head.weight)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3e-3 / 4 * 10, 3e-3 / 4])


# --- the optimizer ----------------------------------------------------------------------------------------------------


def where_they_go(model, optimizer):
    """Name of a parameter -> (the optimizer that moves it, its weight decay, how its learning rate is scaled)."""
    names, found = {p: name for name, p in model.named_parameters()}, {}
    for part in getattr(optimizer, "optimizers", [optimizer]):
        for group in part.param_groups:
            kind = (type(part), group["weight_decay"], group.get("lr_scale", 1.0))
            assert not found.keys() & {names[p] for p in group["params"]}
            found |= {names[p]: kind for p in group["params"]}
    return found


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_goes_to_its_optimizer_and_decays_if_it_is_a_matrix(design, optimizer):
    model = GPT(design(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=16))
    config = TrainingConfig(weight_decay=0.3, learning_rate=0.02, optimizer=optimizer)
    found = where_they_go(model, make_optimizer(model, config))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        inside = "attention" in name or "mlp" in name
        muon = optimizer == "muon" and inside and parameter.dim() == 2
        decay = 0.3 * (parameter.dim() >= 2)
        assert found[name][:2] == (adam.Muon if muon else torch.optim.AdamW, decay), name
        assert found[name][2] == (MUON_LR_SCALE if muon else 1.0), name


def test_muon_of_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="optimizer muon moves matrices inside blocks, and this model has none"):
        make_optimizer(torch.nn.Linear(3, 3), TrainingConfig(optimizer="muon"))


def test_muon_with_torchs_adamw_trains_as_muon_with_ours():
    def by_ours(model):
        inside = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.dim() == 2]
        outside = [model.embedding.token.weight, model.head.weight]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": outside, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        alone = [adam.Muon([p], weight_decay=0.1) for p in inside]
        for muon in alone:
            muon.param_groups[0]["lr_scale"] = MUON_LR_SCALE
        return adam.Together(*alone, adam.AdamW(groups, betas=(0.9, 0.95)))

    ends = []
    for make in (lambda model: None, by_ours):
        torch.manual_seed(0)
        model = GPT(GPTConfig.modern(vocab_size=5, block_size=8, n_layer=2, n_head=2, n_embd=16)).double()
        config = TrainingConfig(batch_size=4, max_iters=30, warmup_iters=3, optimizer="muon", learning_rate=0.01)
        history = Trainer(model, IDS, config, optimizer=make(model)).run(progress=False)
        ends.append(history.losses)
    assert ends[0] == pytest.approx(ends[1], abs=1e-9) and ends[0][-1] < ends[0][0] - 0.03


def test_lower_precision_serves_muons_products_too():
    ends = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        model = GPT(GPTConfig.modern(vocab_size=5, block_size=8, n_layer=1, n_head=2, n_embd=16))
        trainer = Trainer(model, IDS, TrainingConfig(precision=precision, optimizer="muon", warmup_iters=0))
        for p in model.parameters():
            p.grad = torch.ones_like(p) * torch.arange(p.shape[-1]).cos()
        trainer.gradient = lambda x, y: (torch.tensor(1.0), torch.tensor(1.0))  # so that the step alone can differ
        trainer.update()
        ends.append(model.blocks[0].mlp.up.weight.detach())
    assert not torch.equal(*ends)
    torch.testing.assert_close(*ends, atol=1e-3, rtol=0)


@pytest.mark.parametrize("known, expected", [
    ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"), ({"amx_bf16": True}, "bfloat16"), ({}, "float32"),
    ({"avx512_bf16": False, "avx512_f": True}, "float32"), (None, "float32"),
])  # fmt: skip
def test_bfloat16_is_fast_where_the_processor_is_made_for_it(monkeypatch, known, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    if known is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert fastest_precision(torch.device("cpu")) == expected and fastest_precision(torch.device("mps")) == "float32"


@pytest.mark.parametrize("capability, expected", [((7, 5), "float32"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_bfloat16_is_fast_on_newer_cuda_devices(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fastest_precision(torch.device("cuda")) == expected
