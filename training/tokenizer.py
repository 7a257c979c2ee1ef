"""Trains the pack's byte-level BPE from the toon world's own text and a list of ordinary words.

The grammar alone fills only a third of 2,048 entries, and users write words it never uses, so the
rest comes from `english_words.txt`: a caption of one's own then costs about a token a word
instead of a token a letter. Only the train split is read. Deterministic by seed.

    python -m training.tokenizer --out services/models/packs/toon/tokenizer
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from services.models.tokenizer import SPECIAL_TOKENS, VOCABULARY_SIZE, StoryTokenizer

WORDS_FILE = Path(__file__).with_name("english_words.txt")
TOKENIZER_FOLDER = Path(__file__).resolve().parents[1] / "services" / "models" / "packs" / "toon" / "tokenizer"


@dataclass(frozen=True)
class TokenizerRecipe:
    """What the vocabulary is learned from."""

    vocabulary_size: int = VOCABULARY_SIZE
    frames_count: int = 8000  # descriptions read; story captions are told in ordinary words, which are read anyway
    word_repeats: int = 20  # how often each ordinary word counts; grammar words count as often as they occur
    seed: int = 0


def ordinary_words() -> list[str]:
    """The words of `english_words.txt`, in file order, without comments."""
    lines = WORDS_FILE.read_text(encoding="utf-8").splitlines()
    return [word for line in lines if not line.startswith("#") for word in line.split()]


def word_sentences(words: Iterable[str], repeats: int, seed: int) -> Iterator[str]:
    """Each word `repeats` times inside a line of shuffled words, and once with a capital at a line's start."""
    words = list(words)
    rng = random.Random(seed)
    for _ in range(repeats):
        rng.shuffle(words)
        yield " " + " ".join(words)
    yield from (word.capitalize() for word in words)


def toon_texts(recipe: TokenizerRecipe) -> Iterator[str]:
    """Descriptions of the train split."""
    from training.toon.world import sample_frame

    for index in range(recipe.frames_count):
        yield sample_frame(recipe.seed + index, split="train").description


def train(texts: Iterable[str], vocabulary_size: int = VOCABULARY_SIZE) -> StoryTokenizer:
    """Learn a byte-level BPE of at most `vocabulary_size` entries, special tokens included, from `texts`."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return StoryTokenizer(tokenizer)


def from_recipe(recipe: TokenizerRecipe) -> StoryTokenizer:
    """The pack's tokenizer."""

    def texts() -> Iterator[str]:
        yield from toon_texts(recipe)
        yield from word_sentences(ordinary_words(), recipe.word_repeats, recipe.seed)

    return train(texts(), recipe.vocabulary_size)


def main() -> None:
    """Train and write the tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    tokenizer = from_recipe(TokenizerRecipe())
    tokenizer.save(arguments.out)
    print(f"{tokenizer.vocabulary_size} entries in {arguments.out}")


if __name__ == "__main__":
    main()
