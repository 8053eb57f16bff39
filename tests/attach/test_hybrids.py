"""Methods inside LLMs whose layers are mostly recurrent, against the stock layers run one after another by hand."""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from inspect import signature

import pytest
import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

import vidsieve
from vidsieve import registry
from vidsieve.adapters import adapter_for
from vidsieve.adapters.transformers_api import cache_kwargs, eager_attention, output_cache
from vidsieve.compressors.inside import DecodeCompressor, InnerCompressor, LayerCompressor
from vidsieve.errors import BudgetError, NeedError, UnsupportedCallError
from vidsieve.testing.views import GivenView
from vidsieve.types import ENCODER_NEEDS, TokenGrid
from workbench.families import tiny

HYBRIDS = ["qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "lfm3_vl", "nemotron_h_omni"]
BATCHES = {"batch 1": ([[3]], [5]), "ragged batch 2": ([[3, 2], [2]], [3, 9])}
STEPS = 4
FULL = "full_attention"
CACHE = "cache" if "cache" in signature(create_causal_mask).parameters else "past_key_values"
INNER = [name for name in registry.compressors if issubclass(registry.compressors.get(name), InnerCompressor)]
READS_TOWER = ("holitom", "flashvid", "earlytom")
"""Those that read the vision encoder; the last also merges frames there, which no family here lets it."""

each = pytest.mark.parametrize("family", HYBRIDS)
batches = pytest.mark.parametrize("batch", BATCHES)
qwen = pytest.mark.families("qwen3_5")


@functools.cache
def made(family, layers=16):
    """Return the adapter of a tiny model."""
    return adapter_for(tiny(family).model(0, layers))


def given(family, batch):
    """Return the inputs of a batch; the tubelets of Nemotron's videos are all as many."""
    videos, words = BATCHES[batch]
    return tiny(family).inputs(videos, words, "left")


def kinds_of(adapter):
    text = adapter.model.config.get_text_config()
    return list(getattr(text, "layer_types", None) or [FULL] * text.num_hidden_layers)


def full_layers(adapter):
    return [number for number, kind in enumerate(kinds_of(adapter)) if kind == FULL]


class ByHand:
    """The stock layers of an LLM in a plain loop, one prompt at a time, without padding, hooks of ours or a cache."""

    def __init__(self, adapter, inputs):
        self.llm, self.model = adapter.language_model, adapter.model
        self.text, self.kinds = self.model.config.get_text_config(), kinds_of(adapter)
        seen = {}
        hook = self.llm.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
        with torch.no_grad():
            self.model(**inputs)
        hook.remove()
        self.real = inputs["attention_mask"].bool()
        embeds, positions = seen["inputs_embeds"], seen.get("position_ids")
        if positions is None:
            positions = (self.real.long().cumsum(1) - 1).clamp(min=0)
        self.prompts = [
            (embeds[row, real][None], positions[..., row : row + 1, :][..., real]) for row, real in enumerate(self.real)
        ]

    def logits(self, row, cut, answer=(), reads=None):
        """Return the places (n,) of one prompt, and of the words after it, that reach the end, and their logits (n, V).

        ``cut(number, layer, hidden, attend)`` returns the places that go on into a layer, None for all, where
        ``attend(layer, hidden)`` gives (output, weights) of a layer; `reads` is called with a layer's number and its
        mask (1, 1, n, n), and returns another.
        """
        embeds, positions = self.prompts[row]
        words = torch.tensor(list(answer), dtype=torch.int64)
        hidden = torch.cat([embeds, self.llm.get_input_embeddings()(words)[None]], 1)
        positions = torch.cat([positions, positions[..., -1:] + torch.arange(1, len(words) + 1)], -1)
        places = torch.arange(hidden.shape[1])
        with torch.no_grad(), eager_attention(self.model):
            for number in range(len(self.llm.layers)):
                kept = cut(number, hidden, places, functools.partial(self.layer, positions[..., places], reads))
                if kept is not None:
                    hidden, places = hidden[:, kept], places[kept]
                hidden = self.layer(positions[..., places], reads, number, hidden)[0]
            norm = next(getattr(self.llm, n) for n in ("norm", "embedding_norm", "norm_f") if hasattr(self.llm, n))
            head = self.model.lm_head if hasattr(self.model, "lm_head") else self.model.language_model.lm_head
            return places, head(norm(hidden))[0]

    def layer(self, positions, reads, number, hidden):
        """Return a layer's output, and its attention (H, n, n) if it has any."""
        layer, kind = self.llm.layers[number], self.kinds[number]
        without = dict.fromkeys(("attention_mask", "position_ids", CACHE))
        make = {FULL: create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        mask = make[kind](config=self.text, inputs_embeds=hidden, **without) if kind in make else None
        if reads is not None and mask is not None:
            mask = reads(number, mask)
        options = without | {"attention_mask": mask}
        if hasattr(self.llm, "rotary_emb") and kind in make:
            rotary = positions[1:] if positions.ndim == 3 and positions.shape[0] == 4 else positions
            turn = {"layer_type": kind} if self.text.model_type == "lfm3" else {}
            options["position_embeddings"] = self.llm.rotary_emb(hidden, rotary, **turn)
        elif hasattr(self.llm, "rotary_emb"):
            options["position_embeddings"] = None
        weights = {}
        module = getattr(layer, "self_attn", getattr(layer, "mixer", None))
        hooks = [] if kind != FULL else [module.register_forward_hook(lambda m, a, out: weights.update(now=out[1]))]
        output = layer(hidden, **options)
        for hook in hooks:
            hook.remove()
        return output, weights["now"][0] if weights else None


def columns_of(adapter, inputs, row):
    """Return the places of each video's tokens in a prompt without its padding."""
    pad = int((inputs["attention_mask"][row] == 0).sum())
    return [span.columns - pad for span in adapter.encode(inputs).videos if span.row == row]


def best(weights, query, columns, count):
    """Return the `count` columns that get most attention from one token, mean over heads, by rising column."""
    return columns[weights[:, query, columns].mean(0).sort(descending=True, stable=True).indices[:count].sort().values]


class Cutting:
    """A cut before some layers, chosen for the prompt alone and kept for the words after it."""

    def __init__(self, videos, length, counts, back):
        self.alive, self.length, self.counts, self.back, self.gone = dict(enumerate(videos)), length, counts, back, {}
        self.weights = None

    def __call__(self, number, hidden, places, attend):
        cut = number + self.back
        if cut in self.counts and cut not in self.gone:
            self.weights = attend(number, hidden)[1]
        if number not in self.counts:
            return None
        if number not in self.gone:
            now, gone = {int(place): at for at, place in enumerate(places)}, []
            for video, columns in self.alive.items():
                at = torch.tensor([now[int(column)] for column in columns])
                stay = places[best(self.weights, now[self.length - 1], at, self.counts[number][video])]
                gone.append(columns[~torch.isin(columns, stay)])
                self.alive[video] = stay
            self.gone[number] = torch.cat(gone)
        return (~torch.isin(places, self.gone[number])).nonzero().flatten()


def fastv_counts(adapter, retention, videos):
    """Return (cut: tokens of each video) by FastV's rule; the cut is behind the first full layer from layer 1 on."""
    depth = len(kinds_of(adapter))
    (cut, *_) = (number + 1 for number in full_layers(adapter) if number + 1 >= 2)
    share = (Fraction(str(retention)) * depth - cut) / (depth - cut)
    return {cut: [math.floor(share * len(columns)) for columns in videos]}, 1


def pyramid_counts(adapter, retention, videos):
    """Return (cut: tokens of each video): 1/2, 1/4 and 1/8 times what spends the budget, found by bisection."""
    depth, cuts = len(kinds_of(adapter)), []
    for nominal in (8, 16, 24):
        wanted = round(nominal * depth / 32)
        usable = full_layers(adapter)[1:]  # the first one's cache counts the prompt
        cuts.append(next(number for number in usable if number >= wanted and number not in cuts))
    spans = [end - start for start, end in zip(cuts, [*cuts[1:], depth], strict=True)]
    counts = []
    for columns in videos:
        low, high = Fraction(0), Fraction(8)
        for _ in range(40):
            middle = (low + high) / 2
            shares = [min(Fraction(1), max(Fraction(1, len(columns)), middle / 2**step)) for step in (1, 2, 3)]
            spent = cuts[0] + sum(share * span for share, span in zip(shares, spans, strict=True))
            low, high = (middle, high) if spent <= Fraction(str(retention)) * depth else (low, middle)
        kept = [min(1.0, max(1 / len(columns), float(low) / 2**step)) * len(columns) for step in (1, 2, 3)]
        counts.append([math.floor(count + 1e-6) for count in kept])
    return {cut: [count[step] for count in counts] for step, cut in enumerate(cuts)}, 0


RULES = {"fastv": (fastv_counts, 0.5), "pyramiddrop": (pyramid_counts, 0.6)}


@batches
@pytest.mark.parametrize("method", RULES)
@each
def test_a_pruned_run_equals_the_stock_layers_run_by_hand(family, method, batch):
    adapter, inputs = made(family, 18), given(family, batch)
    rule, retention = RULES[method]
    compressor = vidsieve.load(method, retention=retention)
    by_hand, model = ByHand(adapter, inputs), adapter.model
    plan = adapter.prune(inputs, compressor)
    with torch.no_grad(), plan.acting():
        model(**plan.inputs)
    with torch.no_grad(), vidsieve.attach(model, compressor) as session:
        got = model(**inputs).logits
        out = model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    traces = {row: [t for t in plan.traces if t.row == row] for row in range(len(got))}
    for row in range(len(got)):
        videos = columns_of(adapter, inputs, row)
        counts, back = rule(adapter, retention, videos)
        length, pad = int(inputs["attention_mask"][row].sum()), int((inputs["attention_mask"][row] == 0).sum())
        cut = Cutting(videos, length, counts, back)
        places, wanted = by_hand.logits(row, cut)
        columns = session.kept_positions[row]
        at = torch.searchsorted(columns, places + pad)
        assert float((got[row, at] - wanted).abs().max()) < 1e-4
        stay = torch.arange(length)
        for stage, gone in cut.gone.items():
            kept, stay = plan.run.kept[stage][row], stay[~torch.isin(stay, gone)]
            assert torch.equal(plan.kept_positions[row][kept[kept >= 0]] - pad, stay)
        for trace, span, stay in zip(traces[row], videos, cut.alive.values(), strict=True):
            assert list(trace.indices) == torch.isin(span, stay).nonzero().flatten().tolist()
            assert set(trace.attention_layers) == {stage - back for stage in counts} <= set(full_layers(adapter))
            assert set(trace.layers) <= set(counts)
        answer = []
        for step in range(STEPS):
            after = by_hand.logits(row, cut, answer)[1][-1]
            assert float((out.logits[step][row] - after).abs().max()) < 1e-4, step
            answer.append(int(after.argmax()))
        assert out.sequences[row, -STEPS:].tolist() == answer


@pytest.mark.parametrize("method", RULES)
@each
def test_a_later_turn_goes_on_from_states_and_caches_of_the_kept_tokens(family, method):
    adapter, inputs = made(family, 18), given(family, "ragged batch 2")
    rule, retention = RULES[method]
    model, by_hand = adapter.model, ByHand(adapter, inputs)
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    words = torch.tensor([[41, 42, 43], [44, 45, 46]])
    with torch.no_grad(), vidsieve.attach(model, vidsieve.load(method, retention=retention)):
        first = model.generate(**inputs, max_new_tokens=2, **options)
        talk = torch.cat([first.sequences, words], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(talk[:, inputs["input_ids"].shape[1] :])], 1)
        cache = cache_kwargs(model, output_cache(first))
        second = model.generate(input_ids=talk, attention_mask=mask, max_new_tokens=2, **cache, **options)
    for row in range(2):
        videos, length = columns_of(adapter, inputs, row), int(inputs["attention_mask"][row].sum())
        cut = Cutting(videos, length, *rule(adapter, retention, videos))
        by_hand.logits(row, cut)  # chosen for the prompt alone
        answer = [*first.sequences[row, -2:].tolist(), *words[row].tolist()]
        for step in range(2):
            after = by_hand.logits(row, cut, answer)[1][-1]
            assert float((second.logits[step][row] - after).abs().max()) < 1e-4, step
            answer.append(int(after.argmax()))
        assert second.sequences[row, -2:].tolist() == answer[-2:]


@batches
@pytest.mark.parametrize("family", [*HYBRIDS, "glm4v_moe"])  # its layers are handed three rows of position ids
def test_while_decoding_layers_of_full_attention_read_fewer(family, batch):
    """Each word reads, behind the first full layer, the tokens that it attends to most there; states read all."""
    adapter, inputs = made(family), given(family, batch)
    first, *readers = [number for number in full_layers(adapter) if number >= 2]
    by_hand = ByHand(adapter, inputs)
    compressor = vidsieve.load("dycoke", retention=1.0, dropped=0.75, similarity=1.0)
    with torch.no_grad(), vidsieve.attach(adapter.model, compressor) as session:
        out = adapter.model.generate(
            **inputs, max_new_tokens=STEPS, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    for trace in session.trace:
        assert (trace.layers, trace.attention_layers) == ((readers[0],), (first,))
    for row in range(len(out.sequences)):
        videos, length = columns_of(adapter, inputs, row), int(inputs["attention_mask"][row].sum())
        unread = {}

        def note(number, hidden, places, attend, length=length, videos=videos, unread=unread):
            if number == first:
                weights = attend(number, hidden)[1]
                for word in range(length, hidden.shape[1]):
                    stay = [best(weights, word, columns, len(columns) // 4) for columns in videos]
                    unread[word] = torch.cat([c[~torch.isin(c, s)] for c, s in zip(videos, stay, strict=True)])

        def reads(number, mask, unread=unread):
            if number in readers:
                mask = mask.clone()
                for word, columns in unread.items():
                    mask[0, 0, word, columns] = torch.finfo(mask.dtype).min
            return mask

        answer = []
        for step in range(STEPS):
            after = by_hand.logits(row, note, answer, reads)[1][-1]
            assert float((out.logits[step][row] - after).abs().max()) < 1e-4, step
            answer.append(int(after.argmax()))
        assert out.sequences[row, -STEPS:].tolist() == answer


@pytest.mark.parametrize("layers", [12, 24])
@pytest.mark.parametrize("name", INNER)
@each
def test_every_method_runs_within_its_budget_or_says_which_layers_can_be_used(family, name, layers):
    adapter, inputs, retention = made(family, layers), given(family, "ragged batch 2"), 0.5
    compressor = vidsieve.load(name, retention=retention)
    full = full_layers(adapter)
    try:
        session = vidsieve.attach(adapter.model, compressor)
    except (NeedError, UnsupportedCallError) as error:
        assert name in READS_TOWER and "inside the vision encoder" in str(error)
        assert isinstance(error, NeedError) or name == "earlytom"
        return
    except BudgetError as error:
        cuts = adapter.cuts(compressor)
        assert layers == 12 and all(str(cut) in str(error).split(" on, and none")[0] for cut in cuts)
        return
    with session:
        adapter.model.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert any("count the tokens that are kept" in note for note in session.trace.notes)
    for trace in session.trace:
        assert trace.layers and trace.attention_layers and set(trace.attention_layers) <= set(full)
        if isinstance(compressor, DecodeCompressor):
            assert trace.kept == trace.total // 2 and trace.layers[0] in full
            continue
        assert isinstance(compressor, LayerCompressor)
        steps = 1 + len(trace.layers)
        assert 0 <= retention - trace.layer_retention <= steps / trace.total
        assert {layer - compressor.lookback for layer in trace.layers} <= set(full)


@pytest.mark.parametrize("alike", [True, False])
def test_framefusion_counts_the_layers_up_to_its_next_step(alike):
    """Steps before layers 4, 8 and 12 of 16: 88 of 128 tokens are spent by layer 8, and 12 to 15 need one each.

    Nine tokens can then go on to layer 12, ten cannot. The step at layer 4 merged two of twelve, enough to go on.
    """
    method = vidsieve.load("framefusion", retention=0.5).fitted((4, 8, 12))
    indices = torch.arange(10)
    hidden = torch.eye(16)[indices]
    if alike:
        hidden[9] = hidden[5]  # the same place, one frame earlier
    attention = torch.rand(2, 1, 10, generator=torch.Generator().manual_seed(0))
    seen = (8, 16, TokenGrid(4, 2, 2), indices, (12,) * 4 + (10,) * 4)
    view = GivenView(*seen, rows={} if alike else {("last", 7): attention}, tensors={"hidden": hidden})
    choice = method.step(view, 16)
    assert choice.indices.tolist() == list(range(9)) if alike else len(choice.indices) == 5
    assert [layer for layer, _ in method.stages(16, 16)] == [4, 8, 12]


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "lfm3_vl"])
def test_methods_fit_models_of_published_sizes(family):
    """Of transformers' own defaults, without weights: configurations there lack what tiny ones may state besides."""
    kind = type(made(family).model)
    with torch.device("meta"):
        adapter = adapter_for(kind(kind.config_class()))
    for name in INNER:
        if name not in READS_TOWER or (name != "earlytom" and adapter.provides >= ENCODER_NEEDS):
            adapter.check(vidsieve.load(name, retention=0.5))


@qwen
def test_a_named_layer_is_refused_with_the_layers_that_can_be_used():
    model = made("qwen3_5").model
    said = "would drop tokens from layer 2 on, and this model has linear_attention in layers 0, 1, 2, 4"
    with pytest.raises(UnsupportedCallError, match=rf"fastv {said}.*: layers 4, 8, 12 can be used"):
        vidsieve.attach(model, vidsieve.load("fastv", retention=0.5, layer=2))
    with pytest.raises(UnsupportedCallError, match=r"pyramiddrop .* from layer 8 on.* layers 7, 11, 15 can be used"):
        vidsieve.attach(model, vidsieve.load("pyramiddrop", retention=0.7, layers=(7, 8, 11)))
    with pytest.raises(UnsupportedCallError, match=r"dycoke would read fewer tokens .* layers 4, 8, 12 can be used"):
        vidsieve.attach(model, vidsieve.load("dycoke", layer=3))
    with pytest.raises(UnsupportedCallError, match=r"holitom .*: layers 4, 8, 12 can be used"):
        vidsieve.attach(model, vidsieve.load("holitom", retention=0.7, layer=9))
    for layer in (4, 8, 12):
        vidsieve.attach(model, vidsieve.load("fastv", retention=0.9, layer=layer)).close()


@qwen
def test_where_the_budget_is_below_the_first_usable_layer_the_floor_is_named():
    model = made("qwen3_5").model
    for fields in ({}, {"earliest": True}):
        with pytest.raises(BudgetError, match=r"4 of 16 layers see every token, .* below 0\.2501; no layer is earlier"):
            vidsieve.attach(model, vidsieve.load("fastv", retention=0.2, **fields))


@qwen
def test_an_llm_with_one_full_layer_at_its_end_is_refused():
    with pytest.raises(UnsupportedCallError, match="fastv needs a layer of full attention with further ones behind it"):
        vidsieve.attach(made("qwen3_5", 4).model, vidsieve.load("fastv", retention=0.5))


@qwen
def test_a_policy_does_not_start_from_attention_with_a_gate():
    adapter = made("qwen3_5")
    with pytest.raises(NeedError, match="a Qwen3_5DecoderLayer: its attention has a gate"):
        adapter.layer_state(adapter.first_full_layer)


@qwen
def test_a_method_before_the_llm_and_one_inside_share_a_budget():
    model, inputs = made("qwen3_5").model, given("qwen3_5", "batch 1")
    both = vidsieve.Pipeline(vidsieve.load("uniform", retention=0.75), vidsieve.load("fastv"), 0.5)
    with vidsieve.attach(model, both) as session:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    (trace,) = session.trace
    assert trace.layers == (4,) and trace.attention_layers == (3,)
    assert 0 <= 0.5 - trace.layer_retention <= 2 / trace.total
