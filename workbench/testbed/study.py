"""Is the world hard enough? Oracles that know the scene, and heuristics without training, on one table.

Run before any policy is trained: `python -m workbench separation`. The oracles read the scene's cast, so they
are no methods; the heuristics are what anyone would try first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from vidsieve import registry
from vidsieve.adapters.adapter import Adapter
from vidsieve.compressors._question import FirstLook
from vidsieve.errors import NeedError
from vidsieve.evaluation.tasks.testbed import FULL, Oracle, SceneBatch, SceneCondition
from vidsieve.selection import kept_tokens, top_indices
from vidsieve.testbed.model import chat_inputs
from vidsieve.testbed.questions import best_order
from vidsieve.testbed.world import TOKENS, Cast, make_cast, render
from vidsieve.types import Need, Selection, Tokens, VideoTokens

Select = Any


def _fill(first: list[int], count: int, generator: Generator) -> Selection:
    """Return a selection of `count` tokens: `first` in their order, then random ones."""
    chosen = list(dict.fromkeys(first))[:count]
    taken = set(chosen)
    rest = [i for i in torch.randperm(TOKENS, generator=generator).tolist() if i not in taken]
    return Selection(torch.tensor(chosen + rest[: count - len(chosen)]).sort().values)


def question_oracle(count: int) -> Select:
    """Return the selection of the tokens that a question is about, random ones after them."""

    def select(adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
        return _fill(list(scene.questions[number].targets), count, generator)

    return select


def object_oracle(count: int, spread: bool) -> Select:
    """Return the question-blind selection of tokens on objects that could be asked about.

    `spread`: one token of every object first (two of a mover, the turn of a fixture), in random order, then
    the rest; otherwise tokens of objects in random order.
    """

    def select(adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
        first, rest = _object_tokens(scene.cast, generator)
        tokens = first + rest if spread else [*first, *rest]
        if not spread:
            tokens = [tokens[i] for i in torch.randperm(len(tokens), generator=generator).tolist()]
        return _fill(tokens, count, generator)

    return select


def _object_tokens(cast: Cast, generator: Generator) -> tuple[list[int], list[int]]:
    asked = [o for o in cast.objects if o.kind != "glyph"]
    asked = [asked[i] for i in torch.randperm(len(asked), generator=generator).tolist()]
    first: list[int] = []
    for kind in ("fixture", "mover", "flash"):
        for thing in asked:
            if thing.kind == kind:
                tokens = thing.tokens()
                first.append(tokens[0])
                if thing.turned:
                    first.append(tokens[thing.turned[1][0]])
                if kind == "mover":
                    first.append(tokens[-1])
    known = set(first)
    return first, [token for thing in asked for token in best_order(thing) if token not in known]


def _scored(score: Any, needs: frozenset[Need] = frozenset()) -> Any:
    def build(count: int) -> Select:
        def select(adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
            video = adapter.video_tokens(scene.encoded, number, needs)
            return Selection(top_indices(score(adapter, scene, number, video), count))

        return select

    return build


def _from_median(adapter: Adapter, scene: SceneBatch, number: int, video: VideoTokens) -> Tensor:
    frames = video.embeds.reshape(video.grid.frames, video.grid.per_frame, -1)
    return (frames - frames.median(0, keepdim=True).values).square().sum(-1).flatten()


def _from_mean(adapter: Adapter, scene: SceneBatch, number: int, video: VideoTokens) -> Tensor:
    return (video.embeds - video.embeds.mean(0)).square().sum(-1)


def _word_similarity(adapter: Adapter, scene: SceneBatch, number: int, video: VideoTokens) -> Tensor:
    if video.prompt is None:
        raise NeedError("word similarity needs the prompt")
    words = video.prompt.embeds[video.prompt.question_mask]
    tokens = torch.nn.functional.normalize(video.embeds, dim=-1)
    return (tokens @ torch.nn.functional.normalize(words, dim=-1).T).amax(1)


class _Attention:
    """Attention in every layer of the unpruned LLM; one full forward serves a whole scene.

    Per question and layer: that of the last prompt token (mean over heads), and the strongest of any head from any of
    the question's words.
    """

    def __init__(self) -> None:
        self.scene: SceneBatch | None = None
        self.rows: dict[str, list[Tensor]] = {}

    def at(self, kind: str, layer: int) -> Any:
        """Return the score function of one layer, for "last_token" or "words"."""

        def score(adapter: Adapter, scene: SceneBatch, number: int, video: VideoTokens) -> Tensor:
            if scene is not self.scene:
                self.scene, self.rows = scene, self._of(adapter, scene)
            return self.rows[kind][layer][number][scene.encoded.videos[number].columns]

        return score

    @staticmethod
    def _of(adapter: Adapter, scene: SceneBatch) -> dict[str, list[Tensor]]:
        """Return the attention (B, L) of each layer, of both kinds."""
        whole, encoded = Selection(torch.arange(TOKENS)), scene.encoded
        inputs = adapter.build(encoded, [[whole]] * len(scene.questions)).inputs
        asking = [
            encoded.attention_mask[b].nonzero().flatten()[adapter.prompt(encoded, b).question_mask]
            for b in range(len(scene.questions))
        ]
        before = adapter.model.config.get_text_config()._attn_implementation
        adapter.model.set_attn_implementation({"text_config": "eager"})
        try:
            out = adapter.model(**inputs, logits_to_keep=1, use_cache=False, output_attentions=True)
        finally:
            adapter.model.set_attn_implementation({"text_config": before})
        return {
            "last_token": [attention[:, :, -1].mean(1) for attention in out.attentions],
            "words": [
                torch.stack([heads[:, rows].amax((0, 1)) for heads, rows in zip(attention, asking, strict=True)])
                for attention in out.attentions
            ],
        }


HEURISTICS: dict[str, tuple[Any, bool]] = {
    "temporal_median": (_scored(_from_median), False),
    "distance_to_mean": (_scored(_from_mean), False),
    "word_similarity": (_scored(_word_similarity, frozenset({Need.QUESTION})), True),
}
BLIND = ("random", "uniform", "downsample", "frame_difference", "divprune")


def separation_conditions(
    adapter: Adapter, processor: Any, retentions: list[float], *, world: str, seed: int, attention: bool = False
) -> list[SceneCondition]:
    """Return the conditions of the table that TESTBED's targets are read from.

    The last one has another video's tokens (`wrong_video`).
    """
    layers = range(len(adapter.decoder_layers)) if attention else (adapter.first_full_layer,)
    conditions = [FULL]
    for retention in retentions:
        count = kept_tokens(retention, TOKENS)
        oracles = [
            Oracle("question_oracle", retention, question_oracle(count)),
            Oracle("object_oracle", retention, object_oracle(count, True), "spread", False),
            Oracle("object_oracle", retention, object_oracle(count, False), "mixed", False),
        ]
        conditions += [SceneCondition(oracle=oracle) for oracle in oracles]
        conditions += [SceneCondition(registry.compressors.get(name)(retention=retention)) for name in BLIND]
        later = registry.compressors.get("frame_difference")(retention=retention, first_frame="next")
        conditions.append(SceneCondition(later, suffix="_next"))
        oracles = [Oracle(name, retention, build(count), "-", per) for name, (build, per) in HEURISTICS.items()]
        conditions += [SceneCondition(oracle=oracle) for oracle in oracles]
        conditions += [first_look(adapter, retention, layer) for layer in layers]
    conditions += attention_of_layers(adapter, retentions) if attention else []
    return [*conditions, wrong_video(processor, world, seed)]


def attention_of_layers(adapter: Adapter, retentions: Sequence[float]) -> list[SceneCondition]:
    """Return the conditions of every layer's attention under all tokens: from the question's words, the last token.

    One forward of a scene serves all of them.
    """
    seen = _Attention()

    def at(kind: str, layer: int, retention: float) -> SceneCondition:
        select = _scored(seen.at(kind, layer))(kept_tokens(retention, TOKENS))
        return SceneCondition(oracle=Oracle(f"{kind}_attention", retention, select, f"layer {layer}"))

    return [
        at(kind, layer, retention)
        for retention in retentions
        for kind in ("words", "last_token")
        for layer in range(len(adapter.decoder_layers))
    ]


def targets(result: dict[str, Any]) -> list[str]:
    """Return the conditions that the world must meet before any policy is trained, each with its figure."""
    rows = result["rows"]

    def value(method: str, retention: float) -> float:
        found = [r["accuracy"] for r in rows if r["method"] == method and r["retention"] == retention]
        return max(found, default=float("nan"))

    knowing = {"full", "wrong_video", "question_oracle", "object_oracle", "first_look", "words_attention"}
    full = value("full", 1.0)
    lines = [_line("full tokens ≥ .88", full, full >= 0.88)]
    wrong = value("wrong_video", 1.0)
    lines.append(_line("another video's tokens .25 ± .03", wrong, abs(wrong - 0.25) <= 0.03))
    measured = {r["retention"] for r in rows}
    for retention, slack in ((0.1, 0.02), (0.025, 0.05)):
        if retention not in measured:
            continue
        oracle = value("question_oracle", retention)
        name = f"question oracle at {retention:g} ≥ full − {slack:g}"
        lines.append(_line(name, oracle - full, oracle >= full - slack))
    for retention, distance in ((0.1, 0.12), (0.25, 0.05)):
        if retention not in measured:
            continue
        oracle = value("question_oracle", retention)
        best = max(
            ((r["accuracy"], r["method"]) for r in rows if r["method"] not in knowing and r["retention"] == retention),
            default=(float("nan"), "-"),
        )
        name = f"best without training ({best[1]}) at {retention:g} ≤ question oracle − {distance:g}"
        lines.append(_line(name, best[0] - oracle, best[0] <= oracle - distance))
    if 0.1 not in measured:
        return lines
    blind, oracle = value("object_oracle", 0.1), value("question_oracle", 0.1)
    name = "question-blind object oracle at 0.1 ≤ question oracle − 0.06"
    lines.append(_line(name, blind - oracle, blind <= oracle - 0.06))
    return lines


def _line(condition: str, figure: float, met: bool) -> str:
    return f"{'met   ' if met else 'MISSED'}  {condition}: {figure:+.3f}"


def first_look(adapter: Adapter, retention: float | Tokens, layer: int | None = None) -> SceneCondition:
    """Return the condition of a layer's queries and keys on what enters the LLM, question words to video tokens.

    Nothing is trained, and nothing of the LLM runs. For layer 0 that is its attention; default: the first layer that
    sees the video, as in `FirstLook`.
    """
    layer = adapter.first_full_layer if layer is None else layer
    state = adapter.layer_state(layer)
    look = FirstLook(state.shape)
    look.load_state_dict({name: tensor for name, tensor in state.weights.items() if name in look.state_dict()})

    def score(adapter: Adapter, scene: SceneBatch, number: int, video: VideoTokens) -> Tensor:
        if video.prompt is None:
            raise NeedError("the first look needs the prompt")
        attention: Tensor = look(video, video.prompt)
        return attention.amax((0, 1))

    build = _scored(score, frozenset({Need.QUESTION}))
    count = retention.count if isinstance(retention, Tokens) else kept_tokens(retention, TOKENS)
    ratio = count / TOKENS if isinstance(retention, Tokens) else retention
    return SceneCondition(oracle=Oracle("first_look", ratio, build(count), f"layer {layer}"))


def wrong_video(processor: Any, world: str, seed: int) -> SceneCondition:
    """Return the condition in which all tokens are those of another scene: what the text alone gives away."""

    def select(adapter: Adapter, scene: SceneBatch, number: int, generator: Generator) -> Selection:
        frames = render(make_cast(world, seed + 1, scene.index), seed + 1, scene.index)
        (features,) = adapter.video_features(chat_inputs(processor, frames, [scene.questions[0].text]))
        return Selection(torch.arange(TOKENS), embeds=features.embeds)

    return SceneCondition(oracle=Oracle("wrong_video", 1.0, select, per_question=False))
