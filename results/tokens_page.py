"""Which tokens are kept: a page to browse, of your own runs, and a picture of the published ones.

    python results/tokens_page.py out/demo      out/demo/tokens.html; opens in any browser

The page needs no network. `python results/plots.py --publish` draws the picture, tokens.png.
"""

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from drawing import DPI, INK, SOFT, WIDTH  # noqa: E402
from experiments import RUNS  # noqa: E402
from logs import CLASSES, KINDS, SLIP, corpus_tokens, kept, read_runs, token_dynamics  # noqa: E402

from prepare_data import InputError, get_tokenizer, load_meta, prepare_demo  # noqa: E402

SHOWN = 2048  # tokens on the page
RESTART = "python rho.py --restart --stage clm (or slm, ...)"


# ---- the page ------------------------------------------------------------------------------------


def stored_losses(folder, records):
    """(evaluations, N) float64 nats: a run's loss on each token, at each of its evaluations."""
    run = Path(folder) / records[0]["run"]
    paths = [run / f"{record['step']}.npy" for record in records[1:]]
    losses = []
    for path in paths:
        try:
            losses.append(np.load(path).flatten().astype(float))
        except Exception as error:  # numpy raises another kind for each way of damage
            raise InputError(
                f"{path} is damaged. Run again: {RESTART} --name {run.name}"
            ) from error
        if losses[-1].shape != losses[0].shape:
            raise InputError(f"{path} has another size than {paths[0]}. Was the run changed?")
    return np.stack(losses)


def read_page(folder):
    """({run: records}, {run: losses}) of the runs whose stored losses are of the same tokens."""
    runs = {}
    for run, records in read_runs(folder).items():
        if (Path(folder) / run / f"{records[-1]['step']}.npy").exists():
            runs[run] = records
    if "ref" not in runs or len(runs) < 2:
        command = f"python rho.py --out {folder}"
        raise InputError(f"{folder}: needs the runs ref and slm, or another one. Run: {command}")
    losses = {run: stored_losses(folder, records) for run, records in runs.items()}
    n = losses["ref"].shape[1]
    data = runs["ref"][0]["config"]["data"]
    for run, records in [*runs.items()]:
        if losses[run].shape[1] != n or records[0]["config"]["data"] != data:
            del runs[run], losses[run]
    return runs, losses


def rule_of(records, runs):
    """What a run keeps, as (ratio, threshold); of a run without selection, what SLM would keep."""
    for config in (records[0]["config"], runs.get("slm", records)[0]["config"]):
        if config["threshold"] is not None:
            return None, config["threshold"]
        if config["ratio"] and config["ratio"] < 1:
            return config["ratio"], None
    return 0.5, None


def kept_tokens(losses, run, ratio, threshold):
    """(evaluations, N) bool, by excess loss; over all the N tokens, not only those on the page."""
    if threshold is None:
        return kept(losses, run, ratio)
    return losses[run] - losses["ref"][-1] > threshold


def cents(losses):
    """Hundredths of a nat as whole numbers: a third of the page's size."""
    return np.round(100 * losses).astype(int).tolist()


def run_data(run, runs, losses):
    """What the page shows of one run."""
    records = runs[run]
    is_kept = kept_tokens(losses, run, *rule_of(records, runs))[:, :SHOWN]
    moves = []
    if len(losses[run]) > 1:
        found = token_dynamics(losses[run])[:SHOWN]
        moves = [CLASSES.index(name) for name in found]
    label = run
    if run in RUNS:
        label = RUNS[run].label
    return {
        "label": label,
        "seen": [record["tokens"] for record in records[1:]],
        "loss": cents(losses[run][:, :SHOWN]),
        "kept": ["".join("01"[int(keep)] for keep in row) for row in is_kept],
        "moves": moves,
    }


def page_data(folder):
    """All that the page shows, as JSON will hold it."""
    runs, losses = read_page(folder)
    data = Path(runs["ref"][0]["config"]["data"])
    spec = json.loads((data / "meta.json").read_text())["tokenizer"]
    encoding = get_tokenizer(spec)
    text, kinds = corpus_tokens(data, losses["ref"].shape[1])
    # The page opens on the first run: SLM, where it is there.
    names = sorted(runs.keys() - {"ref"}, key=lambda run: (run != "slm", [*runs].index(run)))
    return {
        "text": [encoding.decode([token]) for token in text[:SHOWN].tolist()],
        "end": encoding.decode([encoding.eot_token]),
        "ref": cents(losses["ref"][-1, :SHOWN]),
        "kind": kinds[:SHOWN].tolist(),
        "kinds": KINDS,
        "slip": SLIP,
        "classes": [name.replace("->", "→") for name in CLASSES],
        "runs": {run: run_data(run, runs, losses) for run in names},
    }


def write_page(folder):
    """FOLDER/tokens.html; returns its path. InputError if there is nothing to show."""
    # Text of the corpus must not end the script element it stands in, whatever it holds. json
    # writes all but ASCII as \uXXXX, the line separator U+2028 included.
    safe = json.dumps(page_data(folder), separators=(",", ":")).replace("<", "\\u003c")
    template = (HERE / "tokens_template.html").read_text()
    path = Path(folder) / "tokens.html"
    path.write_text(template.replace("@DATA@", safe))
    return path


# ---- the picture: a page of the published runs' held-out corpus ----------------------------------

COLUMNS = 84  # letters on a line of text
MARGIN = 22  # letters beside it, for the notes
NOTES = {
    0: "target text",
    SLIP: "a slip",
    1: "after a slip",
    2: "chatter",
    3: "article",
    4: "boilerplate",
    5: "noise",
}


def demo_tokenizer():
    """The published runs' tokenizer: it depends on the demo's seed, not on the demo's size."""
    with TemporaryDirectory() as folder:
        prepare_demo(f"{folder}/demo", n_ref=1500, n_train=4000)
        return get_tokenizer(load_meta(f"{folder}/demo")["tokenizer"])


def page_with_every_kind(text, kinds, eot):
    """(start, stop) of the first page of the held-out corpus on which each kind of token occurs."""
    borders = [*np.flatnonzero(text == eot).tolist(), len(text)]
    for start, stop in zip(borders, borders[1:], strict=False):
        if set(KINDS) <= set(kinds[start + 1 : stop].tolist()):
            return start + 1, stop
    raise InputError("no page of the held-out corpus has every kind of token")


def place_tokens(words):
    """(row, column) of each token. Lines break before a space, and may hang over a little."""
    row, column, places = 0, 0, []
    for word in words:
        if word.startswith(" ") and column + len(word.rstrip()) > COLUMNS:
            row += 1
            column = -1  # its space stands in the margin
        places.append((row, column))
        column += len(word)
        if "\n" in word:
            row += 1
            column = 0
    return places


def excess_color(excess):
    """Orange where the student's loss is higher, blue where the reference's is."""
    depth = min(1, abs(excess) / 3)
    if excess > 0:
        return (0.90, 0.45, 0.05, 0.75 * depth)
    return (0.15, 0.50, 0.85, 0.60 * depth)


def new_page(rows):
    """(figure, axes) whose units are letters to the right and rows down."""
    from matplotlib.figure import Figure

    columns = COLUMNS + MARGIN
    size = WIDTH * 72 / columns / 0.602  # a letter of DejaVu Sans Mono is 0.602 of its size wide
    fig = Figure(figsize=(WIDTH, rows * 1.62 * size / 72))
    ax = fig.add_axes([0, 0, 1, 1])
    ax.set(xlim=(-1.5, columns - 1.5), ylim=(rows - 0.5, -0.5))
    ax.axis("off")
    ax.letter_size = size
    return fig, ax


def write(ax, row, column, text, **how):
    letters = {
        "family": "DejaVu Sans Mono",
        "fontsize": ax.letter_size,
        "va": "center_baseline",
        "color": INK,
        "parse_math": False,
    }
    ax.text(column, row, text, **(letters | how))


def draw_token(ax, row, column, word, excess, is_kept, is_slip):
    """One token: its color is its excess loss; bold and underlined if kept; boxed if a slip."""
    from matplotlib.patches import Rectangle

    shown = word.replace("\n", "↵")
    edge = {"lw": 0}
    if is_slip:
        edge = {"lw": 1.2, "edgecolor": INK}
    place = (column, row - 0.42)
    ax.add_patch(Rectangle(place, len(shown), 0.84, facecolor=excess_color(excess), **edge))
    letters = shown.lstrip()
    start = column + len(shown) - len(letters)
    weight = "normal"
    if is_kept:
        weight = "bold"
        ends = [start + 0.1, column + len(shown) - 0.1]
        ax.plot(ends, [row + 0.38, row + 0.38], color=INK, lw=1.2)
    write(ax, row, start, letters, weight=weight)


def draw_legend(ax, row):
    """How to read the page, in the page's own signs."""
    signs = [
        (0, "kept", 0.0, True, False, "trained on"),
        (19, "   ", 3.0, False, False, "student's loss is higher"),
        (51, "   ", -3.0, False, False, "reference's loss is higher"),
        (85, "37", 0.0, False, True, "a wrong number"),
    ]
    for column, word, excess, is_kept, is_slip, meaning in signs:
        draw_token(ax, row, column, word, excess, is_kept, is_slip)
        write(ax, row, column + len(word) + 1, meaning, color=SOFT)


def kept_words(kinds, is_kept):
    """How much is kept of each kind, over all held-out tokens, in words."""
    shares = []
    for kind, name in NOTES.items():
        share = is_kept[kinds == kind].mean()
        shares.append(f"{name} {100 * share:.0f} %")
    return f"Kept over all pages: {', '.join(shares)}"


def row_note(kinds):
    """What stands in a row. A slip is named even where it is a single digit."""
    return "with a slip" if SLIP in kinds else NOTES[kinds[0]]


def picture(losses, ratio, path, at=0):
    """A held-out page as SLM sees it at an early evaluation, where the colors tell most."""
    encoding = demo_tokenizer()
    start, stop = page_with_every_kind(losses["text"], losses["kinds"], encoding.eot_token)
    words = [encoding.decode([token]) for token in losses["text"][start:stop].tolist()]
    kinds = losses["kinds"][start:stop].tolist()
    excess = losses["slm"][at].astype(float) - losses["ref"][-1]
    is_kept = kept(losses, "slm", ratio)[at]
    places = place_tokens(words)

    top = 5  # rows of title and legend
    last_row, _ = places[-1]
    fig, ax = new_page(top + last_row + 1)
    seen = losses["slm seen"][at] / 1e6
    title = f"What SLM keeps after {seen:.1f} million tokens: a page of the held-out corpus"
    write(ax, 0.4, 0, title, weight="bold")
    small = 0.83 * ax.letter_size
    write(ax, 1.5, 0, kept_words(losses["kinds"], is_kept), color=SOFT, fontsize=small)
    draw_legend(ax, 3)

    rows = {}
    for i, (row, column) in enumerate(places):
        token = start + i
        is_slip = kinds[i] == SLIP
        draw_token(ax, top + row, column, words[i], excess[token], is_kept[token], is_slip)
        rows.setdefault(row, []).append(kinds[i])
    for row, found in rows.items():
        write(ax, top + row, COLUMNS + 3, row_note(found), color=SOFT)
    fig.savefig(path, dpi=DPI)


# ---- main ----------------------------------------------------------------------------------------


def main(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="tokens_page.py", description=__doc__, formatter_class=form
    )
    parser.add_argument("folder", help="folder of runs; needs ref and at least one other")
    args = parser.parse_args(argv)
    try:
        print(f"which tokens are kept: {write_page(args.folder)}")
    except InputError as error:
        parser.exit(2, f"tokens_page.py: {error}\n")


if __name__ == "__main__":
    main()
