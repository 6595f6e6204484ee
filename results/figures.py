"""Draw every picture, and write every table of the README, from logs alone.

    python results/figures.py out/demo    one run: out/demo/demo.png
    python results/figures.py             the published logs in results/: pictures, README tables

rho.py computes, this file draws; no number in the README is typed by hand.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
COLORS = {"clm": "#8a8f98", "slm-random": "#d6a03a", "slm": "#c8372d", "ref": "#2b6cb0"}
LABELS = {"clm": "CLM (all tokens)", "slm-random": "random tokens", "slm": "SLM (selected tokens)"}


def read_logs(folder):
    """{run: records} of the *.jsonl logs of a folder; the first record says what was run."""
    logs = {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        if records and "run" in records[0] and len(records) > 1:
            logs[path.stem] = records
    return logs


def curves(logs, path):
    """Accuracy, where questions were asked, and held-out loss against tokens seen, for each arm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    asked = "right" in logs["clm"][-1]
    panels = ["right", "val_loss"] if asked else ["val_loss", "val_corpus_loss"]
    titles = {
        "right": "questions answered right, %",
        "val_loss": "loss on held-out target text, nats",
        "val_corpus_loss": "loss on held-out corpus text, nats",
    }
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.8), constrained_layout=True)
    for ax, key in zip(axes, panels, strict=True):
        for arm, label in LABELS.items():
            if arm in logs:
                x, y = zip(*points(logs[arm], key), strict=True)
                ax.plot(x, y, "o-", ms=3, color=COLORS[arm], label=label)
        if "ref" in logs:
            y = points(logs["ref"], key)[-1][1]
            ax.axhline(y, ls=":", color=COLORS["ref"], label="the reference itself")
        y = points(logs["clm"], key)[-1][1]
        ax.axhline(y, ls="--", lw=0.8, color=COLORS["clm"])
        ax.set_title(titles[key], fontsize=10)
        ax.set_xlabel("tokens seen, millions")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def points(records, key):
    """[(million tokens seen, value)]; `right` in percent."""
    rows = [r for r in records[1:] if key in r]
    scale = {"right": lambda r: 100 * r["right"] / r["questions"]}.get(key, lambda r: r[key])
    return [(r["tokens"] / 1e6, scale(r)) for r in rows]


def table(logs):
    """The closing table of a set of runs, in Markdown."""
    asked = "right" in next(iter(logs.values()))[-1]
    answers = " answers right |" if asked else ""
    lines = [
        f"| arm | tokens seen | tokens trained on | held-out target loss | corpus loss |{answers} "
        "seconds |",
        "|---|---|---|---|---|---|" + ("---|" if asked else ""),
    ]
    names = {"ref": "reference (clean text only)"} | LABELS
    for run in names:
        if run in logs:
            r = logs[run][-1]
            right = f" {r['right']} of {r['questions']} |" if asked else ""
            lines.append(
                f"| {names[run]} | {r['tokens']:,} | {r['trained']:,} | {r['val_loss']:.3f} | "
                f"{r['val_corpus_loss']:.3f} |{right} {r['seconds']:.0f} |"
            )
    return "\n".join(lines)


def fill(text, marker, content):
    """`text` with what stands between <!-- marker --> and <!-- /marker --> replaced."""
    found = f"<!-- {marker} -->\n.*?<!-- /{marker} -->"
    if not re.search(found, text, re.S):
        raise SystemExit(f"README.md has no marker {marker}")
    return re.sub(
        found, lambda _: f"<!-- {marker} -->\n{content}\n<!-- /{marker} -->", text, flags=re.S
    )


def main(argv):
    if argv:
        folder = Path(argv[0])
        logs = read_logs(folder)
        if "clm" not in logs:
            print(f"{folder} holds no clm.jsonl. Run: python rho.py", file=sys.stderr)
            sys.exit(2)
        curves(logs, folder / "demo.png")
        print(f"picture: {folder / 'demo.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
