"""The pictures draw what the logs say, the page of tokens is whole and safe, the bench runs."""

import base64
import io
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rho

matplotlib = pytest.importorskip("matplotlib")  # extra: plots

RESULTS = Path(rho.__file__).parent / "results"
sys.path.insert(0, str(RESULTS))

import bench  # noqa: E402
import contenders  # noqa: E402
import drawing  # noqa: E402
import growth  # noqa: E402
import logs  # noqa: E402
import plots  # noqa: E402
import token_plots  # noqa: E402
import tokens_page  # noqa: E402


def make_log(run, right, losses, tokens=1000, init="", lr=1e-3):
    """A log with one evaluation for each of `right`, the last after `tokens` tokens."""
    config = {"init": init, "ratio": 0.5, "threshold": None, "select": "excess", "data": "d"}
    steps = len(right)
    config |= {"lr": lr, "tokens": steps, "batch_size": 1, "block_size": 1}  # one step a token
    records = [{"run": run, "config": config, "step": 0}]
    for i, (count, loss) in enumerate(zip(right, losses, strict=True), 1):
        record = {"step": i, "tokens": tokens * i // len(right), "trained": 1, "seconds": 1.0}
        record |= {"right": count, "questions": 50, "val_loss": loss, "val_corpus_loss": 2 * loss}
        records.append(record)
    return records


def write_log(folder, run, records):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{run}.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))


@pytest.fixture
def drawn(monkeypatch):
    """The axes of every picture drawn, in order; nothing is written."""
    axes = []
    for module in (plots, token_plots):
        monkeypatch.setattr(module, "finish", lambda fig, *_: axes.extend(fig.axes))
    return axes


def line(ax, label):
    (found,) = [line for line in ax.get_lines() if line.get_label() == label]
    return found


def texts(ax):
    return [text.get_text() for text in ax.texts]


# ---- runs against tokens -------------------------------------------------------------------------


def test_curves_are_the_means_and_deviations_of_the_logs(drawn):
    seeds = [make_log("slm", [5, 10], [3.0, 2.0]), make_log("slm", [15, 30], [4.0, 3.0])]
    clm = [make_log("clm", [1, 2], [5.0, 4.0])] * 2
    plots.curves({"clm": clm, "slm": seeds}, "unused.png")
    accuracy, loss = drawn
    assert line(accuracy, "slm").get_xdata() == pytest.approx([0.0005, 0.001])
    assert line(accuracy, "slm").get_ydata() == pytest.approx([20, 40])  # percent of 50
    assert line(loss, "slm").get_ydata() == pytest.approx([3.5, 2.5])
    assert line(loss, "clm").get_ydata() == pytest.approx([5, 4])
    band = loss.collections[1].get_paths()[0].vertices[:, 1]  # the second: of slm
    assert band.min() == pytest.approx(2.5 - 0.5**0.5)
    assert band.max() == pytest.approx(3.5 + 0.5**0.5)


def test_the_reference_is_a_line_across_where_it_ends(drawn):
    runs = {"ref": [make_log("ref", [9, 40], [2.0, 1.0])], "clm": [make_log("clm", [1, 2], [4, 3])]}
    plots.curves(runs, "unused.png")
    assert set(line(drawn[1], "ref").get_ydata()) == {1.0}


def test_without_questions_both_held_out_losses_are_drawn(drawn):
    records = make_log("clm", [0], [3.0])
    del records[1]["right"], records[1]["questions"]
    plots.curves({"clm": [records]}, "unused.png")
    assert [ax.get_ylabel() for ax in drawn] == [
        plots.TITLES[key] for key in list(plots.TITLES)[1:]
    ]


def test_every_run_of_a_folder_is_named_and_what_is_unlike_clm_is_marked(tmp_path, drawn, capsys):
    write_log(tmp_path, "clm", make_log("clm", [1, 2], [4, 3]))
    write_log(tmp_path, "my-rule", make_log("my-rule", [3, 4], [3, 2]))
    write_log(tmp_path, "short", make_log("short", [3, 4], [3, 2], tokens=500_000))
    write_log(tmp_path, "on", make_log("on", [3, 4], [3, 2], init="out/clm.pt"))
    write_log(tmp_path, "fast", make_log("fast", [3, 4], [3, 2], lr=1e-2))
    (tmp_path / "answers.jsonl").write_text('{"question": 1}\n')
    plots.main([str(tmp_path)])
    marked = {"short\n(0.5 M tokens)", "on\n(from clm.pt)", "fast *"}
    assert set(texts(drawn[0])) == {"CLM:\nall tokens", "my-rule", *marked}
    styles = {(line.get_color(), line.get_marker()) for line in drawn[0].get_lines()}
    assert len(styles) == 5  # one for each run
    assert str(tmp_path / "demo.png") in capsys.readouterr().out


def test_a_folder_of_runs_gets_its_picture(tmp_path):
    write_log(tmp_path, "slm", make_log("slm", [1, 2], [4, 3]))
    plots.main([str(tmp_path)])
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("main", [plots.main, tokens_page.main], ids=["plots", "tokens_page"])
def test_a_folder_without_runs_ends_in_one_line_that_names_it(main, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "none")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and str(tmp_path / "none") in said


@pytest.mark.parametrize("heights", [[0.1] * 6, [0.3, 0.05, 0.1, 0.1, 0.2, 0.05]])
def test_labels_keep_their_order_and_do_not_cover_each_other(heights):
    rng = np.random.default_rng(0)
    places = np.sort(rng.random(6) * 0.3)
    moved = np.array(drawing.spread_out(places, heights))
    halves = np.array(heights) / 2
    assert (np.diff(moved) >= halves[1:] + halves[:-1] - 1e-3).all()
    assert moved[0] >= halves[0] - 1e-3
    assert drawing.spread_out([0.2, 0.9], [0.1, 0.1]) == [0.2, 0.9]  # no need, no move


# ---- sweeps, growth ------------------------------------------------------------------------------


def test_sweeps_draw_where_the_published_runs_ended(drawn):
    plots.sweeps("unused.png")
    ratio, _, _, reference = drawn
    ends = [np.mean(logs.ends(f"ratio-{r}", "right")) for r in (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 1.0)]
    assert ratio.get_lines()[0].get_ydata() == pytest.approx(ends)
    # Five seeds have a reference, but a sweep only three: no mean may mix them.
    expected = []
    for run in ["ref", *(f"ref-{name}" for name in plots.REFERENCES)]:
        found = logs.published(run)
        expected.append(np.mean([logs.value(found[seed][-1], "right") for seed in (1, 2, 3)]))
    assert reference.get_lines()[0].get_xdata() == pytest.approx(sorted(expected))
    assert len(logs.published("ref")) == 5


def test_growth_draws_its_log(drawn, tmp_path, monkeypatch):
    records = []
    for axis in plots.GROWTH_SIZES:
        sizes = dict.fromkeys(plots.GROWTH_SIZES, 8)
        records += [{"axis": axis, **sizes, axis: 8, "tokens_per_s": 900, "gib": 0.5}]
        records += [{"axis": axis, **sizes, axis: 64, "tokens_per_s": 100, "gib": 2}]
    (tmp_path / "growth.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in records))
    monkeypatch.setattr(plots, "HERE", tmp_path)
    plots.growth("unused.png")
    assert len(drawn) == 8
    assert list(line(drawn[0], "tokens_per_s").get_ydata()) == [900, 100]
    assert list(line(drawn[7], "gib").get_xdata()) == [8, 64]
    low, high = drawn[4].get_ylim()
    shown = [tick for tick in drawn[4].get_yticks() if low < tick < high]
    assert len(shown) > 1  # more than one label


# ---- single tokens -------------------------------------------------------------------------------


def tiny_losses():
    """As logs.read_losses gives them: 4 evaluations of 28 tokens, four of each kind."""
    rng = np.random.default_rng(0)
    losses = {"kinds": np.repeat(list(logs.KINDS), 4), "text": np.arange(28)}
    for run in logs.LOSS_RUNS:
        losses[run] = rng.random((4, 28)).astype(np.float16) * 4
        losses[f"{run} seen"] = np.array([1, 2, 3, 4]) * 10**6
    return losses


def test_selection_draws_the_share_kept_of_each_kind(drawn):
    losses = tiny_losses()
    token_plots.selection(losses, 0.5, "unused.png")
    excess = losses["slm"].astype(float) - losses["ref"][-1]
    best = np.argsort(-excess, axis=1)[:, :14]
    for i, name in enumerate(logs.KINDS.values()):
        expected = [100 * np.isin(best[row], range(4 * i, 4 * i + 4)).sum() / 4 for row in range(4)]
        found = line(drawn[0], name.replace(": ", ":\n"))
        assert list(found.get_ydata()) == expected


def test_loss_and_answers_are_those_of_the_same_evaluation(drawn):
    losses = tiny_losses()
    runs = {}
    for run in ("clm", "slm"):
        runs[run] = make_log(run, [1, 5, 20, 30], [4, 3, 2, 1])
    token_plots.loss_and_answers(losses, runs, "unused.png")
    points = drawn[2].get_lines()[0]  # clm's, from the third evaluation on
    is_kept = logs.kept(losses, "slm", 0.5)[-1]
    assert points.get_xdata() == pytest.approx(losses["clm"][2:, is_kept].mean(1, dtype=float))
    assert list(points.get_ydata()) == [40, 60]


def test_dynamics_draws_the_mean_of_each_class(drawn):
    losses = tiny_losses()
    token_plots.dynamics_picture(losses, "unused.png")
    classes, moves = logs.dynamics(losses, "dynamics-slm")
    assert len(moves) == 5  # clm's last evaluation, and four
    for name, tokens in classes.items():
        if tokens.any():
            label = f"{name.replace('->', '→')}\n{100 * tokens.mean():.0f} % of tokens"
            expected = moves[:, tokens].mean(1)
            assert line(drawn[1], label).get_ydata() == pytest.approx(expected)


def test_the_picture_of_tokens_shows_all_of_them_in_order():
    words = ["Question", ":", *[" word"] * 40, ".", "\n", "Answer", " 4", "\n"]
    places = tokens_page.place_tokens(words)
    assert places[0] == (0, 0) and len(places) == len(words)
    for (row, column), (next_row, next_column), word in zip(
        places, places[1:], words, strict=False
    ):
        if next_row == row:
            assert next_column == column + len(word)
        else:
            assert next_row == row + 1 and next_column in (-1, 0)
        assert column + len(word) <= tokens_page.COLUMNS + 2
    assert places[words.index("Answer")][1] == 0


def test_the_published_picture_of_tokens_marks_what_is_kept(monkeypatch, tmp_path):
    losses = logs.read_losses(RESULTS / "runs" / "seed1")
    drawn = []
    draw = tokens_page.draw_token
    monkeypatch.setattr(tokens_page, "draw_legend", lambda *_: None)

    def spy(ax, row, column, word, *facts):
        drawn.append((word, *facts))
        draw(ax, row, column, word, *facts)

    monkeypatch.setattr(tokens_page, "draw_token", spy)
    tokens_page.picture(losses, 0.5, tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")
    n = len(drawn)
    first = [i for i, _ in enumerate(losses["text"]) if starts_page(losses, drawn, i)]
    assert len(first) == 1  # the words are one stretch of the corpus
    page = slice(first[0], first[0] + n)
    excess = losses["slm"][0].astype(float) - losses["ref"][-1]
    assert [facts[1] for facts in drawn] == list(excess[page])
    score = torch.from_numpy(excess)
    assert [facts[2] for facts in drawn] == rho.select_tokens(score, 0.5)[page].tolist()
    assert [facts[3] for facts in drawn] == list(losses["kinds"][page] == logs.SLIP)


def starts_page(losses, drawn, i):
    """Whether the words drawn are the tokens from i on."""
    ids = losses["text"][i : i + len(drawn)].tolist()
    if len(ids) < len(drawn):
        return False
    encoding = starts_page.encoding = getattr(starts_page, "encoding", None)
    if encoding is None:
        encoding = starts_page.encoding = tokens_page.demo_tokenizer()
    return all(encoding.decode([t]) == word for t, (word, *_) in zip(ids, drawn, strict=True))


# ---- the page of tokens --------------------------------------------------------------------------

HOSTILE = ["</script><script>alert(1)</script>", "<!-- ", "\u2028", "&amp;", "\"'\\"]


@pytest.fixture
def page(tmp_path):
    """The page of three runs on hostile text, and the losses behind it."""
    n = 40
    words = [bytes([b]) for b in range(256)] + [word.encode() for word in HOSTILE]
    ranks = [base64.b64encode(word).decode() for word in words]
    spec = {"name": "hostile", "ranks": ranks, "pat_str": "(?s).", "eot": 261, "n_vocab": 262}
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": spec, "dtype": "uint16"}))
    text = np.arange(n + 1) % 6 + 256  # the hostile words and end-of-text, again and again
    text.astype(np.uint16).tofile(tmp_path / "val_corpus.bin")
    losses = {}
    for number, run in enumerate(("ref", "clm", "slm", "slm-random")):
        records = make_log(run, [1, 2, 3], [3, 2, 1])
        records[0]["config"]["data"] = str(tmp_path)
        write_log(tmp_path, run, records)
        (tmp_path / run).mkdir()
        found = []
        for step in (1, 2, 3):
            rng = np.random.default_rng((number, step))
            found.append(rng.permutation(n)[None].astype(np.float16) / 8)
            np.save(tmp_path / run / f"{step}.npy", found[-1])
        losses[run] = np.concatenate(found)
    return tokens_page.write_page(tmp_path).read_text(), losses


def data_of(html):
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S)[1])


def test_page_of_tokens_is_escaped_whatever_the_text_holds(page):
    """A page that let the corpus out of its data would run what the corpus says."""
    html, _ = page
    assert html.count("<script") == html.count("</script>") == 2  # its own
    assert "\u2028" not in html and "<!--" not in html
    assert not re.search(r"https?:|src=|@import|url\(", html)  # nothing comes from a network
    assert data_of(html)["text"][:6] == [*HOSTILE[1:], "<|endoftext|>", HOSTILE[0]]


def test_page_of_tokens_holds_every_run_token_and_evaluation(page):
    html, losses = page
    data = data_of(html)
    assert list(data["runs"]) == ["slm", "clm", "slm-random"]  # it opens on the first
    assert data["ref"] == [round(100 * x) for x in losses["ref"][-1].tolist()]
    for run, shown in data["runs"].items():
        assert shown["seen"] == [333, 666, 1000]
        assert shown["loss"] == [[round(100 * x) for x in row] for row in losses[run].tolist()]
        classes = [data["classes"][move].replace("→", "->") for move in shown["moves"]]
        assert classes == logs.token_dynamics(losses[run]).tolist()


def test_page_of_tokens_underlines_what_select_tokens_keeps(page):
    html, losses = page
    for run, shown in data_of(html)["runs"].items():
        for row, found in zip(losses[run], shown["kept"], strict=True):
            excess = row.astype(float) - losses["ref"][-1]
            cut = np.sort(excess)[::-1][19]  # ratio 0.5 of 40; ties are kept together
            assert found == "".join("1" if e >= cut else "0" for e in excess)


def test_page_of_a_threshold_keeps_what_is_above_it():
    losses = {"ref": np.zeros((1, 3)), "own": np.array([[0.5, 1.0, 2.0]])}
    own = [{"config": {"threshold": 0.9, "ratio": None}}]
    rule = tokens_page.rule_of(own, {"own": own})
    assert tokens_page.kept_tokens(losses, "own", *rule).tolist() == [[False, True, True]]


# ---- the bench -----------------------------------------------------------------------------------


def test_bench_runs_each_measurement_and_writes_nothing(capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # of the process that measures growth
    before = [(RESULTS / name).read_bytes() for name in ("bench.jsonl", "growth.jsonl")]
    bench.main(["--quick"])
    said = capsys.readouterr().out
    assert "skipped" not in said
    for name in [
        "step_slm_over_plain 6x384",
        "step_slm_over_online_ref 6x384",
        "step_clm_over_plain 12x768",
        "step_slm_over_plain demo",
        "step_compiled_over_eager demo",
        "loss_memory_over_plain 6x384",
        "loss_time_recomputing_over_plain 6x384",
        "step_memory_recompute_over_keeping 6x384",
        "fraction_of_peak 6x384",
        "share of the SLM step 6x384: gather, scatter, top k",
        "score_rate_over_forward 6x384",
        "generate_rate_over_uncached 32 rows 6x384",
        "generate_rate_over_transformers 32 rows 6x384, that end",
        "tokenise_rate_over_tiktoken",
        '"tokens_per_s"',
    ]:
        assert name in said
    assert before == [(RESULTS / name).read_bytes() for name in ("bench.jsonl", "growth.jsonl")]


def test_our_step_has_the_gradients_of_the_plain_definitions():
    """Else the bench would time something else than SLM."""
    steps = contenders.Steps(contenders.TINY)
    gradients = {}
    steps.model.zero_grad = lambda: None
    for name in ("ours", "plain"):
        for parameter in steps.model.parameters():
            parameter.grad = None
        if name == "ours":
            steps.our_slm()
        else:
            student_loss = rho.token_loss(steps.model.head(steps.model(steps.x)), steps.y)
            score = rho.score_tokens("excess", student_loss, steps.ref_loss)
            rho.selective_loss(student_loss, rho.select_tokens(score, 0.6)).backward()
        gradients[name] = [p.grad.clone() for p in steps.model.parameters()]
    for ours, plain in zip(gradients["ours"], gradients["plain"], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)


def test_pairs_of_a_ratio_take_turns_in_going_first():
    calls = []

    def called(name):
        calls.append(name)
        time.sleep(1e-4)  # more than the coarsest clock

    ratios = bench.alternate(lambda: called("ours"), lambda: called("other"), 3)
    assert len(ratios) == 3 and all(ratio > 0 for ratio in ratios)
    assert calls == ["ours", "other", "other", "ours", "ours", "other", "other", "ours"]


def test_peak_bytes_are_those_held_at_once():
    kib = 256  # floats

    def two_then_one():
        first = torch.ones(kib)
        second = torch.ones(kib)
        del first, second
        torch.ones(kib)

    assert bench.peak_bytes(two_then_one) == 2 * 1024


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::exp_", "exp, log-sum-exp"),
        ("aten::expand", bench.OTHER_WORK),
        ("aten::gather", "gather, scatter, top k"),
        ("aten::scatter_add_", "gather, scatter, top k"),
        ("aten::mm", "matrix products"),
        ("aten::matmul", bench.OTHER_WORK),  # calls mm, which is counted
    ],
)
def test_operations_are_sorted_by_their_whole_names(name, kind):
    event = type("Event", (), {"name": name, "cpu_parent": None})
    assert bench.kind_of_work(event) == kind
    part = type("Event", (), {"name": "aten::sum", "cpu_parent": event})
    assert bench.kind_of_work(part) == kind  # a part belongs to the whole


def test_a_new_ratio_takes_the_place_of_the_old_one(tmp_path):
    path = tmp_path / "bench.jsonl"
    for name, ratios in [("a", [1.0]), ("b", [3.0, 1.0, 2.0]), ("a", [0.5])]:
        bench.write_record(path, name, ratios)
    records = [json.loads(text) for text in path.read_text().splitlines()]
    assert [(r["name"], r["ratio"], r["low"], r["high"]) for r in records] == [
        ("a", 0.5, 0.5, 0.5),
        ("b", 2.0, 1.0, 3.0),
    ]


@pytest.mark.parametrize("name", ["step_slm demo", "step_clm demo", "score 6x384", "generate demo"])
def test_a_worker_runs_a_contender_by_name(name, monkeypatch, capsys):
    assert name in bench.AGAINST
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{name}\n{name}\n"))
    contenders.work(quick=True)
    assert capsys.readouterr().out == "done\ndone\n"


def test_growth_data_is_a_prepared_folder(tmp_path):
    sizes = {"width": 8, "context": 16, "vocabulary": 300, "corpus": 500}
    growth.write_data(tmp_path, sizes)
    meta = tokens_page.load_meta(tmp_path)
    assert meta["tokens"]["train"] == 500 and set(meta["files"]) == {
        "train.bin",
        "ref.bin",
        "val.bin",
        "val_corpus.bin",
    }


@pytest.mark.parametrize("flags", [["nothing"], ["--against", "/nowhere"]])
def test_bench_refuses_what_it_does_not_know_in_one_line(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(flags)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and flags[-1] in said
