"""How many times fewer tokens SLM needs: every published comparison with CLM in one table."""

import statistics

from experiments import DIRT, LONGER, dirt_runs
from logs import ends, percent, published, spread, times_fewer

# Below this, in percent, CLM answers about as much as before it has learned anything.
FLOOR = 5
# A token scored is one forward pass, of a step's forward and twofold backward.
SCORING = 1 / 3


def comparisons():
    """(share of wrong answers, dirt per problem, CLM's run, SLM's run), the longest runs first."""
    yield 0.75, 1, "clm", "slm"
    for data, longer in LONGER.items():
        yield longer.wrong, longer.dirty, f"{data}-clm", f"{data}-slm"
    for wrong, dirty in DIRT:
        yield wrong, dirty, *dirt_runs(wrong, dirty)[1:]


def pairs(clm, slm, part):
    """[(CLM's log, SLM's log, tokens that the reference has read)] by seed."""
    clms, slms, refs = (published(run, part) for run in (clm, slm, "ref"))
    seeds = [seed for seed in clms if seed in slms]
    return [(clms[seed], slms[seed], refs[seed][-1]["tokens"]) for seed in seeds]


def student_factors(logs, key):
    """Seed by seed, in tokens of the student alone; None: SLM never stays where CLM ends."""
    return [times_fewer(slm, clm, key, between=True) for clm, slm, _ in logs]


def factors_in_all(logs, key, score_all=False):
    """The same with the tokens of the reference, and those that it scores.

    It scores those that SLM reads until it is there or, with score_all, in the whole run.
    """
    found = []
    for (clm, slm, reference), factor in zip(logs, student_factors(logs, key), strict=True):
        if factor is not None:
            whole = clm[-1]["tokens"]
            read = whole / factor
            scored = slm[-1]["tokens"] if score_all else read
            factor = whole / (read + scored * SCORING + reference)
        found.append(factor)
    return found


def is_bound(logs, key):
    """Whether some seed of SLM was past CLM's end when first looked at: sooner is not seen."""
    first = [clm[-1]["tokens"] / slm[1]["tokens"] for clm, slm, _ in logs]
    return any(a == b for a, b in zip(first, student_factors(logs, key), strict=True))


def cell(factors, bound):
    """Mean ± deviation over seeds; or never; or, with a seed that was there at once, a bound."""
    reached = [factor for factor in factors if factor is not None]
    if not reached:
        return "never"
    text = f"at least {statistics.mean(reached):.1f}" if bound else spread(reached)
    if len(reached) < len(factors):
        text += f" (never in {len(factors) - len(reached)} of {len(factors)} seeds)"
    return text


def at_floor(clm, part):
    return statistics.mean(ends(clm, "right", part)) < FLOOR


def factor_table(folder):
    part = folder / "runs"
    yield [
        *("wrong answers", "dirt per problem", "tokens", "seeds", "CLM right, %", "SLM right, %"),
        *("factor by answers", "by held-out loss"),
        *("in all, by answers", "in all, by held-out loss"),
    ]
    for wrong, dirty, clm, slm in comparisons():
        logs = pairs(clm, slm, part)
        row = [percent(wrong), str(dirty), f"{logs[0][0][-1]['tokens']:,}", str(len(logs))]
        row += [spread(ends(run, "right", part)) for run in (clm, slm)]
        for factors in (student_factors, factors_in_all):
            for key in ("right", "val_loss"):
                if key == "right" and at_floor(clm, part):
                    row.append("CLM at floor")
                else:
                    row.append(cell(factors(logs, key), is_bound(logs, key)))
        yield row


# ---- the sentences below it ----------------------------------------------------------------------


def lowest_to_highest(rows, factors, key):
    """`1.5 to 2.1`: of the rows' means, without seeds and rows that never get there."""
    means = []
    for logs in rows:
        reached = [factor for factor in factors(logs, key) if factor is not None]
        if reached:
            means.append(statistics.mean(reached))
    return f"{min(means):.1f} to {max(means):.1f}"


def factor_sentences(folder):
    rows = [pairs(clm, slm, folder / "runs") for *_, clm, slm in comparisons()]
    fewest = min(len(logs[0][1]) for logs in rows)
    short = [logs for logs in rows if len(logs[0][1]) == fewest]
    long = [logs for logs in rows if len(logs[0][1]) > fewest]
    yield "In all: the reference's tokens count, and each token that it scores as a third of one,"
    yield "until SLM is where CLM ends."
    first = [cell(factors_in_all(rows[0], key, True), False) for key in ("right", "val_loss")]
    yield "With the whole run scored beforehand, as it was here, the factors in all of the first"
    yield f"row are {first[0]} by answers and {first[1]} by held-out loss."
    yield f"In the {len(long)} longer comparisons the factor is"
    yield f"{lowest_to_highest(long, student_factors, 'right')} by answers"
    yield f"and {lowest_to_highest(long, student_factors, 'val_loss')} by held-out loss;"
    yield f"in all {lowest_to_highest(long, factors_in_all, 'right')}"
    yield f"and {lowest_to_highest(long, factors_in_all, 'val_loss')}."
    clm, slm, _ = short[0][0]
    yield f"The other {len(short)} have {fewest - 1} evaluations in a run: a rough reading,"
    yield f"and a factor above {clm[-1]['tokens'] / slm[1]['tokens']:.1f} cannot be seen."
