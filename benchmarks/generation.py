"""Characters per second: our `slm_lib.generation` against nanoGPT's own `generate`, with the same weights.

    python benchmarks/generation.py --nanogpt <a checkout of github.com/karpathy/nanoGPT>        (about 5 minutes)

nanoGPT's weights are loaded into our `gpt2` design with the exact gelu; that both give the same logits, and the same
likeliest text, is asserted first, in float64. Then both write the same number of characters after the same prompt, at
temperature 0.8, each in its own way of drawing: two shapes, two contexts, one stream and 16, on two threads, and two
stretches. "growing" begins with one character and ends with a full context; "full" begins with a full one and goes on.
There nanoGPT reads the last `block_size` characters for every new one. Ours, as is the default of the library, begins
a new window with the last half of the old one whenever it is full, so it sees between half a context and a whole one.

Both take turns within a round, and a ratio is formed within a round. nanoGPT keeps nothing from one character to the
next, so a stretch costs it the sum of separate steps: of the longest stretches every k-th step is run, k in the column
"every". Ours always writes the whole stretch.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import statistics
import sys
import time
from pathlib import Path
from types import ModuleType

import record
import torch
from contestants import COMMIT, NANOGPT
from torch import Tensor, nn
from tqdm.auto import tqdm

from slm_lib import data, generation, playhouse
from slm_lib.blocks import GPT, GPTConfig

THREADS, TEMPERATURE = 2, 0.8
SHAPES = {"0.8M": {"n_layer": 4, "n_head": 4, "n_embd": 128}, "10.7M": {"n_layer": 6, "n_head": 6, "n_embd": 384}}
CONTEXTS, STREAMS, STRETCHES = [64, 256], [1, 16], ["growing", "full"]
SAMPLED = {("0.8M", 256, 16): 8, ("10.7M", 64, 16): 4, ("10.7M", 256, 16): 32}  # nanoGPT runs every k-th step
MARKS = {("10.7M", 256, 1): 10, ("0.8M", 64, 1): 2, ("0.8M", 256, 1): 2}  # ours at least so many times as fast
TOKENIZER = data.CharTokenizer(playhouse.SYMBOLS)
NAMES = {  # of parts of a model: nanoGPT's and ours
    "transformer.wte": "embedding.token", "transformer.wpe": "embedding.place", "transformer.h": "blocks",
    "transformer.ln_f": "norm", "lm_head": "head", "ln_1": "norm1", "ln_2": "norm2", "attn.c_attn": "attention.qkv",
    "attn.c_proj": "attention.output", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down",
}  # fmt: skip


def load_nanogpt(checkout: Path) -> ModuleType:
    """nanoGPT's model.py, in the version that it is compared with."""
    path = checkout / "model.py"
    if hashlib.sha256(path.read_bytes()).hexdigest() != NANOGPT["model.py"]:
        raise ValueError(f"{path} is not that of commit {COMMIT}: check that commit out")
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def translated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """nanoGPT's weights under the names that our `gpt2` design gives them."""
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in NAMES.items():
            name = name.replace(f"{theirs}.", f"{ours}.")
        found[name] = tensor
    return found


def twins(nanogpt: ModuleType, shape: str, context: int) -> tuple[nn.Module, GPT]:
    """nanoGPT's model and ours with the same random weights, found to be equal."""
    sizes = {"vocab_size": TOKENIZER.vocab_size, "block_size": context, "bias": False, **SHAPES[shape]}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its size
        theirs = nanogpt.GPT(nanogpt.GPTConfig(dropout=0.0, **sizes)).eval()
    ours = GPT(GPTConfig.gpt2(activation="gelu", **sizes)).eval()
    ours.load_state_dict(translated(theirs.state_dict()))
    assert_equal(theirs.double(), ours.double())
    return theirs.float(), ours.float()


@torch.no_grad()
def assert_equal(theirs: nn.Module, ours: GPT) -> None:
    """That both models, in float64, give the same logits at every position and write the same likeliest text."""
    ids = TOKENIZER.encode(prompt(ours.config.block_size))[None]
    logits, _ = theirs(ids, ids)  # asked for a loss, it gives the logits of every position
    torch.testing.assert_close(ours(ids), logits, atol=1e-10, rtol=1e-10)
    beginning, length = prompt(8), 24
    written = theirs.generate(TOKENIZER.encode(beginning)[None], length, top_k=1)[0, len(beginning) :]
    assert generation.generate(ours, TOKENIZER, beginning, length, temperature=0) == TOKENIZER.decode(written)


def prompt(length: int) -> str:
    """The first characters of playhouse."""
    return playhouse.text(playhouse.scenes(length))[:length]


def work(context: int, stretch: str) -> tuple[str, int]:
    """A stretch: its prompt, and how many characters are written after it.

    The full one is two turns of ours: two windows, each begun with half a context and written to its end.
    """
    return ("\n", context) if stretch == "growing" else (prompt(context), 1 + 2 * (context // 2 + 1))


def seconds_of_nanogpt(model: nn.Module, streams: int, begin: str, length: int, every: int) -> float:
    """How long nanoGPT takes to write `length` characters, of which every k-th is written."""
    ids = TOKENIZER.encode(begin).repeat(streams, 1)
    if every == 1:
        began = time.perf_counter()
        model.generate(ids, length, TEMPERATURE)
        return time.perf_counter() - began
    whole = torch.cat([ids, ids[:, -1:].expand(-1, length)], dim=1)  # what is written does not change the time
    steps = range(every // 2, length, every)
    began = time.perf_counter()
    for step in steps:
        model.generate(whole[:, : ids.shape[1] + step], 1, TEMPERATURE)
    return (time.perf_counter() - began) * length / len(steps)


def seconds_of_ours(model: nn.Module, streams: int, begin: str, length: int) -> float:
    """How long the library takes for the same."""
    began = time.perf_counter()
    if streams == 1:
        generation.generate(model, TOKENIZER, begin, length, TEMPERATURE)
    else:
        generation.continuations(model, TOKENIZER, begin, length, TEMPERATURE, seeds=range(streams))
    return time.perf_counter() - began


def measure(theirs: nn.Module, ours: GPT, cell: dict, rounds: int) -> list[dict]:
    """Both take turns on one stretch: a row for each round, after one that warms up."""
    begin, length = work(cell["context"], cell["stretch"])
    every = SAMPLED.get((cell["shape"], cell["context"], cell["streams"]), 1)
    rows = []
    for turn in range(rounds + 1):
        nanogpt = seconds_of_nanogpt(theirs, cell["streams"], begin, length, every if turn else max(every, length // 2))
        mine = seconds_of_ours(ours, cell["streams"], begin, length)
        rates = [round(cell["streams"] * length / seconds, 1) for seconds in (nanogpt, mine)]
        rows.append({**cell, "round": turn, "characters": cell["streams"] * length, "every": every,
                     "nanogpt": rates[0], "ours": rates[1], "ratio": round(nanogpt / mine, 2)})  # fmt: skip
    return rows[1:]


def table(rows: list[dict]) -> str:
    """Medians over the rounds, and of the ratio the least and the largest too, as Markdown."""
    lines = ["| shape | context | streams | stretch | every | nanoGPT, chars/s | ours, chars/s | ratio | mark |",
             "|---|---:|---:|---|---:|---:|---:|---|---|"]  # fmt: skip
    keys = ("shape", "context", "streams", "stretch", "every")
    for cell in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in keys) == cell]
        rates = [f"{statistics.median(row[who] for row in mine):,.0f}" for who in ("nanogpt", "ours")]
        ratios = sorted(row["ratio"] for row in mine)
        spread = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f} to {ratios[-1]:.1f})"
        mark = f"at least {MARKS[cell[:3]]}" if cell[:3] in MARKS else ""
        lines.append("| " + " | ".join([*map(str, cell), *rates, spread, mark]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help=f"a checkout of nanoGPT at commit {COMMIT}")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES, help="measure these alone")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    nanogpt, rows = load_nanogpt(arguments.nanogpt), []
    pairs = [(shape, context) for shape in arguments.shapes for context in CONTEXTS]
    for shape, context in tqdm(pairs):
        theirs, ours = twins(nanogpt, shape, context)
        for streams in STREAMS:
            for stretch in STRETCHES:
                cell = {"shape": shape, "context": context, "streams": streams, "stretch": stretch}
                rows += measure(theirs, ours, cell, arguments.rounds)
    config = {"shapes": SHAPES, "temperature": TEMPERATURE, "threads": arguments.threads, "rounds": arguments.rounds,
              "nanogpt": COMMIT}  # fmt: skip
    record.save("generation", config, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
