"""Playhouse: endless scenes of a play, drawn from a hand-written grammar whose entropy is known exactly.

Most texts keep their entropy to themselves. This one does not: every scene is drawn choice by choice from the rules in
`playhouse.grammar`, whose head teaches how to change them. So each character's probability given all before it can be
computed, and with it the loss that no model can beat. Every draw also brings its labels.
"""

import functools
import math
import random
from bisect import bisect
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slm_lib.grammar import SYMBOLS, Form, Item, Rules, bind, log_mass, remember

__all__ = ["SYMBOLS", "EntropyRate", "Grammar", "Line", "Recall", "Scene", "log_prob", "scenes", "surprisal", "text"]

REACH = (10, 200)  # a recall is marked if what it repeats was last said this many characters before
FACTS = ("who", "did", "whom", "where")  # the variables that say what a line is about


class Line(NamedTuple):
    """What a speaker says at once, from `start` in its scene, and the same in plain speech."""

    speaker: str
    mood: str
    text: str
    plain: str
    facts: dict[str, str]
    start: int


class Recall(NamedTuple):
    """Characters `start` to `stop` of a scene, foreseen by whoever remembers `distance` characters."""

    kind: str
    start: int
    stop: int
    distance: int


class Scene(NamedTuple):
    """A whole scene, the log probability (nats) of the choices that made it, and its labels."""

    text: str
    log_prob: float
    lines: tuple[Line, ...]
    recalls: tuple[Recall, ...]


class EntropyRate(NamedTuple):
    """What a grammar leaves open on average, in nats, and the mean length of a scene."""

    nats_per_scene: float
    characters_per_scene: float

    @property
    def nats_per_character(self) -> float:
        return self.nats_per_scene / self.characters_per_scene


class Grammar:
    """A grammar that draws scenes and weighs text; its first rule is a whole scene, and none may begin another.

    Raises ValueError, one sentence with the rule's name, where `text` breaks the language.

    >>> coin = Grammar("toss = 3* Heads./ | Tails./")
    >>> round(math.exp(coin.log_prob("Heads.\\nTails.\\n")), 4)
    0.1875
    """

    def __init__(self, text: str):
        self.rules = Rules(text)

    @staticmethod
    @functools.cache
    def default() -> "Grammar":
        """Return the grammar that the library ships, `playhouse.grammar`."""
        return Grammar((Path(__file__).parent / "playhouse.grammar").read_text(encoding="utf-8"))

    def draw(self, rng: random.Random) -> Scene:
        """Return a scene, made with one `rng.random()` for each choice."""
        try:
            return _Draft(self.rules, rng).scene()
        except RecursionError:
            raise ValueError(f"rule '{self.rules.start.text}' drew a scene without end: let it end sooner") from None

    def entropy(self) -> EntropyRate:
        """Return the exact entropy of a scene and its mean length, from the rules alone.

        Exact where no text has two derivations. Raises ValueError if scenes have no finite mean.
        """
        *_, characters, nats = _Expectation(self.rules).total
        return EntropyRate(float(nats), float(characters))

    def surprisal(self, text: str) -> np.ndarray:
        """Return -log p(character | all before it) in nats, float64 (len(text),), for scenes or their beginning.

        Raises ValueError for text that the grammar cannot say.
        """
        mass = log_mass(self.rules, text)
        if mass[-1] == -math.inf:
            place = int(np.isfinite(mass).sum()) - 1
            said = f"the grammar cannot say {text[place]!r} after {text[max(0, place - 20) : place]!r}, at {place}"
            raise ValueError(f"{said}: give it scenes that it drew, or a beginning of them")
        return mass[:-1] - mass[1:]

    def log_prob(self, text: str) -> float:
        """Return the log probability (nats) that endless scenes begin with `text`; -inf if they cannot."""
        return float(log_mass(self.rules, text)[-1])


class _Draft:
    """A scene in the making: what was said so far, and its labels."""

    def __init__(self, rules: Rules, rng: random.Random):
        self.rules, self.rng = rules, rng
        self.parts, self.length, self.log_prob = [], 0, 0.0
        self.lines, self.recalls = [], []
        self.said: dict[str, int] = {}  # what was remembered or recalled -> where its last mention ends
        self.facts: dict[str, str] = {}
        self.fact_slots = {rules.slots[fact]: fact for fact in FACTS if fact in rules.slots}

    def scene(self) -> Scene:
        self._draw(self.rules.start, self.rules.blank)
        return Scene("".join(self.parts), self.log_prob, tuple(self.lines), tuple(self.recalls))

    def _say(self, text: str) -> str:
        self.parts.append(text)
        self.length += len(text)
        return text

    def _perform(self, form: Form, memory: tuple) -> tuple[str, tuple]:
        """Say the items of a form; return the same in plain speech, and the memory as it is then."""
        plains = []
        for item in form.items:
            plain = ""
            if item.act == "say":
                plain = self._say(item.text)
            elif item.act == "draw":
                plain, memory = self._draw(item, memory)
            elif item.act == "again":
                plain = self._again(memory[item.needs[0]], item.text)
            elif item.act == "bind":
                memory = bind(memory, item)
            else:
                plain, memory = self._line(item.text, memory)
            for slot in item.sets or item.needs:
                if slot in self.fact_slots:
                    self.facts[self.fact_slots[slot]] = memory[slot]
            plains.append(plain)
        if form.plain is not None:
            plains = [plains[p] if type(p) is int else memory[p.needs[0]] if p.needs else p.text for p in form.plain]
        return "".join(plains), memory

    def _draw(self, item: Item, memory: tuple) -> tuple[str, tuple]:
        rule = self.rules.named[self.rules.target(item, memory)]
        choice = bisect(rule.cumulative, self.rng.random()) if len(rule.forms) > 1 else 0
        self.log_prob += math.log(rule.chances[choice])
        start, first = self.length, len(self.parts)
        plain, _ = self._perform(rule.forms[choice], memory)
        if item.needs and len(rule.forms) == 1:
            self._mark("agreement", start, memory[item.needs[0]])
        if not item.sets:
            return plain, memory
        value = "".join(self.parts[first:])
        if item.silent:
            del self.parts[first:]
            self.length, plain = start, ""
        else:
            self.said[value] = self.length
        return plain, remember(memory, item.sets[0], value)

    def _again(self, value: str, kind: str) -> str:
        self._say(value)
        if kind:
            self._mark(kind, self.length - len(value), value)
        self.said[value] = self.length
        return value

    def _mark(self, kind: str, start: int, source: str) -> None:
        distance = start - self.said.get(source, start)
        if REACH[0] <= distance <= REACH[1]:
            self.recalls.append(Recall(kind, start, self.length, distance))

    def _line(self, form: Form, memory: tuple) -> tuple[str, tuple]:
        speaker = "".join(self.parts[-8:]).rpartition(":\n")[0].rpartition("\n")[2]
        start, first, self.facts = self.length, len(self.parts), {}
        plain, memory = self._perform(form, memory)
        mood = memory[self.rules.slots["mood"]] if "mood" in self.rules.slots else None
        self.lines.append(Line(speaker, mood or "", "".join(self.parts[first:]), plain, self.facts, start))
        return plain, memory


def _deciding(rules: Rules) -> set[int]:
    """Return the slots that decide draws (<rule.x>), and those whose value is lent to one that does."""
    items = [item for rule in rules.named.values() for flat in rule.flat for item in flat]
    deciding = {slot for item in items if item.act == "draw" for slot in item.needs}
    lent = {pair for item in items if item.act == "bind" for pair in zip(item.sets, item.needs, strict=True)}
    for _ in rules.slots:
        deciding |= {source for target, source in lent if target in deciding}
    return deciding


class _Expectation:
    """Expected values for a scene, as vectors: how often each variable is said again, then characters, then nats.

    Expectations add up, so a remembered string counts its expected length each time it is said; only the variables that
    decide other draws (<rule.x>) must be followed value by value.
    """

    def __init__(self, rules: Rules):
        self.rules, self.deciding, self.reads = rules, _deciding(rules), rules.reads()
        self.last, self.total = {}, None
        for _ in range(10_000):  # a rule that leads back to itself begins at zero and is raised until nothing changes
            self.table, self.under_way, self.looped = {}, set(), False
            before, self.total = self.total, self.rule(rules.start.text, rules.blank)
            if not self.total[-2] < 1e12:
                break
            if not self.looped or before is not None and np.allclose(before, self.total, rtol=1e-14, atol=0):
                return
            self.last = self.table
        raise ValueError(f"rule '{rules.start.text}' has no finite mean length: give its rules more ways to end")

    def rule(self, name: str, memory: tuple) -> np.ndarray:
        memory = tuple(value if slot in self.reads[name] else None for slot, value in enumerate(memory))
        key = (name, memory)
        if key in self.under_way:
            self.looped = True
            return self.last.get(key, np.zeros(len(memory) + 2))
        if key not in self.table:
            self.under_way.add(key)
            rule, total = self.rules.named[name], np.zeros(len(memory) + 2)
            for items, chance in zip(rule.flat, rule.chances, strict=True):
                total += chance * self.items(items, memory)
                total[-1] -= chance * math.log(chance)
            self.under_way.remove(key)
            self.table[key] = total
        return self.table[key]

    def items(self, items: tuple, memory: tuple) -> np.ndarray:
        if not items:
            return np.zeros(len(memory) + 2)
        item, rest = items[0], items[1:]
        if item.act == "draw":
            return self.draw(item, rest, memory)
        total = self.items(rest, bind(memory, item) if item.act == "bind" else memory)
        if item.act == "say":
            total[-2] += len(item.text)
        elif item.act == "again":
            total[item.needs[0]] += 1
        else:  # what is said of the new name is said of the old
            times = total[list(item.sets)]
            total[list(item.sets)] = 0
            np.add.at(total, list(item.needs), times)
        return total

    def draw(self, item: Item, rest: tuple, memory: tuple) -> np.ndarray:
        name = self.rules.target(item, memory)
        if item.sets and item.sets[0] in self.deciding:
            drawn = []
            for value, chance in self.rules.values(name).items():
                after = self.items(rest, remember(memory, item.sets[0], value))
                after[-2:] += (after[item.sets[0]] + (not item.silent)) * len(value), -math.log(chance)
                drawn.append(chance * after)
            total = sum(drawn)
        else:
            said, total = self.rule(name, memory), self.items(rest, memory)
            times = (not item.silent) + (total[item.sets[0]] if item.sets else 0)
            total[:-1] += times * said[:-1]
            total[-1] += said[-1]
        total[list(item.sets)] = 0
        return total


def scenes(n_characters: int, seed: int = 0) -> list[Scene]:
    """Return whole scenes of the default grammar until they hold at least `n_characters`."""
    rng, drawn, length = random.Random(seed), [], 0
    while length < n_characters:
        drawn.append(Grammar.default().draw(rng))
        length += len(drawn[-1].text)
    return drawn


def text(scenes: list[Scene]) -> str:
    """Return the scenes one after the other."""
    return "".join(scene.text for scene in scenes)


def surprisal(text: str) -> np.ndarray:
    """Return `Grammar.default().surprisal(text)`: nats per character, exact, float64 (len(text),)."""
    return Grammar.default().surprisal(text)


def log_prob(text: str) -> float:
    """Return `Grammar.default().log_prob(text)`: nats, exact."""
    return Grammar.default().log_prob(text)
