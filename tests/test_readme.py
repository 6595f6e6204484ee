"""The README says what the logs say, names files that exist, and commands that run."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rho

ROOT = Path(rho.__file__).parent
sys.path.insert(0, str(ROOT / "results"))

import figures  # noqa: E402

README = (ROOT / "README.md").read_text()


def test_tables_are_those_of_the_logs():
    assert figures.readme(README) == README, "run: python results/figures.py"


def test_summary_is_that_of_the_logs():
    assert (ROOT / "results" / "summary.json").read_text() == figures.summary()


def test_a_changed_log_would_be_noticed(monkeypatch):
    real = figures.read_logs

    def doctored(folder):
        logs = real(folder)
        logs["slm"][-1]["val_loss"] -= 0.01
        return logs

    monkeypatch.setattr(figures, "read_logs", doctored)
    assert figures.readme(README) != README


def test_files_that_are_named_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path


@pytest.mark.parametrize("script", ["rho.py", "prepare_data.py", "eval_math.py"])
def test_flags_that_are_named_exist(script):
    command = [sys.executable, str(ROOT / script), "-h"]
    helped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = re.findall(rf"^(?:python )?{re.escape(script)}.*|^python {script} .*", README, re.M)
    assert lines
    for flag in re.findall(r"--\w+", " ".join(line.split("#")[0] for line in lines)):
        assert re.search(rf"{flag}\b", helped), flag


def test_published_runs_are_comparable():
    """Same seed, data, model, optimizer, schedule and tokens in all arms; only the rule differs."""
    for name in ("demo", "real"):
        logs = figures.read_logs(ROOT / "results" / name)
        arms = {run: records[0]["config"] for run, records in logs.items() if run != "ref"}
        assert set(arms) == {"clm", "slm", "slm-random"}
        own = ("select", "ratio", "name", "stage")
        alike = {json.dumps({k: v for k, v in c.items() if k not in own}) for c in arms.values()}
        assert len(alike) == 1
        ends = {records[-1]["tokens"] for run, records in logs.items() if run != "ref"}
        assert len(ends) == 1
        assert logs["slm"][-1]["trained"] == logs["slm-random"][-1]["trained"]
        assert arms["slm"]["ratio"] == arms["slm-random"]["ratio"] < 1 == arms["clm"]["ratio"]
