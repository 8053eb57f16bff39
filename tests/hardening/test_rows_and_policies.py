"""Files that others wrote: an attack, and the answer that is expected, in a limited time and memory."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vidsieve import load
from vidsieve.compressors._decoder import BlockShape
from vidsieve.compressors.cacovid import CaCoVIDPolicy
from vidsieve.compressors.score import ScorePolicy
from vidsieve.errors import EvaluationError, ModelError, OutputError, PolicyError, TrainingError, VidsieveError
from vidsieve.evaluation.benchmarks.questions import read as questions_of
from vidsieve.evaluation.conditions import Condition
from vidsieve.evaluation.experiment import unit_check
from vidsieve.evaluation.tasks.questions import QuestionsTask
from vidsieve.evaluation.tasks.testbed import ScenesTask
from vidsieve.evaluation.tasks.timing import PARTS, TimingTask
from vidsieve.io.checkpoints import load_state, save_state
from vidsieve.io.journal import records_in
from vidsieve.io.limits import limits
from vidsieve.loading import load_model
from vidsieve.options import said_letter
from vidsieve.report.runs import run_page
from vidsieve.serving.batch_groups import BatchError, Rows, read_row
from vidsieve.training.data import reading
from vidsieve.training.data.layouts import read_records
from vidsieve.training.run_folder import RunFolder, read_metrics

GOOD = '{"video": "a.mp4", "caption": "c"}'
DEEP = '{"video": "a.mp4", "caption": "c", "x": ' + "[" * 99 + "]" * 99 + "}"
DEEPER = "[" * 200_000
BAD = {
    "half of a surrogate pair": '{"video": "a.mp4", "caption": "\\ud800"}',
    "holds a NUL": '{"video": "a\\u0000.mp4", "caption": "c"}',
    "nested deeper than 64": DEEP,
    "has more than": '{"video": "a.mp4", "caption": "' + "x" * 5000 + '"}',
    "Exceeds the limit": '{"video": "a.mp4", "caption": "c", "n": ' + "9" * 4400 + "}",
    "expected a text of length <= 4096": '{"video": "' + "a/" * 2049 + '", "caption": "c"}',
    "expected str, got int": '{"video": 3, "caption": "c"}',
    "must be finite": '{"video": "a.mp4", "question": "q", "problem_type": "free-form", "answer": NaN}',
    "expected `int` <= 10000": '{"frames": [["a.png", 1000000000000]], "caption": "c"}',
}


@pytest.fixture
def limited(monkeypatch):
    monkeypatch.setattr(limits, "row", 4500)


@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_a_bad_row_is_that_rows_fault(fault, form, limited, tmp_path):
    rows = [GOOD, BAD[fault], GOOD]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(rows) if form == "lines" else f"[{','.join(rows)}]", encoding="utf-8")
    records = list(read_records(path))
    assert [len(record.rows) for record in records] == [1, 0, 1]
    assert fault.replace("`", "") in records[1].fault and len(records[1].fault) <= 300


def test_bytes_that_are_no_text_and_rows_of_brackets(limited, tmp_path):
    path = tmp_path / "rows.json"
    path.write_bytes(f"[{GOOD}, ".encode() + b'{"video": "\xff"}, nonsense, ' + f"{GOOD}]".encode())
    assert [record.fault[:11] for record in read_records(path)] == ["", "is not UTF-", "is not JSON", ""]
    path.write_text(f"{GOOD}\n{DEEPER}\n{GOOD}\n")
    assert [bool(record.fault) for record in read_records(path)] == [False, True, False]
    for text, said in {
        f"[{GOOD}, {DEEPER}": "breaks off after record 1",
        f"[{GOOD}, " + '"': "breaks off after record 1",
        f"[{GOOD}}}, {GOOD}]": "closes a bracket that is not open",
        f"[{GOOD}] {GOOD}": "goes on behind its list",
    }.items():
        path.write_text(text)
        with pytest.raises(TrainingError, match=said):
            list(read_records(path))


def test_a_long_field_and_a_quote_without_end_in_csv(limited, tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([("videoID", "timestamp", "caption"), ("a", "0", "c"), ("b", "0", "x" * 9000), ("c", "0", "d")])
    faults = [record.fault for record in read_records(path)]
    assert faults[0] == faults[2] == "" and "has more than 4,500 bytes" in faults[1]
    with path.open("a") as file:
        file.write('d,0,"e\nf,0,' + "e\n" * 9000)
    numbers = []
    with pytest.raises(TrainingError, match=r"from line 5 on has more than 4,500 bytes: .* quote is not closed"):
        numbers.extend(record.number for record in read_records(path))
    assert numbers == [1, 2, 3]
    monkeypatch.setattr(reading, "MOST_COLUMNS", 9)
    path.write_text(",".join("abcdefghij") + "\n1\n")
    with pytest.raises(TrainingError, match="more than 9 columns"):
        list(read_records(path))


def test_parquet_within_bounds(limited, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, row = tmp_path / "rows.parquet", {"video": "a.mp4", "caption": "c"}
    rows = [row | {"x": []}, row | {"x": [None] * 9000}, row | {"caption": "x" * 9000, "x": []}, row | {"x": [None]}]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert ["has more" in record.fault for record in read_records(path)] == [False, True, True, False]
    parquet.write_table(arrow.Table.from_pylist([row | {"x": b"\xff"}]), path)
    assert [record.fault for record in read_records(path)] == ["Object of type bytes is not JSON serializable"]
    for bomb, size in (({"caption": "x" * 10**6}, r"1,000,\d+"), ({"x": [0] * 10**5}, r"400,\d+")):  # 1 kB on disk
        parquet.write_table(arrow.Table.from_pylist([row | bomb]), path, compression="zstd", use_dictionary="x" in bomb)
        with pytest.raises(TrainingError, match=rf"{size} bytes in one group of rows"):
            list(read_records(path))
    data = bytearray(path.read_bytes())
    data[-60:-30] = bytes(30)
    path.write_bytes(data)
    with pytest.raises(TrainingError, match="fetch it again"):
        list(read_records(path))


def test_parquet_of_many_parts(monkeypatch, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, row = tmp_path / "rows.parquet", {"video": "a.mp4", "caption": "c", "x": [1]}
    parquet.write_table(arrow.Table.from_pylist([row] * 1000), path, row_group_size=1)
    begun = time.monotonic()
    assert sum(len(record.rows) for record in read_records(path)) == 1000
    assert time.monotonic() - begun < 10, "the footer is read once, not for every group"
    monkeypatch.setattr(reading, "_MOST_PARTS", 999)
    with pytest.raises(TrainingError, match=r"cannot read .*limit; fetch it again$"):
        list(read_records(path))


def test_long_texts_that_regular_expressions_would_hang_on(tmp_path):
    begun, size = time.monotonic(), 2**16
    turns = [{"from": "human", "value": " " * size}, {"from": "gpt", "value": "a"}]
    choice = {"data_type": "video", "problem_type": "multiple choice", "problem": "q", "path": "a"}
    solution = "<answer>" * (size // 8)
    said_letter("not B is correct " * (size // 17))
    path = tmp_path / "rows.jsonl"
    for record in (
        {"video": "a", "conversations": turns},
        choice | {"solution": solution, "options": ["A. a", "B. b"]},
    ):
        path.write_text(json.dumps(record))
        assert next(iter(read_records(path))).fault
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("fault", ["half", "holds a NUL", "nested deeper", "has more than"])
def test_batch_takes_the_same_rows_for_bad(fault, limited):
    text = next(text for name, text in BAD.items() if name.startswith(fault))
    row = read_row(text.encode(), 3, Path())
    assert row.fields is None and "line 3" in row.fault


def test_a_long_line_costs_its_group_nothing(limited, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{BAD["has more than"]}\n{{"video": "b", "question": "q"}}\n')
    rows = Rows(path, tmp_path, 2)
    assert [bool(row.fault) for row in rows.group(0)] == [True, False]


@pytest.mark.parametrize("read", [lambda path: list(read_records(path)), questions_of, lambda p: Rows(p, p.parent, 1)])
def test_what_is_no_file_is_refused_at_once(read, tmp_path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, Path("/dev/zero")):
        with pytest.raises((TrainingError, EvaluationError, BatchError), match="a folder, a pipe or a device"):
            read(path)


# -- policies -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["score", "ours", "paper"])
def policy(request, tmp_path):
    shape = BlockShape(32, 2, 1, 16, 48)
    made = (
        ScorePolicy.start(32, "none", hidden=16)
        if request.param == "score"
        else CaCoVIDPolicy.of_shape(shape, "none", variant=request.param)
    )
    made.save_pretrained(tmp_path)
    return tmp_path


HUGE = 10**12
WRONG = (HUGE, 2**20, 2**63, 10**400, -1, 0, True, "64", 64.5, None, [64], {"a": 1}, float("nan"), float("inf"))


def leaves(value, path=()):
    """Yield the path of every value in a configuration, the training record left out."""
    yield path
    for key in value if isinstance(value, dict) else ():
        if key not in ("training", "base_model", "vidsieve_version"):
            yield from leaves(value[key], (*path, key))


def test_every_wrong_value_of_a_configuration_is_one_line(policy):
    """Either the value has another form that means the same, or it is refused; in no case is it built first."""
    path = policy / "config.json"
    good, begun = json.loads(path.read_text()), time.monotonic()
    refused = 0
    for place in leaves(good):
        for wrong in WRONG:
            broken = json.loads(json.dumps(good))
            if place:
                holder = broken
                for key in place[:-1]:
                    holder = holder[key]
                holder[place[-1]] = wrong
            else:
                broken = wrong
            path.write_text(json.dumps(broken))
            try:
                load(policy)
            except VidsieveError as error:
                refused += 1
                assert len(str(error)) < 1000
    path.write_text(json.dumps(good))
    load(policy)
    assert refused > 80 and time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "nested deeper"),
        ('{"type": "score", "format": "1"}', "not the configuration"),
        ('{"type": "score", "format": 1, "x": "\\ud800"}', "half of a surrogate pair"),
        (b"\xff\xfe", "is not UTF-8"),
        ("9" * 5000, "Exceeds the limit"),
        (" " * (2**24 + 1), "more than 16,777,216 bytes"),
    ],
)
def test_damaged_configurations_are_one_line(text, said, tmp_path):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PolicyError, match=said):
        load(tmp_path)


def edited(folder: Path, **changed) -> None:
    """Edit a configuration, and leave out the checksums that would tell."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"weights": ""} | changed
    del config["checksum"]
    path.write_text(json.dumps(config))


def test_a_small_configuration_costs_no_more_than_its_weights(tmp_path):
    """It asks for 8 TiB beside weights of 5 kB: they are compared before anything is built."""
    ScorePolicy.start(32, "none", hidden=16).save_pretrained(tmp_path)
    edited(tmp_path, hidden_size=2**20, network={"hidden": 2**20})
    with pytest.raises(PolicyError, match=r"out\.weight is \(1, 16\), must be \(1, 1048576\)"):
        load(tmp_path)


@pytest.mark.parametrize("field", ["rope_theta", "rms_norm_eps"])
def test_numbers_of_a_network_are_finite(field, tmp_path):
    CaCoVIDPolicy.of_shape(BlockShape(32, 2, 1, 16, 48), "none").save_pretrained(tmp_path)
    network = json.loads((tmp_path / "config.json").read_text())["network"]
    network["shape"][field] = float("inf")
    edited(tmp_path, network=network)
    with pytest.raises(PolicyError, match="not JSON compliant"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_weights_of_other_types_are_refused(dtype, tmp_path):
    ScorePolicy.start(32, "none", hidden=16).save_pretrained(tmp_path)
    edited(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"out.bias": torch.zeros(1).to(dtype)}, path)
    with pytest.raises(PolicyError, match=r"out\.bias is of torch"):
        load(tmp_path)
    save_file(weights | {"more": torch.zeros(1)}, path)
    with pytest.raises(PolicyError, match=r"more is \(1,\), must be None"):
        load(tmp_path)
    save_file({name: value.half() for name, value in weights.items()}, path)
    assert {p.dtype for p in load(tmp_path).policy.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("config.json", os.mkfifo, "a pipe or a device"),
        ("part.safetensors", os.mkfifo, "a pipe or a device"),
        ("tokenizer.json", lambda path: path.touch() or os.truncate(path, 10**9), "has more than 67,108,864 bytes"),
        ("config.json", lambda path: path.write_text("[" * 200_000), "recursion depth"),
        ("config.json", lambda path: path.write_text("[]"), "cannot load"),
        (
            "config.json",
            lambda path: path.write_text('{"model_type": "llava_onevision", "text_config": 3}'),
            "cannot load",
        ),
        (
            "a.index.json",
            lambda path: path.write_text('{"weight_map": {"a": "../b.safetensors"}}'),
            "outside its folder",
        ),
        ("a.index.json", lambda path: path.write_text('{"weight_map": {"a": "/dev/zero"}}'), "outside its folder"),
        ("a.index.json", lambda path: path.write_text('{"weight_map": [1]}'), "outside its folder, or none"),
    ],
)
def test_a_models_folder_of_strangers_is_one_line(name, make, said, tmp_path):
    make(tmp_path / name)
    with pytest.raises(ModelError, match=said) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


# -- runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        *({"step": "abc"}, {"step": -1}, {"step": True}, {"minutes": float("inf")}, {"minutes": float("nan")}),
        *({"config": 3}, {"window": [1]}, {"best": {"value": "x"}}, {"warnings": []}, {"origin": "x"}),
    ],
)
def test_an_edited_header_of_a_checkpoint_is_one_line(edit, tmp_path):
    module, run = torch.nn.Linear(2, 2), RunFolder(tmp_path)
    optimizer = torch.optim.AdamW(module.parameters())
    good = {"step": 1, "minutes": 0.5, "config": {}, "best": {}}
    save_state(run.checkpoint, {"policy": module}, optimizer, good)
    assert run.load(module, optimizer, {}, {})[0] == good
    save_state(run.checkpoint, {"policy": module}, optimizer, good | edit)
    with pytest.raises(TrainingError, match="is damaged"):
        run.load(module, optimizer, {}, {})


@pytest.mark.parametrize(
    "edit",
    [
        *({"optimizer.x.step": torch.ones(1)}, {"optimizer.0.exp_avg": torch.ones(3)}),
        *({"policy.weight": torch.ones(3, 3)}, {"policy.more": torch.ones(1)}),
    ],
)
def test_edited_tensors_of_a_checkpoint_are_one_line(edit, tmp_path):
    module, path = torch.nn.Linear(2, 2), tmp_path / "checkpoint.safetensors"
    optimizer = torch.optim.AdamW(module.parameters())
    save_state(path, {"policy": module}, optimizer, {})
    save_file(load_file(path) | edit, path, metadata={"vidsieve": '{"step": 1}'})  # without its checksum
    with pytest.raises(TrainingError, match="another network"):
        load_state(path, {"policy": module}, optimizer)


@pytest.mark.parametrize("line", ["[1]", "{", '{"loss": 1}', '{"step": "a"}', '{"step": 1, "x": []}', "[" * 10**5])
def test_an_edited_line_of_metrics_is_named(line, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n' + line + "\n")
    with pytest.raises(TrainingError, match=r"(line|entry) 2 of .*: remove that line"):
        read_metrics(tmp_path)
    with pytest.raises(OutputError, match="no report"):
        run_page(tmp_path)


@pytest.mark.parametrize("name", ["questions", "testbed", "timing"])
def test_an_edited_line_of_a_journal_is_named(name, tmp_path):
    """Without its checksum, as an editor leaves it or another run has it; each value is taken away and changed."""
    spent = {part: 1.0 for part in PARTS}
    task, values = {
        "questions": (QuestionsTask, {"score": 1.0, "kept": 3, "total": 9, "layers": 0.5, "prompt": [9, 3]}),
        "testbed": (ScenesTask, {"right": True, "kept": 3, "total": 9, "layers": 0.5}),
        "timing": (TimingTask, {"ms": spent, "visual": [9, 3], "prompt": [9, 3], "layers": 0.5, "seen": 3, "peak": 9}),
    }[name]
    sample = {"item": "0", "condition": Condition().key, **values}
    good = {"unit": "0/0", "samples": [sample], "refused": {}, "faults": {}, "select_ms": {}}

    def read(line):
        (tmp_path / "units-1-of-1.jsonl").write_text(json.dumps(line) + "\n")
        return records_in(tmp_path, unit_check(task, {Condition().key}))

    assert read(good) == {"0/0": good}
    edits = [sample | {key: "x"} for key in sample if key != "item"]
    needed = set(sample) if name == "timing" else {"item", "condition", "score", "right"} & set(sample)
    edits += [{key: sample[key] for key in sample if key != gone} for gone in needed]
    edits += [sample | ({"ms": {}} if name == "timing" else {"total": 0}), 3]
    lines = [good | {"samples": [edit]} for edit in edits] + [good | {key: [["x"]]} for key in good]
    lines += [{"unit": "0/0"}, [1], 3, good | {"unit": []}]
    for line in lines:
        with pytest.raises(EvaluationError, match=r"line 1 of .*units-1-of-1\.jsonl is damaged: remove that line, and"):
            read(line)


@pytest.mark.parametrize("text", ["[]", '{"benchmark": 1}', '{"n_questions": 3, "rows": [3]}', "[" * 10**5, "{}"])
def test_an_edited_result_is_one_line(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(EvaluationError, match="give the command of the run again"):
        run_page(tmp_path)
