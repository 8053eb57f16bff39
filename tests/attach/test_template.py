"""Where the question is, by a chat template: rendered with byte-level and word tokenizers of every usual form."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.answering import chat
from vidsieve.errors import NeedError, PromptError
from vidsieve.testing.tiny_models import FAMILIES, processor_for, template
from vidsieve.video.reading import Video

RECORDED = Path(__file__).parents[2] / "benchmarks/results/question_masks.json"
PARTS = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ 'VIDEO' if p.type == 'video' else p.text }}{% endfor %}{% endif %}"
)
CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\nCONTENT\n</tool_response>"
    "{% else %}<|im_start|>{{ m.role }}\nCONTENT{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
GEMMA = (
    "<bos>{% for m in messages if m.role != 'system' %}<start_of_turn>{{ m.role.replace('assistant', 'model') }}\n"
    "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}CONTENT"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA4 = (
    "<bos>{% for m in messages %}<|turn>{{ m.role.replace('assistant', 'model') }}\nCONTENT<turn|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|turn>model\n<|channel>thought\n<channel|>{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\nCONTENT{% if m.role == 'user' and enable_thinking is defined "
    "and not enable_thinking %}/nothink{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n<think>"
    "{% endif %}"
)
LLAMA = (
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\nCONTENT<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SMOL = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:{{ '' if m.content is not string and "
    "m.content[0].type == 'video' else ' ' }}CONTENT<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role | upper }}: CONTENT\n{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
FORMS = {"chatml": CHATML, "gemma": GEMMA, "gemma4": GEMMA4, "glm": GLM, "llama": LLAMA, "smol": SMOL, "plain": PLAIN}
SPECIAL = [
    *("<bos>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[gMASK]", "<sop>", "<|system|>"),
    *("<|user|>", "<|assistant|>", "<|tool|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<end_of_utterance>", "<|video|>", "<|turn>", "<turn|>", "<|channel>", "<channel|>"),
]
SENTENCES = (
    "What colour is the home of the user? The assistant said red, at 12.5 seconds.\nUser: USER: user\nAssistant:\n"
    "ASSISTANT: assistant system model tool\n\nyes?\nno.\n<think>\nFrame 1: look\n</think> (A) 0 1 2 3 4 5 6 7 8 9\n"
)


def byte_level():
    """Return a tokenizer as Qwen's or SmolLM's: byte-level BPE, whose words hold their blank and their line's end."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator([SENTENCES] * 3, trainer)
    return core


def line_ends():
    """Return one that joins the line's end to the sign before it, as Qwen's does with "?\\n"."""
    core = byte_level()
    core.add_tokens(["?\n", ".\n"])
    return core


def pieces():
    """Return a tokenizer as Gemma's: SentencePiece's blanks, other characters byte by byte."""
    split = pre_tokenizers.Split
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [split("▁", "merged_with_next"), split(Regex(r"\n+|[^\w▁]"), "isolated")]
    )
    trained.train_from_iterator([SENTENCES], trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"]))
    state = json.loads(trained.to_str())["model"]
    words = [*state["vocab"], *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [tuple(pair) for pair in state["merges"]]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, merges, byte_fallback=True, unk_token="<unk>"))
    core.normalizer, core.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return core


@pytest.fixture(scope="module", params=[byte_level, line_ends, pieces], ids=lambda make: make.__name__)
def core(request):
    return request.param()


def fast(core, form):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    content = PARTS.replace("VIDEO", "<|video|>")
    tokenizer.chat_template = FORMS[form].replace("CONTENT", content)
    return tokenizer


def overlapping(tokenizer, text, said):
    """Return the words that must be marked: tokens that hold a part of what is said, blanks and markers not."""
    tokens, wanted, start = tokenizer(text, return_offsets_mapping=True), set(), 0
    for word in said:
        start = text.index(word, start)
        for place, (a, b) in enumerate(tokens["offset_mapping"]):
            part = text[max(a, start) : min(b, start + len(word))]
            if part.strip() and tokens["input_ids"][place] not in tokenizer.all_special_ids:
                wanted.add(place)
        start += len(word)
    return torch.tensor(tokens["input_ids"]), wanted


def user(text):
    return {"role": "user", "content": text}


SYSTEM, ANSWER = (
    {"role": "system", "content": "be brief"},
    {"role": "assistant", "content": "<think>\nred?\n</think> no"},
)
TOOL = [{"role": "assistant", "content": "look"}, {"role": "tool", "content": "12 red"}]
VIDEO = {"type": "video"}
CHATS = {
    "one question": ([user("What colour is the home?")], ["What colour is the home?"]),
    "options": ([user("What? \n(A) red\n(B) blue.")], ["What? \n(A) red\n(B) blue."]),
    "blanks around": ([user("\n  What\n\n")], ["What"]),
    "many bytes": ([user("漢字 🙂 ñ?")], ["漢字 🙂 ñ?"]),
    "system": ([SYSTEM, user("What is red?")], ["What is red?"]),
    "turns": ([SYSTEM, user("What?"), ANSWER, user("And the home?")], ["And the home?"]),
    "video first": ([user([VIDEO, {"type": "text", "text": "What?"}])], ["What?"]),
    "text around": (
        [user([{"type": "text", "text": "See the home"}, VIDEO, {"type": "text", "text": "What is it?"}])],
        ["See the home", "What is it?"],
    ),
}


@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": True}, {"add_generation_prompt": True, "enable_thinking": False}], ids=str
)
@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("form", FORMS)
def test_just_the_users_last_words_are_the_question(core, form, name, options):
    tokenizer, (messages, said) = fast(core, form), CHATS[name]
    if form == "gemma" and messages[0] is SYSTEM and len(messages) == 2:
        said = ["be brief", *said]  # the template writes it into the user's turn
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    ids, wanted = overlapping(tokenizer, text, said)
    mask = vidsieve.Template.of(tokenizer).question_mask(ids)
    assert set(mask.nonzero().flatten().tolist()) == wanted, tokenizer.decode(ids[mask])


@pytest.mark.parametrize("asked", [[], [user("And now?")]], ids=["a result", "a question"])
@pytest.mark.parametrize("form", ["chatml", "glm", "llama"])
def test_what_a_tool_returned_is_no_question(core, form, asked):
    tokenizer = fast(core, form)
    text = tokenizer.apply_chat_template(
        [user("What is red?"), *TOOL, *asked],
        tools=[{"type": "function", "function": {"name": "look"}}],
        tokenize=False,
    )
    ids, wanted = overlapping(tokenizer, text, ["And now?" if asked else "What is red?"])
    mask = vidsieve.Template.of(tokenizer).question_mask(ids)
    assert set(mask.nonzero().flatten().tolist()) == wanted


def frames(times):
    return "".join(f"<{time} seconds><|video|><|video|>" for time in times)


@pytest.mark.parametrize("times", [("0.5", "1.5", "2.5"), ("0.0", "12.5", "125.0"), ("3",)], ids=str)
def test_times_of_frames_are_no_question(core, times):
    tokenizer = fast(core, "chatml")
    asked, second = "Is <the home red?", "Or here at 2.5 seconds>"
    text = tokenizer.apply_chat_template(
        [user(f"{asked}{frames(times)}{second}{frames(times)}no?")], tokenize=False, add_generation_prompt=True
    )
    alone = len(times) == 1  # the same words do not come again: nothing tells them from the user's
    said = [asked, *(["<3 seconds>"] if alone else []), second, *(["<3 seconds>"] if alone else []), "no?"]
    ids, wanted = overlapping(tokenizer, text, said)
    places = (ids == tokenizer.convert_tokens_to_ids("<|video|>")).nonzero().flatten()
    mask = vidsieve.Template.of(tokenizer).question_mask(ids, places.chunk(2))
    assert set(mask.nonzero().flatten().tolist()) == wanted, tokenizer.decode(ids[mask])


def test_marker_words_that_the_user_says_change_nothing(core):
    """Where the markers are tokens of their own."""
    tokenizer, said = fast(core, "smol"), "Is User: or Assistant: written?\nUser: here"
    ids, wanted = overlapping(tokenizer, tokenizer.apply_chat_template([user(said)], tokenize=False), [said])
    assert set(vidsieve.Template.of(tokenizer).question_mask(ids).nonzero().flatten().tolist()) == wanted


def test_words_of_real_tokenizers():
    """Recorded by ``python benchmarks/question_masks.py``, with the words that real templates and tokenizers give."""
    recorded = json.loads(RECORDED.read_text("utf-8"))["tokenizers"]
    assert len(recorded) >= 6
    for tokenizer, found in recorded.items():
        given = {name: tuple(map(tuple, found["template"][name])) for name in ("openings", "closings", "results")}
        given |= {name: frozenset(found["template"][name]) for name in ("ignore", "numbers")}
        for name, prompt in found["prompts"].items():
            ids, *videos = (torch.tensor(list(map(int, text.split()))) for text in (prompt["ids"], *prompt["videos"]))
            marked = vidsieve.Template(**given).question_mask(ids, videos).nonzero().flatten().tolist()
            assert marked == list(map(int, prompt["question"].split())), (tokenizer, name)
            # Gemma 3's template writes the system prompt into the user's turn.
            assert prompt["exact"] or (tokenizer, name) == ("gemma3", "system prompt and options")


@pytest.mark.parametrize("padding", [0, 3])
def test_methods_read_no_words_of_frames(padding):
    """Qwen3-VL's processor writes a time before every frame."""
    processor, adapter = processor_for("qwen3_vl"), adapter_for(FAMILIES["qwen3_vl"]())
    video = Video(np.zeros((6, 64, 96, 3), np.uint8), np.arange(6), (), 3.0, 2.0, 6, (64, 96))
    inputs = chat(processor, video, "what colour is the home ?")
    ids = inputs["input_ids"]
    assert int((ids == processor.tokenizer.convert_tokens_to_ids("seconds>")).sum()) == 3
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        inputs[name] = torch.nn.functional.pad(inputs[name], (padding, 0))
    with torch.no_grad():
        mask = adapter.prompt(adapter.encode(inputs), 0).question_mask
    assert processor.tokenizer.decode(ids[0][mask]) == "what colour is the home ?"


def test_processors_and_their_tokenizers_tell_the_same():
    for family in ("qwen2_5_vl", "qwen3_vl", "llava_onevision"):
        found = vidsieve.Template.of(processor_for(family))
        assert found == template() and hash(found) == hash(template())
    assert pickle.loads(pickle.dumps(template())) == template()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("{% for m in messages %}<bos>{{ m.role }}{% endfor %}", "renders no user text: a message that says 'axolotl' "
         "became '<bos>user'"),
        ("{{ raise_exception('no') }}", "renders no user text: .* became an error"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing by which a user's words are told from others"),
        (None, "renders no user text"),
    ],
)  # fmt: skip
def test_templates_that_tell_nothing(form, said):
    tokenizer = fast(byte_level(), "chatml")
    tokenizer.chat_template = form
    with pytest.raises(NeedError, match=said):
        vidsieve.Template.of(tokenizer)


def test_prompts_without_a_question():
    tokenizer = fast(byte_level(), "chatml")
    found = vidsieve.Template.of(tokenizer)
    with pytest.raises(NeedError, match="no user turn"):
        found.question_mask(torch.tensor(tokenizer("What?")["input_ids"]))
    text = tokenizer.apply_chat_template([user(" \n<|video|>\n")], tokenize=False)
    with pytest.raises(PromptError, match="no word"):
        found.question_mask(torch.tensor(tokenizer(text)["input_ids"]))


def test_a_tokenizer_without_offsets_is_told():
    class Slow:
        chat_template, is_fast = "{{ messages }}", False

    with pytest.raises(NeedError, match=r"Slow does not say .* template=vidsieve\.Template\(openings="):
        vidsieve.Template.of(Slow())


def test_a_tokenizer_of_another_kind_is_told():
    """As when AutoTokenizer loads the words of one tokenizer into the class of another."""
    processor = processor_for("qwen3_vl")
    words = Tokenizer(models.BPE({"user": 0, "<|im_start|>": 1}, []))  # no letters, no unknown token: words vanish
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    processor.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    with pytest.raises(NeedError, match="has no token for"):
        vidsieve.Template.of(processor)
