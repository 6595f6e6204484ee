"""A page to browse: which tokens of held-out corpus text are worth training on, and when.

    python results/tokens_page.py out/demo      out/demo/tokens.html; opens in any browser
    python results/tokens_page.py out/seed1 --save results/logs/tokens.npz

It shows every run in the folder beside the reference, which is the run `ref`, by the losses that
rho.py stores at each evaluation. The page is one file and needs no network. With --save the losses
of ref, clm and slm go to a file instead, from which the published pictures are drawn.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from plots import read_runs

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

from prepare_data import get_tokenizer, load_meta, run_script  # noqa: E402
from rho import Config, open_windows, select_tokens  # noqa: E402

SHOWN = 2048  # tokens on the page


def page_data(folder):
    """All that the page shows, as JSON will hold it."""
    runs = read_runs(folder)
    if "ref" not in runs:
        sys.exit(f"{folder} has no reference; python rho.py --stage ref --out {folder}")
    data = runs["ref"][0]["flags"]["data"]
    runs = same_text(folder, runs, load_meta(data))
    ref_loss = read_losses(folder, "ref", runs["ref"])[-1]  # (N,)
    text, starts, kinds = read_text(runs.pop("ref")[0]["flags"], len(ref_loss[:SHOWN]))
    shown = {}
    usual = runs["slm"][0]["flags"] if "slm" in runs else vars(Config())
    # The page opens on the first run: SLM, where it is there.
    for run in sorted(runs, key=lambda run: (run != "slm", run)):
        losses = read_losses(folder, run, runs[run])
        shown[run] = run_data(runs[run], losses, ref_loss, usual)
    return {
        "text": text,
        "starts": starts,
        "kinds": kinds,
        "ref": two_decimals(ref_loss),
        "runs": shown,
    }


def same_text(folder, runs, meta):
    """The runs whose losses are of the same tokens as ref's, and of today's text: {run: records}.

    In the same windows, too: a loss fits one context only. Exits if there is nothing to compare.
    """
    before = runs["ref"][0]["identity"]
    text = {
        "val_corpus.bin": meta["files"]["val_corpus.bin"],
        "block_size": before["block_size"],
        "eval_windows": before["eval_windows"],
    }
    same = {}
    for run, records in runs.items():
        if text.items() <= records[0]["identity"].items():
            same[run] = records
    if "ref" not in same or len(same) < 2:
        sys.exit(f"{folder} has no two runs on today's text; python rho.py --out {folder}")
    return same


def read_losses(folder, run, records):
    """A run's loss on each held-out token, at each of its evaluations: (evaluations, N), nats."""
    losses = []
    for record in records[1:]:
        path = Path(folder, f"{run}-{record['step']}.npy")
        try:
            losses.append(np.load(path).flatten())
        except (OSError, ValueError, EOFError):
            sys.exit(f"{path} is missing or damaged; train this run again, with --restart")
    return np.stack(losses).astype(np.float32)


def run_data(records, losses, ref_loss, usual):
    """What the page shows of one run. usual: the flags of SLM, for a run that does not select."""
    flags = records[0]["flags"]
    if flags["select"] == "all":
        flags = usual
    kept = []
    for student_loss in losses:
        # Among all held-out tokens, not only those on the page.
        excess = torch.from_numpy(student_loss - ref_loss)  # (N,)
        mask = select_tokens(excess, flags["ratio"], flags["threshold"])
        kept.append(mask[:SHOWN].int().tolist())
    return {
        "seen": [record["tokens"] for record in records[1:]],
        "loss": two_decimals(losses),
        "kept": kept,
    }


def two_decimals(losses):
    """Of the tokens on the page. More decimals would only make it larger."""
    return losses[..., :SHOWN].astype(float).round(2).tolist()


def read_text(flags, n):
    """Of the first n held-out tokens: their text, whether a document starts, and their kinds.

    A kind is what the demo's generator wrote a token as. Other text has none: [].
    """
    cfg = Config(data=flags["data"], block_size=flags["block_size"])
    meta = load_meta(cfg.data)
    tokenizer = get_tokenizer(meta["tokenizer"])
    # A loss belongs to the token that was to be predicted: the target.
    _, targets, _ = open_windows(cfg, meta, "val_corpus")
    tokens = targets.flatten()[:n].tolist()
    text = [tokenizer.decode([token]) for token in tokens]
    starts = [token == tokenizer.eot for token in tokens]
    path = Path(cfg.data, "kinds.npz")
    if not path.exists():
        return text, starts, []
    numbers = np.load(path)["val_corpus"][1 : n + 1]  # shifted by one, as the targets are
    return text, starts, [meta["kinds"][number] for number in numbers]


def save_losses(folder, path):
    """The losses of three runs, float16: ref (N,) at its end, clm and slm (evaluations, N)."""
    runs = read_runs(folder)
    losses = {run: read_losses(folder, run, runs[run]) for run in ("ref", "clm", "slm")}
    arrays = {run: array.astype(np.float16) for run, array in losses.items()}
    arrays["ref"] = arrays["ref"][-1]
    flags = runs["ref"][0]["flags"]
    arrays["text"], arrays["starts"], arrays["kinds"] = read_text(flags, len(arrays["ref"]))
    arrays["tokens"] = [record["tokens"] for record in runs["slm"][1:]]
    np.savez_compressed(path, **arrays)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", help="folder of runs, with ref and at least one other")
    parser.add_argument("--save", metavar="FILE", help="write losses instead, as .npz")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    if args.save:
        save_losses(folder, args.save)
        return
    # Text of the corpus must not end the script element that it stands in, whatever it holds.
    data = json.dumps(page_data(folder)).replace("<", "\\u003c")
    template = (HERE / "tokens_template.html").read_text()
    (folder / "tokens.html").write_text(template.replace("@DATA@", data))
    print(f"which tokens are kept: {folder / 'tokens.html'}")


if __name__ == "__main__":
    run_script(main)
