"""Options and letters: one rule for files, one for what a model says, and never another option than the one meant."""

from __future__ import annotations

import itertools
import json
import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vidsieve.errors import TrainingError
from vidsieve.options import Options, OptionsError, chosen, said_letter
from vidsieve.training.data.layouts import read_records
from vidsieve.training.data.rows import ask, relettered
from vidsieve.training.judging import judge

ANIMALS = ["A. Dog", "B. Cat", "C. Bird", "D. Fish"]


@pytest.mark.parametrize(
    ("options", "answer", "number"),
    [
        (ANIMALS, "D", 3),
        (ANIMALS, "Dog", 0),
        (ANIMALS, "d", 3),
        (ANIMALS, "B.", 1),
        (ANIMALS, "(C)", 2),
        (ANIMALS, "C. Bird", 2),
        (ANIMALS, " c. bird ", None),
        (ANIMALS, "C. bird", 2),
        (ANIMALS, "Fox", None),
        (ANIMALS, "E", None),
        (ANIMALS, "", None),
        (ANIMALS, "A. Cat", None),
        (["A. Red", "B. Apple"], "Apple", 1),
        (["(A) Dog", "(B) Cat"], "(A) Dog", 0),
        (["A: Dog", "C: Cat"], "C", 1),
        (["A. B", "B. A"], "B", 1),
        (["A. C", "B. D", "C. A", "D. B"], "A", 0),  # beside letters a letter is a letter
        (["red", "blue"], "Blue", 1),
        (["red", "blue"], "b", None),
        (["A", "B", "C"], "C", 2),
        (["J. Smith", "J. Jones", "A. Brown", "M. Lee"], "J. Jones", 1),
        (["T. rex", "T. bataar"], "T. bataar", 1),
        (["J. Smith", "M. Lee"], "J", None),
        (["A. red", "A. blue", "C. green"], "A. blue", 1),
    ],
)
def test_an_answer_is_a_letter_an_option_or_its_text(options, answer, number):
    if number is None:
        with pytest.raises(OptionsError, match="is none of its options"):
            Options.parse(options).index(answer)
    else:
        assert Options.parse(options).index(answer) == number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["red", "RED"], "options 1 and 2 are the same"),
        (["A. dog", "B. cat", "C. Dog"], "options 1 and 3 are the same"),
        (["red", " "], "option 2 is empty"),
        (["red"], "two or more"),
        ([str(n) for n in range(27)], "at most 26"),
    ],
)
def test_options_that_no_answer_can_tell_apart_are_refused(tmp_path, options, message):
    with pytest.raises(OptionsError, match=message):
        Options.parse(options)
    row = {"video": "a.mp4", "question": "?", "options": options, "answer": options[0]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    (record,) = read_records(tmp_path / "rows.jsonl")
    assert message in record.fault


class Tokenizer:
    """Letters and words of one token; texts of several words have several."""

    unk_token_id = 0

    def __init__(self, letters=True):
        self.letters = letters

    def __call__(self, text, **options):
        if len(text) == 1 and text in string.ascii_uppercase:
            return {"input_ids": [ord(text) if self.letters else 0]}
        return {"input_ids": [hash(word) % 10**6 + 300 for word in text.split()]}


@pytest.mark.parametrize(
    ("options", "answer", "letters", "right", "truth", "listed"),
    [
        (ANIMALS, "Cat", True, 1, "B", True),
        (ANIMALS, "Cat", False, 1, "Cat", False),
        (["red", "blue"], "blue", True, 1, "blue", False),
        (["J. Smith", "J. Jones"], "J. Jones", True, 1, "B", True),
        (["a red cup", "a blue hat"], "a red cup", True, 0, "A", True),
    ],
)
def test_options_are_asked_by_tokens_that_tell_them_apart(options, answer, letters, right, truth, listed):
    row = {"video": "a.mp4", "question": "which ?", "options": options, "answer": answer}
    asked = ask(row, Tokenizer(letters))
    assert (asked.answer, asked.truth) == (right, truth)
    assert len(set(asked.option_ids.tolist())) == len(options) and asked.option_ids.dtype == torch.int64
    assert (f"B. {Options.parse(options).texts[1]}" in asked.text) == listed


def test_options_that_share_a_token_are_refused():
    row = {"video": "a.mp4", "question": "which ?", "options": ["a red cup", "a blue hat"], "answer": "a blue hat"}
    with pytest.raises(TrainingError, match="neither they nor the letters A, B are one token each"):
        ask(row, Tokenizer(letters=False))

    class Folding(Tokenizer):
        def __call__(self, text, **options):
            return {"input_ids": [7]}

    with pytest.raises(TrainingError, match="all different"):
        ask(row | {"options": ["red", "blue"], "answer": "red"}, Folding())


@given(st.permutations(range(4)))
def test_shuffled_options_keep_the_right_one(order):
    class Chance:
        def sample(self, values, count):
            return list(order)

    row = {"video": "a.mp4", "question": "?", "options": ANIMALS, "answer": "C"}
    mixed = relettered(row, Chance())
    parsed = Options.parse(mixed["options"])
    assert parsed.texts[parsed.index(mixed["answer"])] == "Bird" and parsed.letters == tuple("ABCD")


# Said, and the letter that everybody reads in it ("": none).
MEANT = {
    "B": "B",
    "b": "B",
    "(B)": "B",
    "(C)": "C",
    "b.": "B",
    "B)": "B",
    "**B**": "B",
    '"B"': "B",
    "B。": "B",
    "“D”": "D",
    "B. a blue hat": "B",
    " B. a red cup.": "B",
    "C: Nobody": "C",
    "(b) a dog": "B",
    "C) a green leaf": "C",
    "B\nbecause it is red": "B",
    "A\n\nExplanation: B is wrong": "A",
    "C, because A is wrong": "C",
    "D - nothing": "D",
    "<answer>C</answer>": "C",
    "<think>A.</think><answer>D": "D",
    "The final answer is \\boxed{B}": "B",
    "The answer is B.": "B",
    "The answer is B because it is red": "B",
    "The answer is option B": "B",
    "The answer is B. Option A is wrong because the cup is not red.": "B",
    "The answer is B, not option A.": "B",
    "The answer is B. Note that A shows up": "B",
    "Choice: B\nExplanation: choice A shows a cup.": "B",
    "The answer is A, no: the answer is B": "B",
    "The correct option is (C).": "C",
    "Best option: (B) a red cup": "B",
    "The correct answer is: **C**": "C",
    "Answer: D": "D",
    "Answer\n\nB": "B",
    "answer: b": "B",
    "ANSWER: B": "B",
    "Answer: (D) nothing": "D",
    "Final answer: C": "C",
    "So the answer is A.": "A",
    "答案是B": "B",
    "B is the answer": "B",
    "Option B is correct, option A is wrong": "B",
    "Option A is incorrect; the answer is C.": "C",
    "It is not A. The answer is B.": "B",
    "Option A": "A",
    "C. it is B": "C",
    "A: a red cup": "A",
    "Based on the video, it is a dog.": "",
    "Dogs and cats": "",
    "A man walks in": "",
    "Can not be determined": "",
    "A man enters the room": "",
    "A red cup": "",
    "In the end": "",
    "I think so": "",
    "I think it's (C)": "",
    "": "",
    "The answer is a dog.": "",
    "Answer: A man walks": "",
    "Answer: I don't know": "",
    "A cat's answer isn't known": "",
    "A or B": "",
    "Both A and B": "",
    "A, B": "",
    "Neither A nor B": "",
    "The answer could be A or B": "",
    "Answer: A, B": "",
    "Option C or D": "",
    "Both options A and C are wrong": "",
    "Not A but B": "",
    "A. So the answer is B.": "",
    "The answer is not A": "",
    "The answer isn't B": "",
    "(A) is wrong. (B)": "",
    "the man is in A. He": "",
}


@pytest.mark.parametrize(("said", "letter"), MEANT.items())
def test_the_letter_that_is_said(said, letter):
    assert said_letter(said) == letter
    assert chosen(said, ("a red cup.", "a blue hat", "a green leaf", "nothing"), "ABCD") in (letter, "A", "")
    for truth in "ABCD":
        assert judge("multiple choice", said, truth) == float(truth == letter)


WORDS = st.sampled_from(["a", "man", "the", "red", "cup", "walks", "in", "with", "of", "it", "and", "based", "on"])


@given(st.lists(WORDS, min_size=1, max_size=8), st.sampled_from("ABCD"))
def test_sentences_of_words_say_no_letter_and_a_declared_one_is_read_whatever_stands_around(words, letter):
    sentence = " ".join(words).capitalize()
    assert said_letter(f"{sentence}.") == "" or (len(words) == 1 and len(words[0]) == 1)
    assert said_letter(f"{letter}. {sentence}") == letter
    if sentence != "A":
        assert said_letter(f"{sentence}. So the answer is {letter}.") == letter


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("a red cup", "B"),
        ("nobody.", "C"),
        ("B a red cup", "B"),
        ("A man", "A"),
        ("A man enters the room", ""),
        ("E", ""),
        ("The answer is E", ""),
        ("<answer>Nobody</answer>", "C"),
    ],
)
def test_an_option_s_own_text_counts_too(said, letter):
    assert chosen(said, ("A man", "a red cup.", "Nobody", "The answer"), "ABCD") == letter


def test_options_that_were_not_listed_are_answered_word_for_word():
    words = ("red", "A", "blue")
    assert [chosen(said, words, words) for said in ("Red.", "A", "B", "blue hat")] == ["red", "A", "", ""]


def test_a_word_is_judged_by_the_first_word():
    assert judge("multiple choice", "Blue.", "blue") == 1 and judge("multiple choice", "dark blue", "blue") == 0
    assert judge("multiple choice", "30 cats", "3") == 0 and judge("multiple choice", "3 cats", "3") == 1


def test_lettered_options_are_in_order_from_a():
    for letters in itertools.permutations("ABC"):
        options = Options.parse([f"{letter}. {text}" for letter, text in zip(letters, ("x", "y", "z"), strict=True)])
        assert options.lettered == (letters == ("A", "B", "C"))
