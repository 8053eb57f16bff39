"""Tables from names to classes, imported on first use: one line per method, model family and benchmark."""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from vidsieve.errors import PluginError, UnknownNameError
from vidsieve.io.hub import is_hub_name, no_policy


class Registry:
    """A table from names to ``"module:Class"``; entry points of `group` are added on first use.

    Parameters
    ----------
    kind : str
        What the names denote, for messages.
    group : str
        Entry-point group with the names of other packages.
    table : dict
        vidsieve's own names.
    """

    def __init__(self, kind: str, group: str, table: dict[str, str]) -> None:
        self.kind, self.group = kind, group
        self._table = dict(table)
        self._plugins_read = False

    def _all(self) -> dict[str, str]:
        if not self._plugins_read:
            self._plugins_read = True
            for entry in entry_points(group=self.group):
                try:
                    self.register(entry.name, entry.value)
                except ValueError as error:
                    warnings.warn(f"an installed plug-in is ignored: {error}", stacklevel=4)
        return self._table

    def register(self, name: str, target: str) -> None:
        """Add `name` → ``"module:Class"``.

        Raises
        ------
        ValueError
            If the name is taken by another target, or `target` is not of that form.
        """
        module, colon, attribute = target.partition(":")
        if not (module and colon and attribute.isidentifier()):
            raise ValueError(f"a {self.kind} is registered as 'module:Class', got {target!r}")
        taken = self._table.setdefault(name, target)
        if taken != target:
            raise ValueError(f"the {self.kind} {name!r} is registered already, as {taken}")

    def names(self) -> list[str]:
        """Return every registered name, in the order of registration."""
        return list(self._all())

    def get(self, name: str) -> Any:
        """Return the class registered as `name`, importing its module.

        Raises
        ------
        UnknownNameError
            If there is none; the text suggests the nearest names.
        PluginError
            If its module cannot be imported.
        """
        target = self._all().get(name)
        if target is None:
            raise UnknownNameError(self.kind, name, self._all())
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise PluginError(f"the {self.kind} {name!r} is registered as {target}, which fails: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        return name in self._all()


compressors = Registry(
    "method",
    "vidsieve.compressors",
    {
        "random": "vidsieve.compressors.random:Random",
        "uniform": "vidsieve.compressors.uniform:Uniform",
        "downsample": "vidsieve.compressors.downsample:Downsample",
        "frame_difference": "vidsieve.compressors.frame_difference:FrameDifference",
        "divprune": "vidsieve.compressors.divprune:DivPrune",
        "cacovid": "vidsieve.compressors.cacovid:CaCoVID",
        "score": "vidsieve.compressors.score:Score",
        "sieve": "vidsieve.compressors.sieve:Sieve",
        "visionselector": "vidsieve.compressors.visionselector:VisionSelector",
        "visionzip": "vidsieve.compressors.visionzip:VisionZip",
        "fastv": "vidsieve.compressors.fastv:FastV",
        "dycoke": "vidsieve.compressors.dycoke:DyCoke",
        "evs": "vidsieve.compressors.evs:EVS",
        "vidcom2": "vidsieve.compressors.vidcom2:VidCom2",
        "vcast": "vidsieve.compressors.vcast:VCast",
        "gleanvid": "vidsieve.compressors.gleanvid:GleanVID",
        "aot": "vidsieve.compressors.aot:AOT",
        "fastvid": "vidsieve.compressors.fastvid:FastVID",
        "holitom": "vidsieve.compressors.holitom:HoliTom",
        "earlytom": "vidsieve.compressors.earlytom:EarlyTom",
        "framefusion": "vidsieve.compressors.framefusion:FrameFusion",
        "prunevid": "vidsieve.compressors.prunevid:PruneVID",
        "pyramiddrop": "vidsieve.compressors.pyramiddrop:PyramidDrop",
        "sparsevlm": "vidsieve.compressors.sparsevlm:SparseVLM",
        "flashvid": "vidsieve.compressors.flashvid:FlashVID",
    },
)

fronts = Registry("method before the LLM's input", "vidsieve.fronts", {"reuse": "vidsieve.compressors.reuse:Reuse"})

families = Registry(
    "model family",
    "vidsieve.families",
    {
        "LlavaOnevisionForConditionalGeneration": "vidsieve.adapters.families.llava_onevision:LlavaOnevisionAdapter",
        "LlavaOnevisionForConditionalGeneration:grid": "vidsieve.adapters.families.llava_video:LlavaVideoAdapter",
        "Qwen2_5_VLForConditionalGeneration": "vidsieve.adapters.families.qwen2_5_vl:Qwen25VLAdapter",
        "Qwen2VLForConditionalGeneration": "vidsieve.adapters.families.qwen2_vl:Qwen2VLAdapter",
        "Qwen3VLForConditionalGeneration": "vidsieve.adapters.families.qwen3_vl:Qwen3VLAdapter",
        "Qwen3VLMoeForConditionalGeneration": "vidsieve.adapters.families.qwen3_vl_moe:Qwen3VLMoeAdapter",
        "Qwen3_5ForConditionalGeneration": "vidsieve.adapters.families.qwen3_5:Qwen35Adapter",
        "Qwen3_5MoeForConditionalGeneration": "vidsieve.adapters.families.qwen3_5:Qwen35MoeAdapter",
        "LlavaNextVideoForConditionalGeneration": "vidsieve.adapters.families.llava_next_video:LlavaNextVideoAdapter",
        "VideoLlama3ForConditionalGeneration": "vidsieve.adapters.families.video_llama_3:VideoLlama3Adapter",
        "PerceptionLMForConditionalGeneration": "vidsieve.adapters.families.perception_lm:PerceptionLMAdapter",
        "Exaone4_5_ForConditionalGeneration": "vidsieve.adapters.families.exaone4_5:Exaone45Adapter",
        "Qwen2_5OmniThinkerForConditionalGeneration": "vidsieve.adapters.families.qwen_omni:Qwen25OmniAdapter",
        "Qwen3OmniMoeThinkerForConditionalGeneration": "vidsieve.adapters.families.qwen_omni:Qwen3OmniMoeAdapter",
        "Ernie4_5_VLMoeForConditionalGeneration": "vidsieve.adapters.families.ernie4_5_vl_moe:Ernie45VLMoeAdapter",
        "Cosmos3EdgeForConditionalGeneration": "vidsieve.adapters.families.cosmos3:Cosmos3EdgeAdapter",
        "Cosmos3OmniForConditionalGeneration": "vidsieve.adapters.families.cosmos3:Cosmos3OmniAdapter",
        "CohereCompassForConditionalGeneration": "vidsieve.adapters.families.cohere_compass:CohereCompassAdapter",
        "Glm4vForConditionalGeneration": "vidsieve.adapters.families.glm:Glm4vAdapter",
        "Glm46VForConditionalGeneration": "vidsieve.adapters.families.glm:Glm46vAdapter",
        "Glm4vMoeForConditionalGeneration": "vidsieve.adapters.families.glm:Glm4vMoeAdapter",
        "GlmOcrForConditionalGeneration": "vidsieve.adapters.families.glm:GlmOcrAdapter",
        "VideoLlavaForConditionalGeneration": "vidsieve.adapters.families.video_llava:VideoLlavaAdapter",
        "HyperCLOVAXVisionV2ForConditionalGeneration": (
            "vidsieve.adapters.families.hyperclovax_vision_v2:HyperCLOVAXVisionV2Adapter"
        ),
        "Molmo2ForConditionalGeneration": "vidsieve.adapters.families.molmo2:Molmo2Adapter",
        "MiniCPMV4_6ForConditionalGeneration": "vidsieve.adapters.families.minicpmv4_6:MiniCPMV46Adapter",
        "MiniCPMV4_7ForConditionalGeneration": "vidsieve.adapters.families.minicpmv4_7:MiniCPMV47Adapter",
        "Kimi_K25ForConditionalGeneration": "vidsieve.adapters.families.kimi_k25:KimiK25Adapter",
        "MiniCPMOcrForConditionalGeneration": "vidsieve.adapters.families.minicpmv4_6:MiniCPMOcrAdapter",
        "Gemma4ForConditionalGeneration": "vidsieve.adapters.families.gemma4:Gemma4Adapter",
        "Gemma4UnifiedForConditionalGeneration": "vidsieve.adapters.families.gemma4:Gemma4UnifiedAdapter",
        "InternVLForConditionalGeneration": "vidsieve.adapters.families.internvl:InternVLAdapter",
        "Lfm3VlForConditionalGeneration": "vidsieve.adapters.families.lfm3_vl:Lfm3VlAdapter",
        "NemotronH_Omni_Reasoning_V3": "vidsieve.adapters.families.nemotron_h_omni:NemotronHOmniAdapter",
        "SmolVLMForConditionalGeneration": "vidsieve.adapters.families.smolvlm:SmolVLMAdapter",
    },
)

benchmarks = Registry(
    "benchmark",
    "vidsieve.benchmarks",
    {
        "longvideobench": "vidsieve.evaluation.benchmarks.longvideobench:LONGVIDEOBENCH",
        "mlvu": "vidsieve.evaluation.benchmarks.mlvu:MLVU",
        "mlvu-test": "vidsieve.evaluation.benchmarks.mlvu:MLVU_TEST",
        "videomme": "vidsieve.evaluation.benchmarks.videomme:VIDEOMME",
        "lvbench": "vidsieve.evaluation.benchmarks.lvbench:LVBENCH",
        "questions": "vidsieve.evaluation.benchmarks.questions:QUESTIONS",
    },
)


def is_policy(name: str) -> bool:
    """Return True if a name is the folder of a policy, that of the run that trained it, or a name on the hub.

    ``:VARIANT`` may follow it.
    """
    names = [part for part in (name, name.rpartition(":")[0]) if part and part not in compressors]
    places = (os.path.join(part, place) for part in names for place in ("config.json", "policy/config.json"))
    return any(map(is_hub_name, names)) or any(map(os.path.isfile, places))


def check_known(name: str) -> None:
    """Refuse the name of a method that is neither registered nor a policy, in a folder or on the hub.

    No module of a method is imported, and the hub is not asked.

    Raises
    ------
    UnknownNameError, PolicyError
    """
    front, _, rest = name.partition("+")
    method = rest if front in fronts else name
    if name in ("all", "full") or not method or method.partition(":")[0] in compressors:
        return
    if not is_policy(method):
        if len(Path(method).parts) > 1:
            raise no_policy(method)
        raise UnknownNameError("method", method, compressors)
