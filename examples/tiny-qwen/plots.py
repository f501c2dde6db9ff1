"""What happens in the stories, in no language: plots are simulated here and told by english.py and chinese.py.

A plot is a list of beats; a beat names a kind of sentence and, by index, the entities it speaks of. So who has what,
where things are and how many are left (and the answer to the closing question) is decided by state, not by phrases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

# How many words of each sort every language must offer.
PEOPLE, JOBS, PLACES, THINGS, COLOURS, GOODS, BOXES, ANIMALS = 24, 8, 16, 16, 7, 12, 8, 12
MOST = 12  # no one ever owns more than this of anything


class Thing(NamedTuple):
    """A single object that keeps its colour through the story."""

    noun: int
    colour: int


class Some(NamedTuple):
    """A number of equal goods."""

    count: int
    goods: int


@dataclass(frozen=True)
class Beat:
    """One sentence to tell: `roles` maps a role letter to an entity (an index into a word list, a Thing or a Some)."""

    kind: str
    roles: dict[str, int | Thing | Some]


def beat(kind: str, **roles: int | Thing | Some) -> Beat:
    """Return a beat of this kind."""
    return Beat(kind, roles)


def things(rng: random.Random, count: int) -> list[Thing]:
    """Return `count` objects with distinct nouns."""
    return [Thing(noun, rng.randrange(COLOURS)) for noun in rng.sample(range(THINGS), count)]


def opening(rng: random.Random, hero: int, home: int) -> list[Beat]:
    """Introduce the hero with a home and a trade; sometimes the day as well."""
    beats = [beat("hero", A=hero, P=home, J=rng.randrange(JOBS))]
    return [*beats, beat("day")] if rng.random() < 0.4 else beats


def hidden(rng: random.Random) -> list[Beat]:
    """Someone hides a thing and leaves; another moves it, takes it away or lets it be."""
    hero, other = rng.sample(range(PEOPLE), 2)
    home, here, away, far = rng.sample(range(PLACES), 4)
    box, second = rng.sample(range(BOXES), 2)
    (thing,) = things(rng, 1)
    story = [
        *opening(rng, hero, home),
        beat("owns", A=hero, T=thing),
        beat("hides", A=hero, T=thing, K=box, P=here),
        beat("goes", A=hero, P=away),
        beat("comes", A=hero, B=other, P=here),
    ]
    turn = rng.choice(("moves", "takes", "leaves"))
    roles = {"A": hero, "B": other, "T": thing, "K": box, "L": second, "P": here, "Q": far}
    where = {"moves": "in_box", "takes": "with_other", "leaves": "in_box"}[turn]
    answer = roles | {"K": second if turn == "moves" else box}
    return [
        *story,
        Beat(turn, roles),
        beat("returns", A=hero, P=here, T=thing),
        Beat(f"after_{turn}", roles),
        Beat(f"where_{where}", answer),
    ]


def counted(rng: random.Random) -> list[Beat]:
    """Someone's goods grow and shrink; the narrator counts along now and then and asks at the end."""
    hero, other = rng.sample(range(PEOPLE), 2)
    home, *stops = rng.sample(range(PLACES), 5)
    goods, count, given = rng.randrange(GOODS), rng.randint(2, 8), 0
    story = [*opening(rng, hero, home), beat("has", A=hero, N=Some(count, goods))]
    for stop in stops[: rng.randint(2, 4)]:
        kinds = ["finds", "buys"] if count < MOST else []
        kinds += ["gives", "loses"] if count > 1 else []
        kind = rng.choice(kinds)
        gain = kind in {"finds", "buys"}
        change = rng.randint(1, min(4, MOST - count if gain else count - 1))
        count += change if gain else -change
        given += change if kind == "gives" else 0
        story.append(beat(kind, A=hero, B=other, P=stop, N=Some(change, goods), M=Some(count, goods)))
        if rng.random() < 0.7:
            story.append(beat("now", A=hero, N=Some(count, goods)))
    if given and rng.random() < 0.3:
        return [*story, beat("how_many", A=other, N=Some(given, goods))]
    return [*story, beat("how_many", A=hero, N=Some(count, goods))]


def swapped(rng: random.Random) -> list[Beat]:
    """Three people with a thing each trade them in pairs."""
    people = rng.sample(range(PEOPLE), 3)
    owned = dict(zip(people, things(rng, 3), strict=True))
    a, b, c = people
    story = [beat("meeting", A=a, B=b, C=c, P=rng.randrange(PLACES))]
    story += [beat("brought", A=who, T=thing) for who, thing in owned.items()]
    for _ in range(rng.randint(2, 3)):
        giver, taker = rng.sample(people, 2)
        story.append(beat("swap", A=giver, B=taker, T=owned[giver], U=owned[taker]))
        owned[giver], owned[taker] = owned[taker], owned[giver]
        if rng.random() < 0.4:
            story.append(beat("holds", A=giver, T=owned[giver]))
    who = rng.choice(people)
    return [*story, beat(rng.choice(("who_has", "what_has")), A=who, T=owned[who])]


def journey(rng: random.Random) -> list[Beat]:
    """Someone looks for a lost thing, asks an animal at each stop and is sent to where it lies."""
    hero = rng.randrange(PEOPLE)
    home, last, *stops = rng.sample(range(PLACES), rng.choice((4, 5)))
    animals = rng.sample(range(ANIMALS), len(stops))
    (thing,) = things(rng, 1)
    box = rng.randrange(BOXES)
    story = [*opening(rng, hero, home), beat("lost", A=hero, T=thing)]
    for stop, animal in zip(stops[:-1], animals, strict=False):
        story += [beat("meets", A=hero, P=stop, X=animal), beat("unseen", A=hero, X=animal, T=thing)]
    helper = animals[-1]
    story += [
        beat("meets", A=hero, P=stops[-1], X=helper),
        beat("seen", A=hero, X=helper, T=thing, K=box, P=last),
        beat("arrives", A=hero, T=thing, K=box, P=last),
    ]
    asked = rng.randrange(len(stops))
    questions = (
        beat("whom_met", A=hero, P=stops[asked], X=animals[asked]),
        beat("where_met", A=hero, P=stops[asked], X=animals[asked]),
        beat("where_found", A=hero, T=thing, K=box, P=last),
    )
    return [*story, rng.choice(questions)]


def promised(rng: random.Random) -> list[Beat]:
    """Someone wishes for a thing; a friend promises it, gets it somewhere and brings it."""
    hero, friend = rng.sample(range(PEOPLE), 2)
    home, shop = rng.sample(range(PLACES), 2)
    (thing,) = things(rng, 1)
    roles = {"A": hero, "B": friend, "P": home, "Q": shop, "T": thing}
    story = [beat("hero", A=hero, P=home, J=rng.randrange(JOBS)), Beat(rng.choice(("ill", "birthday")), roles)]
    story += [Beat(kind, roles) for kind in ("wish", "promise", "fetch", "bring", "thanks")]
    return [*story, Beat(rng.choice(("what_brought", "where_fetched")), roles)]


def bought(rng: random.Random) -> list[Beat]:
    """Two or three sorts of goods are bought and added up in digits."""
    hero = rng.randrange(PEOPLE)
    first, second = rng.sample(range(GOODS), 2)
    n, m = rng.randint(1, 6), rng.randint(1, 6)
    roles = {"A": hero, "P": rng.randrange(PLACES), "N": Some(n, first), "M": Some(m, second), "S": n + m}
    story = [beat("hero", A=hero, P=rng.randrange(PLACES), J=rng.randrange(JOBS)), Beat("shops", roles)]
    return [*story, Beat("carries", roles), Beat("sum", roles)]


PLOTS: tuple[Callable[[random.Random], list[Beat]], ...] = (hidden, counted, swapped, journey, promised, bought)
