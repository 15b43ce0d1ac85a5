"""The word game, without any engine: rules, problems, and that halving the list wins."""

import statistics

import pytest

from policies.presets import small_tokenizer
from rewards.data.examples import default_held_out_split, load_examples
from rewards.data.word_game import GUESSES, WordGame, word_games
from rollout.environments.format import TurnFormat


def new_game(question="ant bee cat dog eel fox gnu", word="cat", **columns) -> WordGame:
    game = WordGame()
    assert game.reset(question=question, word=word, **columns) is None
    return game


def test_the_answers_lead_to_the_word():
    game = new_game()
    assert [game.guess(word) for word in ("dog", "bee", "cat")] == ["before", "after", "yes"]
    assert (game.get_reward(), game.done) == (1.0, True)
    assert game.guess("cat") == "over"


def test_there_are_three_guesses():
    game = new_game()
    assert (game.get_reward(), game.done) == (0.0, False)
    assert [game.guess(word) for word in ("dog", "owl", "gnu", "cat")] == [
        "before",
        "not in the list",
        "before",
        "over",
    ]
    assert (game.get_reward(), game.done) == (0.0, True)


def play(game: WordGame, words: list[str], reads: bool) -> float:
    """Halves the list as the answers say, or as if every answer were `after`."""
    while words:
        middle = len(words) // 2
        answer = game.guess(words[middle])
        if answer in ("yes", "over"):
            break
        words = words[:middle] if answer == "before" and reads else words[middle + 1 :]
    return game.get_reward()


def test_who_reads_the_answers_wins():
    games = word_games("train", count=200)
    reading = [play(new_game(**game), game["question"].split(), True) for game in games]
    blind = [play(new_game(**game), game["question"].split(), False) for game in games]
    assert statistics.mean(reading) == 1.0
    assert 0.3 < statistics.mean(blind) < 0.56  # three of seven


def test_games_are_distinct_and_held_out_by_their_words():
    train, held_out = word_games("train", count=3000), word_games("held_out", count=1000)
    lists = [game["question"] for game in (*train, *held_out)]
    assert len(set(lists)) == 4000
    assert all(game["word"] in game["question"].split() == sorted(game["question"].split()) for game in train)
    assert word_games("train", seed=1, count=10) != train[:10] == word_games("train", count=10)
    other_seed = {game["question"] for game in word_games("train", seed=1, count=3000)}
    assert not other_seed & {game["question"] for game in held_out}
    with pytest.raises(ValueError, match="word_game has no split 'test'; use train or held_out"):
        word_games("test")
    with pytest.raises(ValueError, match="word_game cannot make 20001 games"):
        word_games("train", count=20001)


def test_a_run_can_name_the_games_as_data():
    examples = load_examples("word_game", "train", limit=5)
    assert [example.columns["word"] for example in examples] == [game["word"] for game in word_games("train", count=5)]
    assert examples[0].solution == examples[0].columns["answer"]
    assert default_held_out_split("word_game") == "held_out"
    assert len(load_examples("word_game", "held_out", purpose="eval")) == 5000


def test_a_demonstration_is_a_game():
    """Its guesses, played again, get the answers that are written in it, and a few tokens are enough."""
    games = word_games("train", count=300)
    tokenizer = small_tokenizer([f"{game['question']}\n{game['answer']}\n" for game in games])
    form = TurnFormat(tokenizer, [WordGame().guess])
    won = 0
    for game in games[:100]:
        ids, sampled = form.demonstration(game["answer"])
        assert len(ids) <= 32
        turns: list[list[int]] = [[]]
        for token, own in zip(ids, sampled, strict=True):
            if own:
                turns[-1].append(token)
                if token == tokenizer.eos_token_id:
                    turns.append([])
        played = new_game(**game)
        calls = [call for turn in turns for call in form.read(turn).calls]
        answers = [played.guess(**call.arguments) for call in calls]
        assert 1 <= len(calls) <= GUESSES
        marks = [f"<<{call.arguments['word']}={answer}>>" for call, answer in zip(calls, answers, strict=True)]
        assert "".join(marks) == game["answer"]
        won += played.get_reward()
    assert 55 < won < 80


def test_demonstrations_guess_what_is_possible_and_win_two_of_three_games():
    """With n words and g guesses, f(n, g) = 1/n + Σ over guesses k of ((k-1) f(k-1, g-1) + (n-k) f(n-k, g-1)) / n²;
    f(7, 3) = .678."""

    def wins(n: int, g: int) -> float:
        if not n or not g:
            return 0.0
        return 1 / n + sum((k - 1) * wins(k - 1, g - 1) + (n - k) * wins(n - k, g - 1) for k in range(1, n + 1)) / n**2

    assert wins(3, 2) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    games = word_games("train", count=5000)
    won = sum(game["answer"].endswith("=yes>>") for game in games) / 5000
    assert won == pytest.approx(wins(7, 3), abs=0.02) == pytest.approx(0.678, abs=0.02)
    firsts = [game["question"].split().index(game["answer"][2:5]) for game in games]
    assert all(600 < firsts.count(place) < 830 for place in range(7))
