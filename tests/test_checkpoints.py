"""A saved folder is whole or not there, and what is not whole is refused by name."""

import errno
import json
import os
import resource
import signal

import pytest
import safetensors
import torch

from slm_lib import checkpoints
from slm_lib.blocks import GPT, GPTConfig
from slm_lib.data import CharTokenizer
from slm_lib.tokens import BytePairTokenizer

TOKENIZER = CharTokenizer("\nabc")
SIZES = {"vocab_size": 4, "block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 8}


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    return checkpoints.save_model(tmp_path / "model", GPT(GPTConfig.gpt2(**SIZES)), TOKENIZER, {"why": "test"})


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("dtype, tolerance", [(None, 0), (torch.float16, 1e-3)])
def test_a_model_comes_back_as_it_was(tmp_path, design, dtype, tolerance):
    torch.manual_seed(1)
    model = GPT(design(**SIZES)).eval()
    torch.nn.init.normal_(model.head.weight)
    folder = checkpoints.save_model(tmp_path / "m", model, TOKENIZER, {"why": "test"}, dtype)
    again, tokenizer, provenance = checkpoints.load_model(folder)
    ids = torch.tensor([[1, 2, 3, 0]])
    torch.testing.assert_close(again(ids), model(ids), atol=tolerance, rtol=tolerance)
    assert again.config == model.config and tokenizer.symbols == TOKENIZER.symbols and provenance == {"why": "test"}
    assert (again.head.weight is again.embedding.token.weight) == model.config.tie_weights


def test_a_model_keeps_its_byte_pairs(tmp_path):
    tokenizer = BytePairTokenizer.train("to be or not to be", 262, special=["<|end|>"])
    model = GPT(GPTConfig.gpt2(**{**SIZES, "vocab_size": 262}))
    _, again, _ = checkpoints.load_model(checkpoints.save_model(tmp_path / "m", model, tokenizer, {}))
    assert (again.merges, again.special) == (tokenizer.merges, tokenizer.special)


def test_a_tokenizer_of_another_version_is_refused_by_name(tmp_path, saved):
    files = checkpoints.verify(saved)
    others = [b"{}", b"[]", b"\xff", b'{"kind": "byte pairs", "version": 2, "merges": [], "special": []}']
    for i, stored in enumerate(others):
        folder = checkpoints.publish(tmp_path / f"m{i}", {**files, "tokenizer.json": stored})
        with pytest.raises(ValueError, match=f"{folder.name} is not a model of this version"):
            checkpoints.load_model(folder)


def test_one_flipped_bit_in_any_file_is_found(saved):
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for place in {0, len(content) // 2, len(content) - 1}:
            damaged = bytearray(content)
            damaged[place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises((ValueError, FileNotFoundError)):
                checkpoints.load_model(saved)
        path.write_bytes(content)
    checkpoints.load_model(saved)


def test_a_missing_file_and_a_foreign_folder_are_refused_by_name(saved, tmp_path):
    (saved / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="model.safetensors is missing or damaged"):
        checkpoints.load_model(saved)
    with pytest.raises(FileNotFoundError, match="nowhere holds no manifest.json"):
        checkpoints.load_model(tmp_path / "nowhere")
    foreign = checkpoints.publish(tmp_path / "foreign", {"config.json": b"{}"})
    with pytest.raises(ValueError, match="foreign is not a model"):
        checkpoints.load_model(foreign)


def test_a_model_whose_weights_do_not_fit_its_config_is_refused(saved, tmp_path):
    files = checkpoints.verify(saved)
    files["config.json"] = files["config.json"].replace(b'"n_layer": 1', b'"n_layer": 2')
    with pytest.raises(ValueError, match="is not a model of this version"):
        checkpoints.load_model(checkpoints.publish(tmp_path / "swapped", files))


def test_nothing_is_overwritten(saved):
    before = checkpoints.verify(saved)
    with pytest.raises(FileExistsError, match="choose another name"):
        checkpoints.publish(saved, {"a": b""})
    assert checkpoints.verify(saved) == before


def test_a_full_disk_leaves_what_was_there_and_no_half_folder(saved, tmp_path):
    """The limit on the size of a file stands for the full disk: the write itself fails half-way, in the real code."""
    pid = os.fork()
    if pid == 0:  # in a child, since the limit cannot be lifted again for a process that is not root
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            checkpoints.publish(tmp_path / "big", {"small": b"x" * 10, "large": b"x" * 10_000})
        except OSError as error:
            told = "could not be saved" in str(error) and error.__cause__.errno == errno.EFBIG
            os._exit(0 if told else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    checkpoints.load_model(saved)


def test_what_a_kill_left_unfinished_is_swept_and_nothing_else(saved, tmp_path):
    for name in (".step-000002.1a2b.unfinished", ".model.77.unfinished", ".git", "step-000002"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"half")
    assert checkpoints.sweep(tmp_path) == 2 and checkpoints.sweep(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [".git", "model", "step-000002"]
    checkpoints.load_model(saved)
    assert checkpoints.sweep(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("damage", [
    lambda text: text[:-1], lambda text: text + b" ", lambda text: text.replace(b'": "', b'":"'), lambda text: b"[]",
    lambda text: b"3", lambda text: b"{}", lambda text: b"[" * 100_000, lambda text: b"",
], ids=["cut", "longer", "respaced", "list", "number", "empty object", "deep", "empty"])  # fmt: skip
def test_a_manifest_is_read_as_it_was_written_to_the_last_byte(saved, damage):
    manifest = saved / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(ValueError, match="model"):
        checkpoints.load_model(saved)


# --- weights in several files -----------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A model of the size that is trained on a GPU, saved in half precision."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 65, "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384}
    model = GPT(GPTConfig.modern(**sizes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    tokenizer = CharTokenizer("".join(map(chr, range(32, 97))))
    return model, checkpoints.save_model(tmp_path / "large", model, tokenizer, {}, torch.float16)


def test_a_large_model_lies_in_several_files_that_each_can_be_kept_in_git(sharded):
    model, folder = sharded
    names = sorted(path.name for path in folder.glob("model*"))
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert names == [*parts, checkpoints.INDEX] and model.n_parameters > 10_600_000
    assert all(path.stat().st_size < 16_000_000 for path in folder.iterdir())
    again, _, _ = checkpoints.load_model(folder)
    for (name, mine), theirs in zip(again.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs.half().float()) and mine.dtype == torch.float32, name


def test_the_files_are_those_that_hugging_face_would_write_and_read(sharded):
    hub = pytest.importorskip("huggingface_hub")
    model, folder = sharded
    index = json.loads((folder / checkpoints.INDEX).read_text())
    weights = {name: weight.half() for name, weight in model.state_dict().items()}
    theirs = hub.split_torch_state_dict_into_shards(weights, max_shard_size=checkpoints.LARGEST_FILE)
    assert index == {"metadata": theirs.metadata, "weight_map": theirs.tensor_to_filename}
    for path in folder.glob("model-*"):
        with safetensors.safe_open(path, "pt") as part:
            assert part.metadata() == {"format": "pt"}
    other = GPT(model.config).half()
    found = hub.load_torch_model(other, folder, strict=True, safe=True)
    assert not found.missing_keys and not found.unexpected_keys
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs.half())


@pytest.mark.parametrize("design", [GPTConfig.gpt2, GPTConfig.modern])
@pytest.mark.parametrize("largest", [1, 400, 2_000])
def test_any_number_of_files_comes_back_as_one_model(tmp_path, monkeypatch, design, largest):
    monkeypatch.setattr(checkpoints, "LARGEST_FILE", largest)
    model = GPT(design(**SIZES)).eval()
    torch.nn.init.normal_(model.head.weight)
    folder = checkpoints.save_model(tmp_path / "m", model, TOKENIZER, {})
    assert len(list(folder.glob("model-*"))) > 1 and not (folder / checkpoints.WEIGHTS).exists()
    again, _, _ = checkpoints.load_model(folder)
    assert torch.equal(again(torch.tensor([[1, 2, 3]])), model(torch.tensor([[1, 2, 3]])))


def test_a_file_of_weights_that_is_missing_or_damaged_is_named(sharded):
    _, folder = sharded
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing or damaged"):
        checkpoints.load_model(folder)
    second.unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors is missing or damaged"):
        checkpoints.load_model(folder)


@pytest.mark.parametrize("change", [
    {"norm.weight": "model-00009-of-00002.safetensors"}, {"norm.weight": "model-00001-of-00002.safetensors"},
    {"nobody.weight": "model-00002-of-00002.safetensors"},
])  # fmt: skip
def test_an_index_that_does_not_fit_its_files_is_refused(sharded, tmp_path, change):
    files = checkpoints.verify(sharded[1])
    index = json.loads(files[checkpoints.INDEX])
    index["weight_map"] |= change
    folder = checkpoints.publish(tmp_path / "m", {**files, checkpoints.INDEX: json.dumps(index).encode()})
    with pytest.raises(ValueError, match="m is not a model of this version of slm_lib"):
        checkpoints.load_model(folder)


def test_how_torch_computes_an_update_is_the_affair_of_each_machine(saved):
    model = checkpoints.load_model(saved)[0]
    theirs = torch.optim.AdamW(model.parameters(), fused=True)
    theirs.param_groups[0] |= {"lr": torch.tensor(0.25), "capturable": True}  # as on a GPU
    files = checkpoints.pack_optimizer(theirs, {})
    assert json.loads(files["optimizer.json"])[0]["lr"] == 0.25
    mine = torch.optim.AdamW(model.parameters(), fused=False)
    checkpoints.unpack_optimizer(files, mine)
    group = mine.param_groups[0]
    assert (group["lr"], group["fused"], group["capturable"]) == (0.25, False, False)
