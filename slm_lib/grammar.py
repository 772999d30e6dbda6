"""Grammars that remember: how `playhouse.grammar` is read, and how text is weighed by it.

The head of that file teaches the language. `Rules(text)` turns it into plain data and meets a reader's slip with one
sentence; `log_mass` sums the chances of every derivation that agrees with a text so far (prefix probabilities: Jelinek
and Lafferty 1991, here for rules that remember what was said).
"""

import heapq
import math
import os.path
import re
import string
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

SYMBOLS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase  # those of tiny Shakespeare, in order


class Item(NamedTuple):
    """A piece of an alternative. The memory is a tuple with one slot for each variable."""

    act: str  # say, again, draw, bind, or line (then `text` is the Form in the braces)
    text: str  # what is said, the kind of a recall, or the rule drawn
    needs: tuple[int, ...] = ()  # the slots that it reads
    sets: tuple[int, ...] = ()  # the slots that it writes
    silent: bool = False


class Form(NamedTuple):
    """An alternative or a speech; in `plain` a number stands for the plain form of that item."""

    items: tuple[Item, ...]
    plain: tuple[Item | int, ...] | None


class Rule(NamedTuple):
    """Alternatives with their chances; `flat` holds the items of each, braces dissolved."""

    forms: tuple[Form, ...]
    flat: tuple[tuple[Item, ...], ...]
    chances: tuple[float, ...]
    cumulative: tuple[float, ...]
    openings: tuple[tuple[str, float, tuple[Item, ...]], ...]  # first symbol ("" unless certain), log chance, items


def _rule_texts(text: str):
    """Yield each rule's name and body: comments gone, continued lines joined, shorthands (@name) written out."""
    short = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"#.*", "", text)):
        entry = re.sub(r"\s*([{}/|]|=>)\s*", r"\1", " ".join(entry.split()))
        match = re.fullmatch(r"(@?[A-Za-z][\w.-]*) ?=(?!>) ?(.*)", entry)
        if entry and not match:
            raise ValueError(f"'{entry[:40]}' is not a rule: write  name = alternative | alternative")
        if match:
            body = re.sub(r"@\w+", lambda use: short.get(use[0], use[0]), match[2])
            if match[1][0] == "@":
                short[match[1]] = body
            else:
                yield match[1], body


def _read_rule(name: str, body: str, slots: dict[str, int]) -> Rule:
    parts = [re.fullmatch(r"(?:([1-9]\d*)\* ?)?(.*)", part.strip(" ")).groups() for part in body.split("|")]
    weights = [int(weight or 1) for weight, _ in parts]
    chances = tuple(weight / sum(weights) for weight in weights)
    forms = tuple(_read_form(name, said, slots) for _, said in parts)
    flat = tuple(tuple(chain(*(it.text.items if it.act == "line" else [it] for it in form.items))) for form in forms)
    firsts = [items[0].text[:1] if items and items[0].act == "say" else "" for items in flat]
    openings = tuple(zip(firsts, map(math.log, chances), flat, strict=True))
    return Rule(forms, flat, chances, (*tuple(accumulate(chances))[:-1], 1.0), openings)


def _read_form(name: str, body: str, slots: dict[str, int]) -> Form:
    tokens = re.findall(r"\{[^{}]*\}|<[^<>]*>|=>|[^<>{}=]+|.", body)
    end = tokens.index("=>") if "=>" in tokens else len(tokens)
    items = tuple(_read_item(name, token, slots) for token in tokens[:end])
    plain, drawn = [_read_item(name, token, slots) for token in tokens[end + 1 :]], list(items)
    for place, item in enumerate(plain):
        if item.act == "draw":  # it takes the plain form of the first such draw that is still free
            alike = [index for index, one in enumerate(drawn) if one and one[:3] == item[:3]]
            if not alike:
                raise ValueError(f"rule '{name}' has <{item.text}> after => but not before it: draw it there too")
            plain[place], drawn[alike[0]] = alike[0], None
    return Form(items, tuple(plain) if end < len(tokens) else None)


def _read_item(name: str, token: str, slots: dict[str, int]) -> Item:
    def slot(*variables):
        return tuple(slots.setdefault(variable, len(slots)) for variable in variables if variable)

    if token[0] == "{" and token != "{":
        return Item("line", _read_form(name, token[1:-1], slots))
    if match := re.fullmatch(r"<=(\w+)(?::(\w+))?>", token):
        return Item("again", match[2] or "", slot(match[1]))
    if match := re.fullmatch(r"<(?:(\w+)([:!]))?([A-Za-z][\w-]*)(?:\.(\w+))?>", token):
        return Item("draw", match[3], slot(match[4]), slot(match[1]), match[2] == "!")
    if re.fullmatch(r"<\w+=\w+(,\w+=\w+)*>", token):
        targets, sources = zip(*(pair.split("=") for pair in token[1:-1].split(",")), strict=True)
        return Item("bind", "", slot(*sources), slot(*targets))
    if token[0] in "<>{}=":
        raise ValueError(f"rule '{name}' has '{token}', which means nothing: close each < and {{ that you open")
    text = token.replace("()", "").replace("/", "\n").replace("_", " ")
    for symbol in text:
        if symbol not in SYMBOLS:
            raise ValueError(f"rule '{name}' says '{symbol}', which is not among the 65 symbols: use one that is")
    return Item("say", text)


class Rules:
    """The rules of a grammar by name; `start` draws the first of them, and `blank` is the memory before it.

    Raises ValueError, one sentence with the rule's name, where `text` breaks the language.

    >>> Rules("toss = 3* Heads. | Tails.").values("toss")
    {'Heads.': 0.75, 'Tails.': 0.25}
    """

    def __init__(self, text: str):
        self.slots: dict[str, int] = {}
        self.named: dict[str, Rule] = {}
        for name, body in _rule_texts(text):
            if name in self.named:
                raise ValueError(f"rule '{name}' is written twice: join the two with |")
            self.named[name] = _read_rule(name, body, self.slots)
        if not self.named:
            raise ValueError("the grammar is empty: write at least one rule, such as  scene = Well met./ | Farewell./")
        self.start, self.blank = Item("draw", next(iter(self.named))), (None,) * len(self.slots)
        self._values: dict[str, dict[str, float]] = {}
        self._mute: dict[str, bool] = {}
        self._check()

    def target(self, item: Item, memory: tuple) -> str:
        """Return the name of the rule that a draw leads to."""
        return f"{item.text}.{memory[item.needs[0]]}" if item.needs else item.text

    def targets(self, item: Item) -> list[str]:
        """Return the names of all rules that a draw can lead to."""
        return [name for name in self.named if name.startswith(item.text + ".")] if item.needs else [item.text]

    def values(self, name: str, above: tuple[str, ...] = ()) -> dict[str, float]:
        """Return every string of a rule made of plain words, with its chance."""
        if name not in self._values:
            total: dict[str, float] = {}
            for items, chance in zip(self.named[name].flat, self.named[name].chances, strict=True):
                strings = {"": chance}
                for item in items:
                    if item.act not in ("say", "draw") or item.needs or item.sets or name in above:
                        raise ValueError(f"rule '{name}' is drawn silently or decides others: make it of plain words")
                    more = {item.text: 1.0} if item.act == "say" else self.values(item.text, (*above, name))
                    strings = {one + two: strings[one] * more[two] for one in strings for two in more}
                for said in strings:
                    total[said] = total.get(said, 0.0) + strings[said]
            self._values[name] = total
        return self._values[name]

    def _check(self) -> None:
        """Walk from the start, with what is remembered on the way; refuse what leads nowhere or never begins."""
        seen, waiting = set(), [(self.start.text, frozenset())]
        while waiting:
            here = waiting.pop()
            if here not in seen:
                seen.add(here)
                for items in self.named[here[0]].flat:
                    waiting += self._walk(here[0], items, dict(here[1]))
        for name in self.named.keys() - {name for name, _ in seen}:
            raise ValueError(f"rule '{name}' is never drawn: draw it somewhere, or take it out")
        if self.start.text in [name for name in self.named if self._is_mute(name)]:
            raise ValueError(f"rule '{self.start.text}' can say nothing, and a scene must say something: give it words")

    def _walk(self, name: str, items: tuple[Item, ...], known: dict) -> list:
        """Return the rules that items draw, each with what is known there: slot -> the rules it was drawn from."""
        drawn = []
        for item in items:
            for variable, slot in self.slots.items():
                if slot in item.needs and slot not in known:
                    why = f"rule '{name}' uses '{variable}', but nothing is remembered by that name"
                    raise ValueError(f"{why}: write <{variable}:...> before it")
            found = [known[slot] for slot in item.needs]
            if item.silent:
                self.values(item.text)
            if item.act == "draw":
                ends = ["." + value for rule in found[0] for value in self.values(rule)] if item.needs else [""]
                found = [tuple(sorted({item.text + end for end in ends}))] * 2
                for unknown in set(found[0]) - self.named.keys():
                    raise ValueError(f"rule '{name}' draws <{unknown}>, which no rule is called: write it or mend it")
                drawn += [(target, frozenset(known.items())) for target in found[0]]
            known.update(zip(item.sets, found, strict=False))
        return drawn

    def _is_mute(self, name: str, above: tuple[str, ...] = ()) -> bool:
        """Say whether a rule can say nothing; refuse one that comes round to itself before it has said anything."""
        if name in above:
            raise ValueError(f"rule '{name}' can begin with itself and so never start: put words before that <{name}>")
        if name not in self._mute:
            found = [all(self._may_pass(item, (*above, name)) for item in items) for items in self.named[name].flat]
            self._mute[name] = any(found)
        return self._mute[name]

    def _may_pass(self, item: Item, above: tuple[str, ...]) -> bool:
        if item.act == "draw":
            return max([self._is_mute(name, above) for name in self.targets(item)]) or item.silent
        return item.act == "bind" or item.act == "say" and not item.text

    def reads(self) -> dict[str, set[int]]:
        """Return for each rule the slots that it, or any rule that it leads to, reads to draw or to lend."""
        items = {name: [*chain(*rule.flat)] for name, rule in self.named.items()}
        reads = {name: {slot for one in items[name] if one.act != "again" for slot in one.needs} for name in items}
        below = {name: [to for one in items[name] if one.act == "draw" for to in self.targets(one)] for name in items}
        while any(not reads[inner] <= reads[name] for name in reads for inner in below[name]):
            reads = {name: reads[name].union(*(reads[inner] for inner in below[name])) for name in reads}
        return reads


def remember(memory: tuple, slot: int, value: str) -> tuple:
    """Return the memory with one slot filled."""
    return memory[:slot] + (value,) + memory[slot + 1 :]


def bind(memory: tuple, item: Item) -> tuple:
    """Return the memory in which each slot that the item sets holds what the slot that it needs held."""
    lent = dict(zip(item.sets, (memory[slot] for slot in item.needs), strict=True))
    return tuple(lent.get(slot, value) for slot, value in enumerate(memory))


def log_mass(rules: Rules, text: str) -> np.ndarray:
    """Return, for each beginning of text, the log of the summed chances of the derivations that say it: (len + 1,)."""
    mass = np.full(len(text) + 1, -np.inf)
    mass[0] = 0.0
    starts, stops, weights = (np.array(column) for column in zip((0, 0, 0.0), *_matches(rules, text), strict=True))
    lengths = stops - starts
    places = np.repeat(starts + 1 - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
    weights = np.repeat(weights, lengths)
    np.maximum.at(mass, places, weights)
    total = np.bincount(places, np.exp(weights - mass[places]), len(mass))
    return mass + np.log(np.where(total > 0, total, 1.0))


def _matches(rules: Rules, text: str):
    """Yield (start, stop, log weight) for each stretch of text that a derivation says, or says until it goes astray.

    A frame (items, next, memory, capture, below) is an alternative under way: what it has to say and what it remembers,
    the (slot, place) of a variable that waits for the string begun there, and the frame that goes on after this one.
    """
    agenda, places = {0: [(0.0, None)]}, [0]
    while places and (place := heapq.heappop(places)) < len(text):
        todo = _merge(agenda.pop(place))
        while todo:
            weight, frame = todo.pop()
            items, at, memory, capture, below = frame or ((rules.start,), 0, rules.blank, None, None)
            if at == len(items):
                todo.append((weight, below))
                continue
            if capture:
                memory = remember(memory, capture[0], text[capture[1] : place])
            item = items[at]
            if item.act == "draw":
                todo += _expand(rules, item, weight, (items, at + 1, memory, None, below), text, place)
                continue
            if item.act == "bind":
                memory = bind(memory, item)
            said = "" if item.act == "bind" else item.text if item.act == "say" else memory[item.needs[0]]
            stop = place + len(said)
            if text.startswith(said, place):
                if said and stop not in agenda:
                    heapq.heappush(places, stop)
                (agenda.setdefault(stop, []) if said else todo).append((weight, (items, at + 1, memory, None, below)))
            else:
                stop = place + len(os.path.commonprefix((said, text[place:stop])))
            yield place, stop, weight


def _expand(rules: Rules, item: Item, weight: float, after: tuple, text: str, place: int) -> list:
    """Return the frames, with log weights, that a draw leads to, without those that surely begin otherwise."""
    items, at, memory, _, below = after
    name = rules.target(item, memory)
    if item.silent:
        values = rules.values(name).items()
        return [(weight + math.log(p), (items, at, remember(memory, item.sets[0], v), None, below)) for v, p in values]
    if at == len(items):
        after = below  # nothing more is said or remembered here, so the stack need not grow
    elif item.sets:
        after = (items, at, memory, (item.sets[0], place), below)
    openings, now = rules.named[name].openings, text[place]
    return [(weight + p, (inner, 0, memory, None, after)) for first, p, inner in openings if first == now or not first]


def _merge(states: list) -> list:
    """Join equal frames, adding up their weights."""
    if len(states) == 1:
        return states
    merged: dict = {}
    for weight, frame in states:
        merged[frame] = np.logaddexp(merged[frame], weight) if frame in merged else weight
    return [(weight, frame) for frame, weight in merged.items()]
