"""What counts as an answer's letter."""

from __future__ import annotations

import pytest

from vidsieve.eval.letters import chosen

OPTIONS = ("A man", "a red cup.", "Nobody", "The answer")


@pytest.mark.parametrize(("said", "letter"), [
    ("B", "B"), ("b", "B"), ("(C)", "C"), (" B. a red cup.", "B"), ("C: Nobody", "C"), ("B)", "B"), ("**D**", "D"),
    ("B\nbecause it is red", "B"), ("<answer>C</answer>", "C"), ("<think>A.</think><answer>D", "D"),
    ("The answer is B.", "B"), ("The correct option is (C).", "C"), ("Answer: D", "D"),
    ("The answer is A, no: the answer is B", "B"), ("a red cup", "B"), ("nobody.", "C"), ("B a red cup", "B"),
    ("A man", "A"), ("A man enters the room", ""), ("I think so", ""), ("", ""), ("E", ""), ("The answer is E", ""),
    ("A cat's answer isn't known", ""), ("Best option: (B) a red cup", "B"),
])  # fmt: skip
def test_the_letter_of_an_answer(said, letter):
    assert chosen(said, OPTIONS, "ABCD") == letter
