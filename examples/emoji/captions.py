"""The captions of this example: which ones are trained, which are held out, and their tokenizer."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

CAPTIONS = Path(__file__).resolve().parent / "captions.json"
SPACE, END, UNKNOWN_LETTER = "\u2581", "</s>", "\u00a4"
SPECIAL = ("<pad>", END, "<unk>")
PAD, UNKNOWN = SPECIAL.index("<pad>"), SPECIAL.index("<unk>")
TOKENS = 16
TEMPLATES = (
    "{}", "a {}", "the {}", "{} emoji", "an emoji of a {}", "a picture of a {}", "draw a {}",
    "draw me the {} please", "show me a {}", "a drawing of the {}", "{} icon", "my {}",
    "this is a {}", "a picture that is from a {}", "some {}", "a photo of a {} on white",
    "an icon with a {}", "a {} to look at", "a simple {} for me",
)  # fmt: skip
ADJECTIVES = (
    "cute", "little", "small", "big", "nice", "wild", "shiny", "beautiful", "colourful", "funny",
    "tiny", "lovely", "bright", "simple", "pretty", "friendly", "large", "jumping", "swimming",
    "reading", UNKNOWN_LETTER,
)  # fmt: skip
ADJECTIVE_CHANCE = 0.3
MIXED_CHANCE, EXTRA_WORD_CHANCE = 0.25, 0.3
# Plural and singular are one word; so are words with a hyphen and two words.
NORMALISATION = (
    (r"[^a-z0-9\u00a4]+", " "),
    (r"(?<=[a-z]{2})ies(?= |$)", "y"),
    (r"(?<=[a-z]{3})s(?= |$)", ""),
)


@dataclass(frozen=True, slots=True)
class Captions:
    """Captions of one emoji: its name and everyday synonyms, and a held-out one.

    Training uses the first ones, the evaluation the last one only.
    """

    train: tuple[str, ...]
    held_out: str


def read_captions(path: Path = CAPTIONS) -> dict[str, Captions]:
    """Captions by the name of the emoji, in the order of the file."""
    found: Mapping[str, Mapping[str, str | list[str]]] = json.loads(
        path.read_text(encoding="utf-8")
    )
    return {
        name: Captions(tuple(entry["train"]), str(entry["held_out"]))
        for name, entry in found.items()
    }


def normalised(text: str) -> str:
    """What the tokenizer's normaliser makes of a text."""
    text = text.lower()
    for pattern, replacement in NORMALISATION:
        text = re.sub(pattern, replacement, text)
    return text.strip()


def vocabulary(captions: Mapping[str, Captions]) -> list[str]:
    """All words that training uses, sorted."""
    texts = [
        *TEMPLATES,
        *ADJECTIVES,
        *(text for entry in captions.values() for text in entry.train),
    ]
    words = {word for text in texts for word in normalised(text.replace("{}", "")).split()}
    return sorted(words - {UNKNOWN_LETTER})


def tokenizer_of_words(words: Iterable[str]) -> Tokenizer:
    """Whole words; every other word is one unknown token."""
    pieces = [(SPACE + word, -1.0) for word in words]
    found = Tokenizer(models.Unigram([*((name, 0.0) for name in SPECIAL), *pieces], unk_id=UNKNOWN))
    found.add_special_tokens(list(SPECIAL))
    replacements = [normalizers.Replace(Regex(pattern), to) for pattern, to in NORMALISATION]
    found.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), *replacements, normalizers.Strip()]
    )
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, SPECIAL.index(END))]
    )
    return found


def token_rows(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """One row of TOKENS numbers per prompt, cut or padded as the runtime does."""
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt).ids
        if len(ids) > TOKENS:
            ids = [*ids[: TOKENS - 1], ids[-1]]
        rows.append(ids + [PAD] * (TOKENS - len(ids)))
    return rows


def random_prompt(captions: Captions, draw: random.Random) -> str:
    """A training caption in a random sentence, sometimes with an adjective without meaning."""
    text = draw.choice(captions.train)
    if draw.random() < ADJECTIVE_CHANCE:
        text = f"{draw.choice(ADJECTIVES)} {text}"
    return draw.choice(TEMPLATES).format(text) if draw.random() < 0.75 else text


def random_prompts(captions: Iterable[Captions], dropout: float, draw: random.Random) -> list[str]:
    """A random prompt for each, or with the probability of ``dropout`` an empty one."""
    return ["" if draw.random() < dropout else random_prompt(one, draw) for one in captions]


def shared_words(captions: Iterable[Captions]) -> list[str]:
    """Words that training captions of several emoji have, sorted: they name none of them alone."""
    counts = Counter(
        word
        for entry in captions
        for word in {word for text in entry.train for word in normalised(text).split()}
    )
    return sorted(word for word, count in counts.items() if count > 1)


def mixed_prompt(captions: Captions, shared: Sequence[str], draw: random.Random) -> str:
    """A prompt from which the words of new captions are learned.

    It is the shuffled words of two training captions, a training caption with a shared word put
    into it, or a `random_prompt`. It is never the held-out caption.
    """
    while True:
        kind = draw.random()
        if kind >= MIXED_CHANCE + EXTRA_WORD_CHANCE:
            return random_prompt(captions, draw)
        words = draw.choice(captions.train).split()
        if kind < MIXED_CHANCE:
            words += draw.choice(captions.train).split()
            draw.shuffle(words)
        else:
            words.insert(draw.randint(0, len(words)), draw.choice(shared))
        prompt = " ".join(words)
        if normalised(prompt) != normalised(captions.held_out):
            return prompt
