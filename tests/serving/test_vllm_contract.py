"""What the plug-in relies on in vLLM, checked against a release's sources without running it.

VIDSIEVE_VLLM_SOURCE is the folder of a package `vllm`, installed or unpacked from a wheel.
"""

from __future__ import annotations

import ast
import bisect
import os
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import vidsieve.serving.vllm as ours
from tests.serving.test_vllm_mrope import Request
from vidsieve.serving.vllm.plugin import MODELS

SOURCE = Path(os.environ.get("VIDSIEVE_VLLM_SOURCE", "none"))
OURS = sorted(Path(ours.__path__[0]).glob("*.py"))
BASES = {
    "PruningProcessor": [("multimodal/processing/processor.py", "BaseMultiModalProcessor")],
    "CarriesPositions": [
        ("model_executor/models/qwen3_vl.py", "Qwen3VLForConditionalGeneration"),
        ("model_executor/models/qwen2_5_vl.py", "Qwen2_5_VLForConditionalGeneration"),
    ],
    "LlavaOnevision": [("model_executor/models/llava_onevision.py", "LlavaOnevisionForConditionalGeneration")],
}
"""vLLM's classes under ours; of a processor the classes of families inherit the rest."""
USED = {
    ("v1/engine/output_processor.py", "OutputProcessor"): {
        "add_request": ["request"],
        "process_outputs": ["engine_core_outputs"],
        "abort_requests": ["request_ids", "internal"],
    },
    ("v1/engine/output_processor.py", "OutputProcessorOutput"): {"reqs_to_abort": None},
    ("v1/engine/__init__.py", "EngineCoreOutput"): dict.fromkeys(
        ("request_id", "new_token_ids", "new_logprobs", "pooling_output", "finish_reason", "stop_reason")
    ),
    ("v1/engine/__init__.py", "FinishReason"): {"ERROR": None},
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner"): {"load_model": []},
    ("config/multimodal.py", "MultiModalConfig"): {"video_pruning_rate": None, "is_multimodal_pruning_enabled": []},
    ("config/compilation.py", "CompilationConfig"): {"cudagraph_mm_encoder": None},
    ("multimodal/inputs.py", "MultiModalFeatureSpec"): dict.fromkeys(
        ("data", "modality", "identifier", "mm_position", "mm_hash")
    ),
    ("multimodal/registry.py", "MultiModalRegistry"): {"register_processor": ["processor", "info", "dummy_inputs"]},
    ("multimodal/inputs.py", "MultiModalFieldConfig"): {"batched": ["modality", "keep_on_cpu"]},
    ("model_executor/models/llava_onevision.py", "LlavaOnevisionProcessingInfo"): {
        "get_num_video_tokens": ["image_width", "image_height", "num_frames"]
    },
    ("model_executor/models/qwen3_vl.py", "Qwen3VLMultiModalProcessor"): {
        "get_video_repl": [
            "tokens_per_frame",
            "timestamps",
            "tokenizer",
            "vision_start_token_id",
            "vision_end_token_id",
            "video_token_id",
        ]
    },
}
"""Fields, and methods with the first of their arguments or those that we name."""

pytestmark = pytest.mark.skipif(not SOURCE.is_dir(), reason="VIDSIEVE_VLLM_SOURCE is not the folder of a package vllm")


@cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


def names(path):
    """Return what a module defines or imports at its top, also behind conditions."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
    for node in tree(path).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found | lazy(path)


def lazy(path):
    """Return names that a package imports on demand, which are keys of a literal mapping."""
    mappings = [node for node in tree(path).body if isinstance(node, ast.AnnAssign | ast.Assign)]
    keys = [key for node in mappings if isinstance(node.value, ast.Dict) for key in node.value.keys]
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def module(name):
    base = SOURCE.joinpath(*name.split(".")[1:])
    return base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__init__.py"


def body(path, name):
    """Return the definition of a class or function of a module."""
    return next(node for node in tree(path).body if getattr(node, "name", None) == name)


def arguments(function):
    return [argument.arg for argument in (*function.args.args, *function.args.kwonlyargs) if argument.arg != "self"]


def functions(definition):
    return {node.name: node for node in definition.body if isinstance(node, ast.FunctionDef)}


def imports():
    """Return (module, name) of everything that our package takes from vLLM."""
    for path in OURS:
        aliases = {}
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                for alias in node.names:
                    yield node.module, alias.name
                    aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "theirs":
                yield aliases["theirs"], node.attr


def test_everything_that_we_import_is_there():
    found = set(imports())
    assert len(found) > 25
    for where, name in found:
        is_module = module(f"{where}.{name}").is_file()
        assert is_module or (module(where).is_file() and name in names(module(where))), f"{where} has no {name}"


def test_every_architecture_has_its_class():
    registry = ast.unparse(tree(SOURCE / "model_executor/models/registry.py"))
    assert not [name for name in MODELS if f"'{name}'" not in registry]


@pytest.mark.parametrize("name", sorted(BASES))
def test_our_methods_take_what_those_below_them_take(name):
    mine = next(body(path, name) for path in OURS if f"class {name}" in path.read_text("utf-8"))
    called = {
        key: method for key, method in functions(mine).items() if f"super().{key}(" in ast.unparse(method)
    }  # those that go on to vLLM's
    assert called
    for where, base in BASES[name]:
        theirs = functions(body(SOURCE / where, base))
        for key, method in called.items():
            if method.args.vararg is None:
                assert arguments(method) == arguments(theirs[key]), f"{base}.{key}"
            assert key in theirs, f"{base} has no {key}"


@pytest.mark.parametrize(("where", "name"), sorted(USED))
def test_what_we_read_and_call_is_there(where, name):
    definition = body(SOURCE / where, name)
    methods = functions(definition)
    fields = {node.target.id for node in definition.body if isinstance(node, ast.AnnAssign)}
    fields |= {t.id for node in definition.body if isinstance(node, ast.Assign) for t in node.targets}
    for key, wanted in USED[where, name].items():
        if wanted is None:
            assert key in fields, f"{name} has no {key}"
        else:
            assert not set(wanted) - set(arguments(methods[key])), f"{name}.{key}"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_the_second_runner_gets_the_same_positions_and_embeddings(family):
    """Model Runner V2's pruner, from the sources, over a request that is computed a few tokens at a time."""
    request = Request(family, 0.5)
    embeds, wanted, delta = request.run(len(request.ids))
    window = taken(SOURCE / "multimodal/utils.py", "get_mm_features_in_window", bisect=bisect, MultiModalFeatureSpec=0)
    pruner = taken(
        SOURCE / "v1/worker/gpu/model_states/mm_pruning.py",
        "MultiModalPruner",
        torch=torch,
        nn=torch.nn,
        get_mm_features_in_window=window,
        copy_mm_embedding_modality=lambda src, dst: dst,
        **dict.fromkeys(("RopeState", "EncoderCache", "InputBatch", "RequestState"), object),
    )
    for feature in request.features:
        feature.mm_position.get_embeds_indices_in_range = lambda start, end: (start, end)
    length = len(request.ids)
    ids, (rows, first) = (
        torch.tensor([request.ids]),
        request.model.get_mrope_input_positions(request.ids, request.features),
    )
    state = SimpleNamespace(rows=rows.int(), delta=first)
    state.read_prefill_positions = lambda index, count: state.rows[:, :count]
    state.update_prefill_positions = lambda index, new, delta: (state.rows.copy_(new), setattr(state, "delta", delta))
    cache_of = SimpleNamespace(mm_features={"a": request.features})
    width = request.pieces[0].shape[1] - 9
    step, got = pruner(request.model, state, cache_of, width), []
    for start in range(0, length, 5):
        end = min(start + 5, length)
        some = [
            piece[max(start - f.mm_position.offset, 0) : max(end - f.mm_position.offset, 0)]
            for f, piece in zip(request.features, request.pieces, strict=True)
        ]
        some = [piece for piece in some if len(piece)]
        batch = SimpleNamespace(
            req_ids=["a"],
            idx_mapping_np=torch.tensor([0]),
            prefill_len_np=torch.tensor([length]),
            num_computed_prefill_tokens_np=torch.tensor([start]),
            num_scheduled_tokens=torch.tensor([end - start]),
        )
        states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=ids))
        assert all(torch.equal(a, b[:, :width]) for a, b in zip(step.strip(some), some, strict=True))
        got += step.recompute(some, batch, states)
    assert torch.equal(torch.cat(got), embeds)
    assert torch.equal(state.rows.long(), wanted) and state.delta == delta


def taken(path, name, **known):
    """Return a class or function of a module, with the names `known` in place of what it imports."""
    scope = dict(known)
    exec(compile(ast.Module([body(path, name)], []), str(path), "exec"), scope)
    return scope[name]
