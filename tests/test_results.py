"""The published tables say what the logs say, and the logs are those of the named commands."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import eval_math
import prepare_data
import rho

ROOT = Path(rho.__file__).parent
RESULTS = ROOT / "results"
sys.path.insert(0, str(RESULTS))

import checks  # noqa: E402
import control_tables  # noqa: E402
import experiments  # noqa: E402
import factors  # noqa: E402
import findings  # noqa: E402
import logs  # noqa: E402
import tables  # noqa: E402

READMES = {name: (ROOT / name).read_text() for name in ("README.md", "results/README.md")}
PAGES = "".join(READMES.values())


# ---- the published pages -------------------------------------------------------------------------


@pytest.mark.parametrize("name", READMES)
def test_published_tables_are_those_of_the_logs(name):
    assert tables.fill(READMES[name]) == READMES[name], "run: python results/tables.py --publish"


def test_summary_is_that_of_the_logs():
    assert (RESULTS / "summary.json").read_text() == findings.summary(RESULTS)


def test_every_table_stands_on_a_page_once():
    markers = re.findall(r"<!-- (\S+) -->\n", PAGES)
    opened = [marker for marker in markers if not marker.startswith("/")]
    assert sorted(opened) == sorted(tables.TABLES)
    for marker in opened:
        assert PAGES.count(f"<!-- /{marker} -->") == 1


def section(marker):
    """{first cell: other cells} of a table as it stands on its page."""
    text = re.search(rf"<!-- {marker} -->\n(.*?)<!-- /{marker} -->", PAGES, re.S)[1]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in rows}


def test_published_values_checked_by_hand():
    """Values read off the logs by people. A table of something else would not hold them."""
    real = {label: row[3].split()[0] for label, row in section("real").items()}
    assert real["reference (clean text only)"] == "2.896"
    assert real["CLM: all tokens"] == "3.528"
    assert real["SLM: selected tokens"] == "3.360"
    assert real["SLM, 30 % selected"] == "3.345"
    assert float(real["random tokens"]) == pytest.approx(3.669, abs=0.0011)
    arms = {label: row[-1] for label, row in section("arms").items()}
    assert arms["CLM: all tokens"] == "33.8 ± 4.9"
    assert arms["SLM: selected tokens"] == "64.5 ± 5.0"
    assert section("map")["75 %"] == ["", "+21.7", "+4.8", "+0.4"]
    # 375, 382, 331, 359, 399 right of 500; the model itself 340, 346, 303, 304, 333.
    assert section("clean-model")["SLM, started from the reference"][4:] == [
        "73.8 ± 5.1",
        "+8.8 (4.9 to 12.7)",
    ]
    demo = list(tables.TABLES["demo"](RESULTS))
    right = [row[6] for row in demo[1:]]
    assert right == ["112 of 500", "56 of 500", "307 of 500", "32 of 500", "115 of 500"]


def test_summary_has_whole_keys_and_nothing_that_was_not_measured():
    summary = json.loads((RESULTS / "summary.json").read_text())
    measured = {"demo", "clean_text", "real", "dynamics", "bench", "hf"}
    if (RESULTS / "faults.jsonl").exists():
        measured.add("faults")
    assert set(summary) == measured
    demo = "seeds gain_points gain_points_ci95 tokens_ratio_mean tokens_ratio_loss_mean"
    demo += " student_minus_reference_points seconds_total cores"
    assert list(summary["demo"]) == demo.split()
    assert list(summary["real"]["heldout_loss"]) == ["clm", "random", "slm", "reference_only"]
    assert sum(summary["dynamics"].values()) == pytest.approx(1, abs=1e-3)
    rows = {record["name"]: record["ratio"] for record in logs.read_log(RESULTS / "bench.jsonl")}
    short = set(summary["bench"]) - set(rows)
    assert short <= set(checks.HEADLINE_RATIOS)
    for name, ratio in summary["bench"].items():
        assert ratio == rows[name if name in rows else checks.HEADLINE_RATIOS[name]]


@pytest.mark.parametrize("script", [rho, prepare_data, eval_math])
def test_flags_of_the_commands_exist(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["-h"])
    helped = capsys.readouterr().out
    name = Path(script.__file__).name
    lines = []
    for commands in (experiments.DEMO | experiments.REAL).values():
        for line in commands():
            lines += [part for part in line.split(" && ") if part.startswith(f"python {name}")]
    flags = set(re.findall(r"--\w+", " ".join(lines)))
    assert flags
    for flag in flags:
        assert re.search(rf"{flag}\b", helped), flag


# ---- each table and its own logs -----------------------------------------------------------------

HEADERS = {
    "main": "arm | target loss | answers right, %",
    "demo": "run | tokens seen | in all | trained on | target loss | corpus loss | right | seconds",
    "fresh": "arm | right, %: the five seeds | right, %: seed 6 | right, %: seed 7",
    "arms": "arm | tokens seen | trained on | target loss | corpus loss | answers right, %",
    "ratio": "selected | seeds | trained on | target loss | answers right, %",
    "map": "wrong answers | dirt per problem: 0 | dirt per problem: 1 | dirt per problem: 3",
    "dirt": "wrong answers | dirt per problem | target tokens | seeds | CLM right, %",
    "references": "reference | seeds | its target loss | its answers right, % | student right, %",
    "long": "wrong answers | dirt per problem | tokens seen | CLM right, % | SLM right, %",
    "factor": "wrong answers | dirt per problem | tokens | seeds | CLM right, % | SLM right, %",
    "scope": "top k over | seeds | trained on | target loss | answers right, %",
    "kinds": "kind of token | share of tokens | kept at 0.3 M | kept at 1.1 M | kept at 2.0 M",
    "dynamics": "class | paper: share | paper: mean loss | CLM: share | CLM: mean loss",
    "self": "kept | seeds | trained on | target loss | answers right, %",
    "variants": "rule | seeds | trained on | target loss | answers right, %",
    "lr": "tokens | learning rate | CLM's target loss | corpus loss | answers right, %",
    "sft": "fine-tuned on | seeds | target loss | answers right, % | points over plain",
    "real": "arm | seeds | tokens seen | trained on | target loss | corpus loss | singleop right",
    "real-model": "use | rate | target loss | minus the model's | corpus loss | singleop",
    "real-lr": "tokens | learning rate | CLM's target loss | corpus loss",
    "uses": "you have | you train | target loss | answers right, %",
    "clean": "use | tokens of its own | in all | seeds | target loss | answers right, %",
    "clean-map": "use | 1 x, reference 1/3 | 1 x, reference 1/10 | 0.3 x, reference 1/3",
    "clean-shares": "clean text | 5 % of the mixture | 15 % of the mixture",
    "clean-cheap": "use | seeds | target loss | answers right, % | points over CLM on corpus and",
    "clean-kept": "use | clean share of the mixture | of the corpus kept | target loss | right",
    "clean-dirtier": "use | clean share of the mixture | in all | target loss | answers right, %",
    "clean-model": "use | tokens of its own | in all | seeds | target loss | answers right, % | po",
    "clean-model-more": "use | tokens of its own | in all | seeds | target loss | answers right,",
    "model": "you train | CLM on the corpus | SLM (the paper's) | ",
    "clean-model-rates": "use | rate 9.4e-5 | rate 1.9e-4 | rate 3.75e-4 | rate 7.5e-4",
    "clean-trials": "use | rate 1.9e-4 | rate 3.75e-4 | rate 7.5e-4 | rate 1.5e-3",
    "units": "rule | seeds | in all | trained on | target loss | answers right, %",
    "no-reference": "rule | seeds | in all | trained on | target loss | answers right, %",
    "when": "rule | seeds | in all | trained on | target loss | answers right, %",
    "fixed": "rule | seeds | in all | trained on | target loss | answers right, %",
    "slm-lr": "learning rate | SLM's target loss | answers right, %",
    "hours": "experiment | runs | core-hours",
    "faults": "what | how often | found",
    "hf": "what | compared with | found",
    "bench": "ratio | median | lowest | highest",
    "paper": "stage | 1 H100 | 8 H100 | 32 H100",
    "memory": "model | optimizer | GPUs | 24 GB | 24 GB, --recompute | 80 GB",
}


# What faults.py and the runs of `sft` will say once they are there.
FAULT_ROWS = {
    "kills": "kills=105 ends=52 bit_identical=52 signals=40 one_line_and_resumed=39",
    "fuzz": "inputs_fuzzed=100000 crashes=0 slow=0",
    "damage": "damaged=60 refused_in_one_line=41 ran_right=19",
    "full_disk": "full=25 one_line=24 old_files_intact=25 ends_right=25",
    "writers": "pairs=18 one_refused_one_right=18 score_pairs=6 score_pairs_same_bytes=6",
    "memory": "minutes=18 steps=90000 mean_mb=300 spread=0.004 mb_per_hour=0.1",
}
SFT_LIKE = {"base": "1.0", "all": "0.5", "excess": "0.6", "random": "0.7", "lr2.5e-4": "0.4"}


def fault_row(part):
    counts = dict(pair.split("=") for pair in FAULT_ROWS[part].split())
    row = {name: float(n) if "." in n else int(n) for name, n in counts.items()}
    return {"part": part, **row, "n_failed": 0, "commit": "abc", "machine": "2 cores"}


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_up(folder):
    """Logs in the place of those that are still to come."""
    if not (folder / "faults.jsonl").exists():
        write_records(folder / "faults.jsonl", map(fault_row, FAULT_ROWS))
    for seed in (1, 2, 3):
        part = folder / "runs" / f"seed{seed}"
        for arm, ratio in SFT_LIKE.items():
            path = part / f"sft-{arm}.jsonl"
            if not path.exists() and (seed == 1 or "lr" not in arm):
                shutil.copy(part / f"ratio-{ratio}.jsonl", path)


def logs_copied(folder):
    others = ["runs/shares.json", "real/answers.json", "hf.json"]
    others = [RESULTS / name for name in others]
    for path in [*RESULTS.rglob("*.jsonl"), *RESULTS.rglob("*.npz"), *others]:
        copy = folder / path.relative_to(RESULTS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    make_up(folder)
    return folder


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """The published logs once more. A test puts back what it changes."""
    return logs_copied(tmp_path_factory.mktemp("published"))


@pytest.mark.parametrize("marker", tables.TABLES)
def test_a_table_begins_with_its_own_header(marker, copied):
    header, *rows = tables.TABLES[marker](copied)
    assert " | ".join(header).startswith(HEADERS[marker])
    assert rows and {len(row) for row in rows} == {len(header)}
    page = re.search(rf"<!-- {marker} -->\n(.*)\n", PAGES)[1]
    if logs.sources(marker, RESULTS) or marker == "paper":
        assert page == "| " + " | ".join(header) + " |"
    else:
        assert page == "Not run yet."


def altered(found):
    """What a JSON file holds, with half of every share and other counts."""
    if isinstance(found, dict):
        return {name: altered(value) for name, value in found.items()}
    if isinstance(found, list) and found and isinstance(found[0], int):
        return [found[0] // 2, found[1]]  # of answers: right, asked
    if isinstance(found, float):
        return found / 2
    return found + 1 if isinstance(found, int) else found


MEASURED = "val_loss val_corpus_loss trained ratio low high needed_gb summed_over_peak".split()


def alter(path):
    """Change what a file says: every measurement of a log, and how many tokens it selects."""
    if path.suffix == ".npz":
        losses = dict(np.load(path))
        for run in ("slm", "dynamics-clm", "dynamics-slm"):
            losses[run] = losses[run] + np.linspace(0, 3, losses[run].shape[1])
        np.savez(path, **losses)
    elif path.suffix == ".json":
        path.write_text(json.dumps(altered(json.loads(path.read_text()))))
    elif path.name == "faults.jsonl":
        write_records(path, map(altered, logs.read_log(path)))
    else:
        records = logs.read_log(path)
        for record in records:
            if "right" in record:
                record["right"] = record["questions"] - record["right"]
            for key in MEASURED:
                if key in record:
                    record[key] *= 0.5
            if "seconds" in record:
                record["seconds"] += 7200
        if records[0].get("config", {}).get("ratio"):
            records[0]["config"]["ratio"] *= 0.5
        write_records(path, records)


@pytest.fixture(scope="module")
def falsified(tmp_path_factory):
    """All of them altered."""
    folder = logs_copied(tmp_path_factory.mktemp("falsified"))
    for path in folder.rglob("*.*"):
        alter(path)
    return folder


def made_with(paths, source, folder, make):
    """make(folder) with these files taken from `source`; they are then put back."""
    before = {path: (folder / path).read_bytes() for path in paths}
    for path in paths:
        shutil.copy(source / path, folder / path)
    try:
        return make(folder)
    finally:
        for path, content in before.items():
            (folder / path).write_bytes(content)


def own_logs(marker, folder):
    return [path.relative_to(folder) for path in logs.sources(marker, folder)]


@pytest.mark.parametrize("marker", tables.TABLES)
def test_a_table_changes_with_its_own_logs_and_no_other(marker, copied, falsified):
    def rows(folder):
        return list(tables.TABLES[marker](folder))

    published = rows(copied)
    own = own_logs(marker, copied)
    assert own or marker == "paper"
    assert made_with(own, copied, falsified, rows) == published  # every other log is altered
    for path in own[:: len(own) // 10 + 1]:  # of long lists some
        assert made_with([path], falsified, copied, rows) != published, path


# The sentences of bench, demo and hf name machines and packages, and no measurement.
@pytest.mark.parametrize("marker", sorted(set(findings.FINDINGS) - {"bench", "demo", "hf"}))
def test_sentences_change_with_the_logs_of_their_table(marker, copied, falsified):
    def sentences(folder):
        return " ".join(findings.FINDINGS[marker](folder))

    published = sentences(copied)
    assert made_with(own_logs(marker, copied)[::2], falsified, copied, sentences) != published


def test_a_table_names_the_commits_of_all_its_logs():
    for marker in tables.TABLES:
        commits = set()
        for path in logs.sources(marker, RESULTS):
            if path.suffix == ".jsonl" and "config" in (header := logs.read_log(path)[0]):
                commits.add(header["commit"])
        assert commits <= set(re.findall(r"[\w-]+", logs.provenance(marker))), marker
    assert logs.provenance("dirt") == "Logs: commit a6dbf33."
    assert logs.provenance("dynamics") == "Logs: commit a6dbf33."


# ---- statistics, by hand -------------------------------------------------------------------------


def log(*evaluations, questions=10):
    """A log of (tokens, right) or (tokens, right, loss) at each evaluation."""
    records = [{"run": "by hand"}]
    for tokens, right, *loss in evaluations:
        record = {"tokens": tokens, "right": right, "questions": questions, "seconds": tokens}
        record["val_loss"] = loss[0] if loss else 1.0
        records.append(record)
    return records


def test_interval_is_students():
    """The textbook: 1 2 3 4 5 have mean 3, standard error 0.70711, and t is 2.776."""
    mean, low, high = logs.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, high) == pytest.approx((3, 3 + 2.776 * 0.70711), abs=1e-4)
    assert high - mean == pytest.approx(mean - low)
    assert findings.with_interval([-0.02, -0.02]) == "+0.0 (0.0 to 0.0)"  # not -0.0


def test_spread_is_mean_and_sample_deviation():
    assert logs.spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"
    assert logs.spread([1.234], 2) == "1.23"


def write_seed(folder, seed, run, right):
    path = folder / f"seed{seed}" / f"{run}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, log((100, 0), (200, right)))


def test_gains_are_paired_by_seed_and_taken_at_the_end(tmp_path):
    for seed, clm, slm in ((2, 1, 5), (10, 4, 6), (3, 2, 2)):
        write_seed(tmp_path, seed, "clm", clm)
        write_seed(tmp_path, seed, "slm", slm)
    write_seed(tmp_path, 4, "slm", 9)  # without a CLM run: no pair
    assert logs.gains("slm", "clm", part=tmp_path) == [20, 40, 0]  # seeds 10, 2, 3 by name
    assert sorted(logs.ends("slm", "right", tmp_path)) == [20, 50, 60, 90]


def test_uses_are_compared_with_the_rival_of_their_seed(tmp_path):
    """Of a run only the seeds asked for, and points only where the rival has that seed."""
    for seed, mine, theirs in ((1, 5, 4), (2, 6, 3), (3, 9, 0)):
        write_seed(tmp_path / "runs", seed, "mine", mine)
        write_seed(tmp_path / "runs", seed, "theirs", theirs)
    write_seed(tmp_path / "runs", 4, "mine", 10)
    runs = {"mine": "A", "theirs": "B", "not-run": "C"}
    header, *rows = control_tables.uses_compared(tmp_path, runs, (1, 2, 4), "theirs", "B")
    assert header[-1] == "points over B"
    # 50, 60 and 100 % right of 10; 10 and 30 points over B: mean 20, t of one degree 12.706.
    assert rows[0] == ["A", "200", "200", "3", "1.000 ± 0.000", "70.0 ± 26.5", rows[0][-1]]
    assert rows[0][-1] == "+20.0 (-107.1 to 147.1)"
    assert rows[1] == ["B", "200", "200", "2", "1.000 ± 0.000", "35.0 ± 7.1", ""]
    assert len(rows) == 2


def test_passing_must_hold_to_the_end():
    """An untrained model that guesses 22 right and then falls back has not passed."""
    clm = log((100, 5), (300, 20), questions=500)
    guess = log((50, 22), (100, 3), (150, 21), (300, 40), questions=500)
    assert logs.times_fewer(guess, clm, "right") == 2
    below = log((50, 22), (100, 3), (300, 19), questions=500)
    assert logs.times_fewer(below, clm, "right") is None
    assert logs.times_fewer(below, clm, "right", between=True) is None


def test_passing_is_read_off_the_line_between_evaluations():
    clm = log((400, 5))
    slm = log((100, 1), (200, 9), (400, 9))  # 5 of 10 halfway between 100 and 200
    assert logs.times_fewer(slm, clm, "right") == 2
    assert logs.tokens_between(slm, clm[-1], "right") == 150
    assert logs.times_fewer(slm, clm, "right", between=True) == pytest.approx(400 / 150)
    assert logs.tokens_between(log((100, 6), (200, 7)), clm[-1], "right") == 100


def test_a_seed_that_never_passes_is_said_and_not_averaged():
    assert findings.times_text([2.0, None, 4.0]) == (
        "3.0 ± 1.4 times fewer tokens (in 2 of 3 seeds; in the others at no point)"
    )
    assert findings.times_text([None]) == "at no point"
    assert findings.mean_or_none([2.0, None]) is None


def test_the_factor_in_tokens_by_hand():
    """SLM is at CLM's 5 right answers after 150 tokens, and at its loss at the first evaluation."""
    clm = log((100, 1, 2.0), (400, 5, 1.0))
    slm = log((100, 1, 0.9), (200, 9, 0.8), (400, 9, 0.7))
    behind = log((100, 1, 2.0), (400, 4, 1.5))
    pairs = [(clm, slm, 600), (clm, behind, 600)]
    assert factors.student_factors(pairs, "right") == [pytest.approx(400 / 150), None]
    assert factors.factors_in_all(pairs, "right") == [pytest.approx(400 / (200 + 600)), None]
    whole_run = factors.factors_in_all(pairs, "right", score_all=True)
    assert whole_run == [pytest.approx(400 / (150 + 400 / 3 + 600)), None]
    assert not factors.is_bound(pairs, "right") and factors.is_bound(pairs, "val_loss")
    assert factors.cell([2.0, 4.0], False) == "3.0 ± 1.4"
    assert factors.cell([2.0, None], True) == "at least 2.0 (never in 1 of 2 seeds)"
    assert factors.cell([None, None], False) == "never"


def test_a_factor_to_a_floor_is_not_given(tmp_path, monkeypatch):
    """4 % right is what is guessed: whoever passes it has shown nothing."""
    for run, right in (("ref", 60), ("clm", 4), ("slm", 50)):
        folder = tmp_path / "runs" / "seed1"
        folder.mkdir(parents=True, exist_ok=True)
        records = log((100, 2, 2.0), (200, right, 1.0), questions=100)
        write_records(folder / f"{run}.jsonl", records)
    monkeypatch.setattr(factors, "comparisons", lambda: [(0.75, 1, "clm", "slm")])
    header, row = factors.factor_table(tmp_path)
    found = dict(zip(header, row, strict=True))
    assert found["factor by answers"] == found["in all, by answers"] == "CLM at floor"
    assert found["by held-out loss"] == "1.0"


def test_fishers_exact_test():
    """The lady tasting tea: 3 of 4 and 1 of 4; all 4 and none; equal shares."""
    assert logs.fisher_p(3, 4, 1, 4) == pytest.approx(34 / 70)
    assert logs.fisher_p(4, 4, 0, 4) == pytest.approx(2 / 70)
    assert logs.fisher_p(5, 10, 5, 10) == 1


def test_answers_are_counted_over_seeds_by_run_and_task(tmp_path):
    answers = {"seed1/slm.addsub": [1, 10], "seed2/slm.addsub": [2, 10]}
    answers |= {"seed1/slm-30.addsub": [7, 10], "seed1/slm.singleop": [5, 10]}
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    assert logs.count_answers("slm", "addsub", tmp_path) == (3, 20)


# ---- fine-tuning, memory, faults, other tools: made-up logs --------------------------------------


@pytest.fixture
def fine_tuned(tmp_path):
    """fine_tuned({run: right answers of 10 by seed}) writes these logs, and gives their folder."""

    def write(runs):
        (tmp_path / "runs").mkdir()
        for run, answers in runs.items():
            for seed, right in enumerate(answers, start=1):
                write_seed(tmp_path / "runs", seed, run, right)
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("excess", "verdict"),
    [([8, 7, 9], "is better than"), ([1, 0, 2], "is worse than"), ([6, 2, 7], "is not shown to")],
)
def test_the_verdict_on_fine_tuning_follows_the_interval(fine_tuned, excess, verdict):
    answers = {"sft-base": [1, 1, 1], "sft-all": [5, 4, 6], "sft-excess": excess}
    folder = fine_tuned(answers | {"sft-random": [3, 2, 4], "sft-lr2.5e-4": [7]})
    rows = {row[0]: row[1:] for row in tables.TABLES["sft"](folder)}
    assert rows["all answer tokens"] == ["3", "1.000 ± 0.000", "50.0 ± 10.0", "0.0 ± 0.0"]
    assert rows["random, 60 %"][-1] == "-20.0 ± 0.0"
    assert rows["all, learning rate 2.5e-4"] == ["1", "1.000", "70.0", "20.0"]
    assert "all, learning rate 2.25e-3" not in rows  # not run
    said = " ".join(findings.FINDINGS["sft"](folder))
    assert said.startswith(f"By answers, selection {verdict}")
    assert said.endswith("(seed 1): 7.5e-4: 50.0 %, 2.5e-4: 70.0 %.")


def test_one_seed_of_fine_tuning_gives_no_verdict(fine_tuned):
    folder = fine_tuned({"sft-all": [5], "sft-excess": [9]})
    assert "selection" not in " ".join(findings.FINDINGS["sft"](folder))
    assert tables.content("sft", folder).startswith("| fine-tuned on | seeds |")


@pytest.mark.parametrize("marker", ["sft", "faults"])
def test_what_has_not_been_run_is_one_line(marker, tmp_path):
    assert tables.content(marker, tmp_path) == "Not run yet."


def test_the_last_row_of_a_part_counts_and_missing_parts_are_left_out(tmp_path):
    assert checks.faults_summary(tmp_path) == {}
    old = fault_row("kills") | {"kills": 7, "n_failed": 3}
    write_records(tmp_path / "faults.jsonl", [old, fault_row("kills"), fault_row("writers")])
    header, kills, signals, *pairs = checks.faults_table(tmp_path)
    assert kills[1:] == ["105 kills", "52 of 52 ends bit-identical to an undisturbed run"]
    assert signals[1:] == ["40 signals", "39 said so in one line and resumed"]
    assert [row[1] for row in pairs] == ["18 pairs", "6 pairs"]
    assert checks.faults_summary(tmp_path) == {"kills": 105, "bit_identical": 105}
    assert "0 attempts ended otherwise" in " ".join(checks.faults_sentences(tmp_path))


def test_an_end_that_differed_counts_against_all_its_kills(tmp_path):
    row = fault_row("kills") | {"bit_identical": 50}
    write_records(tmp_path / "faults.jsonl", [row, fault_row("fuzz")])
    assert checks.faults_summary(tmp_path) == {
        "kills": 105,
        "bit_identical": 105 - 2 * 3,
        "inputs_fuzzed": 100000,
        "crashes": 0,
    }


def test_a_row_of_faults_py_fills_its_line_of_the_table():
    """Every number that the table names is one that faults.py or hostile.py counts."""
    counted = (RESULTS / "faults.py").read_text() + (RESULTS / "hostile.py").read_text()
    for rows in checks.FAULTS.values():
        for name in re.findall(r"\{(\w+)", str(rows)):
            assert re.search(rf"\b{name}=|[\"']{name}[\"']", counted), name


def test_memory_says_how_many_windows_fit_or_what_one_would_need():
    rows = {tuple(row[:3]): row[3:] for row in checks.memory_table(RESULTS)}
    assert rows["TinyLlama 1.1 B", "adamw", "1"] == [
        "no: 25.5 GB",
        "2 windows: 20.7 GB",
        "8 windows: 61.3 GB",
        "64 windows: 57.3 GB",
    ]
    assert all(cell.startswith("no: ") for cell in rows["Mistral 7 B", "adamw", "1"])
    assert rows["TinyLlama 1.1 B", "muon", "1"][0].startswith("1 window: ")


def test_slm_on_a_real_model_is_shown_once_it_has_run(tmp_path):
    found = json.loads((RESULTS / "hf.json").read_text())
    slm = {"tokens": 100352, "trained": 60211, "val_loss": [2.4, 2.3]}
    found["train"] = {"slm": slm, "commit": "abc", "packages": {}}
    (tmp_path / "hf.json").write_text(json.dumps(found))
    rows = [row for row in checks.hf_table(tmp_path) if "of SLM" in row[0]]
    assert rows == [
        [
            "SmolLM2: 100,352 tokens of SLM, 60,211 of them selected",
            "",
            "target loss 2.40 → 2.30 nats at its evaluations",
        ]
    ]
    lm_eval = found["lm_eval"]
    right = f"{lm_eval['right_eval_math']} of {lm_eval['n']} here"
    assert any(right in row[2] for row in checks.hf_table(tmp_path))
    assert checks.hf_summary(tmp_path)["lm_eval_difference"] == lm_eval["difference"]


# ---- losses of single tokens ---------------------------------------------------------------------


def test_token_dynamics_equal_a_line_fitted_by_hand():
    """Least squares from its textbook formula, token by token, in plain Python."""
    rng = np.random.default_rng(0)
    start, drift = rng.uniform(0, 5, 300), rng.uniform(-1, 1, 300)
    losses = start + np.linspace(0, 1, 16)[:, None] * drift + rng.normal(0, 0.2, (16, 300))
    losses = losses.astype(np.float16)
    found = logs.token_dynamics(losses)
    mean_last = sum(map(float, losses[-1])) / 300
    for token, kind in zip(losses.astype(float).T.tolist(), found, strict=True):
        mean = sum(token) / 16
        slope = sum((x - 7.5) * (y - mean) for x, y in enumerate(token))
        change = 15 * slope / sum((x - 7.5) ** 2 for x in range(16))
        flat = "L->L" if token[-1] <= mean_last else "H->H"
        assert kind == ("L->H" if change > 0.2 else "H->L" if change < -0.2 else flat)
    assert set(found) == set(logs.CLASSES)


def test_token_dynamics_by_hand():
    losses = np.array([[4, 1, 3, 0.1], [4, 1.5, 2, 0.2], [4, 2, 1, 0.1]])
    assert logs.token_dynamics(losses).tolist() == ["H->H", "L->H", "H->L", "L->L"]


def test_kept_is_the_rule_of_select_tokens():
    losses = {"slm": np.random.rand(3, 50), "ref": np.random.rand(1, 50)}
    kept = logs.kept(losses, "slm", 0.4)
    for at_evaluation, mine in zip(losses["slm"], kept, strict=True):
        score = torch.from_numpy(at_evaluation - losses["ref"][-1])
        assert (rho.select_tokens(score, 0.4).numpy() == mine).all()


def test_losses_are_read_with_the_kind_of_each_token(tmp_path):
    """A wrong number is a kind of its own: the digits that open a run of kind 1."""
    (tmp_path / "meta.json").write_text('{"dtype": "uint16"}')
    text = [0, *b"A78B7A"]
    np.array(text, np.uint16).tofile(tmp_path / "val_corpus.bin")
    np.savez(tmp_path / "kinds.npz", val_corpus=np.array([0, 0, 1, 1, 1, 1, 3], np.uint8))
    (tmp_path / "slm").mkdir()
    for step in (1, 2):
        np.save(tmp_path / "slm" / f"{step}.npy", np.full((1, 6), step, np.float16))
    records = [{"config": {"data": str(tmp_path), "init": "out/clm.pt"}}]
    records += [{"step": step, "tokens": 10 * step} for step in (1, 2)]
    (tmp_path / "slm.jsonl").write_text("\n".join(map(json.dumps, records)))
    found = logs.read_losses(tmp_path)
    assert found["slm"].tolist() == [[1] * 6, [2] * 6]
    assert found["slm seen"].tolist() == [10, 20] and found["slm on"]
    assert found["text"].tolist() == text[1:]
    assert found["kinds"].tolist() == [0, logs.SLIP, logs.SLIP, 1, 1, 3]
    assert logs.read_losses(tmp_path / "slm") == {}


# ---- the published runs and their commands -------------------------------------------------------


def test_published_runs_are_comparable():
    """Same seed, data, model, optimizer, schedule and tokens in all arms; only the rule differs."""
    folders = [*(RESULTS / "runs").glob("seed*"), *(RESULTS / "real").glob("seed*")]
    assert len(folders) == 8
    own = {"select", "ratio", "threshold", "name", "stage", "reference"}
    for folder in [*folders, RESULTS / "demo"]:
        runs = logs.read_runs(folder)
        arms = {run: runs[run] for run in ("clm", "slm", "slm-random")}
        configs = {run: records[0]["config"] for run, records in arms.items()}
        shared = [{k: v for k, v in config.items() if k not in own} for config in configs.values()]
        assert shared[0] == shared[1] == shared[2]
        assert len({records[-1]["tokens"] for records in arms.values()}) == 1
        assert arms["slm"][-1]["trained"] == arms["slm-random"][-1]["trained"]
        assert configs["slm"]["ratio"] == configs["slm-random"]["ratio"] < 1
        assert configs["slm"]["select"] == "excess" and configs["slm-random"]["select"] == "random"


def is_set_to(setting, text):
    """Whether a logged setting is what the flag said: 0.002 is 2e-3."""
    if isinstance(setting, bool):
        return text == str(setting).lower()
    if isinstance(setting, (int, float)):
        return setting == float(text)
    return setting == text


def test_every_published_log_is_of_a_named_command_and_the_other_way_round():
    """Made with just these flags, and trained to its end."""
    lines = []
    for name, commands in (experiments.DEMO | experiments.REAL).items():
        if name != "sft" or logs.sources("sft"):  # else it has not been run
            lines += commands()
    made = experiments.logs_made(lines)
    folders = [RESULTS / "runs", RESULTS / "fresh", RESULTS / "real"]
    found = [path for folder in folders for path in folder.rglob("*.jsonl")]
    assert sorted(made) == sorted(str(path.relative_to(RESULTS)) for path in found)

    runs = [part for part in " && ".join(lines).split(" && ") if "rho.py" in part]
    for command in (run for run in runs if "--stage dynamics" not in run):
        flags = dict(re.findall(r"--(\w+) (\S+)", command))
        header, *evaluations = logs.read_log(RESULTS / experiments.logs_made([command])[0])
        config = header["config"]
        tokens = config["tokens"]
        if flags["stage"] == "ref":
            tokens = config["ref_tokens"] or tokens  # the older logs call both `tokens`
            assert is_set_to(tokens, flags.pop("ref_tokens", tokens)), command
        if flags.get("select") == "oracle" and config["select"] == "ref_loss":
            del flags["select"]  # older logs: within the program the oracle was this rule
        for flag, text in flags.items():
            assert is_set_to(config[flag], text), command
        assert evaluations[-1]["step"] == tokens // (config["batch_size"] * config["block_size"])


def test_commands_are_printed_by_table(capsys):
    experiments.main(["lr", "scope"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7 + 9 and all(line.startswith("python rho.py") for line in printed)
    with pytest.raises(SystemExit) as stopped:
        experiments.main(["lt"])
    assert stopped.value.code == 2 and "lt: unknown" in capsys.readouterr().err


# ---- mistakes in the wild ------------------------------------------------------------------------


def test_every_test_that_the_mistakes_name_exists():
    text = re.search(r"^## Mistakes in the wild\n(.*?)^## ", PAGES, re.M | re.S)[1]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 8
    for row in rows:
        named = re.findall(r"`(tests/\w+\.py)::(\w+)`", row)
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / path).read_text(), name


# ---- a user's own runs ---------------------------------------------------------------------------


def test_own_runs_are_shown_and_nothing_is_published(tmp_path, capsys):
    for path in (RESULTS / "demo").glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    shutil.copy(tmp_path / "slm.jsonl", tmp_path / "mine.jsonl")
    before = (ROOT / "README.md").read_text()
    tables.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search("^ *mine .* 115 of 500", printed, re.M)
    assert (ROOT / "README.md").read_text() == before
    with pytest.raises(SystemExit) as stopped:
        tables.main([str(tmp_path / "none")])
    assert stopped.value.code == 2 and "holds no runs" in capsys.readouterr().err


def test_collect_copies_logs_and_counts_answers(tmp_path):
    out, data, results = (tmp_path / name for name in ("out", "data", "results"))
    folders = (
        "out/seed1",
        "out/real/seed2",
        "data/demo",
        "data/real",
        "results/runs",
        "results/real",
    )
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    (out / "seed1" / "slm.jsonl").write_text("{}")
    (out / "real" / "seed2" / "clm.jsonl").write_text("{}")
    answers = '{"correct": true}\n{"correct": false}\n{"correct": true}\n'
    (out / "real" / "seed2" / "clm.addsub.answers.jsonl").write_text(answers)
    (data / "real" / "meta.json").write_text("{}")
    np.savez(data / "demo" / "kinds.npz", train=np.array([0, 0, 0, 5]))
    (results / "runs" / "shares.json").write_text('{"other": 0.5}')
    logs.collect(out, data, results)
    found = {str(path.relative_to(results)) for path in results.rglob("*.jsonl")}
    assert found == {"runs/seed1/slm.jsonl", "real/seed2/clm.jsonl"}
    counted = json.loads((results / "real" / "answers.json").read_text())
    assert counted == {"seed2/clm.addsub": [2, 3]}
    shares = json.loads((results / "runs" / "shares.json").read_text())
    assert shares == {"other": 0.5, "demo": 0.75}
    assert (results / "real" / "meta.json").exists()
