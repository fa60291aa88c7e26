"""Word problems: amounts that change, and those of `relations`."""

from __future__ import annotations

import random
from typing import NamedTuple

from sparing.curate.exercises import NAMES, Exercise
from sparing.curate.relations import BESIDE, LEAST, OPERATIONS, PARTS, SIZES, relations
from sparing.data.worked import thought

RELATED = 2 / 3
"""Share of word problems that `relations` makes."""


class Scene(NamedTuple):
    """What a word problem tells of; sentences with names, a thing and numbers to fill in."""

    unit: str
    start: str
    add: tuple[str, ...]
    take: tuple[str, ...]
    times: str
    """k times m more."""
    part: str
    """One part in k less."""
    ask: str
    divide: tuple[str, str]
    """A last question, whose answer is the amount divided by k, and its unit."""
    multiply: tuple[str, str]
    beside: tuple[str, ...]
    """Sentences with a number that does not matter."""


THINGS = "apples beads books buttons cards coins marbles nuts pencils pears shells stamps stickers tiles".split()
SCENES = {
    "things": Scene(
        "{thing}",
        "{name} has {n} {thing}.",
        ("{other} gives {name} {n} more {thing}.", "{name} finds another {n} {thing}.", "{name} buys {n} {thing}."),
        ("{name} gives {n} {thing} to {other}.", "{name} loses {n} {thing}.", "{name} sells {n} of the {thing}."),
        "{name} buys {k} boxes of {m} {thing} each.",
        "{name} gives {part} of all the {thing} to {other}.",
        "How many {thing} does {name} have now?",
        ("{name} puts all the {thing} into bags of {k}. How many bags does {name} fill?", "bags"),
        ("{name} sells all the {thing} for {k} cents each. How many cents does {name} get?", "cents"),
        ("{other} is {n} years old.", "{third} has {n} {thing}."),
    ),
    "water": Scene(
        "litres",
        "There are {n} litres of water in {name}'s tank.",
        ("{name} pours {n} litres into the tank.", "Rain brings another {n} litres.", "{other} fills {n} litres in."),
        ("{name} takes {n} litres for the garden.", "{n} litres leak out.", "{other} uses {n} litres to wash a car."),
        "A pump adds {m} litres a minute for {k} minutes.",
        "Then {name} lets {part} of the water run out.",
        "How many litres are in the tank now?",
        ("{name} fills all the water into cans of {k} litres. How many cans does {name} fill?", "cans"),
        ("A litre is enough for {k} plants. For how many plants is all the water enough?", "plants"),
        ("The tank is {n} years old.", "{third} has {n} plants."),
    ),
    "road": Scene(
        "km",
        "{name} is {n} km from home.",
        ("{name} cycles {n} km further away from home.", "{name} goes on for {n} km, away from home."),
        ("{name} turns round and cycles {n} km towards home.", "{name} forgot something and goes {n} km back towards home."),
        "{name} drives away from home for {k} hours at {m} km an hour.",
        "{name} covers {part} of the way back home.",
        "How many km from home is {name} now?",
        ("{name} goes all the way home at {k} km an hour. How many hours does that take?", "hours"),
        ("The way home costs {k} cents for every km. How many cents does {name} pay?", "cents"),
        ("{other} lives {n} km away from {name}.", "{third} is {n} km from home."),
    ),
    "money": Scene(
        "dollars",
        "{name} has {n} dollars.",
        ("{name} earns {n} dollars.", "{other} pays back {n} dollars to {name}.", "{name} wins {n} dollars."),
        ("{name} spends {n} dollars on food.", "{name} lends {n} dollars to {other}.", "{name} pays {n} dollars for shoes."),
        "{name} sells {k} pots for {m} dollars each.",
        "{name} gives {part} of the money to {other}.",
        "How many dollars does {name} have now?",
        ("{name} spends all the money on tickets for {k} dollars each. How many tickets are that?", "tickets"),
        ("{name} changes all the money and gets {k} crowns for a dollar. How many crowns does {name} get?", "crowns"),
        ("{other} has {n} cousins.", "{third} has {n} dollars."),
    ),
}


def words(rng: random.Random, difficulty: int) -> Exercise:
    """A story of amounts that are related to each other, or of one that changes. Answer: the number."""
    return (relations if rng.random() < RELATED else changes)(rng, difficulty)


def changes(rng: random.Random, difficulty: int) -> Exercise:
    """A story about an amount that changes, and what it is at the end. Answer: the number."""
    kind = rng.choice(list(SCENES))
    scene, left, size = SCENES[kind], OPERATIONS[difficulty - 1], SIZES[difficulty - 1]
    name, other, third = rng.sample(NAMES, 3)
    fixed = {"name": name, "other": other, "third": third, "thing": rng.choice(THINGS)}
    unit, amount = scene.unit.format(**fixed), rng.randint(2 * LEAST, size)
    told, steps, subject, question = [scene.start.format(n=amount, **fixed)], [], [f"{kind} {amount}"], scene.ask
    while left:
        k, n, m = rng.randint(2, 12), rng.randint(2, size), rng.randint(2, size // 2)
        change = rng.choice(["add", "take", *(["times", "part"] if left > 1 else ["last", "last"])])
        if change == "add":
            steps.append(f"{amount} + {n} = {amount + n} {unit}")
            amount, sentence, sign = amount + n, rng.choice(scene.add), f"+{n}"
        elif change == "take":
            if amount < 2 * LEAST:
                continue
            n = rng.randint(LEAST, min(size, amount - LEAST))
            steps.append(f"{amount} - {n} = {amount - n} {unit}")
            amount, sentence, sign = amount - n, rng.choice(scene.take), f"-{n}"
        elif change == "times":
            steps += [f"{k} * {m} = {k * m} {unit}", f"{amount} + {k * m} = {amount + k * m} {unit}"]
            amount, sentence, sign = amount + k * m, scene.times, f"+{k}*{m}"
        elif change == "part":
            k = rng.choice(list(PARTS))
            if amount % k or amount // k < LEAST:
                continue
            share = amount // k
            steps += [f"{amount} / {k} = {share} {unit}", f"{amount} - {share} = {amount - share} {unit}"]
            amount, sentence, sign = amount - share, scene.part, f"-1/{k}"
        elif rng.random() < 0.5 and amount % k == 0 and amount // k >= LEAST:
            (question, last), sentence, sign = scene.divide, "", f"/{k}"
            steps.append(f"{amount} / {k} = {amount // k} {last}")
            amount = amount // k
        else:
            (question, last), sentence, sign = scene.multiply, "", f"*{k}"
            steps.append(f"{amount} * {k} = {amount * k} {last}")
            amount = amount * k
        left -= 2 if change in ("times", "part") else 1
        subject.append(sign)
        if sentence:
            told.append(sentence.format(n=n, k=k, m=m, part=PARTS.get(k), **fixed))
        else:
            question = question.format(k=k, **fixed)
    if rng.random() < BESIDE:
        told.insert(rng.randint(1, len(told)), rng.choice(scene.beside).format(n=rng.randint(3, 60), **fixed))
    story = " ".join([*told, question.format(**fixed)])
    return Exercise(story, str(amount), thought(steps, str(amount)), " ".join(subject))
