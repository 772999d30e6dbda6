"""Saving and loading: a folder of safetensors and JSON with a SHA-256 manifest, published by one rename."""

import hashlib
import json
import os
import secrets
import shutil
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from slm_lib.blocks import GPT, GPTConfig
from slm_lib.tokens import Tokenizer, tokenizer_from_json

MANIFEST, WEIGHTS, INDEX = "manifest.json", "model.safetensors", "model.safetensors.index.json"
LARGEST_FILE = 15_000_000  # bytes of weights in one file; beyond it there are several
UNFINISHED = ".unfinished"  # how the name of a folder ends that is still being written


def publish(folder: str | os.PathLike, files: dict[str, bytes]) -> Path:
    """Write `files` (name to content) and a manifest of their hashes as a new folder: whole, or not there at all.

    Everything is written and flushed under a temporary name beside it, then renamed once. Raises FileExistsError
    where the folder exists, OSError where the disk refuses; nothing that was there before is touched.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already and is never overwritten: choose another name")
    manifest = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    unfinished = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        unfinished.mkdir(parents=True)
        for name, content in {**files, MANIFEST: _json(manifest)}.items():
            with open(unfinished / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        unfinished.rename(folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(
            f"{folder} could not be saved ({error.strerror or error}): free some disk space or choose another place; "
            "what was saved before is still there"
        ) from error
    return folder


def sweep(folder: str | os.PathLike) -> int:
    """Remove from `folder` what killed processes left half written there, and return how many pieces that were.

    Nobody ever reads them; they only take room. To be called while no other process publishes into `folder`.
    """
    left = [path for path in Path(folder).glob(f".*{UNFINISHED}") if path.is_dir()]
    for path in left:
        shutil.rmtree(path)
    return len(left)


def verify(folder: str | os.PathLike) -> dict[str, bytes]:
    """Read every file that the manifest of `folder` names and return name to content.

    Raises FileNotFoundError for a folder without a manifest, ValueError naming the first missing or damaged file.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}: it is not a whole folder that slm_lib saved")
    try:
        stored = (folder / MANIFEST).read_bytes()
        manifest = dict(json.loads(stored))
        if _json(manifest) != stored:  # it is read as it was written, to the last byte
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ValueError(f"{folder / MANIFEST} is damaged: take an earlier checkpoint") from None
    files = {}
    for name, expected in manifest.items():
        path = folder / Path(name).name
        files[name] = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(files[name]).hexdigest() != expected:
            raise ValueError(f"{path} is missing or damaged (its SHA-256 is not the manifest's): take an earlier one")
    return files


def save_model(
    folder: str | os.PathLike,
    model: GPT,
    tokenizer: Tokenizer,
    provenance: dict,
    dtype: torch.dtype | None = None,
    extra: dict[str, bytes] | None = None,
) -> Path:
    """Publish a model with its tokenizer and provenance as a new folder; `dtype` float16 halves the weights.

    Weights beyond LARGEST_FILE bytes lie in several files with an index, named as Hugging Face does.
    """
    weights = {name: tensor.detach().to("cpu", dtype or tensor.dtype) for name, tensor in _unique(model).items()}
    files = {
        "config.json": _json(asdict(model.config)),
        **_pack_weights(weights),
        "tokenizer.json": tokenizer.to_json().encode(),
        "provenance.json": _json(provenance),
    }
    return publish(folder, {**files, **(extra or {})})


def load_model(folder: str | os.PathLike, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Return the model (float32, evaluation mode), its tokenizer and its provenance from a folder of `save_model`.

    Raises FileNotFoundError or ValueError with a sentence for a folder that is damaged, incomplete or something else.
    """
    files = verify(folder)
    try:
        model = GPT(GPTConfig(**json.loads(files["config.json"])))
        weights = _unpack_weights(files)
        model.load_state_dict({**weights, **_tied(model, weights)})
        tokenizer = tokenizer_from_json(files["tokenizer.json"].decode())
        provenance = json.loads(files["provenance.json"])
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder} is not a model of this version of slm_lib ({reason}): save it again") from None
    return model.to(device).eval(), tokenizer, provenance


def _pack_weights(weights: dict[str, Tensor]) -> dict[str, bytes]:
    """One file of weights, or several, each filled as far as it goes, with the index that tells what lies where."""
    parts: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if parts[-1] and sum(t.nbytes for t in parts[-1].values()) + tensor.nbytes > LARGEST_FILE:
            parts.append({})
        parts[-1][name] = tensor
    if len(parts) == 1:
        return {WEIGHTS: safetensors.torch.save(weights)}
    named = {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in weights.values())},
        "weight_map": {name: file for file, part in named.items() for name in part},
    }
    packed = {file: safetensors.torch.save(part, {"format": "pt"}) for file, part in named.items()}
    return {**packed, INDEX: _json(index)}


def _unpack_weights(files: dict[str, bytes]) -> dict[str, Tensor]:
    """The weights by name, from one file or from all that the index names."""
    if INDEX not in files:
        return safetensors.torch.load(files[WEIGHTS])
    places = json.loads(files[INDEX])["weight_map"]
    parts = {file: safetensors.torch.load(files[file]) for file in set(places.values())}
    return {name: parts[file][name] for name, file in places.items()}


def _unique(model: GPT) -> dict[str, Tensor]:
    """The model's tensors by name, a tied head left out: it is the embedding under a second name."""
    tensors = model.state_dict()
    if model.config.tie_weights:
        del tensors["head.weight"]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _tied(model: GPT, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"head.weight": weights["embedding.token.weight"]} if model.config.tie_weights else {}


def pack_optimizer(optimizer: torch.optim.Optimizer, generators: dict[str, Tensor]) -> dict[str, bytes]:
    """The optimizer's tensors and the states of random generators as the two files of a checkpoint."""
    state = optimizer.state_dict()
    tensors = {f"{i}.{key}": value for i, entry in state["state"].items() for key, value in entry.items()}
    tensors |= {f"generator.{name}": value for name, value in generators.items()}
    return {
        "optimizer.safetensors": safetensors.torch.save({name: t.detach().cpu() for name, t in tensors.items()}),
        "optimizer.json": _json([_in_numbers(group) for group in state["param_groups"]]),
    }


def _in_numbers(group: dict) -> dict:
    """A group of parameters whose learning rate is a number, also where a recorded step reads it from the device."""
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in group.items()}


def unpack_optimizer(files: dict[str, bytes], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put back what `pack_optimizer` stored, and return the states of the random generators."""
    tensors = safetensors.torch.load(files["optimizer.safetensors"])
    generators = {name.split(".", 1)[1]: tensors.pop(name) for name in list(tensors) if name.startswith("generator.")}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    groups = json.loads(files["optimizer.json"])
    for stored, own in zip(groups, optimizer.param_groups, strict=False):
        stored.update({name: own[name] for name in ("fused", "capturable") if name in own})  # these suit the device
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return generators


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
