"""Who has what in word problems, what happens there, and the sentences that tell and ask it: people and places."""

from __future__ import annotations

from typing import NamedTuple

# Fields of sentences: {who}: the subject, a name or "she"; {name}: the same, always the name; {them}: the subject's things; {ref}, {other}:
# further holders; {has}, {does}, {do}, {are}: of the time that is told of; [a|b]: where the story is told in the present and in the past.
SAY = {
    "people": {
        "state": ("{who} {has} {n} {things}.",),
        "some": ("{who} {has} some {things}.",),
        "now": ("now {who} has {n} {things}.",),
        "now as": ("now {who} has as many {things} as {ref}.",),
        "compare": ("{since}{who} {has} {n} {more} {things} than {ref}.",),
        "times": ("{since}{who} {has} {times} as many {things} as {ref}.",),
        "together": ("{since}{who} {has} as many {things} as {ref} and {other} together.",),
        "kinds": ("{who} {has} {n} {one} and {m} {two}.", "{who} {has} {n} {one} and also {m} {two}."),
        "days": ("{who} {has} {n} {things} on Saturday and {m} {things} on Sunday.",),
        "also": ("{who} also {has} {n} {seconds}.",),
        "of them": ("{n} of {them} {are} {one}, and the others {are} {two}.", "{n} of {them} {are} {one}. The rest {are} {two}."),
        "ask": ("How many {things} {does} {who} {have}{now}?",),
        "ask some": ("How many {two} {does} {who} {have}{now}?",),
        "start": ("How many {things} did {who} have at the start?", "How many {things} did {who} have at first?"),
        "total": (
            "How many {things} {do} {ref} and {name} {have} in total{now}?",
            "How many {things} {do} {ref} and {name} {have} together{now}?",
        ),
        "difference": ("How many {more} {things} {does} {who} {have}{now} than {ref}?",),
        "equal": (
            "How many more {things} {does} {ref} need{now} to have as many as {name}?",
            "If {ref} {wants} to have as many {things} as {name}, how many more {does} {ref} need{now}?",
        ),
        "ratio": ("How many times as many {things} as {ref} {does} {name} {have}{now}?",),
        "of one": ("How many {more} {things} than {seconds} {does} {who} {have}{now}?",),
        "all of one": ("How many {things} and {seconds} {does} {who} {have} in total{now}?",),
        "change": ("{then}{who} {verb} {n} {extra}{things}{tail}.",),
        "also changes": ("{who} also {verb} {n} {seconds}{tail}.",),
        "asked": ("How many {extra}{things} [does|did] {who} {verb}{tail}?",),
    },
    "places": {
        "state": ("there {are} {n} {things} {at} {who}.",),
        "some": ("there {are} some {things} {at} {who}.",),
        "now": ("now there are {n} {things} {at} {who}.",),
        "now as": ("now there are as many {things} {at} {who} as {at} {ref}.",),
        "compare": ("{since}there {are} {n} {more} {things} {at} {who} than {at} {ref}.",),
        "times": ("{since}there {are} {times} as many {things} {at} {who} as {at} {ref}.",),
        "together": ("{since}there {are} as many {things} {at} {who} as {at} {ref} and {at} {other} together.",),
        "kinds": ("there {are} {n} {one} and {m} {two} {at} {who}.",),
        "of them": ("{n} of {them} {are} {one}, and the others {are} {two}.", "{n} of {them} {are} {one}. The rest {are} {two}."),
        "ask": ("How many {things} {are} there {at} {who}{now}?", "How many {things} {are}{now} {at} {who}?"),
        "ask some": ("How many {two} {are} there {at} {who}{now}?",),
        "start": ("How many {things} were there {at} {who} at the start?", "How many {things} were there {at} {who} at first?"),
        "total": ("How many {things} {are} there {at} {ref} and {at} {who} in total{now}?",),
        "difference": ("How many {more} {things} {are} there {at} {who} than {at} {ref}{now}?",),
        "equal": ("How many more {things} {does} {ref} need{now} to have as many as {who}?",),
        "ratio": ("How many times as many {things} {are} there {at} {who} as {at} {ref}{now}?",),
        "change": ("{then}{n} {extra}{things} {verb} {who}.",),
        "asked": ("How many {extra}{things} {verb} {who}?",),
    },
}  # fmt: skip


class Groups(NamedTuple):
    """How equal groups are told: k of them with m in each."""

    open: str
    each: str
    """All are given, and k; how many are in one is asked."""
    many: str
    """All are given, and m."""
    unit: str
    """What a group is."""
    more: str = ""
    """Further groups of one who has some."""
    rest: str = ", and another {n} {things}."
    """In place of the full stop of `open`: some that are in no group."""


class World(NamedTuple):
    """What there are amounts of, who has them and what happens to them."""

    label: str
    things: dict[str, tuple[str, str]]
    """Of each: two kinds of it."""
    has: tuple[str, str, str] = ("has", "had", "have")
    """Present, past and infinitive of what people do; the present is "" where all is past."""
    gain: tuple[tuple[str, ...], ...] = ()
    """Present and past of verbs, and for people the infinitive, and what comes after the thing."""
    lose: tuple[tuple[str, ...], ...] = ()
    groups: tuple[Groups, ...] = ()
    at: str = ""
    """Preposition, where holders are places."""
    places: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    """Which of OWN_ENDS it has."""
    weight: int = 1
    """How often it is chosen."""

    @property
    def say(self) -> dict[str, tuple[str, ...]]:
        return SAY["places" if self.places else "people"]


def _kinds(*kinds: str) -> dict[str, tuple[str, str]]:
    """apples red green -> {"apples": ("red apples", "green apples")}."""
    split = (words.split() for words in kinds)
    return {thing: (f"{one} {thing}", f"{two} {thing}") for thing, one, two in split}


def _places(adjectives: str, noun: str) -> tuple[str, ...]:
    return tuple(f"the {adjective} {noun}".strip() for adjective in adjectives.split())


def _hold(unit: str) -> Groups:
    """Groups that are vessels."""
    one = {"boxes": "box"}.get(unit, unit[:-1])
    return Groups(
        f"{{who}} {{has}} {{k}} {unit} with {{m}} {{things}} in each.",
        f"{{who}} [puts|put] all the {{things}} into {{k}} {unit}, the same number into each. "
        f"How many {{things}} [does|did] {{who}} put into each {one}?",
        f"{{who}} [puts|put] all the {{things}} into {unit}, {{m}} into each. How many {unit} [does|did] {{who}} fill?",
        unit,
        f"{{then}}{{who}} [buys|bought] {{k}} {unit} with another {{m}} {{things}} in each.",
    )


THINGS = _kinds(
    "apples red green", "beads wooden glass", "books old new", "buttons black white", "coins gold silver", "marbles red blue",
    "pencils long short", "shells white brown", "stamps old new", "stickers round square", "cards red black", "stones grey white",
    "balloons yellow blue", "crayons thick thin", "leaves dry green",
)  # fmt: skip
ROWS = Groups(
    "there {are} {k} rows of {m} {things} {at} {who}.",
    "The {things} {at} {who} {are} in {k} equal rows. How many {things} {are} in each row?",
    "The {things} {at} {who} {are} in rows of {m}. How many rows {are} there?",
    "rows",
    "{then}another {k} rows of {m} {things} [are|were] added to {who}.",
)
FOUND = (("finds", "found", "find", ""), ("buys", "bought", "buy", ""), ("gets", "got", "get", " from {friend}"))
GIVEN = (
    ("gives", "gave", "give", " to {friend}"), ("loses", "lost", "lose", ""), ("sells", "sold", "sell", ""),
    ("throws", "threw", "throw", " away"),
)  # fmt: skip
WORLDS = (
    World(
        "has",
        THINGS,
        gain=FOUND,
        lose=GIVEN,
        groups=(
            *map(_hold, ("bags", "boxes", "jars")),
            Groups(
                "{who} {has} {k} rows of {m} {things}.",
                "{who} [lays|laid] out all the {things} in {k} equal rows. How many {things} {are} in each row?",
                "{who} [lays|laid] out all the {things} in rows of {m}. How many rows {are} there?",
                "rows",
            ),
        ),
        ends=("remainder", "sold", "two things"),
        weight=6,
    ),
    World(
        "money",
        {"dollars": ("", "")},
        gain=(("earns", "earned", "earn", ""), ("wins", "won", "win", ""), ("gets", "got", "get", " from {friend}")),
        lose=(("spends", "spent", "spend", " on food"), ("loses", "lost", "lose", ""), ("lends", "lent", "lend", " to {friend}")),
        groups=(
            Groups(
                "{who} {has} {k} jars with {m} dollars in each.",
                "{who} [spends|spent] all the dollars on {k} tickets of one price. How many dollars [does|did] a ticket cost?",
                "{who} [spends|spent] all the dollars on tickets for {m} dollars each. How many tickets [does|did] {who} buy?",
                "tickets",
            ),
        ),
        weight=2,
    ),
    World(
        "spent",
        {"dollars": ("", "")},
        ("", "spent", "spend"),
        groups=tuple(
            Groups(
                f"{{who}} bought {{k}} {goods} for {{m}} dollars each.",
                f"{{who}} bought {{k}} {goods} for that, which all cost the same. How many dollars did one of the {goods} cost?",
                f"{{who}} bought only {goods}, for {{m}} dollars each. How many {goods} did {{who}} buy?",
                goods,
                rest=" and a bag for {n} dollars.",
            )
            for goods in ("tickets", "plants", "shirts", "balls", "chairs", "lamps")
        ),
        ends=("note",),
    ),
    World(
        "picked",
        _kinds("apples red green", "pears ripe hard", "flowers yellow white", "plums blue yellow", "tomatoes red yellow"),
        ("", "picked", "pick"),
        groups=(
            Groups(
                "{who} picked {k} baskets of {m} {things} each.",
                "{who} filled {k} baskets, with the same number in each. How many {things} were in each basket?",
                "{who} put {m} {things} into each basket. How many baskets did {who} fill?",
                "baskets",
            ),
        ),
        ends=("two things",),
    ),
    World(
        "read",
        {"pages": ("", "")},
        ("", "read", "read"),
        groups=(
            Groups(
                "{who} read {m} pages a day for {k} days.",
                "{who} took {k} days and read the same number of pages on each. How many pages did {who} read a day?",
                "{who} read {m} pages a day. How many days did that take?",
                "days",
            ),
        ),
    ),
    World(
        "scored",
        {"points": ("", "")},
        ("", "scored", "score"),
        groups=(
            Groups(
                "{who} scored {m} points in each of {k} games.",
                "{who} played {k} games and scored the same number of points in each. How many points did {who} score in a game?",
                "{who} scored {m} points in each game. How many games did {who} play?",
                "games",
            ),
        ),
    ),
    World(
        "baked",
        _kinds("rolls dark white", "biscuits round square", "muffins plain sweet", "cakes small large"),
        ("", "baked", "bake"),
        groups=(
            Groups(
                "{who} baked {k} trays of {m} {things} each.",
                "{who} used {k} trays, with the same number on each. How many {things} were on each tray?",
                "{who} had {m} {things} on each tray. How many trays did {who} use?",
                "trays",
            ),
        ),
        ends=("two things",),
    ),
    World(
        "bus",
        {"passengers": ("adults", "children"), "people": ("women", "men")},
        gain=(("get on", "got on"),),
        lose=(("get off", "got off"),),
        at="on",
        places=_places("red blue green white yellow grey black orange", "bus"),
    ),
    World(
        "tree",
        {"birds": ("sparrows", "pigeons"), "insects": ("beetles", "ants")},
        gain=(("fly into", "flew into"),),
        lose=(("leave", "left"),),
        at="in",
        places=_places("oak elm birch willow fir maple cedar pine", ""),
    ),
    World(
        "shelf",
        {"books": ("novels", "picture books"), "films": ("comedies", "cartoons")},
        gain=(("are put on", "were put on"),),
        lose=(("are taken from", "were taken from"),),
        at="on",
        places=_places("top second third fourth fifth sixth seventh bottom", "shelf"),
    ),
    World(
        "class",
        {"pupils": ("girls", "boys"), "children": ("girls", "boys")},
        gain=(("join", "joined"),),
        lose=(("leave", "left"),),
        at="in",
        places=_places("art music dance chess swimming reading sewing cooking", "class"),
    ),
    World(
        "car park",
        {"cars": ("red cars", "white cars"), "vehicles": ("cars", "vans")},
        gain=(("enter", "entered"),),
        lose=(("leave", "left"),),
        groups=(ROWS,),
        at="in",
        places=_places("school station museum hotel hospital library theatre zoo", "car park"),
    ),
    World(
        "hall",
        {"chairs": ("wooden chairs", "plastic chairs"), "seats": ("red seats", "blue seats")},
        gain=(("are brought into", "were brought into"),),
        lose=(("are taken out of", "were taken out of"),),
        groups=(ROWS,),
        at="in",
        places=_places("large small old new school town dance sports", "hall"),
    ),
    World(
        "garden",
        {"trees": ("oaks", "elms"), "plants": ("roses", "tulips")},
        gain=(("are planted in", "were planted in"),),
        lose=(("are removed from", "were removed from"),),
        groups=(ROWS,),
        at="in",
        places=_places("school town front back palace museum hospital hotel", "garden"),
    ),
)  # fmt: skip
