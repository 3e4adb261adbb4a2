# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from ssmkernels import bench, info, ops
from ssmkernels.bench import (
    case,
    graph,
    growth,
    measure,
    memory,
    neighbours,
    overhead,
    plots,
    ranking,
    report,
    training,
    views,
)


def small_case(**changes):
    settings = {
        "op": "instance_matching",
        "phase": "forward",
        "size": {"B": 2, "K": 3},
        "dtype": torch.float32,
        "ours": lambda: torch.ones(8).sum(),
        "peers": {"eager": lambda: torch.ones(64, 64).sum()},
        "products": {"score": lambda: torch.ones(4, 4) @ torch.ones(4, 4)},
        "product_counts": {"score": 3},
        "flops": 10,
        "bytes": 10,
    }
    return case.Case(**(settings | changes))


def run(op_case):
    rates = measure.Rates(copy=1e9, matmul={"float32": 1e9})
    return case.run(op_case, device="cpu", rates=rates, seconds=0.05, say=lambda line: None)


def test_every_function_is_timed_in_every_round():
    calls = dict.fromkeys("ab", 0)

    def function(name):
        calls[name] += 1

    timings = measure.time_alternating({name: lambda name=name: function(name) for name in "ab"}, seconds=0.0, rounds=4)
    assert set(timings) == {"a", "b"} and all(t.low <= t.median <= t.high for t in timings.values())
    assert min(calls.values()) >= 3 + 3  # two to warm up, one to size the rounds, and three rounds at least


def test_peak_memory_sees_what_a_call_takes():
    extra = measure.peak_extra_bytes(lambda: torch.ones(2**24).sum())  # 64 MiB
    if extra is None:
        pytest.skip("this system does not tell peak memory")
    assert 60 * 2**20 < extra < 90 * 2**20


def test_floor_is_the_products_or_the_bytes():
    result = run(small_case())
    assert result.floor == result.products.median > 0
    without = run(small_case(products={}, product_counts={}))
    assert without.products is None and without.floor == pytest.approx(10 / 1e9)


def test_table_and_plot(tmp_path):
    result = run(small_case())
    row = report.table([result]).splitlines()[-1]
    assert (
        "`instance_matching`" in row
        and "B=2 K=3" in row
        and row.count("|") == report.table([result]).splitlines()[0].count("|")
    )
    rates = measure.Rates(1e9, {"float32": 1e9})
    names = plots.plot([result], tmp_path / "plot.json", rates, "a processor; torch 2.11.0, ssmkernels 0.1.0")
    assert names == ["plot.png", "plot-roofline.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_results_are_written_with_machine_and_versions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "cases", lambda **options: iter([small_case()]))
    monkeypatch.setattr(measure, "device_rates", lambda device, dtypes: measure.Rates(1e9, {"float32": 1e9}))
    out = tmp_path / "results" / "cpu.json"
    assert bench.main(["memory", "--seconds", "0.05", "--out", str(out)]) == 0
    document = json.loads(out.read_text())
    assert document["versions"]["torch"] == torch.__version__.split("+")[0]
    assert document["machine"]["cpu"]["processors"] >= 1
    where = plots.measured_on(document)
    assert document["machine"]["cpu"]["model"] in where and f"torch {document['versions']['torch']}" in where
    assert document["results"][0]["ours"]["median"] > 0
    assert {path.suffix for path in out.parent.iterdir()} == {".json", ".md", ".png"}
    assert "instance_matching" in capsys.readouterr().out


def test_unknown_family(capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["graphs"])
    assert stop.value.code == 2
    assert "there is no family 'graphs'; did you mean graph" in capsys.readouterr().err


def test_cases_agree_with_their_peers():
    """What is timed is the same computation: each peer's gradient is ours."""
    for op_case in memory.cases(quick=True):
        if op_case.op in ("instance_matching", "aggregate") and op_case.size["K"] == 250:
            for name in op_case.peers.keys() & {"eager", "attention"}:
                torch.testing.assert_close(op_case.ours()[0], op_case.peers[name]()[0], rtol=1e-4, atol=1e-6)


def test_losses_of_other_forms_agree():
    rows, labels = ranking._rows(1100, 16, "cpu", torch.float64)  # two blocks, and a part of one
    blocked = ranking.in_blocks(rows, labels, negative_margin=0.5)
    torch.testing.assert_close(blocked, ops.pair_ranking_loss(rows, labels), rtol=1e-9, atol=0)
    op_case = ranking.references_case(8, 40, 16, "cpu", torch.float32)
    for name in ("CrossBatchMemory", "eager"):
        torch.testing.assert_close(op_case.ours()[0], op_case.peers[name]()[0], rtol=1e-4, atol=1e-6)


def test_solvers_agree():
    op_case = graph.solve_case(graph.clustered(300, 3), torch.float64, "cpu")
    solution = op_case.ours()[0]
    for name in op_case.peers.keys() & {"scipy, all columns", "pyamg", "GraphLearning"}:
        theirs = torch.as_tensor(np.asarray(op_case.peers[name]()))
        theirs = theirs.t() if name == "pyamg" else theirs  # a column each
        assert (theirs - solution).norm() <= 1e-4 * solution.norm(), name


def test_searches_find_the_neighbours_that_ours_finds():
    """Each row itself among them; exact searches find all, but for cosines that differ by their rounding, and
    approximate ones nearly all of a small set.
    """
    features = torch.nn.functional.normalize(torch.randn(300, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    peers = {name: peer for name, peer in neighbours.libraries().items() if name != "pynndescent"}  # it is compiled
    op_case = neighbours.search_case(features, 10, peers)
    op_case.ours()
    for name, search in op_case.peers.items():
        search()
        exact = name in ("torch.mm, topk", "faiss IndexFlatIP", "scikit-learn")
        assert op_case.recall[name]() >= (0.999 if exact else 0.9), name


def test_recall_is_reported_beside_the_time():
    result = run(small_case(recall={"eager": lambda: 0.98765}))
    assert "(recall 0.9877)" in report.table([result]) and case.Result.from_json(dataclasses.asdict(result)) == result


def test_one_op_of_a_family(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "cases", lambda **options: iter([small_case(op="aggregate"), small_case(op="unfold")]))
    monkeypatch.setattr(measure, "device_rates", lambda device, dtypes: measure.Rates(1e9, {"float32": 1e9}))
    arguments = ["memory", "--seconds", "0.05", "--out", str(tmp_path / "cpu.json")]
    assert bench.main([*arguments, "--op", "unfold"]) == 0
    assert [result["op"] for result in json.loads((tmp_path / "cpu.json").read_text())["results"]] == ["unfold"]
    assert bench.main([*arguments, "--op", "fold"]) == 1
    assert "no case of these families is of 'fold'" in capsys.readouterr().err


def test_comparison_with_earlier_results(tmp_path, monkeypatch, capsys):
    """By time over the floor of the same run, case by case."""
    monkeypatch.setattr(plots, "plot", lambda *args: [])
    monkeypatch.setattr(memory, "cases", lambda **options: iter([small_case(), small_case(op="unfold")]))
    monkeypatch.setattr(measure, "device_rates", lambda device, dtypes: measure.Rates(1e9, {"float32": 1e9}))
    out = tmp_path / "cpu.json"
    arguments = ["memory", "--seconds", "0.05", "--out", str(out)]
    assert bench.main(arguments) == 0
    old = json.loads(out.read_text())
    old["results"] = old["results"][:1]
    old["results"][0]["ours"]["median"] /= 1e4
    (tmp_path / "old.json").write_text(json.dumps(old))
    capsys.readouterr()
    assert bench.main([*arguments, "--compare", str(tmp_path / "old.json")]) == 0
    assert capsys.readouterr().out.count("instance_matching forward B=2 K=3 float32 |") == 1
    assert bench.main([*arguments, "--compare", str(tmp_path / "old.json"), "--fail-if-slower", "1.5"]) == 3
    assert "1 of 1 cases got slower by more than 1.5" in capsys.readouterr().err
    assert bench.main([*arguments, "--compare", str(out), "--fail-if-slower", "1e6"]) == 0
    for wrong in (["--fail-if-slower", "0"], ["--compare", str(tmp_path / "none.json")]):
        with pytest.raises(SystemExit):
            bench.main([*arguments, *wrong])


def test_each_kind_of_processor_has_a_table_to_compare_with(tmp_path, monkeypatch, capsys):
    """A table that is not there is made, and a case that it lacks is added; what it has stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "plot", lambda *args: [])
    monkeypatch.setattr(measure, "device_rates", lambda device, dtypes: measure.Rates(1e9, {"float32": 1e9}))
    cases = [small_case()]
    monkeypatch.setattr(memory, "cases", lambda **options: iter(cases))
    arguments = ["memory", "--seconds", "0.05", "--out", "out.json", "--fail-if-slower", "1e6"]
    table = tmp_path / "bench" / "results" / f"cpu-{info.cpu_kind()}-memory.json"
    assert bench.main(arguments) == 0 and "added 1 cases" in capsys.readouterr().out
    stored = json.loads(table.read_text())
    assert stored["machine"]["cpu"]["kind"] == info.cpu_kind()

    cases.append(small_case(op="unfold"))
    stored["results"][0]["ours"]["median"] /= 1e9
    table.write_text(json.dumps(stored))
    assert bench.main(arguments) == 3
    after = json.loads(table.read_text())["results"]
    assert after[:1] == stored["results"] and [result["op"] for result in after[1:]] == ["unfold"]


def test_tables_of_processors_are_named_after_them(source_tree):
    tables = sorted((source_tree / "bench" / "results").glob("cpu-*.json"))
    assert tables
    for path in tables:
        cpu = json.loads(path.read_text())["machine"]["cpu"]
        maker, widest = path.stem.split("-")[1:3]
        assert maker in cpu["model"].lower()
        assert widest == next(name for flag, name in info.VECTORS.items() if flag in cpu["flags"])


def test_comparison_without_a_floor_is_by_the_last_peer():
    settings = {"flops": 0, "bytes": 0, "products": {}, "product_counts": {}}
    before = run(small_case(**settings, phase="forward, small"))
    after = dataclasses.replace(before, ours=before.ours.scaled(3.0))
    assert report.compare([after], [before]) == pytest.approx({after.label(): 3.0})
    assert " 0 %" not in report.table([after])


def test_growth_is_told_per_unit():
    results = [
        case.Result(
            "unfold",
            "forward, growth",
            {"B": 2, "K": 10**k},
            "float32",
            measure.Timing(t, t, t),
            {},
            None,
            1.0,
            {"ours": 2**20 * k},
        )
        for k, t in ((1, 2e-8), (2, 2e-6))
    ]
    row = report.growth_table(results).splitlines()[-1]
    assert row == "| `unfold` forward | row × slot | 1 → 10 | 20 → 2e+02 | 1.0 → 2.0 |"


def test_every_growing_op_grows():
    cases = list(growth.cases(quick=True))
    for op in growth.OPS:
        sizes = [dict(op_case.size) for op_case in cases if op_case.op == op]
        assert len(sizes) == 2 and sizes[0] != sizes[1] and all(not op_case.peers for op_case in cases)


def test_kernels_of_a_call_are_its_operators_alone():
    rows, labels = torch.randn(8, 4, requires_grad=True), torch.arange(8) % 2
    kernels = overhead.kernels_of(lambda: torch.autograd.grad(ops.pair_ranking_loss(rows, labels), rows))
    with overhead._Recorder() as recorder:
        kernels()
    names = [func.overloadpacket.__name__ for func, _ in recorder.calls]
    assert names == ["pair_ranking_loss", "pair_ranking_loss_backward"]


@pytest.mark.parametrize("variant", ["fixmatch", "torchssl"])
def test_views_of_all_ways_have_the_shapes_of_a_step(variant):
    op_case = training.small_views(views.small_images(24), variant, 2, "cpu")
    first, second = op_case.ours(), op_case.ours()
    assert [len(first.labeled_weak), len(first.unlabeled_weak), len(first.unlabeled_strong)] == [2, 14, 14]
    assert not first.unlabeled_strong.equal(second.unlabeled_strong)  # every call is a step of its own
    pil, torchvision = (op_case.peers[name]() for name in (training.PIL, training.V2))
    assert [part.shape for part in pil] == [part.shape for part in first]
    assert [part.shape for part in torchvision] == [part.shape for part in first if part.ndim == 4]
    assert all(part.dtype == torch.float32 for part in torchvision)
    assert op_case.bytes == 30 * 3 * 32 * 32 * 5  # uint8 once, float32 once


def test_views_of_photographs_have_the_shapes_of_a_step(tmp_path):
    splits = views.photographs(tmp_path, 3)
    simmatch, swav = training.photograph_views(splits, 1, "cpu"), training.multi_crop_views(splits, 1, "cpu")
    for op_case, shapes in ((simmatch, [(1, 224), (5, 224), (5, 224)]), (swav, [(2, 224), (6, 96)])):
        wanted = [(count, 3, side, side) for count, side in shapes]
        for batch in (op_case.ours(), *(peer() for peer in op_case.peers.values())):
            assert [tuple(part.shape) for part in batch if part.ndim == 4] == wanted
            assert all(part.dtype == torch.float32 for part in batch if part.ndim == 4)
        assert op_case.bytes == 5 * sum(count * 3 * side**2 for count, side in shapes)


def test_a_step_of_simmatch_has_the_formulas_in_place_of_the_ops():
    op_case = training.simmatch_step(views.small_images(480), "wrn-10-1", 1, "cpu")
    with overhead._Recorder() as recorder:
        op_case.peers["eager formulas"]()
        op_case.products["network"]()
    assert recorder.calls == []
    with overhead._Recorder() as recorder:
        metrics = op_case.ours()
    names = {func.overloadpacket.__name__ for func, _ in recorder.calls}
    assert {"instance_matching", "memory_update_"} <= names and metrics["loss"].isfinite()


def test_an_evaluation_is_the_same_by_either_way():
    op_case = training.evaluation(views.small_images(480), 300, "cpu")
    together = op_case.ours()
    apart = op_case.peers[training.PIL]()
    assert together == apart[0] | apart[1] == op_case.products["networks"]() and together.keys() == {"student", "ema"}


@pytest.mark.long
def test_families_are_measured_apart(tmp_path):
    out = tmp_path / "cpu.json"
    assert (
        bench.main(["overhead", "pairs", "--quick", "--seconds", "0", "--op", "laplacian_solve", "--out", str(out)])
        == 0
    )
    assert {result["op"] for result in json.loads(out.read_text())["results"]} == {"laplacian_solve"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu.json", "cpu.md"]  # no flops: no roofline
