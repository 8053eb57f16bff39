"""The package as a whole: light to import, complete in its public names, honest in its README."""

from __future__ import annotations

import ast
import importlib.util
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import vidsieve
from vidsieve import errors, registry
from vidsieve.errors import PluginError, UnknownNameError, VidsieveError
from vidsieve.registry import Registry


def loaded_after(statement):
    code = f"import sys\n{statement}\nprint(' '.join(sorted(m for m in sys.modules if '.' not in m)))"
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    assert not {"torch", "transformers", "av", "matplotlib", "typer"} & loaded_after("import vidsieve")


def test_compressors_are_torch_only():
    names = [m.name for m in pkgutil.iter_modules(vidsieve.__path__ and [f"{vidsieve.__path__[0]}/compressors"])]
    statement = "\n".join(f"import vidsieve.compressors.{name}" for name in names)
    assert not {"transformers", "av", "matplotlib"} & loaded_after(statement)


def test_help_is_fast_to_load():
    assert "torch" not in loaded_after("import vidsieve.cli")


def modules():
    found = [m.name for m in pkgutil.walk_packages(vidsieve.__path__, "vidsieve.")]
    if importlib.util.find_spec("vllm") is None:  # `make test-vllm` imports these
        theirs = ("processing", "llava_onevision", "qwen2_5_vl", "qwen3_5", "qwen3_vl", "qwen3_vl_moe")
        found = [name for name in found if name not in {f"vidsieve.serving.vllm.{part}" for part in theirs}]
    return found


def test_every_module_has_a_docstring_and_imports():
    found = modules()
    assert len(found) > 100
    assert not [name for name in found if not (importlib.import_module(name).__doc__ or "").strip()]


def test_public_names_are_sorted_complete_and_real():
    assert vidsieve.__all__ == sorted(vidsieve.__all__)
    for name in vidsieve.__all__:
        assert getattr(vidsieve, name) is not None
    assert set(dir(vidsieve)) == set(vidsieve.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = vidsieve.nonsense


def test_every_error_has_a_docstring():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, VidsieveError)]
    assert len(kinds) > 15 and all(kind.__doc__ for kind in kinds)


def test_registries_refuse_mistakes():
    table = Registry("thing", "vidsieve.test.nothing", {"alpha": "math:pi"})
    assert table.get("alpha") > 3 and list(table) == ["alpha"]
    table.register("beta", "math:e")
    table.register("beta", "math:e")
    with pytest.raises(ValueError, match="registered already"):
        table.register("beta", "math:pi")
    with pytest.raises(ValueError, match="'module:Class'"):
        table.register("gamma", "math.pi")
    with pytest.raises(UnknownNameError, match="Did you mean 'alpha'"):
        table.get("alpa")


def test_a_method_from_elsewhere_is_found_by_entry_point(monkeypatch):
    class Entry:
        name, value = "from_elsewhere", "vidsieve.compressors.random:Random"

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry] if group == "some.group" else [])
    table = Registry("compressor", "some.group", {})
    assert table.get("from_elsewhere").name == "random"


def test_a_broken_plug_in_does_not_take_the_others_down(monkeypatch):
    class Broken:
        name, value = "broken", "no_such_module_anywhere:Thing"

    class Taken:
        name, value = "random", "elsewhere:Random"

    monkeypatch.setattr(registry, "entry_points", lambda group: [Broken, Taken])
    table = Registry("compressor", "some.group", {"random": "vidsieve.compressors.random:Random"})
    with pytest.warns(UserWarning, match="'random' is registered already"):
        assert table.names() == ["random", "broken"]
    assert table.get("random").name == "random"
    with pytest.raises(PluginError, match="no_such_module_anywhere"):
        table.get("broken")


def test_modules_that_the_readme_names_are_there_after_a_plain_import():
    code = "import vidsieve; vidsieve.registry.compressors.register('x', 'a:B'); vidsieve.testing.check_compressor"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_oldest_transformers_that_is_tested_is_the_oldest_that_is_allowed():
    root = Path(__file__).parents[1]
    allowed = re.search(r'"transformers>=([\d.]+),', (root / "pyproject.toml").read_text())
    tested = re.search(r"^OLDEST := ([\d.]+)$", (root / "Makefile").read_text(), re.MULTILINE)
    assert tested[1] in (allowed[1], f"{allowed[1]}.0")


LAYERS = (
    "cli",
    "serving",
    "report",
    "evaluation",
    "training",
    "testing",
    "testbed",
    "streaming",
    "answering",
    "loading",
    "adapters",
    "registry",
    "compressors",
    "policies",
    "selection",
    "video",
    "io",
    "types",
    "retention",
    "options",
    "errors",
    "_version",
)
"""Each imports from those behind it only."""


def imported(path):
    """Yield what a module imports, inside its functions too."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    root = Path(vidsieve.__path__[0])
    wrong = []
    for path in root.rglob("*.py"):
        mine = path.relative_to(root).with_suffix("").parts[0]
        if mine not in LAYERS:
            continue
        behind = {mine, *LAYERS[LAYERS.index(mine) + 1 :]}
        for name in imported(path):
            top, _, rest = name.partition(".")
            if top in ("workbench", "tests") or (top == "vidsieve" and rest.partition(".")[0] not in behind):
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_class_has_the_name_of_another():
    root = Path(vidsieve.__path__[0])
    found = {}
    for path in sorted(root.rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(str(path.relative_to(root)))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def test_ruff_formats_everything():
    root = Path(__file__).parents[1]
    files = [path for name in ("src", "tests", "workbench", "benchmarks") for path in (root / name).rglob("*.py")]
    assert sum(path.read_text("utf-8").count("# fmt: " + "skip") for path in files) <= 10


def commands(command, name=""):
    """Yield (name, options) of every command that `vidsieve --help` and its groups list."""
    if not hasattr(command, "commands"):
        yield name.strip(), [p.name for p in command.params if p.param_type_name == "option" and p.name != "help"]
        return
    for part, inner in command.commands.items():
        if not inner.hidden:
            yield from commands(inner, f"{name} {part}")


def test_commands_and_options_stay_few():
    import typer

    from vidsieve.cli.main import app

    options = dict(commands(typer.main.get_command(app)))
    assert {"ask", "train cacovid", "data check", "testbed render"} <= options.keys()
    assert "frames" in options["ask"]
    assert len(options) <= 23, sorted(options)
    count = sum(map(len, options.values()))
    assert count <= 350, f"{count} options: { ({name: len(names) for name, names in options.items()}) }"
