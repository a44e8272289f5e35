"""Pairs of English sentences that say the same in other words, made from templates: what to compare embeddings on.

Each template is a pair of wordings with places for words, and each place has a word, or a word for either wording.
"""

from __future__ import annotations

import itertools

import numpy as np

TEMPLATES: tuple[tuple[str, str, dict[str, tuple[str | tuple[str, str], ...]]], ...] = (
    (
        "A {who} is playing {what} on the stage.",
        "On stage, a {who} performs with {what}.",
        {
            "who": (("man", "guy"), "woman", ("child", "kid"), ("musician", "performer")),
            "what": ("a guitar", "the piano", "a violin", "the drums", "a trumpet"),
        },
    ),
    (
        "The price of {what} has {moved} since last {when}.",
        "Compared with last {when}, {what} now {costs}.",
        {
            "what": ("oil", "coffee", "bread", "gold", "natural gas"),
            "moved,costs": (("risen sharply", "costs much more"), ("fallen a lot", "costs far less")),
            "when": ("year", "winter", "month"),
        },
    ),
    (
        "My {pet} refuses to {do} when it is {weather} outside.",
        "In {weather} weather the {pet} of mine will not {do}.",
        {
            "pet": ("dog", "cat", "horse", "rabbit"),
            "do": ("go for a walk", ("eat its food", "eat anything"), ("leave its bed", "get out of bed")),
            "weather": ("rainy", "cold", "windy", "hot"),
        },
    ),
    (
        "How do I {do} in {language}?",
        "What is the way to {do} using {language}?",
        {
            "do": ("sort a list", "read a text file", "parse a date", "reverse a string", "open a network socket"),
            "language": ("Python", "Java", "Rust", "Haskell"),
        },
    ),
    (
        "The {team} team {result} the {sport} match in {place} yesterday.",
        "Yesterday in {place} the {sport} game {ended} the {team} side.",
        {
            "team": ("Spanish", "Japanese", "Brazilian", "Kenyan"),
            "result,ended": (("won", "was won by"), ("lost", "was lost by")),
            "sport": ("football", "tennis", "hockey", "basketball"),
            "place": ("Berlin", "Toronto", "Sydney"),
        },
    ),
    (
        "Doctors recommend {what} for patients with {ill}.",
        "If you suffer from {ill}, physicians advise {what}.",
        {
            "what": ("plenty of sleep", "daily exercise", "a low salt diet", "drinking more water"),
            "ill": ("headaches", "high blood pressure", "diabetes", "back pain", "asthma"),
        },
    ),
    (
        "The {ship} {arrived} the harbour of {town} after a storm.",
        "Following a storm, the {ship} {came} port in {town}.",
        {
            "ship": ("fishing boat", "ferry", "cargo ship", "submarine"),
            "arrived,came": (("reached", "came into"), ("left", "sailed out of the")),
            "town": ("Lisbon", "Oslo", "Naples", "Hamburg"),
        },
    ),
    (
        "She bakes {cake} with {inside} for her {whom}.",
        "For her {whom} she makes {cake} containing {inside}.",
        {
            "cake": ("a cake", "bread", "cookies", "a pie"),
            "inside": ("apples", "chocolate", "walnuts", "cinnamon", "blueberries"),
            "whom": ("grandmother", "neighbours", "children"),
        },
    ),
    (
        "Scientists have discovered a new {thing} near {place}.",
        "Researchers found a previously unknown {thing} close to {place}.",
        {
            "thing": ("species of frog", "planet", "volcano", "comet", "virus", "dinosaur"),
            "place": ("the equator", "Iceland", "Madagascar", "the Pacific coast"),
        },
    ),
    (
        "The {who} was arrested for stealing {what}.",
        "Police caught the {who} who had stolen {what}.",
        {
            "who": ("teenager", ("clerk", "employee"), "tourist", "politician"),
            "what": ("a bicycle", "jewelry", "two paintings", "credit cards", "a tractor"),
        },
    ),
    (
        "The train from {a} to {b} is {late}.",
        "{Late} for the railway connection between {a} and {b}.",
        {
            "a": ("Paris", "Vienna", "Madrid"),
            "b": ("Munich", "Rome", "Prague", "Geneva"),
            "late,Late": (
                ("delayed by an hour", "There is a delay of an hour"),
                ("cancelled", "There is a cancellation"),
            ),
        },
    ),
    (
        "Our {room} needs {what} before the guests arrive.",
        "Before visitors come, we have to get {what} for the {room}.",
        {
            "room": ("kitchen", "garden", "bathroom", "living room"),
            "what": ("new chairs", "a lamp", "fresh paint", "curtains", "a bigger table"),
        },
    ),
)


def pairs(count: int = 120, seed: int = 0) -> list[tuple[str, str]]:
    """Draw pairs of different sentences, of all templates in turn."""
    rng = np.random.default_rng(seed)
    drawn = []
    for first, second, places in TEMPLATES:
        ways = []
        for words in itertools.product(*places.values()):
            left, right = {}, {}
            for names, word in zip(places, words, strict=True):
                one, other = (word, word) if isinstance(word, str) else word
                for name in names.split(","):
                    left[name], right[name] = one, other
            ways.append((first.format(**left), second.format(**right)))
        drawn.append([ways[i] for i in rng.permutation(len(ways))])
    return [drawn[i % len(drawn)][i // len(drawn)] for i in range(count)]
