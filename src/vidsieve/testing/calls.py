"""Every kind of call, on pruned inputs and on the masked reference."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded
from vidsieve.adapters.family import Videos
from vidsieve.adapters.session import Session, attach
from vidsieve.adapters.transformers_api import cache_kwargs, output_cache
from vidsieve.compressors.base import Compressor
from vidsieve.compressors.inside import LayerCompressor
from vidsieve.errors import VidsieveError
from vidsieve.selection import indices_to_mask
from vidsieve.testing.reference import chosen_inside, reference_greedy, reference_logits
from vidsieve.types import Selection, Stage

STEPS = 8
Outcome = tuple[float, bool | None]
"""Largest difference to the reference, and whether generated tokens are equal (None: none generated)."""


@dataclass(frozen=True)
class Case:
    """A model with a method, and the inputs of a batch; `videos` as in `prune`.

    `given` replaces the method's own selections.
    """

    adapter: Adapter
    inputs: Mapping[str, Any]
    compressor: Compressor
    videos: Videos = None
    given: list[Selection] | None = None

    @property
    def ids(self) -> Tensor:
        """The prompts (B, L)."""
        ids: Tensor = self.inputs["input_ids"]
        return ids

    def attached(self, **options: Any) -> Session:
        """Return an open session of the method."""
        adapter = self.adapter
        return attach(
            adapter.model,
            self.compressor,
            positions=adapter.convention,
            layout=adapter.layout,
            videos=self.videos,
            **options,
        )

    def chosen(self, gradients: bool = False) -> list[Selection]:
        """Return the method's selection for each video."""
        if self.given is not None:
            return self.given
        with torch.set_grad_enabled(gradients):
            if isinstance(self.compressor, LayerCompressor) and self.compressor.acts is Stage.LAYER:
                return chosen_inside(self.adapter, self.inputs, self.compressor, self.videos)
            encoded = self.adapter.encode_for(self.inputs, self.compressor, self.videos)
            return self.adapter.select(encoded, self.compressor, torch.Generator().manual_seed(0))[0]

    def logits(self, chosen: list[Selection], extra: Tensor | None = None, encoded: Encoded | None = None) -> Tensor:
        """Return the reference's logits (B, L + E, V) with `extra` (B, E) tokens after the prompts."""
        return reference_logits(self.adapter, self.inputs, chosen, extra, self.videos, encoded)

    def greedy(self, chosen: list[Selection], extra: Tensor | None = None) -> Tensor:
        """Return the reference's next `STEPS` tokens (B, STEPS) after the prompts and `extra`."""
        return reference_greedy(self.adapter, self.inputs, chosen, STEPS, self.videos, extra)

    def generate(self, inputs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Return the output of the model's own `generate`, greedy by default; no token ends an answer."""
        defaults = {"max_new_tokens": STEPS, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        defaults["eos_token_id"] = self.adapter.model.config.get_text_config().vocab_size
        return self.adapter.model.generate(**(self.inputs if inputs is None else inputs), **(defaults | options))


def prefill(case: Case) -> Outcome:
    """Compare the logits of a plain forward."""
    with torch.no_grad():
        chosen = case.chosen()
        wanted = case.logits(chosen)
        with case.attached() as session:
            got = case.adapter.model(**case.inputs).logits
        kept = session.kept_positions
        if kept is None:
            raise VidsieveError("nothing was pruned")
        if isinstance(case.compressor, LayerCompressor):
            # Tokens dropped inside the LLM went through its first layers: their rows mean nothing.
            for span, selection in zip(case.adapter.encode(case.inputs, case.videos).videos, chosen, strict=True):
                gone = span.columns[(~indices_to_mask(selection.indices, len(span.columns))).to(span.columns.device)]
                newlines = span.tail_columns[~span.features.kept_tail(selection.indices).to(span.columns.device)]
                dropped = torch.cat([gone, newlines])
                kept[span.row] = kept[span.row].where(~torch.isin(kept[span.row], dropped), -1)
    rows, real = torch.arange(len(kept), device=kept.device)[:, None].expand_as(kept), kept >= 0
    return float((got[real] - wanted[rows[real], kept[real]]).abs().max()), None


def greedy(case: Case, **options: Any) -> Outcome:
    """Compare greedy tokens, and the logits of the last step."""
    with torch.no_grad():
        chosen = case.chosen()
        wanted = case.greedy(chosen)
        with case.attached():
            out = case.generate(**options)
        last = case.logits(chosen, wanted[:, :-1])[:, -1]
    return float((out.logits[-1] - last).abs().max()), torch.equal(out.sequences, torch.cat([case.ids, wanted], 1))


def static_cache(case: Case) -> Outcome:
    """Compare greedy tokens on a cache of fixed length."""
    return greedy(case, cache_implementation="static", disable_compile=True)


def beams(case: Case) -> Outcome:
    """Compare the best of two beams and its score."""
    with torch.no_grad():
        chosen = case.chosen()
        wanted, score = _beam_reference(case, chosen, 2)
        with case.attached():
            out = case.generate(num_beams=2, output_scores=True)
    equal = torch.equal(out.sequences, torch.cat([case.ids, wanted], 1))
    return float((out.sequences_scores - score).abs().max()), equal


def _beam_reference(case: Case, chosen: list[Selection], count: int) -> tuple[Tensor, Tensor]:
    """Return the best of `count` beams (B, STEPS) and its mean log-probability (B,), the LLM run anew at each step."""
    batch, device = case.ids.shape[0], case.ids.device
    tokens = torch.empty(batch, 1, 0, dtype=torch.int64, device=device)
    totals, encoded = torch.zeros(batch, 1, device=device), case.adapter.encode(case.inputs, case.videos)
    for _ in range(STEPS):
        each = [F.log_softmax(case.logits(chosen, tokens[:, i], encoded)[:, -1], -1) for i in range(tokens.shape[1])]
        log_p = torch.stack(each, 1)
        vocabulary = log_p.shape[-1]
        totals, flat = (totals[..., None] + log_p).flatten(1).topk(count, 1)
        parent, token = flat // vocabulary, flat % vocabulary
        tokens = torch.cat([tokens[torch.arange(batch, device=device)[:, None], parent], token[..., None]], 2)
    return tokens[:, 0], totals[:, 0] / STEPS


def sampled(case: Case) -> Outcome:
    """Compare the logits of two sampled answers to each prompt, on the tokens that were sampled."""
    count, prompt = 2, case.ids.shape[1]
    # Random models draw placeholders too, and the reference cannot read one that stands for nothing.
    never = sorted({case.adapter.video_token_id, case.adapter.image_token_id})
    with torch.no_grad():
        chosen = case.chosen()
        torch.manual_seed(0)
        with case.attached():
            out = case.generate(do_sample=True, num_return_sequences=count, suppress_tokens=never)
        answers, logits, gap = out.sequences[:, prompt:], torch.stack(out.logits, 1), 0.0
        for i in range(count):
            wanted = case.logits(chosen, answers[i::count, :-1])[:, -STEPS:]
            gap = max(gap, float((logits[i::count] - wanted).abs().max()))
    return gap, torch.equal(out.sequences[:, :prompt], case.ids.repeat_interleave(count, 0))


def second_turn(case: Case, reselect: bool = False) -> Outcome:
    """Compare a second turn that sends the whole conversation with the cache of the first."""
    with torch.no_grad():
        chosen = case.chosen()
        first = case.greedy(chosen)
        words = torch.arange(40, 46, device=first.device).expand(first.shape[0], -1)
        extra = torch.cat([first, words], 1)
        with case.attached(reselect=reselect):
            out = case.generate()
            conversation = _longer(case, torch.cat([out.sequences[:, case.ids.shape[1] :], words], 1))
            names = conversation if reselect else ("input_ids", "attention_mask")
            sent = {name: conversation[name] for name in names}
            again = case.generate(sent, **cache_kwargs(case.adapter.model, output_cache(out)))
        if reselect:
            case = Case(case.adapter, conversation, case.compressor, case.videos)
            chosen, extra = case.chosen(), extra[:, :0]
        wanted, reference = case.greedy(chosen, extra), case.logits(chosen, extra)[:, -1]
    equal = torch.equal(again.sequences, torch.cat([conversation["input_ids"], wanted], 1))
    return float((again.logits[0] - reference).abs().max()), equal


def reselected(case: Case) -> Outcome:
    """Compare a second turn prefilled again under ``reselect=True``."""
    return second_turn(case, reselect=True)


def _longer(case: Case, words: Tensor) -> dict[str, Any]:
    """Return inputs with `words` (B, E) after the prompts."""
    longer = dict(case.inputs) | {"input_ids": torch.cat([case.ids, words], 1)}
    longer["attention_mask"] = torch.cat([longer["attention_mask"], torch.ones_like(words)], 1)
    for name in {"mm_token_type_ids", *case.adapter.column_keys} & longer.keys():
        longer[name] = torch.cat([longer[name], torch.zeros_like(words)], 1)
    return longer


def labels(case: Case) -> Outcome:
    """Compare the loss on the words after the video, and its gradient in the vision tower."""
    # Merged tokens pass gradients on, so they must not be constants in the reference.
    model, chosen, ids = case.adapter.model, case.chosen(gradients=True), case.ids
    targets = torch.full_like(ids, -100)
    targets[:, -5:] = ids[:, -5:]
    tower = [p for n, p in model.named_parameters() if ("patch_embed" in n or "vis" in n) and p.ndim > 1]
    weight = tower[0]
    model.zero_grad()
    logits = case.logits(chosen)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
    wanted.backward()  # type: ignore[no-untyped-call]
    gradient = weight.grad.clone()
    model.zero_grad()
    with case.attached():
        got = model(**case.inputs, labels=targets, use_cache=False).loss
    got.backward()
    gap = max(float((got - wanted).detach().abs()), float((weight.grad - gradient).abs().max()))
    model.zero_grad()
    return gap, None


BACKEND = "aot_eager"
"""Backend of `torch.compile`; "eager" takes less than half the time."""


def compiled(case: Case) -> Outcome:
    """Compare greedy tokens of a model whose language model is compiled, in one graph per pass.

    Methods inside the LLM act in hooks, and run it uncompiled.
    """
    inner, whole = case.adapter.language_model, case.compressor.acts is Stage.PRE_LLM
    torch._dynamo.reset()
    inner.forward = torch.compile(inner.forward, backend=BACKEND, dynamic=True, fullgraph=whole)
    try:
        return greedy(case)
    finally:
        del inner.forward
        torch._dynamo.reset()


def spread(case: Case) -> Outcome:
    """Compare greedy tokens of a model spread over two devices.

    Its last layers are loaded when needed: from disk on a CPU, from the CPU on a GPU.
    """
    with _spread(case.adapter):
        return greedy(case)


@contextmanager
def _spread(adapter: Adapter) -> Iterator[None]:
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    model, layers = adapter.model, list(adapter.decoder_layers)
    names = {id(module): name for name, module in model.named_modules()}
    ends = {names[id(layer)] for layer in layers[len(layers) // 2 :]}
    gpu = model.device.type == "cuda"
    near: int | str = (model.device.index or 0) if gpu else "cpu"
    places: dict[str, int | str] = {}

    def place(module: Any, name: str) -> None:
        """Place a module as a whole, or each of its parts."""
        if name in ends:
            places[name] = "cpu" if gpu else "disk"
        elif any(end.startswith(f"{name}.") for end in ends) or not name:
            for child, part in module.named_children():
                place(part, f"{name}.{child}" if name else child)
            for child, _ in module.named_parameters(recurse=False):
                places[f"{name}.{child}"] = near
        else:
            places[name] = near

    place(model, "")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        with warnings.catch_warnings():
            # Parameters without a module, as LLaVA's newline, must be placed too, which accelerate warns about.
            warnings.filterwarnings("ignore", "The following device_map keys do not match")
            dispatch_model(model, places, main_device=near, offload_dir=folder, force_hooks=True)
        try:
            yield
        finally:
            remove_hook_from_module(model, recurse=True)
            model.__dict__.pop("hf_device_map", None)
            model.load_state_dict(weights, assign=True)


CALLS: dict[str, Callable[[Case], Outcome]] = {
    "prefill logits": prefill,
    "8 greedy tokens": greedy,
    "2 beams": beams,
    "2 sampled sequences": sampled,
    "static cache": static_cache,
    "second turn": second_turn,
    "second turn, reselected": reselected,
    "forward with labels": labels,
}
"""The calls of the equivalence table."""

SLOW_CALLS: dict[str, Callable[[Case], Outcome]] = {"compiled language model": compiled, "device map": spread}
"""Calls that change the model; they run on one configuration and one attention."""

REFUSED: dict[str, dict[str, Any]] = {
    "assisted decoding": {"assistant_model": object()},
    "prompt-lookup decoding": {"prompt_lookup_num_tokens": 2},
    "contrastive search": {"penalty_alpha": 0.6, "top_k": 4},
    "DoLa decoding": {"dola_layers": "low"},
    "classifier-free guidance": {"guidance_scale": 2.0},
    "no cache": {"use_cache": False},
    "paged cache": {"cache_implementation": "paged"},
    "chunked prefill": {"prefill_chunk_size": 4},
    "custom loop": {"custom_generate": "somebody/loop"},
}
"""Options of `generate` that a session refuses."""
