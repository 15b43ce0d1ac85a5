"""A game in several turns that a tiny policy learns in minutes: find a word in a sorted list, in three guesses.

The list has seven words. After each guess the policy reads whether the word comes before or after it. Who halves the
list each time always wins. Who guesses any word that is still possible wins 68 of 100 games, and who guesses without
reading 3 of 7.
"""

from __future__ import annotations

import hashlib
import random

_WORDS = "ant bat bee cat cow cub dog eel elk emu ewe fly fox gnu hen hog jay owl pig ram rat sow yak"
LENGTH, GUESSES, COUNT = 7, 3, 5_000


class WordGame:
    """One game, which is `done` when the word was found or no guess is left. Its reward is 1 if the word was found.

    >>> game = WordGame()
    >>> game.reset(question="ant bee cat dog eel fox gnu", word="cat")
    >>> game.guess("dog"), game.guess("cat"), game.get_reward()
    ('before', 'yes', 1.0)
    """

    def reset(self, question: str, word: str, **columns: object) -> None:
        """Begin a game with the list of words `question`, of which `word` is to be found."""
        self._words, self._word = question.split(), word
        self._guesses: list[str] = []
        self.done = False

    def guess(self, word: str) -> str:
        """Guesses the word and says whether it comes before or after the guess.

        Args:
            word: A word of the list.
        """
        if self.done:
            return "over"
        self._guesses.append(word)
        self.done = word == self._word or len(self._guesses) == GUESSES
        return _answer(self._words, word, self._word)

    def get_reward(self) -> float:
        """Gives 1 if the word was found, else 0."""
        return float(self._word in self._guesses)


def word_games(split: str, seed: int = 0, *, count: int = COUNT) -> list[dict[str, str]]:
    """Games with the keys `question` (the list), `word`, `answer` and `id`; a list of words is there once.

    `answer` is a game to learn the form from, in the marks of `TurnFormat.demonstration`. Each guess is drawn at random
    from the words that are still possible. A hash of the list puts about one in eight into the split `held_out`,
    whatever the seed. Raises ValueError for another split than `train` and `held_out`, and for more than 20,000 games.

    >>> game = word_games("train", count=1)[0]
    >>> game["question"], game["word"], game["answer"]
    ('dog eel emu fly hog jay pig', 'hog', '<<fly=after>><<jay=before>><<hog=yes>>')
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"word_game has no split {split!r}; use train or held_out")
    if not 1 <= count <= 20_000:
        raise ValueError(f"word_game cannot make {count} games; ask for 1 to 20,000")
    seeded = split.replace("_", "")  # games are drawn by the word `heldout`; another word would draw others
    rng = random.Random(f"word_game/{seeded}/{seed}")
    games: dict[str, dict[str, str]] = {}
    while len(games) < count:
        words = sorted(rng.sample(_WORDS.split(), LENGTH))
        question = " ".join(words)
        if question in games or (hashlib.sha256(question.encode()).digest()[0] % 8 == 0) != (split == "held_out"):
            continue
        word, possible, marks = rng.choice(words), words, list[str]()
        while word in possible and len(marks) < GUESSES:
            guess = rng.choice(possible)
            answer = _answer(words, guess, word)
            marks.append(f"<<{guess}={answer}>>")
            possible = [other for other in possible if _answer(words, guess, other) == answer != "yes"]
        games[question] = {
            "question": question,
            "word": word,
            "answer": "".join(marks),
            "id": f"word_game/{'-'.join(words)}/{word}",
        }
    return list(games.values())


def _answer(words: list[str], guess: str, word: str) -> str:
    if guess not in words:
        return "not in the list"
    return "yes" if guess == word else "before" if word < guess else "after"
