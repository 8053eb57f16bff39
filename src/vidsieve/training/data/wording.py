"""Prompts about a video that is encoded already: the processor's text, without its pixels.

A processor puts many placeholders, and with some families words, where the chat template has one. That text does not
depend on the question, which follows it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.encoded import Encoded, VideoFeatures, on_device
from vidsieve.answering import chat, chat_text
from vidsieve.errors import UnsupportedCallError
from vidsieve.video.reading import Video


@dataclass(frozen=True)
class Wording:
    """A processor's outputs about one video, without pixels.

    Parameters
    ----------
    start, head : str
        How prompts about this video begin, up to and with the video: by the chat template, and as the processor
        writes it.
    kinds : dict of Tensor, (n, 2), int64
        Outputs with one value a token, such as ``mm_token_type_ids``: the ids whose value is not 0, and it.
    extras : dict of Tensor
        Outputs that tell of the video, such as ``video_grid_thw``.
    """

    start: str
    head: str
    kinds: dict[str, Tensor]
    extras: dict[str, Tensor]

    def inputs(self, processor: Any, question: str) -> dict[str, Any]:
        """Return the processor's inputs of a question about the video, pixels left out.

        Raises
        ------
        PromptError
            As `chat_text`.
        UnsupportedCallError
            If the processor's prompts begin otherwise now.
        """
        text = chat_text(processor, question)
        if not text.startswith(self.start):
            raise UnsupportedCallError("the chat template depends on the question before the video: use no cache")
        encoded = processor.tokenizer([self.head + text[len(self.start) :]], return_tensors="pt")
        ids = encoded["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": encoded["attention_mask"]} | self.extras
        for name, table in self.kinds.items():
            inputs[name] = torch.zeros_like(ids)
            for token, kind in table.tolist():
                inputs[name][ids == token] = kind
        return inputs


def is_pixels(name: str) -> bool:
    """Return True for an output of a processor that holds pixels, or their padding mask."""
    return name.startswith("pixel_")


def worded(processor: Any, video: Video, question: str) -> tuple[dict[str, Any], Wording]:
    """Return the outputs of `chat`, and the wording that gives them again without the pixels.

    Raises
    ------
    PromptError
        As `chat_text`.
    UnsupportedCallError
        If the wording does not give the same.
    """
    # A copy, as other threads use the processor too.
    recording, tokenizer = copy.copy(processor), _RecordingTokenizer(processor.tokenizer)
    recording.tokenizer = tokenizer
    outputs, text = chat(recording, video, question), chat_text(processor, question)
    written = tokenizer.texts[-1] if tokenizer.texts else ""
    rest = text.partition(processor.video_token)[2]
    ids = outputs["input_ids"]
    kinds, extras = {}, {}
    for name, value in outputs.items():
        if name in ("input_ids", "attention_mask") or is_pixels(name):
            continue
        if isinstance(value, Tensor) and value.shape == ids.shape:
            pairs = zip(ids[value != 0].tolist(), value[value != 0].tolist(), strict=True)
            kinds[name] = torch.tensor(sorted(set(pairs)), dtype=torch.int64).reshape(-1, 2)
        else:
            extras[name] = torch.as_tensor(value)
    wording = Wording(text[: len(text) - len(rest)], written[: len(written) - len(rest)], kinds, extras)
    again = wording.inputs(processor, question) if rest and written.endswith(rest) else {}
    if any(not is_pixels(name) and not _equal(again.get(name), value) for name, value in outputs.items()):
        raise UnsupportedCallError(
            f"prompts of {type(processor).__name__} cannot be made again without the video's pixels: use no cache"
        )
    return outputs, wording


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and torch.equal(one, torch.as_tensor(other))


class _RecordingTokenizer:
    """A tokenizer that records its inputs: a processor's prompts with their placeholders."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.texts = tokenizer, list[str]()

    def __call__(self, text: Any, *args: Any, **options: Any) -> Any:
        self.texts += [text] if isinstance(text, str) else text
        return self._tokenizer(text, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def prompt_about(adapter: Adapter, processor: Any, features: VideoFeatures, wording: Wording, question: str) -> Encoded:
    """Return a prompt that asks a question about a video that is encoded already."""
    inputs = on_device(wording.inputs(processor, question), adapter.device)
    ready = {"mm_encoder_outputs": adapter.ready_features(features)}
    return adapter.encode(inputs | ready).with_signals(features)
