#!/usr/bin/env bash
# Every run behind the tables and pictures of results/README.md. Two runs at a time, one thread each.
#
#   bash results/run.sh             all: 8 hours on two cores. Repeated, it goes on where it stopped
#   bash results/run.sh rules 2     the runs of one table for one seed, after `setup 0` and `main`
#                                   (setup, real_base and collect are for all seeds: write 0)
#
# The runs of `real` need PACK, a folder of public text (see the function), and are skipped without.
set -eu
export OMP_NUM_THREADS=1
PACK=${PACK:-}

# Peak learning rates: for each arm the best of three on seed 1, by right answers (`rates`,
# `dirtier_rates`). They were fixed before the other seeds were run.
NEW="--lr 1.5e-3"     # new weights
STARTED="--lr 2e-4"   # the reference's weights

# `rho . FLAGS` is a run by the scripts of this folder, `rho out/code/soft FLAGS` by a changed copy.
rho() { code=$1; shift; python "$code/rho.py" --out "out/seed$seed" --seed "$seed" "$@"; }
ref() { echo "out/seed$seed/ref.pt"; }

# The data sets, and copies of the scripts with the diffs of results/variants.
setup() {
    demo="python prepare_data.py --max_tokens"
    $demo 3.2e6 --out data/demo
    $demo 6.2e6 --out data/long
    $demo 6.2e6 --dirty 6 --out data/d6
    for wrong in 0 0.9; do $demo 2.2e6 --wrong $wrong --out data/w$wrong; done
    $demo 2.2e6 --dirty 0 --out data/d0
    $demo 3.2e6 --n_ref 15000 --out data/ref-3x
    for variant in soft mask pages distilled; do
        mkdir -p out/code/$variant
        cp ./*.py out/code/$variant
        patch -s -d out/code/$variant -p1 < results/variants/$variant.diff
    done
}

# What does selection do, and what does the same clean text do otherwise?
main() {
    four_arms
    rho . --stage slm --select random --tokens 2e6 $NEW --evals 10
    # As many tokens as SLM and its reference read together.
    rho . --stage clm --corpus mixed --tokens 2.9e6 $NEW --evals 10
    rho . --stage ref --name clean --ref_tokens 2.9e6 $NEW --evals 10
}

# These were also run on seeds 6 and 7, with which nothing was chosen.
four_arms() {
    rho . --stage ref --ref_tokens 9e5 $NEW --evals 3
    rho . --stage clm --tokens 2e6 $NEW --evals 20
    rho . --stage slm --tokens 2e6 $NEW --evals 20
    rho . --stage slm --name started --init "$(ref)" --tokens 2e6 $STARTED --evals 10
}

# The rates that were tried beside those above.
rates() {
    for lr in 7.5e-4 3e-3; do
        trial="--lr $lr --evals 1 --name"
        rho . --stage ref --ref_tokens 9e5 --lr $lr --evals 3 --name ref-lr$lr
        rho . --stage clm --tokens 2e6 $trial clm-lr$lr
        rho . --stage slm --tokens 2e6 $trial slm-lr$lr
        rho . --stage slm --select random --tokens 2e6 $trial slm-random-lr$lr
        rho . --stage clm --corpus mixed --tokens 2.9e6 $trial clm-mixed-lr$lr
        rho . --stage ref --ref_tokens 2.9e6 $trial clean-lr$lr
    done
    for lr in 1e-4 4e-4; do
        rho . --stage slm --init "$(ref)" --tokens 2e6 --lr $lr --evals 1 --name started-lr$lr
    done
}

# A dirtier corpus, more of it, and only a model of clean text: what is its best use?
# A fifth of the tokens is kept: that is about the share of worked problems in this corpus.
d6() { code=$1; shift; rho $code --data data/d6 --tokens 3.1e6 "$@"; }
dirtier() {
    d6 . --stage clm --name d6-started-clm --init "$(ref)" $STARTED --evals 5
    d6 . --stage slm --name d6-started --init "$(ref)" --ratio 0.2 $STARTED --evals 5
    d6 . --stage slm --name d6-new --ratio 0.2 $NEW --evals 5
    d6 out/code/distilled --stage slm --name d6-distilled --ratio 1 $NEW --evals 5
}
dirtier_rates() {
    for lr in 1e-4 4e-4; do
        trial="--init $(ref) --lr $lr --evals 1"
        d6 . --stage clm --name d6-started-clm-lr$lr $trial
        d6 . --stage slm --name d6-started-lr$lr --ratio 0.2 $trial
    done
    for lr in 7.5e-4 3e-3; do
        d6 out/code/distilled --stage slm --name d6-distilled-lr$lr --ratio 1 --lr $lr --evals 1
    done
}

# Which tokens should be kept? CLM, SLM (the half with the most excess) and random are of `main`.
rules() {
    same="--tokens 2e6 $NEW --evals 1"
    rho . --stage slm $same --ratio 0.2 --name keep-0.2
    rho . --stage slm $same --ratio 0.8 --name keep-0.8
    rho . --stage slm $same --threshold 0.5 --name half-nat
    rho . --stage slm $same --select ref_loss
    rho . --stage slm $same --select ref_both
    rho . --stage slm $same --select loss
    # Without clean text: the reference is CLM of another seed.
    other="out/seed$((seed % 5 + 1))/clm.pt"
    rho . --stage slm $same --select ref_both --ratio 0.8 --reference $other --name self
    for variant in soft mask pages; do
        rho out/code/$variant --stage slm $same --name $variant
    done
}

# Does CLM catch up? Three times the length, at one and at six pieces of dirt a problem.
long() {
    same="--tokens 6e6 $NEW --evals 30"
    rho . --data data/long --stage clm $same --name long-clm
    rho . --data data/long --stage slm $same --name long-slm
    rho . --data data/d6 --stage clm $same --name long-d6-clm
    rho . --data data/d6 --stage slm $same --name long-d6-slm --ratio 0.2
}

# The picture of sweeps: the corpus, the reference, and the share kept, which is of `rules`.
sweeps() {
    same="--tokens 2e6 $NEW --evals 1"
    for corpus in w0 w0.9 d0 d6; do
        rho . --data data/$corpus --stage clm $same --name $corpus-clm
        rho . --data data/$corpus --stage slm $same --name $corpus-slm
    done
}
references() {
    same="$NEW --evals 1"
    rho . --stage ref $same --name ref-short --ref_tokens 3e5
    rho . --stage ref $same --name ref-3x --ref_tokens 9e5 --data data/ref-3x
    for name in short 3x; do
        reference=out/seed$seed/ref-$name.pt
        rho . --stage slm $same --tokens 2e6 --name slm-ref-$name --reference $reference
    done
}

# Real text: mathematics as it is found, a seventh of it GSM8K's training problems, after a base
# model of other text. The target is problems of GSM8K that are in neither; the questions are
# MAWPS's easiest.
real_base() {
    gsm8k=$PACK/reference/gsm8k_train_text.jsonl
    mkdir -p data/src
    sed -n '1,500p' "$gsm8k" > data/src/dev.jsonl
    awk 'NR > 500 && NR % 2 == 1' "$gsm8k" > data/src/clean.jsonl
    awk 'NR > 500 && NR % 2 == 0' "$gsm8k" > data/src/hidden.jsonl
    awk 'NR % 4 == 1' "$PACK/reference/math_train_text.jsonl" > data/src/math.jsonl
    sed 's/"input"/"question"/; s/"target"/"answer"/' \
        "$PACK/eval/math-evaluation-harness/data/mawps/singleop.jsonl" > data/src/questions.jsonl
    make="python prepare_data.py --max_tokens 4e6 --reference data/src/clean.jsonl data/src/math.jsonl"
    make="$make --val data/src/dev.jsonl --questions data/src/questions.jsonl"
    text=$PACK/corpus
    $make --tokenizer 4096 --out data/real --corpus data/src/hidden.jsonl:6 \
        "$text"/{openstax_math,planetmath,mathbooks_bysa,mathbooks_gfdl,stackmathqa}.jsonl
    $make --tokenizer data/real/meta.json --out data/base \
        --corpus "$text"/{openstax_other,techdocs}.jsonl

    shape="--n_layer 4 --n_head 2 --n_embd 128 --n_inner 384 --block_size 256"
    python rho.py --data data/base --out out/real --stage clm --name base --seed 1 $shape \
        --lr 2e-3 --tokens 2e6 --evals 1 --questions 0
}
real() {
    run="python rho.py --data data/real --out out/real/seed$seed --seed $seed --init out/real/base.pt"
    run="$run --block_size 256 --lr 2e-3 --tokens 1e6 --evals 5 --eval_windows 128"
    $run --stage ref --ref_tokens 1e6
    $run --stage clm
    $run --stage slm --select random --ratio 0.6
    $run --stage slm --ratio 0.6
    $run --stage slm --ratio 0.3 --name slm-30
}

# What the pages are made from: the logs, and losses of single tokens of seed 1.
collect() {
    for folder in out/seed* out/real/seed*; do
        [ -d "$folder" ] || continue
        mkdir -p "results/logs/${folder#out/}"
        cp "$folder"/*.jsonl "results/logs/${folder#out/}"
    done
    python results/tokens_page.py out/seed1 --save results/logs/tokens.npz
}

if [ $# -eq 2 ]; then
    seed=$2
    $1
    exit
elif [ $# -ne 0 ]; then
    echo "usage: bash results/run.sh, or with a table and a seed: bash results/run.sh rules 2" >&2
    exit 2
fi
# A job may use what earlier ones made, but not the one before it, which may still be running.
all_jobs() {
    for seed in 1 2 3; do echo main $seed; done
    echo rates 1; echo main 4; echo main 5
    echo dirtier_rates 1; echo sweeps 1; echo references 1
    for seed in 1 2 3; do echo rules $seed; echo dirtier $seed; echo long $seed; done
    for seed in 6 7; do echo four_arms $seed; done
}
bash "$0" setup 0
all_jobs | xargs -P 2 -L 1 bash "$0"
if [ -n "$PACK" ]; then
    bash "$0" real_base 0
    for seed in 1 2 3; do echo real $seed; done | xargs -P 2 -L 1 bash "$0"
fi
bash "$0" collect 0
