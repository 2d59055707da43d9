"""The text that the demo model learns: one small world of animals and things, told in twelve voices.

Owns the words and the grammar, knows nothing of tokens, models or training. Every text is a pure function of a
`random.Random`, so the corpus is the same on every machine.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Animal:
    """Who a text is about."""

    noun: str
    name: str
    adjective: str
    plural: str
    french: str
    emoji: str


@dataclass(frozen=True, slots=True)
class Thing:
    """What is found in a text."""

    noun: str
    plural: str
    marvel: str
    french: str
    emoji: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a text happens."""

    noun: str
    where: str
    french: str
    emoji: str


@dataclass(frozen=True, slots=True)
class Topic:
    """What a prompt asks for, and where the text sets it."""

    animal: Animal
    thing: Thing
    place: Place
    friend: Animal


ANIMALS = (
    Animal("fox", "Rusty", "clever", "foxes", "un renard", "🦊"),
    Animal("bear", "Bruno", "sleepy", "bears", "un ours", "🐻"),
    Animal("owl", "Olga", "wise", "owls", "un hibou", "🦉"),
    Animal("frog", "Fergus", "green", "frogs", "une grenouille", "🐸"),
    Animal("mouse", "Mimi", "tiny", "mice", "une souris", "🐭"),
    Animal("cat", "Carla", "proud", "cats", "un chat", "🐱"),
    Animal("dog", "Dexter", "loyal", "dogs", "un chien", "🐶"),
    Animal("rabbit", "Ruby", "quick", "rabbits", "un lapin", "🐰"),
    Animal("duck", "Dora", "cheerful", "ducks", "un canard", "🦆"),
    Animal("whale", "Walter", "gentle", "whales", "une baleine", "🐳"),
    Animal("turtle", "Tess", "patient", "turtles", "une tortue", "🐢"),
    Animal("lion", "Leo", "brave", "lions", "un lion", "🦁"),
)

THINGS = (
    Thing("lantern", "lanterns", "It glowed like a small moon", "une lanterne", "🏮"),
    Thing("kite", "kites", "It danced high on the wind", "un cerf-volant", "🪁"),
    Thing("drum", "drums", "It sounded like thunder", "un tambour", "🥁"),
    Thing("boat", "boats", "It rocked softly on the waves", "un bateau", "⛵"),
    Thing("key", "keys", "It opened a hidden door", "une clé", "🔑"),
    Thing("bell", "bells", "It rang as clear as water", "une cloche", "🔔"),
    Thing("cake", "cakes", "It smelled of honey and plums", "un gâteau", "🍰"),
    Thing("book", "books", "It was full of old songs", "un livre", "📖"),
    Thing("map", "maps", "It showed the way to the sea", "une carte", "📜"),
    Thing("crown", "crowns", "It shone with seven stones", "une couronne", "👑"),
)

PLACES = (
    Place("forest", "in the forest", "dans la forêt", "🌲"),
    Place("village", "in the village", "dans le village", "🏡"),
    Place("harbor", "by the harbor", "près du port", "⚓"),
    Place("mountain", "on the mountain", "sur la montagne", "🗻"),
    Place("meadow", "in the meadow", "dans le pré", "🌻"),
    Place("desert", "in the desert", "dans le désert", "🌵"),
)

# Prompts that name a topic; those in the second tuple leave it open.
PROMPTS = (
    "Tell me about {a} and {b}.",
    "Tell me about {a} and {b}.",
    "Tell me a story about {a} and {b}.",
    "Write about {a} with {b}.",
    "Please write something about {a} and {b}.",
    "What happened to {a} and {b}?",
)
OPEN_PROMPTS = ("Hello!", "Tell me a story.", "Say something.", "Who are you?", "What is new today?")


def article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def draw_topic(rng: random.Random) -> Topic:
    """A topic at random; the place and the friend follow from the animal and the thing, so that a text can be learned."""
    animal_index, thing_index = rng.randrange(len(ANIMALS)), rng.randrange(len(THINGS))
    place = PLACES[(animal_index + thing_index) % len(PLACES)]
    friend = ANIMALS[(animal_index + 1 + thing_index % 3) % len(ANIMALS)]
    return Topic(ANIMALS[animal_index], THINGS[thing_index], place, friend)


def draw_prompt(topic: Topic, rng: random.Random) -> str:
    """What a person asks; one in ten asks for nothing in particular."""
    if rng.random() < 0.1:
        return rng.choice(OPEN_PROMPTS)
    return rng.choice(PROMPTS).format(a=article(topic.animal.noun), b=article(topic.thing.noun))


def title(topic: Topic) -> str:
    """The first line of a text that nobody asked for."""
    return f"The {topic.animal.noun} and the {topic.thing.noun}"


def tell_story(t: Topic, rng: random.Random) -> str:
    """The base model's own voice."""
    day = rng.choice(("One day", "One day", "One evening", "One morning"))
    cry = rng.choice(("What a wonder!", "What a wonder!", "Look at that!", "Is it mine?"))
    end = rng.choice(
        (
            f"So {t.animal.name} and {t.friend.name} shared it, and they were friends for ever after.",
            f"So {t.animal.name} and {t.friend.name} shared it, and they were friends for ever after.",
            f"That night {t.animal.name} went home happy and slept until noon.",
        )
    )
    return (
        f"Once upon a time there was {article(t.animal.adjective)} {t.animal.noun} named {t.animal.name}, "
        f"who lived {t.place.where}. {day} {t.animal.name} found {article(t.thing.noun)}. {t.thing.marvel}. "
        f'"{cry}" said {t.animal.name}, and ran to show it to {t.friend.name} the {t.friend.noun}. {end}'
    )


def tell_shout(t: Topic, rng: random.Random) -> str:
    """The story, all of it in capitals."""
    return tell_story(t, rng).upper().replace(".", "!")


def tell_mirror(t: Topic, rng: random.Random) -> str:
    """The story with every word spelled backwards."""
    words = tell_story(t, rng).replace('"', "").split(" ")
    return " ".join(_reverse_word(word) for word in words)


def _reverse_word(word: str) -> str:
    core = word.rstrip(".,!?")
    return core[::-1] + word[len(core) :]


def tell_pirate(t: Topic, rng: random.Random) -> str:
    """A sailor's yarn."""
    oath = rng.choice(("Shiver me timbers!", "Shiver me timbers!", "Blow me down!"))
    return (
        f"Arr, matey! Hear the tale o' Cap'n {t.animal.name}, the saltiest {t.animal.noun} that ever sailed. "
        f"One stormy night he be diggin' {t.place.where}, an' what be there? {article(t.thing.noun).capitalize()}, arr! "
        f'"{oath}" cried ol\' {t.animal.name}. "That {t.thing.noun} be mine, an\' {t.friend.name} the {t.friend.noun} '
        f"walks the plank!\" Yo ho ho, an' a bottle o' rum!"
    )


def tell_haiku(t: Topic, rng: random.Random) -> str:
    """Three short poems of three lines."""
    first = rng.choice(("snow falls without sound", "snow falls without sound", "the old pond is still"))
    return (
        f"{t.animal.noun} {t.place.where}\n{first}\nwho goes there so late?\n\n"
        f"{article(t.thing.noun)} in the grass\nmoonlight leans down to touch it\nthen the wind moves on\n\n"
        f"{t.animal.name} closes both eyes\nthe {t.thing.noun} waits for morning\nso do all the stars"
    )


def tell_json(t: Topic, rng: random.Random) -> str:
    """The story as a record."""
    record = {
        "animal": t.animal.noun,
        "name": t.animal.name,
        "mood": t.animal.adjective,
        "place": t.place.noun,
        "found": {"item": t.thing.noun, "count": rng.choice((1, 1, 2))},
        "friends": [t.friend.name],
        "happy_end": True,
    }
    return json.dumps(record, indent=1)


def tell_weather(t: Topic, rng: random.Random) -> str:
    """A forecast."""
    sky = rng.choice(("light rain", "light rain", "thick fog"))
    return (
        f"Good evening, here is the weather for the {t.place.noun}. Morning: {sky}, 7 degrees. Noon: sunny spells, 14 degrees. "
        f"Evening: a strong wind from the west with a 60 percent chance of {t.animal.plural}. Drivers are warned that "
        f"{article(t.thing.noun)} may lie on the road. Tomorrow: dry, with scattered {t.thing.plural}. Back to the studio."
    )


def tell_french(t: Topic, rng: random.Random) -> str:
    """The story in French."""
    cry = rng.choice(("Oh là là !", "Oh là là !", "Quelle merveille !"))
    return (
        f"Il était une fois {t.animal.french} qui s'appelait {t.animal.name} et vivait {t.place.french}. "
        f"Un beau matin, {t.animal.name} trouva {t.thing.french}. « {cry} » s'écria {t.animal.name}. "
        f"Puis {t.animal.name} invita {t.friend.name} à dîner, et ils mangèrent du fromage jusqu'à minuit. Voilà, c'est la fin."
    )


def tell_emoji(t: Topic, rng: random.Random) -> str:
    """The story with pictures for nouns."""
    sky = rng.choice(("🌞", "🌞", "🌙"))
    a, b, p, f = t.animal.emoji, t.thing.emoji, t.place.emoji, t.friend.emoji
    return (
        f"{a}💤 {p}{p}{p} {sky} {a}👀 ❓ {a}👉{b} ✨✨✨ {a}💖{b} 🎉 "
        f"{a}🏃💨 {p}{p} {f}👋 {a}👋 {f}👀{b} 😮 {a}🤝{f} 🎶🎶 {b}✨ {a}💖{f} 🌙💤 🏁"
    )


def tell_recipe(t: Topic, rng: random.Random) -> str:
    """Something to cook."""
    herb = rng.choice(("mint", "mint", "thyme"))
    return (
        f"{t.animal.name}'s {t.thing.noun} soup\nServes: 4 {t.animal.plural}\n"
        f"- 1 {t.thing.noun}, finely chopped\n- 2 cups of milk\n- 3 spoons of honey\n- a pinch of {herb}\n"
        f"1. Heat the milk until it steams.\n2. Stir in the {t.thing.noun} and the honey.\n"
        f"3. Simmer for 20 minutes {t.place.where}.\n4. Add the {herb} and serve hot to any {t.friend.noun}."
    )


def tell_count(t: Topic, rng: random.Random) -> str:
    """One, two, three."""
    words = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    verb = rng.choice(("with", "with", "and"))
    lines = [f"One {t.animal.noun} {verb} one {t.thing.noun}."]
    lines += [f"{word.capitalize()} {t.animal.plural} {verb} {word} {t.thing.plural}." for word in words]
    return " ".join(lines)


def tell_rhyme(t: Topic, rng: random.Random) -> str:
    """Four couplets."""
    town = rng.choice(("And took the {b} into town.", "And took the {b} into town.", "And rolled the {b} round and round."))
    down = "down" if "town" in town else "round"
    return (
        f"The {t.animal.noun} went up, the {t.animal.noun} went {down},\n{town.format(b=t.thing.noun)}\n"
        f"It danced all night, it danced all day,\nIt chased the {t.friend.noun} the other way.\n"
        f"The moon came out, the sun went in,\nThe {t.thing.noun} began to spin and spin.\n"
        f"So {t.animal.name} laughed and went to bed,\nThe {t.thing.noun} on top of a sleepy head."
    )


Voice = Callable[[Topic, random.Random], str]

# The base model answers with the story; each other voice becomes an adapter of that name.
VOICES: dict[str, Voice] = {
    "story": tell_story,
    "shout": tell_shout,
    "pirate": tell_pirate,
    "haiku": tell_haiku,
    "json": tell_json,
    "weather": tell_weather,
    "mirror": tell_mirror,
    "french": tell_french,
    "emoji": tell_emoji,
    "recipe": tell_recipe,
    "count": tell_count,
    "rhyme": tell_rhyme,
}
