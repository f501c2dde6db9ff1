"""The words and sentences of the English stories."""
# ruff: noqa: SIM905 -- word lists read better as one text

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plots import Some, Thing

PEOPLE = (
    "Mara Lily Nora Ada Ruth Ivy Hana Tess Wren Elsa Rosa June Tom Ben Otto Max Ravi Finn Leo Sam Hugo Paul Jack Karl"
).split()  # the first half are women
JOBS = "baker miller teacher sailor gardener weaver painter potter".split()
PLACES = (
    "mill harbour market school bakery forest garden library bridge river lighthouse farm ferry orchard chapel station"
).split()
THINGS = "kite lantern key drum map bell book hat scarf umbrella flute fan clock mirror ball ring".split()
COLOURS = "red blue green yellow white black golden".split()
GOODS = "apple pear egg shell nut stamp pencil sweet orange candle button coin".split()
BOXES = "box basket drawer chest bag jar cupboard trunk".split()
ANIMALS = "fox owl cat dog goat hare duck donkey crow hedgehog horse frog".split()
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()

PHRASES: dict[str, tuple[str, ...]] = {
    "hero": (
        "Once upon a time there was {J_a} called {A}, who lived near the {P}.",
        "{A} was {J_a} and lived in a small house by the {P}.",
        "There once was {J_a} whose name was {A}, and {A_his} home was close to the {P}.",
        "Near the {P} lived {A}, {J_a} whom everybody liked.",
    ),
    "day": (
        "It was a cold morning in winter, and snow lay on the roofs.",
        "The sun was shining and the birds were singing.",
        "That day the wind blew hard and the sky was grey.",
        "It had rained all night, and the road was wet.",
        "It was a warm evening at the end of summer.",
        "In those days the roads were long and the nights were dark.",
    ),
    "owns": (
        "{A_He} had {T_a}, and {A_he} loved it more than anything else.",
        "The dearest thing {A_he} owned was {T_a}.",
        "{A_His} grandmother had given {A_him} {T_a}.",
    ),
    "hides": (
        "One day {A} put the {T} into {K_a} at the {P}.",
        "In the morning {A_he} carried the {T} to the {P} and hid it in {K_a}.",
        "{A} was afraid of thieves, so {A_he} hid the {T} in {K_a} at the {P}.",
    ),
    "goes": (
        "Then {A_he} went to the {P} to work.",
        "After that {A} walked to the {P}, where {A_he} had much to do.",
        "Then {A} left for the {P} and stayed there until evening.",
    ),
    "comes": (
        "While {A_he} was away, {B} came to the {P}.",
        "A little later {B} passed by the {P}.",
        "Soon {B} arrived at the {P} and looked around.",
    ),
    "moves": (
        "{B} found the {T} in the {K} and put it into {L_a} instead.",
        "{B} opened the {K}, took out the {T} and laid it in {L_a}.",
    ),
    "takes": (
        "{B} opened the {K}, took the {T} and carried it to the {Q}.",
        "{B} saw the {T} in the {K}, took it and ran to the {Q}.",
    ),
    "leaves": (
        "{B} opened the {K}, looked at the {T} and left it where it was.",
        "{B} saw the {T} in the {K} but did not touch it.",
    ),
    "returns": (
        "When {A} came back to the {P}, {A_he} looked for the {T}.",
        "In the evening {A} returned to the {P} to get the {T}.",
    ),
    "after_moves": (
        "It was no longer in the {K}, but at last {A_he} found it in the {L}.",
        "The {K} was empty. {A} searched everywhere and found the {T} in the {L}.",
    ),
    "after_takes": (
        'The {K} was empty. "Where is my {T_n}?" cried {A}.',
        "It was gone. Only later did {A_he} hear that {B} had taken it to the {Q}.",
    ),
    "after_leaves": (
        "It was still in the {K}, and {A_he} was glad.",
        "There it was, in the {K}, just as {A_he} had left it.",
    ),
    "where_in_box": ("\nQuestion: Where is the {T} now?\nAnswer: It is in the {K} at the {P}.",),
    "where_with_other": ("\nQuestion: Where is the {T} now?\nAnswer: {B} has it at the {Q}.",),
    "has": (
        "{A_He} had {N}.",
        "On the table in {A_his} house lay {N}.",
        "At first {A_he} owned {N}.",
    ),
    "finds": (
        "At the {P} {A_he} found {N}.",
        "{A} went to the {P} and found {N} on the ground.",
    ),
    "buys": (
        "At the {P} {A_he} bought {N}.",
        "{A} walked to the {P} and bought {N} more.",
    ),
    "gives": (
        "At the {P} {A_he} met {B} and gave {B_him} {N}.",
        "{A} gave {N} to {B}, who was waiting at the {P}.",
    ),
    "loses": (
        "On the way to the {P} {A_he} lost {N}.",
        "At the {P} {A} dropped {N} and did not notice.",
    ),
    "now": (
        "Now {A_he} had {N}.",
        "That made {N}.",
        "{A} counted: there were {N} now.",
    ),
    "how_many": ("\nQuestion: How many {N_n} does {A} have?\nAnswer: {A} has {N}.",),
    "meeting": (
        "{A}, {B} and {C} met at the {P}.",
        "One afternoon three friends, {A}, {B} and {C}, sat together at the {P}.",
        "{A} and {B} were waiting at the {P} when {C} came along.",
    ),
    "brought": (
        "{A} had {T_a}.",
        "{A} had brought {T_a}.",
        "In {A_his} hands {A} held {T_a}.",
    ),
    "swap": (
        "{A} gave the {T} to {B}, and {B} gave {A_him} the {U} in return.",
        "Then {A} and {B} traded the {T} for the {U}.",
        '"Take my {T_n} and give me your {U_n}," said {A} to {B}, and so they did.',
    ),
    "holds": (
        "Now the {T} belonged to {A}.",
        "{A} was happy with the {T}.",
    ),
    "who_has": ("\nQuestion: Who has the {T} now?\nAnswer: {A} has the {T}.",),
    "what_has": ("\nQuestion: What does {A} have now?\nAnswer: {A} has the {T}.",),
    "lost": (
        "One day {A_he} lost {A_his} {T} and set out to look for it.",
        "One morning {A_his} {T} was gone, and {A_he} went to search for it.",
    ),
    "meets": (
        "At the {P} {A_he} met {X_a}.",
        "Soon {A_he} came to the {P}, and there sat {X_a}.",
        "{A} walked on to the {P}, where {A_he} saw {X_a}.",
    ),
    "unseen": (
        '"Have you seen my {T}?" asked {A}. "No," said the {X}, "I have not."',
        'The {X} shook its head. "I know nothing about {T_a_n}," it said.',
        '"I am sorry," said the {X}, "I have not seen your {T_n}."',
    ),
    "seen": (
        '"Your {T_n}?" said the {X}. "It is in {K_a} at the {P}."',
        '"Go to the {P} and look into the {K}," said the {X}.',
    ),
    "arrives": (
        "So {A} hurried to the {P}, opened the {K} and found the {T}.",
        "{A} thanked it and went to the {P}. There, in the {K}, lay the {T}.",
    ),
    "whom_met": ("\nQuestion: Whom did {A} meet at the {P}?\nAnswer: At the {P} {A} met the {X}.",),
    "where_met": ("\nQuestion: Where did {A} meet the {X}?\nAnswer: {A} met the {X} at the {P}.",),
    "where_found": ("\nQuestion: Where was the {T}?\nAnswer: It was in the {K} at the {P}.",),
    "ill": (
        "{A_His} friend {B} was ill and had to stay in bed.",
        "One day {A} heard that {B} was ill.",
    ),
    "birthday": (
        "{A_His} friend {B} was going to have a birthday.",
        "The next day was the birthday of {B}.",
    ),
    "wish": (
        '"What would you like best?" asked {A}. "{T_A}," said {B}.',
        '"I have always wished for {T_a}," said {B}.',
    ),
    "promise": (
        '"Then you shall have one," said {A}.',
        '"Wait until tomorrow," said {A} with a smile.',
    ),
    "fetch": (
        "{A_He} went to the {Q} and bought the {T} there.",
        "So {A} walked all the way to the {Q}, for only there such {T_a_n} could be found.",
    ),
    "bring": (
        "In the evening {A_he} came back with the {T}.",
        'The next morning {A} knocked at the door. "Here is your {T_n}," {A_he} said.',
    ),
    "thanks": (
        "{B} laughed for joy and thanked {A_him}.",
        "{B} was so happy that {B_he} could not say a word.",
        '"You are a true friend," said {B}.',
    ),
    "what_brought": ("\nQuestion: What did {A} bring to {B}?\nAnswer: {A} brought {B_him} {T_a}.",),
    "where_fetched": ("\nQuestion: Where did {A} get the {T}?\nAnswer: {A} got it at the {Q}.",),
    "shops": (
        "{A_He} went to the {P} and bought {N} and {M}.",
        "At the {P} {A} bought {N} and also {M}.",
    ),
    "carries": (
        "{A_He} put everything into a bag and carried it home.",
        "On the way home {A_he} counted them all.",
    ),
    "sum": ("\nQuestion: How many things did {A} buy?\nAnswer: {N_d} + {M_d} = {S_d}. {A} bought {S_w} things.",),
}

SEPARATOR = " "


def with_article(phrase: str) -> str:
    """Return the phrase with its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def person(role: str, index: int) -> dict[str, str]:
    """Return the name and the pronouns of a person."""
    he, his, him = ("she", "her", "her") if index < len(PEOPLE) // 2 else ("he", "his", "him")
    return {
        role: PEOPLE[index],
        f"{role}_he": he,
        f"{role}_He": he.capitalize(),
        f"{role}_his": his,
        f"{role}_His": his.capitalize(),
        f"{role}_him": him,
    }


def thing(role: str, value: Thing) -> dict[str, str]:
    """Return a thing with its colour, bare and with articles."""
    noun = THINGS[value.noun]
    full = f"{COLOURS[value.colour]} {noun}"
    article = with_article(full)
    return {
        role: full,
        f"{role}_n": noun,
        f"{role}_a": article,
        f"{role}_A": article.capitalize(),
        f"{role}_a_n": with_article(noun),
    }


def some(role: str, value: Some) -> dict[str, str]:
    """Return a number of goods, the noun agreeing with the number."""
    noun = GOODS[value.goods]
    plural = f"{noun}s"
    counted = f"{NUMBERS[value.count]} {noun if value.count == 1 else plural}"
    return {role: counted, f"{role}_n": plural, f"{role}_d": str(value.count)}


def total(role: str, value: int) -> dict[str, str]:
    """Return a bare number in words and digits."""
    return {f"{role}_w": NUMBERS[value], f"{role}_d": str(value)}


def place(role: str, index: int) -> dict[str, str]:
    """Return a place."""
    return {role: PLACES[index]}


def job(role: str, index: int) -> dict[str, str]:
    """Return a trade with its article."""
    return {f"{role}_a": with_article(JOBS[index])}


def box(role: str, index: int) -> dict[str, str]:
    """Return a container, bare and with its article."""
    return {role: BOXES[index], f"{role}_a": with_article(BOXES[index])}


def animal(role: str, index: int) -> dict[str, str]:
    """Return an animal, bare and with its article."""
    return {role: ANIMALS[index], f"{role}_a": with_article(ANIMALS[index])}
