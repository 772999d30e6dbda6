"""How long training and encoding take, here and in karpathy/minbpe, measured in turn: fills results/tokenizers.

    git clone https://github.com/karpathy/minbpe somewhere     (fetched by you; nothing of it is kept here)
    python benchmarks/tokenizers_speed.py --minbpe somewhere

Both cut the text with GPT-2's pattern and encode with the same merges, and the ids must agree. minbpe counts all pairs
anew for every merge, so it is trained with fewer merges (--merges), and its time for more grows in proportion.
"""

import argparse
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import record

from slm_lib import data, tokens

ALL_MERGES = 1_024


def timed(rows: list[dict], task: str, who: str, work: Callable):
    """Do the work, keep its seconds as a row, and return what it gives."""
    began = time.perf_counter()
    result = work()
    rows.append({"task": task, "who": who, "seconds": round(time.perf_counter() - began, 3)})
    print(f"{task:24} {who:8} {rows[-1]['seconds']:9.2f} s", flush=True)
    return result


def foreign(minbpe, tokenizer: tokens.BytePairTokenizer):
    """minbpe's tokenizer with our merges: its ids of single bytes are the bytes themselves."""
    theirs = minbpe.RegexTokenizer(tokens.PATTERN.pattern)
    byte = [*tokens.BYTES, *range(256, tokenizer.vocab_size)]
    theirs.merges = {(byte[left], byte[right]): 256 + i for i, (left, right) in enumerate(tokenizer.merges)}
    return theirs, byte


def measure(minbpe, text: str, merges: int, repeats: int) -> list[dict]:
    """One row per measurement; the two take turns, so that a busy machine slows both."""
    rows: list[dict] = []
    for _ in range(repeats):
        timed(rows, f"train {merges} merges", "slm_lib", lambda: tokens.train_merges(text, merges))
        timed(rows, f"train {merges} merges", "minbpe",
              lambda: minbpe.RegexTokenizer(tokens.PATTERN.pattern).train(text, 256 + merges))
        learned = timed(rows, f"train {ALL_MERGES} merges", "slm_lib", lambda: tokens.train_merges(text, ALL_MERGES))
        ours = tokens.BytePairTokenizer(learned)
        theirs, byte = foreign(minbpe, ours)
        ids = timed(rows, "encode the corpus", "slm_lib", partial(ours.encode, text))
        expected = timed(rows, "encode the corpus", "minbpe", partial(theirs.encode_ordinary, text))
        assert [byte[i] for i in ids.tolist()] == expected, "the two encoders disagree"
    return rows


def summarise(rows: list[dict]) -> list[dict]:
    """For each task the median seconds of both, and the median of the ratios of neighbouring runs."""
    found = []
    for task in dict.fromkeys(row["task"] for row in rows):
        seconds = {who: [row["seconds"] for row in rows if (row["task"], row["who"]) == (task, who)]
                   for who in ("slm_lib", "minbpe")}
        entry = {"task": task, "slm_lib": statistics.median(seconds["slm_lib"])}
        if seconds["minbpe"]:
            ratios = [b / a for a, b in zip(seconds["slm_lib"], seconds["minbpe"], strict=True)]
            entry |= {"minbpe": statistics.median(seconds["minbpe"]), "ratio": round(statistics.median(ratios), 1),
                      "lowest_ratio": round(min(ratios), 1), "highest_ratio": round(max(ratios), 1)}
        found.append(entry)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minbpe", type=Path, required=True, help="a clone of karpathy/minbpe that you fetched")
    parser.add_argument("--corpus", help="shakespeare, playhouse or a text file; otherwise what is here")
    parser.add_argument("--merges", type=int, default=64, help="how many merges both learn (default 64)")
    parser.add_argument("--repeats", type=int, default=3, help="how often all is measured (default 3)")
    args = parser.parse_args()
    if not (args.minbpe / "minbpe" / "regex.py").is_file():
        sys.exit(f"{args.minbpe} is no clone of karpathy/minbpe: git clone it, and give the folder with --minbpe")
    package = types.ModuleType("minbpe")  # by itself the package would import tiktoken, which is not needed here
    package.__path__ = [str(args.minbpe / "minbpe")]
    sys.modules["minbpe"] = package
    minbpe = importlib.import_module("minbpe.regex")
    corpus = data.load_corpus(args.corpus)
    rows = measure(minbpe, corpus.text, args.merges, args.repeats)
    config = {"corpus": corpus.name, "characters": len(corpus.text), "merges": args.merges, "repeats": args.repeats}
    print(record.save("tokenizers", config, rows, summary=summarise(rows)))


if __name__ == "__main__":
    main()
