"""Evaluation protocols of the two papers: model, frames, tokens a frame, benchmarks, averages."""

from __future__ import annotations

from dataclasses import dataclass

from vidsieve.errors import UnknownNameError


@dataclass(frozen=True)
class Protocol:
    """One model of one paper's tables.

    Parameters
    ----------
    name, paper : str
    model : str
        Hub id.
    frames : int
        Taken evenly; of a video with fewer all of them.
    tokens_per_frame : int or None
        At most so many; None: as the model's processor has it.
    benchmarks : tuple of str
        Whose figures the paper's average is the mean of.
    retentions : tuple of float
    layout : str or None
        As `prune` has it.
    """

    name: str
    paper: str
    model: str
    frames: int
    tokens_per_frame: int | None
    benchmarks: tuple[str, ...]
    retentions: tuple[float, ...]
    layout: str | None = None


_CACOVID = "CaCoVID, AAAI 2026, Table 1"
_FOUR = ("longvideobench", "mlvu", "mlvu-test", "videomme")
_SCORE = "SCORE, Table 1"
_THREE = ("lvbench", "mlvu", "videomme")
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "cacovid:llava-onevision",
            _CACOVID,
            "llava-hf/llava-onevision-qwen2-7b-ov-hf",
            32,
            None,
            _FOUR,
            (0.25, 0.2, 0.15, 0.1),
        ),
        Protocol("cacovid:qwen2.5-vl", _CACOVID, "Qwen/Qwen2.5-VL-3B-Instruct", 64, 256, _FOUR, (0.25, 0.2, 0.15, 0.1)),
        Protocol("score:qwen2.5-vl", _SCORE, "Qwen/Qwen2.5-VL-7B-Instruct", 128, None, _THREE, (0.4, 0.25, 0.1)),
        Protocol(
            "score:llava-video",
            "SCORE, Table 2",
            "llava-hf/LLaVA-Video-7B-Qwen2-hf",
            64,
            None,
            ("videomme",),
            (0.4, 0.25, 0.1),
            "grid",
        ),
    )
}


def protocol(name: str) -> Protocol:
    """Return the protocol of a name.

    Raises
    ------
    UnknownNameError
    """
    if name not in PROTOCOLS:
        raise UnknownNameError("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
