"""What the bench does on a GPU: one process for many measurements, in an order, within a time."""

import argparse
import csv
import math
import subprocess
import sys
from dataclasses import asdict

import pytest

from bench import end_to_end, run, server, table
from bench.case import Case
from bench.registry import CASES
from fastuda.errors import UserError

SMALL = Case("contrast_softmax", "fwd", "float32", 64, 64)


def job(provider):
    return {"case": asdict(SMALL), "provider": provider, "device": "cpu", "repeats": 2, "threads": 1}


@pytest.fixture(name="server")
def running_server():
    running = server.Server()
    yield running
    running.close()


def test_a_server_goes_on_after_what_fails(server):
    assert server.ask(job("reference"), 120)["p50"] > 0
    first = server.process.pid
    assert "KeyError" in server.ask(job("nobody"), 120)["failed"]
    assert "no second backend" in server.ask(job("triton"), 120)["skipped"]
    assert server.ask(job("fastuda"), 120)["p50"] > 0 and server.process.pid == first
    assert "took over 0 s" in server.ask(job("reference"), 0.001)["failed"]
    assert server.ask(job("reference"), 120)["p50"] > 0 and server.process.pid != first
    server.process.kill()
    server.process.wait()
    assert server.ask(job("reference"), 120)["p50"] > 0


def test_a_server_that_dies_says_what_it_said(server, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "ended with 1" in server.ask(job("reference"), 120)["failed"]


def test_the_gpus_order_has_every_case_once():
    args = argparse.Namespace(sweep=False, device="cuda", op=None, mode=None, dtype=None, pixels=None)
    cases = run.chosen(args)
    assert set(cases) >= set(CASES) and len(set(cases)) == len(cases)
    assert (cases[0].op, cases[0].pixels, cases[0].channels) == ("cycle_association_loss", 8464, 2048)


def test_rows_end_with_the_time(tmp_path):
    command = ["run", "--op", "contrast_softmax", "--budget", "0", "--csv", str(tmp_path / "o.csv")]
    code = f"import sys; from bench import run, table; table.write = int; sys.argv = {command}; run.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=table.HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "time is over: 2 cases" in done.stdout and not (tmp_path / "o.csv").exists()


def test_a_method_whose_published_side_fails_has_a_row(tmp_path, monkeypatch, capsys):
    answers = {
        "fused": {"losses": [{"a": 1.0}], "mib": 9.0, "ops": {}, "share": dict.fromkeys(table.PARTS, 1 / 6)},
        "published": {"failed": "out of memory"},
        "plain": {"losses": [{"a": 1.0}], "mib": 9.0, "floor": 0.125},
        "turns": {"fused": [0.5], "plain": [0.75]},
    }  # fmt: skip
    monkeypatch.setattr(end_to_end, "side", lambda job, name, timeout: dict(answers[name]))
    path = tmp_path / "results" / "end_to_end_card.csv"
    path.parent.mkdir()
    argv = ["end_to_end", "--method", "plca", "--method", "fada", "--csv", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    end_to_end.main()
    assert "plca, published, out of memory" in capsys.readouterr().out
    rows = list(csv.DictReader(path.open()))
    assert [row["method"] for row in rows] == ["plca", "fada"] and rows[0]["fused_s"] == "0.500"
    assert rows[0]["plain_ratio"] == "1.50" and rows[0]["to_floor"] == "1.33"
    answers["plain"]["losses"] = [{"a": 2.0}]
    end_to_end.main()
    assert "plca, plain: the losses differ by 0.5" in capsys.readouterr().out
    last = list(csv.DictReader(path.open()))[-1]
    assert last["fused_s"] == "0.500" and last["plain_ratio"] == last["to_floor"] == ""
    assert rows[0]["published_s"] == "" and math.isnan(float(rows[0]["published_ops"]))
    monkeypatch.setattr(table, "HERE", tmp_path)
    assert "| failed |" in table.steps()
    answers["fused"] = {"failed": "ended with 1"}
    with pytest.raises(UserError, match="no row for"):
        end_to_end.main()
