"""Contents of the papers' tables: benchmarks and methods, trainings that differ in one thing, or times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vidsieve.errors import UnknownNameError
from workbench.testbed.ablations import BASE


@dataclass(frozen=True)
class Trained:
    """A row whose policy is trained in a way of its own.

    Parameters
    ----------
    method : str
    options, data : str
        What `vidsieve train METHOD FOLDER` is given to train it, and what stands for its file of prompts.
    fields : dict
        Fields of the method, where rows differ in how one policy's scores are spent.
    ablation, label, view : str
        Its row of the testbed's own ablations: table, condition, and what is behind the condition's name.
    """

    method: str
    options: str = ""
    data: str = "FILE"
    fields: Mapping[str, Any] = field(default_factory=dict)
    ablation: str = ""
    label: str = ""
    view: str = ""


@dataclass(frozen=True)
class PaperTable:
    """One table.

    Parameters
    ----------
    kind : {"accuracy", "training", "time"}
    protocols : dict
        By model, the name of the protocol by which it is evaluated.
    benchmarks : tuple of str
        Columns.
    fields : dict
        What methods are given where they have such a field: SCORE's tables have the parts before the LLM alone.
    trained : dict
        By row, for tables of trainings.
    blueprint, small : str
        Of tables of times: the size measured, and a small one of the same family.
    lengths : tuple of int
        Frames of the videos that are timed.
    """

    kind: str
    protocols: Mapping[str, str]
    benchmarks: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    trained: Mapping[str, Trained] = field(default_factory=dict)
    blueprint: str = ""
    small: str = ""
    lengths: tuple[int, ...] = ()


_OV = {"llava-onevision": "cacovid:llava-onevision"}
_QWEN = {"qwen2.5-vl": "score:qwen2.5-vl"}
_FILTERED = "FILE-AFTER-vidsieve-data-filter"
_PSEUDO = "--variant paper --pseudo PSEUDO-VIDEOS --pseudo-steps 1250"
_REPLAYED = "--iterations 5 --dynamic-ratio"
_SPENT = {"FrameAvg": "frame_avg", "FrameAda": "frame_ada", "FrameAda+ST": "frame_ada_st"}


def _sampled(options: str, table: str, label: str = BASE.label, data: str = "FILE") -> Trained:
    options = f"--variant paper --frame-rollouts 8 {options}"
    return Trained("cacovid", options, data, ablation=table, label=label)


PAPER_TABLES: dict[str, PaperTable] = {
    "cacovid:table1": PaperTable(
        "accuracy", _OV | {"qwen2.5-vl": "cacovid:qwen2.5-vl"}, ("longvideobench", "mlvu", "mlvu-test", "videomme")
    ),
    "cacovid:table2": PaperTable(
        "time", _OV, blueprint="llava-onevision-7b", small="llava-onevision-0.1b", lengths=(32,)
    ),
    "cacovid:table3": PaperTable(
        "training",
        _OV,
        ("mlvu", "videomme"),
        trained={
            "OCSS, video, 2 %": _sampled(
                f"--ratio 0.02 {_REPLAYED} --set over=video", "sampling", "OCSS over the whole video, as many tokens"
            ),
            "OCSS, frame, 2 %": _sampled(f"--ratio 0.02 {_REPLAYED}", "sampling"),
            "random, frame, 2 %": _sampled(f"--ratio 0.02 {_REPLAYED} --set sampler=random", "sampling", "random"),
            "multinomial, frame, 2 %": _sampled(
                f"--ratio 0.02 {_REPLAYED} --set sampler=multinomial", "sampling", "multinomial"
            ),
            "OCSS, frame, 1 %": _sampled(f"--ratio 0.01 {_REPLAYED}", "ratio", "one token of every frame"),
            "OCSS, frame, 5 %": _sampled(f"--ratio 0.05 {_REPLAYED}", "ratio", "four tokens"),
        },
    ),
    "cacovid:table4": PaperTable(
        "training",
        _OV,
        ("mlvu", "videomme"),
        trained={
            "none": _sampled("--ratio 0.02", "exploration"),
            "ISF": _sampled("--ratio 0.02", "exploration", "ISF", _FILTERED),
            "ISF, ER": _sampled("--ratio 0.02 --iterations 5", "exploration", "ISF + ER", _FILTERED),
            "ISF, ER, DSR": _sampled(f"--ratio 0.02 {_REPLAYED}", "exploration", "ISF + ER + DSR", _FILTERED),
        },
    ),
    "cacovid:table5": PaperTable(
        "training",
        _OV,
        ("mlvu", "videomme"),
        trained={
            row: replace(
                _sampled(f"--ratio 0.02 {_REPLAYED}", "allocation", data=_FILTERED),
                fields={"allocation": way},
                view=f"[{way}]",
            )
            for row, way in _SPENT.items()
        },
    ),
    "score:table1": PaperTable("accuracy", _QWEN, ("lvbench", "mlvu", "videomme"), {"inner": False}),
    "score:table2": PaperTable("accuracy", {"llava-video": "score:llava-video"}, ("videomme",), {"inner": False}),
    "score:table3": PaperTable(
        "time", _QWEN, blueprint="qwen2.5-vl-7b", small="qwen2.5-vl-0.1b", lengths=(32, 64, 96, 128)
    ),
    "score:table4": PaperTable(
        "training",
        _QWEN,
        ("lvbench", "mlvu", "videomme"),
        trained={
            "pseudo": Trained("score", f"{_PSEUDO} --steps 1250", ablation="curriculum", label="pseudo"),
            "pseudo + real": Trained(
                "score", f"{_PSEUDO} --steps 8375", ablation="curriculum", label="half pseudo, then real"
            ),
        },
    ),
    "score:table5": PaperTable(
        "training",
        _QWEN,
        ("videomme",),
        trained={
            "without residual": Trained(
                "score", "--variant paper --set residual=false", ablation="residual", label="X alone"
            ),
            "with residual": Trained("score", "--variant paper", ablation="residual", label="[X; ΔX]"),
        },
    ),
}


def paper_table(name: str) -> PaperTable:
    """Return the contents of a table.

    Raises
    ------
    UnknownNameError
    """
    if name not in PAPER_TABLES:
        raise UnknownNameError("table", name, PAPER_TABLES)
    return PAPER_TABLES[name]
