"""The language in which `playhouse.grammar` is written: its rules are read here, and a reader's slips refused.

The head of that file teaches the language. What comes out of `Rules(text)` is plain data: each rule a tuple of
alternatives with their chances, each alternative a tuple of items. `slm_lib.playhouse` draws from it and weighs text.
"""

import math
import re
import string
from itertools import accumulate
from typing import NamedTuple

SYMBOLS = "\n !$&',-.3:;?" + string.ascii_uppercase + string.ascii_lowercase  # those of tiny Shakespeare, in order


class Item(NamedTuple):
    """A piece of an alternative; what was remembered lies in a tuple, the memory, one slot for each variable."""

    act: str  # say, again, draw, bind, or line (then `text` is the Form inside the braces)
    text: str  # what is said, the kind of a recall, or the rule drawn
    needs: tuple[int, ...] = ()  # the slots of memory it reads
    sets: tuple[int, ...] = ()  # and those it writes
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
    parts = [re.fullmatch(r"(?:(\d*\.?\d+)\* ?)?(.*)", part.strip(" ")).groups() for part in body.split("|")]
    forms = tuple(_read_form(name, said, slots) for _, said in parts)
    flat = [[inner for item in form.items for inner in (item.text.items if item.act == "line" else [item])] for form in forms]
    weights = [float(weight or 1) for weight, _ in parts]
    if min(weights) <= 0:
        raise ValueError(f"rule '{name}' has an alternative of weight 0: give it a weight above 0, or take it out")
    chances = tuple(weight / sum(weights) for weight in weights)
    firsts = [items[0].text[:1] if items and items[0].act == "say" else "" for items in flat]
    flat = tuple(map(tuple, flat))
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

    if re.fullmatch(r"\{.*\}", token, re.S):
        return Item("line", _read_form(name, token[1:-1], slots))
    if match := re.fullmatch(r"<=(\w+)(?::(\w+))?>", token):
        return Item("again", match[2] or "", slot(match[1]))
    if match := re.fullmatch(r"<(?:(\w+)([:!]))?([A-Za-z][\w-]*)(?:\.(\w+))?>", token):
        return Item("draw", match[3], slot(match[4]), slot(match[1]), match[2] == "!")
    if re.fullmatch(r"<\w+=\w+(,\w+=\w+)*>", token):
        targets, sources = zip(*(pair.split("=") for pair in token[1:-1].split(",")), strict=True)
        return Item("bind", "", slot(*sources), slot(*targets))
    if token[0] in "<>{}=":
        raise ValueError(f"rule '{name}' has '{token}', which says nothing: see that each < and {{ is closed and well formed")
    text = token.replace("()", "").replace("/", "\n").replace("_", " ")
    for symbol in text:
        if symbol not in SYMBOLS:
            raise ValueError(f"rule '{name}' says '{symbol}', which is not among the 65 symbols: use one that is")
    return Item("say", text)


class Rules:
    """The rules of a grammar by name; `start` draws the first, `blank` is the memory before anything was said.

    Raises ValueError, one sentence with the rule's name, where `text` breaks the language.

    >>> Rules("toss = 3* Heads./ | Tails./").values("toss")
    {'Heads.\\n': 0.75, 'Tails.\\n': 0.25}
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
        self._wordless: dict[str, bool] = {}
        self._values: dict[str, dict[str, float]] = {}
        self._check()
        if any([self._can_be_wordless(name) for name in self.named]) and self._wordless[self.start.text]:
            raise ValueError(f"rule '{self.start.text}' can say nothing, and a scene must say something: give it words")

    def values(self, name: str, above: tuple[str, ...] = ()) -> dict[str, float]:
        """Return every string of a rule made of plain words, with its chance."""
        if name in self._values:
            return self._values[name]
        total: dict[str, float] = {}
        for items, chance in zip(self.named[name].flat, self.named[name].chances, strict=True):
            strings = {"": chance}
            for item in items:
                if item.act not in ("say", "draw") or item.needs or item.sets or name in above:
                    raise ValueError(f"rule '{name}' is drawn silently or decides others: make it of plain words alone")
                more = {item.text: 1.0} if item.act == "say" else self.values(item.text, (*above, name))
                strings = {one + two: strings[one] * more[two] for one in strings for two in more}
            for said in strings:
                total[said] = total.get(said, 0.0) + strings[said]
        self._values[name] = total
        return total

    def deciding(self) -> set[int]:
        """Return the slots whose values decide draws (<rule.x>), or are lent to one that does."""
        items = [item for rule in self.named.values() for flat in rule.flat for item in flat]
        deciding = {slot for item in items if item.act == "draw" for slot in item.needs}
        for _ in self.slots:
            binds = (pair for item in items if item.act == "bind" for pair in zip(item.sets, item.needs, strict=True))
            deciding |= {source for target, source in binds if target in deciding}
        return deciding

    def _check(self) -> None:
        """Walk from the start, with what is remembered on the way, and refuse names that lead nowhere."""
        seen, waiting = set(), [(self.start.text, frozenset())]
        while waiting:
            here = waiting.pop()
            if here not in seen:
                seen.add(here)
                for items in self.named[here[0]].flat:
                    waiting += self._walk(here[0], items, dict(here[1]))
        for name in self.named.keys() - {name for name, _ in seen}:
            raise ValueError(f"rule '{name}' is never drawn: draw it somewhere, or take it out")

    def _walk(self, name: str, items: tuple[Item, ...], known: dict) -> list:
        """Return the rules that an alternative draws, each with what is known there: slot -> rules it was drawn from."""
        drawn = []
        for item in items:
            for variable in (variable for variable, slot in self.slots.items() if slot in item.needs and slot not in known):
                raise ValueError(f"rule '{name}' uses '{variable}', but nothing is remembered as that: draw <{variable}:...> first")
            targets = [known[slot] for slot in item.needs]
            if item.act == "draw":
                ends = ["." + value for rule in targets[0] for value in self.values(rule)] if item.needs else [""]
                targets = [tuple(sorted({item.text + end for end in ends}))] * max(1, len(item.sets))
                for unknown in set(targets[0]) - self.named.keys():
                    raise ValueError(f"rule '{name}' draws <{unknown}>, but there is no such rule: write it, or mend the name")
                drawn += [(target, frozenset(known.items())) for target in targets[0]]
            known.update(zip(item.sets, targets, strict=False))
        return drawn

    def targets(self, item: Item) -> list[str]:
        """Return the names of the rules to which a draw can lead."""
        return [name for name in self.named if name.startswith(item.text + ".")] if item.needs else [item.text]

    def _can_be_wordless(self, name: str, above: tuple[str, ...] = ()) -> bool:
        """Say whether a rule can say nothing at all; refuse one that can come round to itself before its first symbol."""
        if name in above:
            raise ValueError(f"rule '{name}' can begin with itself and would never start: put words before that <{name}>")
        if name not in self._wordless:
            empty = [self._first_word(items, (*above, name)) == len(items) for items in self.named[name].flat]
            self._wordless[name] = any(empty)
        return self._wordless[name]

    def _first_word(self, items: tuple[Item, ...], above: tuple[str, ...]) -> int:
        for place, item in enumerate(items):
            wordless = [self._can_be_wordless(name, above) for name in self.targets(item)] if item.act == "draw" else []
            if item.act == "again" or item.act == "say" and item.text or not any([item.silent, item.act != "draw", *wordless]):
                return place
        return len(items)
