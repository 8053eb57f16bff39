"""Methods inside the LLM act on their own call, whatever else runs, and however the model was prepared."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

import vidsieve
from vidsieve.adapters import adapter_for
from vidsieve.adapters.inside.hooks import InnerRun
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.errors import BudgetError, PromptError, UnsupportedCallError, UnsupportedModelError
from vidsieve.testing.equivalence import configuration
from vidsieve.testing.tiny_models import FAMILIES, VIDEO, default_grid, inputs_for

METHODS = {
    "fastv": vidsieve.load("fastv", retention=0.5, layer=1),
    "dycoke": vidsieve.load("dycoke", retention=0.5, layer=1),
}
inside = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@inside
@pytest.mark.parametrize("length", [9, 200])
def test_text_beside_a_video_is_left_alone(method, length):
    """A logits processor asks the model something else, shorter or longer than the prompt; so does another thread."""
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    text = torch.randint(10, 100, (1, length), generator=torch.Generator().manual_seed(0))
    wanted = model.generate(input_ids=text, **GREEDY)
    with vidsieve.attach(model, method):
        plain = model.generate(**inputs, **GREEDY)
    got = []

    class Asks(LogitsProcessor):
        def __call__(self, ids, scores):
            ask = lambda: got.append(model.generate(input_ids=text, **GREEDY))  # noqa: E731
            ask()
            thread = threading.Thread(target=ask)
            thread.start()
            thread.join()
            return scores

    with vidsieve.attach(model, method):
        out = model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([Asks()]))
    assert torch.equal(out, plain)
    assert len(got) == 12 and all(torch.equal(other, wanted) for other in got)


@inside
def test_a_language_model_compiled_and_warm_before(method):
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    with vidsieve.attach(model, method) as session:
        plain = model.generate(**inputs, **GREEDY)
        shares = [trace.inside for trace in session.trace]
    torch._dynamo.reset()
    model.model.language_model.compile(backend="eager")
    whole = model.generate(**inputs, **GREEDY)
    with vidsieve.attach(model, method) as session:
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
        assert [trace.inside for trace in session.trace] == shares and shares[0]
    assert torch.equal(model.generate(**inputs, **GREEDY), whole)
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decoding_method_that_drops_nothing_is_its_outer_part(family):
    """Also where the caller hides tokens of a finished row from the next turn."""
    model, inputs = FAMILIES[family](), configuration(family, "ragged batch 2")
    prompt, outs = inputs["input_ids"].shape[1], []
    for inner in (True, False):
        method = vidsieve.load("dycoke", retention=0.5, layer=1, dropped=0.0, inner=inner)
        with vidsieve.attach(model, method):
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            talk = torch.cat([first.sequences, torch.tensor([[41, 42]] * 2)], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(talk[:, prompt:])], 1)
            mask[0, prompt + 2 : prompt + 6] = 0
            outs.append(
                model.generate(
                    input_ids=talk,
                    attention_mask=mask,
                    **cache_kwargs(model, output_cache(first)),
                    **GREEDY,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            )
    gap = torch.stack(outs[0].logits) - torch.stack(outs[1].logits)
    assert float(gap.abs().max()) < 1e-4 and torch.equal(outs[0].sequences, outs[1].sequences)


def test_shares_are_noted_for_steps_by_hand_and_later_turns():
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")
    with torch.no_grad(), vidsieve.attach(model, METHODS["dycoke"]) as session:
        cache = output_cache(model(**inputs, use_cache=True))
        assert [trace.decoded for trace in session.trace] == [None]
        model(input_ids=torch.tensor([[41]]), **cache_kwargs(model, cache))
        (trace,) = session.trace
        assert 0 < trace.decoded < 0.3


def test_a_cropped_cache_forgets_the_step_before():
    """The step that was cut off is not compared with: what follows equals a method that never compares."""
    model, inputs = FAMILIES["qwen2_5_vl"](), configuration("qwen2_5_vl", "batch 1")
    outs = []
    for similarity in (-1.0, 1.0):  # always the same choice; always a new one
        method = vidsieve.load("dycoke", retention=1.0, layer=1, dropped=0.5, similarity=similarity)
        with torch.no_grad(), vidsieve.attach(model, method):
            cache = output_cache(model(**inputs, use_cache=True))
            for word in (41, 42, 43):
                model(input_ids=torch.tensor([[word]]), **cache_kwargs(model, cache))
            cache.crop(-3)
            outs.append(model(input_ids=torch.tensor([[44]]), **cache_kwargs(model, cache)).logits)
    assert torch.allclose(outs[0], outs[1], atol=1e-5)


@inside
def test_static_caches_are_refused_in_forward_too(method):
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=128)
    with vidsieve.attach(model, method), pytest.raises(UnsupportedCallError, match="DynamicCache, got StaticCache"):
        model(**inputs, **cache_kwargs(model, cache))


@inside
def test_guidance_by_a_processor_is_refused_and_a_penalty_counts_the_callers_prompt(method):
    from transformers import RepetitionPenaltyLogitsProcessor

    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "batch 1")
    guide = LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(2.0, model)])
    length = inputs["input_ids"].shape[1]

    class Own(RepetitionPenaltyLogitsProcessor):
        pass

    with vidsieve.attach(model, method):
        with pytest.raises(UnsupportedCallError, match="guidance"):
            model.generate(**inputs, **GREEDY, logits_processor=guide)
        outs = [
            model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([kind(9.0, length)]))
            for kind in (RepetitionPenaltyLogitsProcessor, Own)
        ]
        assert torch.equal(*outs) and not torch.equal(outs[0], model.generate(**inputs, **GREEDY))


def test_a_session_closed_inside_a_call_ends_it_in_good_order():
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")
    session = vidsieve.attach(model, vidsieve.load("random", retention=0.3))
    plain = model.generate(**inputs, **GREEDY)

    class Closes(LogitsProcessor):
        def __call__(self, ids, scores):
            session.close()
            return scores

    assert torch.equal(model.generate(**inputs, **GREEDY, logits_processor=LogitsProcessorList([Closes()])), plain)
    assert "generate" not in vars(model)


@pytest.mark.parametrize("least", [118, VIDEO], ids=["words", "from the first token on"])
def test_right_padding_with_labels_adds_no_term(least):
    """Of two prompts beside each other: the loss of both is that of each alone, weighed by its words.

    A row's first token, labelled or not, has nothing before it that could predict it: no padding either.
    """
    grid, family = default_grid("llava_onevision"), "llava_onevision"
    model = FAMILIES[family]()
    both = inputs_for(family, [[grid], [grid]], words=[3, 9], pad="right")
    unsaid = both["input_ids"] >= 118 if least == 118 else both["input_ids"] == VIDEO
    labels = both["input_ids"].masked_fill(unsaid | (both["attention_mask"] == 0), -100)
    with torch.no_grad(), vidsieve.attach(model, vidsieve.load("uniform", retention=0.3)):
        got = model(**both, labels=labels).loss
        total = count = 0.0
        for row in range(2):
            real = both["attention_mask"][row].bool()
            alone = {k: v[row : row + 1, real] for k, v in both.items() if k in ("input_ids", "attention_mask")}
            alone["pixel_values_videos"] = both["pixel_values_videos"][row : row + 1]
            words = labels[row : row + 1, real]
            number = int((words[:, 1:] != -100).sum())
            total, count = total + number * float(model(**alone, labels=words).loss), count + number
    assert float(got) == pytest.approx(total / count, abs=1e-5)


WRONG_FIELDS = [
    ("fastv", {"layer": 1.5}),
    ("fastv", {"layer": True}),
    ("dycoke", {"layer": "2"}),
    ("dycoke", {"dropped": "0.8"}),
    ("dycoke", {"similarity": 2}),
    ("dycoke", {"inner": "no"}),
]


def test_mistakes_are_named():
    model, inputs = FAMILIES["internvl"](), configuration("internvl", "batch 1")
    method = vidsieve.load("uniform", retention=0.3)
    for wrong in ((0, 3), [0, 3], "x", torch.tensor([0, 3])):
        with pytest.raises(UnsupportedCallError, match=r"as \[\(0, 8\)\]"):
            vidsieve.prune(model, inputs, method, videos=wrong)
    with pytest.raises(PromptError, match="single image, which is not a video"):
        vidsieve.prune(
            model, inputs_for("internvl", [[vidsieve.testing.tiny_models.default_grid("internvl", 1)]]), method
        )
    with pytest.raises(PromptError, match="pruned already"):
        vidsieve.prune(model, vidsieve.prune(model, inputs, method), method)
    with pytest.raises(UnsupportedCallError, match="tells them itself"):
        vidsieve.attach(FAMILIES["llava_onevision"](), method, videos=[(0, 3)])
    with pytest.raises(UnsupportedModelError, match="compile its language model"):
        vidsieve.attach(torch.compile(model, backend="eager"), method)
    labels = inputs["input_ids"][:, :-1]
    with vidsieve.attach(model, method), pytest.raises(UnsupportedCallError, match="labels must be"):
        model(**inputs, labels=labels)
    for name, fields in WRONG_FIELDS:
        with pytest.raises(BudgetError, match=next(iter(fields))):
            vidsieve.load(name, **fields)
    with pytest.raises(BudgetError, match="ask for all of it"):
        METHODS["dycoke"].compress(vidsieve.testing.make_video(vidsieve.types.TokenGrid(1, 4, 4)))


def test_a_count_of_tokens_is_judged_at_the_video():
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")  # 48 tokens, 3 layers
    with vidsieve.attach(model, vidsieve.load("fastv", layer=1, retention=vidsieve.Tokens(30))) as session:
        model.generate(**inputs, **GREEDY)
    (trace,) = session.trace
    assert trace.layer_retention == pytest.approx(30 / 48, abs=0.02) and trace.kept == 21
    with (
        vidsieve.attach(model, vidsieve.load("fastv", layer=1, retention=vidsieve.Tokens(10))),
        pytest.raises(BudgetError, match=r"retention 10 tokens"),
    ):
        model.generate(**inputs, **GREEDY)
    assert not any(layer._forward_pre_hooks for layer in adapter_for(model).decoder_layers)


@inside
def test_a_dynamic_cache_may_be_asked_for_by_name(method):
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")
    with vidsieve.attach(model, method):
        plain = model.generate(**inputs, **GREEDY)
        assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="dynamic"), plain)
        model.generation_config.cache_implementation = "dynamic"
        assert torch.equal(model.generate(**inputs, **GREEDY), plain)
        assert model.generation_config.cache_implementation == "dynamic"


@inside
def test_layers_that_see_a_part_of_the_prompt_are_refused(method):
    model = FAMILIES["llava_onevision"]()
    model.config.get_text_config().layer_types = ["full_attention", "sliding_attention", "full_attention"]
    said = "sliding_attention in layer 1: layers from 2 on" if method.name == "fastv" else "further ones behind it, and"
    with pytest.raises(UnsupportedCallError, match=f"{method.name} .*{said}"):
        vidsieve.attach(model, method)


@inside
def test_a_method_that_keeps_its_selection_says_so_and_others_do_not(method):
    model, inputs = FAMILIES["smolvlm"](), configuration("smolvlm", "batch 1")
    for some, noted in ((method, method.name == "fastv"), (vidsieve.load("dycoke", inner=False), False)):
        with vidsieve.attach(model, some) as session:
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            talk = torch.cat([first.sequences, torch.tensor([[41, 42]])], 1)
            model.generate(input_ids=talk, **cache_kwargs(model, output_cache(first)), **GREEDY)
        assert bool(session.trace.notes) == noted


@inside
@pytest.mark.parametrize("name", ["batch 1", "ragged batch 2"])
def test_flash_attention_gets_masks_that_it_takes(method, name):
    """A stand-in that computes what flash attention does from a mask (B, k) or none, and refuses any other."""
    from transformers import AttentionInterface, AttentionMaskInterface

    def flash(module, query, key, value, attention_mask=None, **options):
        assert attention_mask is None or attention_mask.ndim == 2, tuple(attention_mask.shape)
        lines, length = query.shape[2], key.shape[2]
        seen = torch.ones(lines, length, dtype=torch.bool).tril(length - lines)[None, None]
        if attention_mask is not None:
            seen = (
                seen & attention_mask[:, None, None, :].bool() | torch.eye(length, dtype=torch.bool)[length - lines :]
            )
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=options.get("scaling"))
        return out.transpose(1, 2), None

    def mask(batch_size=0, attention_mask=None, **options):
        return None if attention_mask is None or bool(attention_mask.all()) else attention_mask

    AttentionInterface.register("flash_stand_in", flash)
    AttentionMaskInterface.register("flash_stand_in", mask)
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", name)
    outs = []
    for attention in ("sdpa", "flash_stand_in"):
        model.set_attn_implementation({"text_config": attention})
        with torch.no_grad(), vidsieve.attach(model, method):
            first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
            talk = torch.cat([first.sequences, torch.tensor([[41, 42]] * len(first.sequences))], 1)
            whole = torch.cat([inputs["attention_mask"], torch.ones_like(talk[:, inputs["input_ids"].shape[1] :])], 1)
            outs.append(
                model.generate(
                    input_ids=talk, attention_mask=whole, **cache_kwargs(model, output_cache(first)), **GREEDY
                )
            )
    assert torch.equal(*outs)


@pytest.mark.parametrize(
    "method",
    [*METHODS.values(), vidsieve.load("framefusion", retention=0.6, threshold=-1.0)],
    ids=[*METHODS, "framefusion"],
)
def test_layers_of_a_step_share_their_mask(method, monkeypatch):
    model, inputs = FAMILIES["llava_onevision"](), configuration("llava_onevision", "ragged batch 2")
    built, mask = [], InnerRun._mask

    def counted(self, seen, allowed, hidden):
        built.append(tuple(allowed.shape))
        return mask(self, seen, allowed, hidden)

    monkeypatch.setattr(InnerRun, "_mask", counted)
    with torch.no_grad(), vidsieve.attach(model, method):
        model.generate(**inputs, **GREEDY)
    steps = [shape for shape in built if shape[1] == 1]
    assert steps and len(steps) == len(set(steps)), "a step builds a mask once for each length"
