"""results/: what the pictures and the page show is what the runs have stored."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from prepare_data import get_tokenizer, load_meta

sys.path.append(str(Path(__file__).parents[1] / "results"))

import plots  # noqa: E402
import tokens_page  # noqa: E402

N = 8 * 16  # held-out tokens: windows times block_size
RATIOS = {"ref": 1.0, "clm": 1.0, "slm": 0.4, "slm-30": 0.3}


@pytest.fixture
def out(tiny_data, tmp_path):
    """A folder as rho.py leaves it: four runs with three evaluations each.

    All losses are multiples of 1/64, which float16 holds exactly, and no two excesses are equal.
    """
    rng = np.random.default_rng(0)
    digest = load_meta(tiny_data)["files"]["val_corpus.bin"]
    identity = {"val_corpus.bin": digest, "block_size": 16, "eval_windows": 8}
    ref_loss = rng.integers(0, 256, N) / 64
    for run, ratio in RATIOS.items():
        flags = {"stage": run[:3], "data": str(tiny_data), "block_size": 16, "ratio": ratio}
        flags |= {"select": "all" if ratio == 1 else "excess", "threshold": None}
        records = [{"run": run, "flags": flags, "identity": identity}]
        for step in (10, 20, 30):
            losses = ref_loss + rng.permutation(N) / 64
            if run == "ref" and step == 30:
                losses = ref_loss
            np.save(tmp_path / f"{run}-{step}.npy", losses.reshape(8, 16).astype(np.float16))
            record = {"step": step, "tokens": 1000 * step, "val_loss": rng.random()}
            records.append({**record, "right": int(rng.integers(500)), "questions": 500})
        lines = [json.dumps(record) for record in records]
        (tmp_path / f"{run}.jsonl").write_text("\n".join(lines))
    return tmp_path


def stored(out, run, step):
    return np.load(out / f"{run}-{step}.npy").flatten().tolist()


def test_page_shows_the_stored_losses_beside_their_tokens(out, tiny_data, monkeypatch):
    monkeypatch.setattr(tokens_page, "SHOWN", 50)
    tokens_page.main([str(out)])
    html = (out / "tokens.html").read_text()
    _, _, rest = html.partition('id="data">')
    data, _, _ = rest.partition("</script>")
    page = json.loads(data)
    assert "<" not in data and "<" in "".join(page["text"])  # no text can end the element

    # The first loss is that of the second token: nothing predicts the first.
    meta = load_meta(tiny_data)
    tokens = np.fromfile(tiny_data / "val_corpus.bin", meta["dtype"])[1:51]
    assert "".join(page["text"]) == get_tokenizer(meta["tokenizer"]).decode(tokens)
    assert page["starts"] == (tokens == meta["tokenizer"]["eot"]).tolist()
    kinds = np.load(tiny_data / "kinds.npz")["val_corpus"][1:51]
    assert page["kinds"] == [meta["kinds"][kind] for kind in kinds]

    assert page["ref"] == pytest.approx(stored(out, "ref", 30)[:50], abs=0.0051)
    assert [*page["runs"]] == ["slm", "clm", "slm-30"]
    for run, shown in page["runs"].items():
        assert shown["seen"] == [10_000, 20_000, 30_000]
        for losses, step in zip(shown["loss"], (10, 20, 30), strict=True):
            assert losses == pytest.approx(stored(out, run, step)[:50], abs=0.0051)


# A run that trains on all tokens shows what SLM would keep.
@pytest.mark.parametrize("run, ratio", [("slm", 0.4), ("slm-30", 0.3), ("clm", 0.4)])
def test_kept_tokens_are_the_top_k_of_the_excess(out, run, ratio):
    page = tokens_page.page_data(out)
    ref_loss = stored(out, "ref", 30)
    for kept, step in zip(page["runs"][run]["kept"], (10, 20, 30), strict=True):
        losses = stored(out, run, step)
        excess = [losses[i] - ref_loss[i] for i in range(N)]
        best = sorted(range(N), key=lambda i: excess[i])[-round(ratio * N) :]
        assert [i for i in range(N) if kept[i]] == sorted(best)


def test_picture_shows_the_logged_values_and_names_each_line(out):
    runs = plots.read_runs(out)
    fig = plots.runs_picture(runs)
    for ax, key in zip(fig.axes, ("right", "val_loss"), strict=True):
        looks = set()
        for line, (run, (_, *evaluations)) in zip(ax.lines, sorted(runs.items()), strict=True):
            x, y = line.get_data()
            values = [record[key] for record in evaluations]
            if run == "ref":
                assert [*y] == [values[-1], values[-1]]
            else:
                assert [*x] == [0.01, 0.02, 0.03] and [*y] == values
            looks.add((line.get_linestyle(), line.get_marker()))
        assert len(looks) == len(runs)  # told apart without color
        assert {text.get_text() for text in ax.texts} == {line.get_label() for line in ax.lines}
        boxes = sorted(text.get_window_extent().intervaly.tolist() for text in ax.texts)
        assert all(low[1] <= high[0] for low, high in zip(boxes, boxes[1:], strict=False))
    plots.main([str(out)])
    assert (out / "demo.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "script, file, content, says",
    [
        (plots, "*.jsonl", None, "python rho.py --out"),
        (plots, "clm.jsonl", '{"run": "cl', "clm.jsonl is damaged"),
        (tokens_page, "ref.jsonl", None, "python rho.py --stage ref --out"),
        (tokens_page, "[cs]*.jsonl", None, "python rho.py --out"),
        (tokens_page, "slm-20.npy", None, "slm-20.npy is missing or damaged"),
        (tokens_page, "slm-20.npy", "\x93NUMPY", "slm-20.npy is missing or damaged"),
    ],
)
def test_what_is_missing_or_damaged_is_named_in_one_line(out, script, file, content, says):
    for path in out.glob(file):
        path.unlink()
        if content:
            path.write_text(content)
    with pytest.raises(SystemExit, match=says) as error:
        script.main([str(out)])
    assert "\n" not in str(error.value)


def test_losses_of_another_text_are_not_shown(out):
    for run in ("slm", "ref"):
        log = out / f"{run}.jsonl"
        log.write_text(log.read_text().replace('"val_corpus.bin": "', '"val_corpus.bin": "0'))
        if run == "slm":
            assert [*tokens_page.page_data(out)["runs"]] == ["clm", "slm-30"]
    with pytest.raises(SystemExit, match="today's text"):
        tokens_page.page_data(out)
