"""Every model family on a tiny random model: what correct means, calls, methods inside the LLM; docs/families.md.

A family is saved when it is done, and skipped when its files have not changed since.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import vidsieve
from vidsieve import registry
from vidsieve.adapters.adapter import Adapter
from vidsieve.adapters.pruning import adapter_for
from vidsieve.compressors.inside import DecodeCompressor, LayerCompressor
from vidsieve.errors import VidsieveError
from vidsieve.io.files import writing
from vidsieve.io.machine import machine, write_result
from vidsieve.io.versions import minor
from vidsieve.serving.vllm.plugin import MODELS
from vidsieve.testing.calls import CALLS, Case
from vidsieve.testing.equivalence import TOLERANCE, check_full_retention, configuration
from vidsieve.testing.tiny_models import FAMILIES
from vidsieve.types import ENCODER_NEEDS, Stage
from workbench.families import families, tiny

RETENTION = 0.3
LAYERS = 24
"""Layers of the tiny models on which methods inside the LLM are tried: enough for each method's own."""


def subject(family: str, layers: int | None = None) -> tuple[Any, list[Mapping[str, Any]]]:
    """Return a family's tiny model, and its inputs for one prompt and for a ragged batch of two."""
    if family in FAMILIES:
        model = FAMILIES[family]() if layers is None else FAMILIES[family](layers=layers)
        return model, [configuration(family, name) for name in ("batch 1", "ragged batch 2")]
    kind = tiny(family)
    given = [kind.inputs([[3]], [5], "left"), kind.inputs([[3, 2], [2]], [3, 9], "left")]
    return kind.model(0, layers or kind.layers), given


def calls(family: str) -> dict[str, Any]:
    """Return the largest difference of every call from the family's reference, or the error of a call that is refused.

    Raises
    ------
    CheckFailure
        If the model's own logits are not reproduced with every token kept.
    """
    model, batches = subject(family)
    found: dict[str, Any] = {}
    for inputs in batches:
        case = Case(adapter_for(model), inputs, vidsieve.load("random", retention=RETENTION))
        if case.adapter.layout == "installed":
            check_full_retention(case)
        for name, call in CALLS.items():
            try:
                difference, equal = call(case)
            except VidsieveError as error:
                found[name] = str(error)
                continue
            if isinstance(found.get(name, 0.0), float | int):
                found[name] = max(difference if equal is not False else float("inf"), found.get(name, 0.0))
    return found


def inside(family: str) -> dict[str, str]:
    """Return the error of every method inside the LLM on a model with `LAYERS` layers; empty where it runs."""
    model, (inputs, _) = subject(family, LAYERS)
    found = {}
    for name in registry.compressors:
        method = registry.compressors.get(name)
        if not issubclass(method, LayerCompressor | DecodeCompressor):
            continue
        try:
            with vidsieve.attach(model, vidsieve.load(name, retention=0.5)):
                model.generate(**inputs, max_new_tokens=2, do_sample=False)
        except VidsieveError as error:
            found[name] = str(error)
        else:
            found[name] = ""
    return found


def facts(family: str) -> dict[str, Any]:
    """Return everything that the page says of one family."""
    model, (inputs, _) = subject(family)
    adapter: Adapter = adapter_for(model)
    text = model.config.get_text_config()
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ["full_attention"]))
    why = " ".join((type(adapter).__doc__ or "").split())
    return {
        "class": type(model).__name__,
        "about": why,
        "definition": adapter.definition,
        "oldest": adapter.oldest,
        "layers": kinds,
        "positions": adapter.encode(inputs).positions[adapter.position_rows].shape[0],
        "calls": calls(family),
        "inside": inside(family),
        "encoder": bool(adapter.provides & ENCODER_NEEDS),
        "vllm": type(model).__name__ in MODELS,
    }


def made_by() -> str:
    """Return a hash of the code that a result depends on."""
    folder = Path(vidsieve.__file__).parent
    files = [*folder.glob("adapters/**/*.py"), *folder.glob("testing/*.py"), *Path("workbench/families").glob("*.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


def fronts(names: Iterable[str]) -> list[str]:
    """Return lines on which families let methods act before the vision encoder, and between its blocks."""
    every = {adapter.family: adapter for adapter in map(registry.families.get, registry.families)}
    lines = []
    for stage, method in ((Stage.FRAME, "reuse"), (Stage.ENCODER, "earlytom")):
        reasons: dict[str, list[str]] = {}
        for name in names:
            if stage not in every[name].fronts:
                reasons.setdefault(every[name].lacks[stage], []).append(f"`{name}`")
        refused = "; ".join(f"{', '.join(missing)} ({reason})" for reason, missing in reasons.items())
        lines.append(f"- {stage.value} (`{method}`): all families but {refused}.")
    return lines


def exact(row: Mapping[str, Any]) -> str:
    """Return how many calls are exact, and the largest difference."""
    numbers = [value for value in row["calls"].values() if not isinstance(value, str)]
    good = sum(value <= TOLERANCE for value in numbers)
    return f"{good} of {len(row['calls'])}, {max(numbers):.0e}"


def page(result: Mapping[str, Any]) -> str:
    """Return docs/families.md."""
    rows = result["families"]
    lines = [
        "# Model families",
        "",
        f"Written by `python benchmarks/families.py`: {len(rows)} families, transformers "
        f"{result['machine']['transformers']}, tiny random models of the real classes, float32, one prompt and a "
        "ragged batch of two.",
        "",
        "- **masked**: a pruned run equals a run of the whole prompt in which the dropped tokens are masked out at "
        "unchanged positions.",
        "- **shortened**: layers do more than attend to every earlier token, so it equals a fresh run of the stock "
        "model on the shortened prompt, alone, at the same positions.",
        f"- calls: how many of {len(CALLS)} kinds of call ({', '.join(CALLS)}) equal that reference within "
        f"{TOLERANCE:g}, and the largest difference. With every token kept, all families equal the stock model.",
        f"- inside: methods inside the LLM that run on {LAYERS} layers; the others are refused, see below.",
        "- encoder: signals of the vision encoder, which `visionzip` and others read.",
        "",
        "| family | class | definition | positions | calls | inside | encoder | vLLM |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        runs = [method for method, error in row["inside"].items() if not error]
        inner = "all" if len(runs) == len(row["inside"]) else (", ".join(runs) or "none")
        cells = [
            f"`{name}`",
            f"`{row['class']}`",
            row["definition"],
            "1-D" if row["positions"] == 1 else "M-RoPE",
            exact(row),
            inner,
            *("yes" if row[key] else "no" for key in ("encoder", "vllm")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Before and inside the vision encoder", "", *fronts(rows)]
    lines += ["", "## What each family is", ""]
    lines += [f"- `{name}` ({', '.join(row['layers'])}): {row['about']}" for name, row in rows.items()]
    reasons: dict[str, dict[str, list[str]]] = {}
    for name, row in rows.items():
        for what, outcome in {**row["calls"], **row["inside"]}.items():
            if isinstance(outcome, str) and outcome:
                reason = outcome.replace(f"the {name} adapter", "the adapter").removeprefix(f"{what} ")
                reason = re.sub(r"\b[A-Z]\w*(RotaryEmbedding|DecoderLayer)\b", r"\1", reason.replace(what, "it"))
                reasons.setdefault(reason.replace(name, "the family"), {}).setdefault(name, []).append(what)
    lines += ["", "## Refused", ""]
    for reason, where in reasons.items():
        several: dict[str, list[str]] = {}
        for name, names in where.items():
            several.setdefault(", ".join(names), []).append(f"`{name}`")
        places = [f"{', '.join(found)} ({which})" for which, found in several.items()]
        lines.append(f"- {'; '.join(places)}: {reason}")
    if result["versions"]:
        lines += [
            "",
            "## Versions of transformers",
            "",
            "Families that run in each; an older transformers is refused by name.",
            "",
        ]
        for version, missing in result["versions"].items():
            lines.append(f"- {version}: {'all of them' if not missing else 'all but ' + ', '.join(missing)}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", help="names, with commas; default: all")
    parser.add_argument("--installed", nargs="*", default=[], help="folders with other versions of transformers")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/families.json"))
    parser.add_argument("--page", type=Path, default=Path("docs/families.md"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    names = options.families.split(",") if options.families else [*FAMILIES, *families()]
    known = json.loads(options.json.read_text()) if options.json.exists() else {}
    code, rows = made_by(), dict(known.get("families", {}))
    for name in names:
        if rows.get(name, {}).get("made_by") == code:
            continue
        rows[name] = facts(name) | {"made_by": code}
        print(f"{name}: {rows[name]['definition']}, {exact(rows[name])}", flush=True)
        write_result(options.json, {"machine": machine(), "families": rows, "versions": known.get("versions", {})})
    versions = dict(known.get("versions", {}))
    for folder in map(Path, options.installed):
        (about,) = folder.glob("transformers-*.dist-info")
        version = about.name.removeprefix("transformers-").removesuffix(".dist-info")
        versions[version] = [name for name, row in rows.items() if minor(version) < minor(row["oldest"])]
    result = {"machine": machine(), "families": rows, "versions": versions}
    write_result(options.json, result)
    with writing(options.page) as temporary:
        temporary.write_text(page(result), encoding="utf-8")


if __name__ == "__main__":
    main()
