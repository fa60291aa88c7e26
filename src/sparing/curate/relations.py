"""Word problems about how amounts are related, of the kinds that research on children's word problems tells apart.

Change (result, change or start unknown), combine (whole or part), compare (difference, compared or referent) and equalise: Riley, Greeno
and Heller 1983 and Carpenter and Moser 1984. Equal groups, rates, rows and "times as many": Vergnaud 1983 and Greer 1992.

A story opens with an amount of one holder, a person or a place. Links lead from it to amounts of others, and an end asks for a number.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

from sparing.curate.exercises import NAMES, Exercise
from sparing.curate.worlds import WORLDS
from sparing.data.worked import thought

OPERATIONS = (1, 2, 3, 5, 8)
"""Of a word problem, by difficulty: sums, differences, products and quotients."""
SIZES = (99, 99, 150, 250, 500)
"""Largest number that is added or taken away."""
BESIDE = 1 / 3
"""Share of word problems with one number that does not matter."""
PARTS = {2: "half", 3: "a third", 4: "a quarter", 5: "a fifth"}
LEAST = 2
"""Of an amount, so that nobody has 1 apples."""
MOST = 10
"""Times the largest number: of an amount."""
EACH = 40
"""Most in a group, and dollars for one thing."""
HOLDERS = 16
"""Most in one story, and then some."""
NOTES = (10, 20, 50, 100, 200, 500, 1000)
HE = frozenset("Amir Ben David Emil Felix Hugo Ivan Jonas Kofi Luis Max Noah Omar Peter Sami Simon Theo Tim Victor Yusuf".split())
PEOPLE = tuple(name for name in NAMES if name != "Chen")  # a name of women and of men


class Story:
    """A word problem as it grows. `who` holds the `amount` that was told or worked out last."""

    def __init__(self, rng: random.Random, size: int):
        self.rng, self.size = rng, size
        (self.world,) = rng.choices(WORLDS, [world.weight for world in WORLDS])
        self.things = rng.choice(list(self.world.things))
        self.one, self.two = self.world.things[self.things]
        others = [thing for thing in self.world.things if thing != self.things]
        self.seconds = rng.choice(others) if others and not self.world.places else ""
        if self.seconds and rng.random() < 0.3:  # the story is of one kind of a thing, beside the other kind
            (self.things, self.seconds), self.one, self.two = (self.one, self.two), "", ""
        self.past = not self.world.has[0] or rng.random() < 0.6
        self.changed = False
        """Then the past is told, and what holds now."""
        holders = self.world.places or PEOPLE
        self.fresh = rng.sample(holders, min(len(holders), HOLDERS))
        """Holders that were not named yet."""
        self.told: list[tuple[str, str]] = []
        """Sentences and their subjects, for which {who} stands."""
        self.steps: list[str] = []
        self.subject = [self.world.label]
        self.amounts: dict[str, int] = {}
        self.grouped: set[str] = set()
        """Those of whose amounts it was told how they are made up."""
        self.verbs: set[str] = set()
        self.multiple = ""
        """One of whose amount `amount` is a multiple or a part."""
        self.event: tuple[int, str, str, str] | None = None
        """Of the last change: place of the next sentence, whose change, verb and what comes last."""
        self.asked: dict[str, str] = {}
        self.who = self.fresh.pop()

    @property
    def amount(self) -> int:
        return self.amounts[self.who]

    def number(self) -> int:
        return self.rng.randint(LEAST, self.size)

    def each(self) -> int:
        return self.rng.randint(LEAST, min(self.size, EACH))

    def factor(self) -> int:
        return self.rng.randint(2, 12)

    def nth(self, who: str) -> str:
        """A letter for one whose amount is known."""
        return chr(ord("a") + list(self.amounts).index(who))

    def say(self, sentence: str, who: str = "", verb: str = "", tail: str = "", **fields: object) -> None:
        """Add a sentence of the world's, or the sentence itself."""
        past, who, place = self.past and not self.changed, who or self.who, self.world.at
        text = self.rng.choice(self.world.say[sentence]) if sentence in self.world.say else sentence
        text = re.sub(r"\[([^]|]*)\|([^]]*)\]", r"\2" if self.past else r"\1", text)
        after = bool(self.told) and self.told[-1][0].startswith("now ")
        fields = {
            "then": "then " if after or self.rng.random() < 0.3 else "",
            "who": "{who}", "name": who, "them": "{them}", "things": self.things, "seconds": self.seconds, "at": place, "one": self.one,
            "two": self.two, "has": self.world.has[past], "have": self.world.has[2], "does": "did" if past else "does",
            "do": "did" if past else "do", "are": "were" if past else "are", "wants": "wanted" if past else "wants", "verb": verb,
            "now": " now" if self.changed else "", "since": "now " if self.changed else "", "tail": tail, "extra": "", **fields,
        }  # fmt: skip
        told = re.sub(r"some (more )?dollars", r"some \1money", text.format(**fields))
        self.told.append((told, who))

    def becomes(self, who: str, a: int, sign: str, b: int, unit: str = "") -> bool:
        """One step; the amount of `who` is its result. -> Whether that is an amount that a story can have."""
        result = {"+": a + b, "-": a - b, "*": a * b, "/": a // b if b and a % b == 0 else 0}[sign]
        self.steps.append(f"{a} {sign} {b} = {result} {unit or self.things}")
        self.who, self.amounts[who] = who, result
        return LEAST <= result <= MOST * self.size


# openings: an amount of the one who is the first


def _state(story: Story, who: str = "") -> bool:
    who, n = who or story.who, story.number()
    story.say("state", who, n=n)
    story.amounts[who] = n
    story.subject.append(f"{n}")
    return True


def _kinds_of(story: Story) -> bool:
    n, m = story.number(), story.number()
    days = not (story.one or story.world.has[0])
    story.say("days" if days else "kinds", n=n, m=m)
    story.grouped.add(story.who)
    story.subject.append(f"{n} {m}")
    return bool(days or story.one) and story.becomes(story.who, n, "+", m)


def _groups_of(story: Story) -> bool:
    if not story.world.groups:
        return False
    groups, k, m = story.rng.choice(story.world.groups), story.factor(), story.each()
    story.say(groups.open, k=k, m=m)
    story.grouped.add(story.who)
    story.subject.append(f"{k} {m}")
    return story.becomes(story.who, k, "*", m)


def _groups_and_more(story: Story) -> bool:
    if not story.world.groups:
        return False
    groups, k, m, n = story.rng.choice(story.world.groups), story.factor(), story.each(), story.number()
    story.say(groups.open.removesuffix(".") + groups.rest, k=k, m=m, n=n)
    story.grouped.add(story.who)
    story.subject.append(f"{k} {m} {n}")
    return story.becomes(story.who, k, "*", m) and story.becomes(story.who, k * m, "+", n)


def _boxes_of(story: Story) -> bool:
    k, j, m = story.factor(), story.factor(), story.factor()
    story.say("{who} {has} {k} crates. In each of them {are} {j} bags with {m} {things} each.", k=k, j=j, m=m)
    story.grouped.add(story.who)
    story.subject.append(f"{k} {j} {m}")
    return story.world.label == "has" and story.becomes(story.who, k, "*", j, "bags") and story.becomes(story.who, k * j, "*", m)


# links: from one amount to another


def _compare(story: Story) -> bool:
    """k more or fewer than before."""
    ref, who, k = story.who, story.fresh.pop(), story.number()
    more, sign = story.rng.choice((("more", "+"), ("fewer", "-")))
    story.say("compare", who, ref=ref, n=k, more=more)
    story.subject.append(f"{more} {k}")
    return story.becomes(who, story.amount, sign, k)


def _referent(story: Story) -> bool:
    """The one before has k more or fewer than another."""
    ref, who, k = story.fresh.pop(), story.who, story.number()
    more, sign = story.rng.choice((("more", "-"), ("fewer", "+")))
    story.say("compare", who, ref=ref, n=k, more=more)
    story.subject.append(f"referent {more} {k}")
    return story.becomes(ref, story.amount, sign, k)


def _times(story: Story) -> bool:
    """k times as many, or one part in k, as the one before or as another."""
    before, new, k = story.who, story.fresh.pop(), story.rng.randint(2, 6)
    who, ref = story.rng.choice(((before, new), (new, before)))
    part = k in PARTS and story.rng.random() < 0.5
    story.say("times", who, ref=ref, times=PARTS[k] if part else "twice" if k == 2 else f"{k} times")
    story.multiple = before
    story.subject.append(f"{'referent ' if who == before else ''}{'part' if part else 'times'} {k}")
    return story.becomes(new, story.amount, "*" if (who == new) != part else "/", k)


def _together(story: Story) -> bool:
    if len(story.amounts) < 2 or any(name.startswith("together") for name in story.subject):
        return False
    who, (ref, other) = story.fresh.pop(), story.rng.sample(list(story.amounts), 2)
    story.say("together", who, ref=ref, other=other)
    story.subject.append(f"together {story.nth(ref)}{story.nth(other)}")
    return story.becomes(who, story.amounts[ref], "+", story.amounts[other])


def _happens(story: Story, who: str, n: int | str) -> str:
    """A change of who's amount by n. -> Its sign, "" where no more can happen."""
    sign, verbs = story.rng.choice((("+", story.world.gain), ("-", story.world.lose)))
    verbs = [verb for verb in verbs if verb[0] not in story.verbs]
    if not verbs:
        return ""
    present, past, *rest = story.rng.choice(verbs)
    tail = rest[1].format(friend=story.fresh.pop()) if rest else ""
    if n != "some":
        story.event = (len(story.told) + 1, who, past if story.past else present, tail)
    story.say("change", who, past if story.past else present, tail, n=n, extra="more " if sign == "+" else "")
    story.verbs.add(present)
    story.asked = {"verb": rest[0] if rest else past if story.past else present, "tail": tail}
    story.changed = True
    return sign


def _change(story: Story) -> bool:
    n = story.rng.randint(LEAST, min(story.size, max(LEAST, story.amount - LEAST)))
    sign = _happens(story, story.who, n)
    story.subject.append(f"change {sign}{n}")
    return bool(sign) and story.becomes(story.who, story.amount, sign, n)


def _more_groups(story: Story) -> bool:
    groups = [groups for groups in story.world.groups if groups.more and "buys" not in story.verbs]
    if not groups:
        return False
    (groups, k, m), before = (story.rng.choice(groups), story.factor(), story.factor()), story.amount
    story.say(groups.more, k=k, m=m)
    story.changed = True
    story.verbs.add("buys")
    story.subject.append(f"change groups {k} {m}")
    return story.becomes(story.who, k, "*", m) and story.becomes(story.who, before, "+", k * m)


# ends: a question, and the last step to its answer


def _ask(story: Story) -> bool:
    story.say("ask")
    return True


def _another(story: Story) -> str:
    """A new one whose amount is told."""
    other = story.fresh.pop()
    _state(story, other)
    return other


def _total(story: Story) -> bool:
    who, a, others = story.who, story.amount, [name for name in story.amounts if name != story.who]
    ref = story.rng.choice(others) if others and story.rng.random() < 0.6 else _another(story)
    story.subject.append(story.nth(ref))
    story.say("total", who, ref=ref)
    return story.becomes(who, story.amounts[ref], "+", a)


def _difference(story: Story) -> bool:
    """How many more or fewer one has than another, or needs to have as many."""
    one, multiple = story.who, story.multiple
    other = multiple if multiple and story.rng.random() < 0.6 else _another(story)
    story.subject.append(story.nth(other))
    small, large = sorted((one, other), key=story.amounts.__getitem__)
    kind = story.rng.choice(("more", "fewer", "equal"))
    if kind == "equal" and not story.world.has[0]:
        return False
    story.subject.append(kind)
    asked = (small, large) if kind == "fewer" else (large, small)
    story.say("equal" if kind == "equal" else "difference", asked[0], ref=asked[1], more=kind)
    return story.becomes(one, story.amounts[large], "-", story.amounts[small])


def _ratio(story: Story) -> bool:
    one, other, k = story.who, story.fresh.pop(), story.factor()
    divides = story.amount % k == 0 and story.rng.random() < 0.5
    n = story.amounts[other] = story.amount // k if divides else story.amount * k
    story.say("state", other, n=n)
    story.subject.append(f"{n}")
    small, large = (other, one) if divides else (one, other)
    story.say("ratio", large, ref=small)
    return LEAST <= n <= max(4 * story.size, story.amount) and story.becomes(one, story.amounts[large], "/", story.amounts[small], "times")


def _change_unknown(story: Story) -> bool:
    who, before = story.who, story.amount
    sign = _happens(story, who, "some")
    after = story.number() if sign == "-" else before + story.number()
    story.say("now", n=after)
    story.say("asked", **story.asked)
    story.subject.append(f"{sign} {after}")
    return bool(sign) and story.becomes(who, *((after, "-", before) if sign == "+" else (before, "-", after)))


def _start_unknown(story: Story) -> bool:
    """Of a new one, who has as many at the end as the one before, if there was one."""
    ref, n = (story.who if story.amounts else ""), story.number()
    who, story.changed = story.fresh.pop(), False
    after = story.amounts[ref] if ref else story.number()
    story.say("some", who)
    sign = _happens(story, who, n)
    story.say("now as" if ref else "now", who, n=after, ref=ref)
    story.say("start", who)
    story.subject.append(f"{sign}{n}" + ("" if ref else f" {after}"))
    return bool(sign) and story.becomes(who, after, "-" if sign == "+" else "+", n)


def _part_unknown(story: Story) -> bool:
    n = story.rng.randint(LEAST, story.size)
    of_it = [kind.removesuffix(f" {story.things}") for kind in (story.one, story.two)]
    one, two = of_it if story.two not in of_it else (story.one, story.two)
    story.say("of them", n=n, one=one, two=two)
    story.say("ask some")
    story.subject.append(f"{n}")
    return story.who not in story.grouped and bool(story.one) and story.becomes(story.who, story.amount, "-", n)


def _equal_groups(story: Story) -> bool:
    """How many are in each, or how many groups there are."""
    factors = [k for k in range(2, 13) if story.amount % k == 0 and story.amount // k >= LEAST]
    free = story.world.label in ("has", "money") or story.who not in story.grouped
    if not (story.world.groups and factors and free):
        return False
    groups, k = story.rng.choice(story.world.groups), story.rng.choice(factors)
    many = story.rng.random() < 0.5
    unit = groups.unit if many else story.things
    story.say(groups.many if many else groups.each, k=k, m=k)
    story.subject.append(f"{'number' if many else 'size'} {k}")
    return story.becomes(story.who, story.amount, "/", k, unit)


def _remainder(story: Story) -> bool:
    k = story.rng.randint(3, 12)
    story.say(
        "{who} [shares|shared] all the {things} equally among {k} friends, as many as possible to each, and [keeps|kept] the rest. "
        "How many {things} [does|did] {who} keep?",
        k=k,
    )
    story.subject.append(f"{k}")
    all_of_them, each = story.amount, story.amount // k
    return each >= LEAST and story.becomes(story.who, each, "*", k) and story.becomes(story.who, all_of_them, "-", each * k)


def _sold(story: Story) -> bool:
    k = story.rng.randint(2, 20)
    story.say("{who} [sells|sold] all the {things} for {k} cents each. How many cents [does|did] {who} get for them?", k=k)
    story.subject.append(f"{k}")
    return story.becomes(story.who, story.amount, "*", k, "cents")


def _note(story: Story) -> bool:
    notes = [note for note in NOTES if note > story.amount + LEAST]
    note = notes[0] if notes else 0
    story.say(
        story.rng.choice(
            (
                "{who} paid with {n} dollars. How many dollars did {who} get back?",
                "{who} had taken {n} dollars along. How many dollars did {who} have left?",
            )
        ),
        n=note,
    )
    story.subject.append(f"{note}")
    return story.becomes(story.who, note, "-", story.amount)


def _two_things(story: Story) -> bool:
    """Another kind of thing of the same one: how many in total, or how many more of one kind."""
    n, total = story.number(), story.rng.random() < 0.4
    more = "more" if n < story.amount else "fewer"
    story.say("also", n=n)
    story.say("all of one" if total else "of one", more=more)
    story.subject.append(f"{'total' if total else more} {n}")
    step = (story.amount, "+", n) if total else (max(n, story.amount), "-", min(n, story.amount))
    return story.becomes(story.who, *step, *([f"{story.things} and {story.seconds}"] if total else []))


Part = Callable[[Story], bool]
OPENINGS: dict[str, tuple[int, Part]] = {
    "state": (0, _state),
    "kinds": (1, _kinds_of),
    "groups": (1, _groups_of),
    "groups and more": (2, _groups_and_more),
    "boxes": (2, _boxes_of),
}
"""Operations, and what tells: False where this cannot be told here."""
LINKS: dict[str, tuple[int, Part]] = {
    "compare": (1, _compare), "referent": (1, _referent), "times": (1, _times), "change": (1, _change), "together": (1, _together),
    "more groups": (2, _more_groups),
}  # fmt: skip
ENDS: dict[str, tuple[int, Part, int]] = {
    "total": (1, _total, 2), "difference": (1, _difference, 3), "ratio": (1, _ratio, 1), "change unknown": (1, _change_unknown, 2),
    "start unknown": (1, _start_unknown, 2), "part unknown": (1, _part_unknown, 2), "equal groups": (1, _equal_groups, 3),
    "sold": (1, _sold, 1), "note": (1, _note, 1), "two things": (1, _two_things, 3), "remainder": (2, _remainder, 1),
}  # fmt: skip
"""Operations, what asks, and how often it is chosen."""
OWN_ENDS = ("remainder", "sold", "note", "two things")
"""That need a world for them."""
TRIES = 200


def relations(rng: random.Random, difficulty: int) -> Exercise:
    """A story of amounts that are related, and a question for one of them. Answer: the number."""
    count, size = OPERATIONS[difficulty - 1], SIZES[difficulty - 1]
    while True:
        ends = [name for name, (operations, _, weight) in ENDS.items() if operations <= count for _ in range(weight)]
        end = rng.choice(ends) if rng.random() < 0.6 else ""
        left = count - (ENDS[end][0] if end else 0)
        opening = rng.choice(["state", *(name for name, (operations, _) in OPENINGS.items() if operations <= left)])
        for _ in range(TRIES):
            story = Story(rng, size)
            if _grown(story, opening, end, count):
                return _exercise(story)


def _grown(story: Story, opening: str, end: str, count: int) -> bool:
    """Whether the story could be told with so many operations."""
    if end in OWN_ENDS and end not in story.world.ends:
        return False
    left = count - (ENDS[end][0] if end else 0)
    if end != "start unknown" or left:
        operations, part = OPENINGS[opening]
        left -= operations
        story.subject.append(opening)
        if left < 0 or not part(story):
            return False
    while left:
        if len(story.fresh) < 3:
            return False
        story.multiple = ""
        link = story.rng.choice([name for name, (operations, _) in LINKS.items() if operations <= left])
        if not LINKS[link][1](story):
            return False
        left -= LINKS[link][0]
    story.subject.append(end)
    return (ENDS[end][1] if end else _ask)(story)


def _exercise(story: Story) -> Exercise:
    """With a number that does not matter, sometimes, and with pronouns where they cannot be mistaken."""
    rng, told, answer = story.rng, story.told, str(story.amount)
    if rng.random() < BESIDE:
        story.told, story.changed = [], False
        also, n = story.seconds and story.subject[-2] != "two things" and rng.random() < 0.6, story.number()
        if also and story.event and rng.random() < 0.6:
            at, who, verb, tail = story.event
            story.say("also changes", who, verb, tail, n=n)
        elif also:
            at = 1
            story.say("also", told[0][1], n=n)
        else:
            at = 0 if "{them}" in told[1][0] else rng.randrange(2)
            story.say("state", story.fresh.pop(), n=n)
        told[at:at] = story.told
    holders = story.world.places or PEOPLE
    everyone = {who for text, name in told for who in _mentioned(text.format(who=name, them=""), holders)}
    sentences, before = [], set()
    for text, name in told:
        same, asks = before == {name}, text.startswith("How")
        she = "he" if name in HE else "she"
        subject = she if name in PEOPLE and "{who}" in text and same and (not asks or len(everyone) == 1) and rng.random() < 0.7 else name
        them = "them" if same else f"the {story.things} {story.world.at} {name}" if story.world.at else f"{name}'s {story.things}"
        sentence = text.format(who=subject, them=them)
        sentences.append(re.sub(r"(^|[.] )([a-z])", lambda start: start[1] + start[2].upper(), sentence))
        before = _mentioned(text.format(who=name, them=""), holders)
    return Exercise(" ".join(sentences), answer, thought(story.steps, answer), " ".join(filter(None, story.subject)))


def _mentioned(sentence: str, holders: Sequence[str]) -> set[str]:
    words = set(re.findall(r"\w+", sentence))
    return {who for who in holders if (who in sentence if " " in who else who in words)}
