"""Draw every picture, and write every table of the README, from logs alone.

    python results/figures.py out/demo    one set of runs: its table, and out/demo/demo.png
    python results/figures.py             the published logs: pictures, summary.json, README tables
    python results/figures.py tokens out/demo    the page of coloured tokens, of --stage dynamics

rho.py computes, this file draws; no number in the README is typed by hand.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
ARMS = {  # run: (label, color)
    "ref": ("reference (clean text only)", "#2b6cb0"),
    "clm": ("CLM: all tokens", "#8a8f98"),
    "slm-random": ("random tokens", "#d6a03a"),
    "slm": ("SLM: selected tokens", "#c8372d"),
}
TITLES = {
    "right": "questions answered right, %",
    "val_loss": "loss on held-out target text, nats",
    "val_corpus_loss": "loss on held-out corpus text, nats",
}


def read_logs(folder):
    """{run: records} of a folder, in the order of ARMS; the first record says what was run."""
    logs = {}
    for run in ARMS:
        path = Path(folder) / f"{run}.jsonl"
        if path.exists():
            logs[run] = [json.loads(line) for line in path.read_text().splitlines()]
    if "clm" not in logs:
        print(f"{folder}/clm.jsonl not found. Run: python rho.py", file=sys.stderr)
        sys.exit(2)
    return logs


def points(records, key):
    """[(million tokens seen, value)]; `right` in percent."""
    rows = [r for r in records[1:] if key in r]
    return [(r["tokens"] / 1e6, 100 * r[key] / r["questions"] if key == "right" else r[key])
            for r in rows]  # fmt: skip


def passed(logs, key):
    """(tokens that slm had seen when it first was where clm ended, how many times fewer)."""
    end, sign = logs["clm"][-1], -1 if key == "right" else 1
    there = [r["tokens"] for r in logs["slm"][1:] if sign * r[key] <= sign * end[key]]
    return (there[0], end["tokens"] / there[0]) if there else (None, None)


def rows(logs):
    """The table of a set of runs, its head first; every cell a text."""
    asked = "right" in logs["clm"][-1]
    yield ["arm", "tokens seen", "trained on", "target loss", "corpus loss"] + [
        *(["answers right"] if asked else []),
        "seconds",
    ]
    for run, records in logs.items():
        r = records[-1]
        cells = [ARMS[run][0], f"{r['tokens']:,}", f"{r['trained']:,}"]
        cells += [f"{r['val_loss']:.3f}", f"{r['val_corpus_loss']:.3f}"]
        cells += [f"{r['right']} of {r['questions']}"] if asked else []
        yield [*cells, f"{r['seconds']:.0f}"]


def sentences(logs):
    """What the reader came for, in words."""
    named = {"right": "final accuracy", "val_loss": "final held-out loss"}
    for key in named if "slm" in logs else ():
        if key in logs["clm"][-1]:
            tokens, times = passed(logs, key)
            end = f"after {tokens:,} tokens: {times:.1f} times fewer" if tokens else "at no point"
            yield f"slm passed clm's {named[key]} {end}"


def curves(logs, path):
    """Accuracy, where questions were asked, and held-out losses against tokens seen, by arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    keys = [key for key in TITLES if key in logs["clm"][-1]][:2]
    fig, axes = plt.subplots(1, len(keys), figsize=(10, 3.8), constrained_layout=True)
    for ax, key in zip(axes, keys, strict=True):
        for run, records in logs.items():
            label, color = ARMS[run]
            x, y = zip(*points(records, key), strict=True)
            if run == "ref":  # it sees other text: only where it ends can be compared
                ax.axhline(y[-1], ls=":", color=color, label=label)
            else:
                ax.plot(x, y, "o-", ms=3, color=color, label=label)
            if run == "clm":
                ax.axhline(y[-1], ls="--", lw=0.8, color=color)
        ax.set_title(TITLES[key], fontsize=10)
        ax.set_xlabel("tokens seen, millions")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def growth(path):
    """Tokens per second, and peak memory, of --stage slm against one size at a time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in (HERE / "growth.jsonl").read_text().splitlines()]
    axes_of = dict.fromkeys(r["axis"] for r in records)
    titles = {"tokens_per_s": "tokens per second", "gib": "peak memory, GiB"}
    fig, axes = plt.subplots(2, len(axes_of), figsize=(10, 4.4), sharex="col", sharey="row")
    for column, axis in zip(axes.T, axes_of, strict=True):
        mine = [r for r in records if r["axis"] == axis]
        for ax, (key, title) in zip(column, titles.items(), strict=True):
            ax.plot([r[axis] for r in mine], [r[key] for r in mine], "o-", color="#c8372d")
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.spines[["top", "right"]].set_visible(False)
            if axis == "width":
                ax.set_ylabel(title, fontsize=9)
        column[1].set_xlabel(axis + (", tokens" if axis in ("context", "corpus") else ""))
    fig.tight_layout()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def on_paper():
    """The paper's 1 B run in hours, from operations alone; TinyLlama's shape, windows of 2048."""
    inside = 22 * (2 * 2048**2 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 22 * 2048 * 2048
    head, tokens, rate = 2048 * 32000, 15e9, 0.4 * 989e12  # multiplications a token; H100, bf16
    forward = inside + head
    costs = {
        "reference: 3 epochs of 0.5 B tokens": 1.5e9 * 3 * forward,
        "scoring 15 B tokens once (30 GB on disk)": tokens * forward,
        "student, CLM": tokens * 3 * forward,
        "student, SLM 60 %, scores from disk": tokens * (forward + 2 * (inside + 0.6 * head)),
        "student, SLM with the reference online": tokens * 4 * forward,
    }
    yield ["stage", "1 H100", "8 H100", "32 H100"]
    for stage, cost in costs.items():
        hours = 2 * cost / rate / 3600
        yield [stage, *(f"{hours / n:.1f} h" for n in (1, 8, 32))]


def read_looks(folder):
    """What --stage dynamics left in a folder: the runs' logs, losses and classes; the corpus text.

    Returns {run: (records, losses (looks, N) in nats)}, reference losses (N,), a dict about the
    text: its tokens (N,), their kinds (N,) or None, meta. N held-out tokens, float32.
    """
    sys.path.insert(0, str(HERE.parent))
    folder, runs = Path(folder), {}
    if not (folder / "dynamics.ref_loss.f16").exists():
        print(f"{folder}: no looks at tokens. Run: python rho.py --stage dynamics", file=sys.stderr)
        sys.exit(2)
    ref_loss = np.fromfile(folder / "dynamics.ref_loss.f16", np.float16).astype(np.float32)
    for run in ("slm", "clm"):
        lines = (folder / f"dynamics-{run}.jsonl").read_text().splitlines()
        losses = np.fromfile(folder / f"dynamics-{run}.losses.f16", np.float16)
        runs[run] = list(map(json.loads, lines)), losses.reshape(-1, len(ref_loss)).astype(float)
    data = Path(runs["slm"][0][0]["config"]["data"])
    meta, kinds = json.loads((data / "meta.json").read_text()), data / "val_corpus.kind.bin"
    text = {
        "meta": meta,
        "kinds": None,
        "tokens": np.fromfile(data / "val_corpus.bin", meta["dtype"]),
    }
    text["tokens"] = text["tokens"][1 : 1 + len(ref_loss)]
    if kinds.exists():
        text["kinds"] = np.fromfile(kinds, np.uint8)[1 : 1 + len(ref_loss)]
    return runs, ref_loss, text


def cut(excess, ratio):
    """The excess above which a share `ratio` of the tokens lies, at each look (looks,)."""
    return np.quantile(excess, 1 - ratio, axis=-1)


def dynamics_rows(looks):
    """Shares of the four classes, and their mean loss at the first look and at the last."""
    from rho import DYNAMICS, token_dynamics

    paper = dict(zip(DYNAMICS, ("11", "12", "26", "51"), strict=True))
    found = {run: (token_dynamics(losses), losses) for run, (_, losses) in looks[0].items()}
    yield [
        "class",
        "paper, 1 B",
        *(f"{run.upper()}, {w}" for run in found for w in ("share", "loss")),
    ]
    for i, name in enumerate(DYNAMICS):
        cells = [name, f"{paper[name]} %"]
        for classes, losses in found.values():
            mine = losses[:, classes == i].mean(1) if (classes == i).any() else [np.nan]
            cells += [f"{100 * (classes == i).mean():.0f} %", f"{mine[0]:.2f} → {mine[-1]:.2f}"]
        yield cells


def looks_picture(looks, path):
    """Six views of the same looks: dynamics (s. 2.1), selection over training (Figs. 6 and 8)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from rho import DYNAMICS, token_dynamics

    runs, ref_loss, text = looks
    records, slm = runs["slm"]
    seen, ratio = [r["tokens"] / 1e6 for r in records[1:]], records[0]["config"]["ratio"] or 0.5
    kept = slm - ref_loss >= cut(slm - ref_loss, ratio)[:, None]  # (looks, N)
    fig, axes = plt.subplots(2, 3, figsize=(11, 6.4), constrained_layout=True)
    colors = ("#c8372d", "#d6a03a", "#2b6cb0", "#4a9a5b")
    for ax, run in zip(axes[0], ("clm", "slm"), strict=False):
        losses = runs[run][1]
        classes = token_dynamics(losses)
        for i in range(4):
            if (classes == i).any():
                share = f"{DYNAMICS[i].replace('->', '→')}  {100 * (classes == i).mean():.0f} %"
                ax.plot(seen, losses[:, classes == i].mean(1), color=colors[i], label=share)
        ax.set_title(f"{run.upper()}: mean loss by class", fontsize=10)
    classes, clm = token_dynamics(runs["clm"][1]), runs["clm"][1]
    for i in (0, 3):  # those that move most about their line
        mine = np.flatnonzero(classes == i)
        for token in mine[np.argsort(-clm[:, mine].std(0))][:3]:
            axes[0, 2].plot(seen, clm[:, token], color=colors[i], lw=0.9)
    axes[0, 2].set_title("CLM: single tokens, H→H (red) and L→L (green)", fontsize=10)
    for run, color in (("clm", "#8a8f98"), ("slm", "#c8372d")):
        losses = runs[run][1]
        axes[1, 0].plot(
            seen, losses[:, kept[-1]].mean(1), color=color, label=f"{run.upper()}: kept"
        )
        left = losses[:, ~kept[-1]].mean(1)
        axes[1, 0].plot(seen, left, "--", color=color, label=f"{run.upper()}: left out")
    axes[1, 0].set_title("loss on tokens that SLM keeps at the end", fontsize=10)
    for i in np.linspace(1, len(seen) - 1, 4).astype(int):
        label = f"kept at {seen[i]:.2f} M"
        axes[1, 1].plot(seen[1:], np.exp(slm[1:, kept[i]].mean(1)), label=label)
    axes[1, 1].set(yscale="log")
    axes[1, 1].set_title("SLM: perplexity of what was kept when", fontsize=10)
    for kind in range(len(text["meta"].get("kinds", ()))):
        share = kept[:, text["kinds"] == kind].mean(1)
        axes[1, 2].plot(seen, 100 * share, label=text["meta"]["kinds"][kind])
    axes[1, 2].set_title("SLM: % kept, by what the generator wrote", fontsize=10)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0]:
            ax.legend(frameon=False, fontsize=7)
    for ax in axes[1]:
        ax.set_xlabel("tokens seen, millions")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def agreement(looks):
    """Precision and recall of clean target tokens among the kept, at first and last look, in %."""
    runs, ref_loss, text = looks
    records, slm = runs["slm"]
    target = text["kinds"] == text["meta"]["kinds"].index("target")
    ratio = records[0]["config"]["ratio"]
    kept = slm - ref_loss >= cut(slm - ref_loss, ratio)[:, None]  # (looks, N)
    both = (kept & target).sum(1)
    return 100 * both / kept.sum(1), 100 * both / target.sum()


def token_page(folder, n=2048):
    """out/.../tokens.html: the first n held-out corpus tokens, at each look; needs no network."""
    runs, ref_loss, text = read_looks(folder)
    from prepare_data import get_tokenizer
    from rho import DYNAMICS, token_dynamics

    encoding = get_tokenizer(text["meta"]["tokenizer"])
    words = [encoding.decode([token], errors="replace") for token in text["tokens"][:n].tolist()]
    end = encoding.decode([text["meta"]["tokenizer"]["eot"]])
    cents = lambda losses: np.round(100 * losses).astype(int).tolist()  # noqa: E731
    data = {"text": words, "end": end, "classes": DYNAMICS, "ref": cents(ref_loss[:n]), "runs": {}}
    data["labels"] = {"slm": "SLM student", "clm": "CLM student"}
    if text["kinds"] is not None:
        data |= {"kind": text["kinds"][:n].tolist(), "kinds": text["meta"]["kinds"]}
    for run, (records, losses) in runs.items():
        data["tokens"] = [r["tokens"] for r in records[1:]]
        ratio = runs["slm"][0][0]["config"]["ratio"] or 0.5  # of a run by threshold: a half
        mine = {"loss": cents(losses[:, :n]), "cut": cut(losses - ref_loss, ratio).tolist()}
        data["runs"][run] = mine | {"dynamics": token_dynamics(losses)[:n].tolist()}
    safe = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    page = (HERE / "tokens_template.html").read_text().replace("@DATA@", safe)
    (Path(folder) / "tokens.html").write_text(page)
    print(f"page: {folder}/tokens.html")


def markdown(table):
    head, *body = table
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def fill(text, marker, content):
    """`text` with what stands between <!-- marker --> and <!-- /marker --> replaced."""
    found = f"<!-- {marker} -->\n.*?<!-- /{marker} -->"
    if not re.search(found, text, re.S):
        raise SystemExit(f"README.md has no marker {marker}")
    new = f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->"
    return re.sub(found, lambda _: new, text, flags=re.S)


def seconds(logs):
    """Of training and of evaluating, over all arms."""
    return sum(r[-1]["seconds"] + sum(e["eval_seconds"] for e in r[1:]) for r in logs.values())


def machine(logs):
    """Where and with what a set of runs was made, in one line."""
    first, cfg = logs["clm"][0], logs["clm"][0]["config"]
    shape = f"{first['params'] / 1e6:.1f} M parameters, windows of {cfg['block_size']}"
    where = f"{first['device']}, {first['threads']} thread(s), torch {first['torch']}"
    took = f"{seconds(logs) / 60:.0f} minutes of training and answering in all"
    return (
        f"{shape}; {where}; {took}; seed {cfg['seed']}, one run per arm; commit {first['commit']}."
    )


def bench_table():
    path = HERE / "bench.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    yield ["ratio", "median", "lowest", "highest"]
    for r in records:
        yield [r["name"], f"{r['ratio']:.2f}", f"{r['low']:.2f}", f"{r['high']:.2f}"]


def readme(text):
    """The README with all its tables made anew from the logs in results/."""
    for name in ("demo", "real"):
        logs = read_logs(HERE / name)
        told = "\n\n".join([markdown(rows(logs)), ". ".join(sentences(logs)) + ".", machine(logs)])
        text = fill(text, name, told)
    text = fill(text, "paper", markdown(on_paper()))
    return fill(text, "bench", markdown(bench_table()))


def summary():
    """results/summary.json: the headline figures of one seed; spreads come with more seeds."""
    demo, real = (read_logs(HERE / name) for name in ("demo", "real"))
    share = {run: 100 * r[-1]["right"] / r[-1]["questions"] for run, r in demo.items()}
    figures = {
        "demo": {
            "seeds": 1,
            "gain_points": round(share["slm"] - share["clm"], 1),
            "tokens_ratio_mean": round(passed(demo, "right")[1], 2),
            "student_minus_reference_points": round(share["slm"] - share["ref"], 1),
            "seconds_total": round(seconds(demo)),
            "cores": demo["clm"][0]["threads"],
        },
        "real": {
            "tokens": real["clm"][-1]["tokens"],
            "seeds": 1,
            "heldout_loss": {
                name: round(real[run][-1]["val_loss"], 4)
                for name, run in (
                    ("clm", "clm"),
                    ("random", "slm-random"),
                    ("slm", "slm"),
                    ("reference_only", "ref"),
                )
            },  # fmt: skip
        },
        "bench": {},
    }
    for line in (HERE / "bench.jsonl").read_text().splitlines():
        r = json.loads(line)
        figures["bench"][r["name"].replace(" 6x384", "").replace(" 32 rows", "")] = r["ratio"]
    return json.dumps(figures, indent=1) + "\n"


def main(argv):
    if argv[:1] == ["tokens"]:
        return token_page(*argv[1:])
    if argv:
        logs = read_logs(argv[0])
        table = list(rows(logs))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        print()
        for cells in table:
            print("  ".join(c.rjust(w) for c, w in zip(cells, widths, strict=True)))
        print("\n" + "\n".join(sentences(logs)))
        picture = Path(argv[0]) / "demo.png"
        try:
            curves(logs, picture)
            print(f"picture: {picture}")
        except ImportError:
            print("no picture: it needs matplotlib (pip install matplotlib)")
        return
    for name in ("demo", "real"):
        curves(read_logs(HERE / name), HERE / f"{name}.png")
    growth(HERE / "growth.png")
    (HERE / "summary.json").write_text(summary())
    path = HERE.parent / "README.md"
    path.write_text(readme(path.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
