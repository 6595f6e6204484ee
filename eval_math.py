r"""A question goes in, right or wrong comes out: prompt, greedy answer, extraction, comparison.

    python eval_math.py --ckpt out/demo/slm.pt               the demo's questions, no examples
    python eval_math.py --ckpt out/real/slm.pt --task gsm8k  or a file; 8 examples in the prompt

The rules are those of the harness that scored the paper's models (ZubinGou/math-evaluation-harness,
parser.py and grader.py), its looseness included: 5 is 500, for one may be a percentage. We differ:
1. A marker with nothing after it passes on to the next rule; "the answer is" ends at its sentence.
2. `#### x` is read, since models trained on GSM8K write it. The letter of a choice needs no flag.
3. The last number may be a fraction or a mixed number; in "12-5" it is 5, where the harness has -5.
4. (1,2) is not [1,2], and \frac{1}{23} is not \frac{12}{3}: the harness drops brackets and braces.
5. What it asks of sympy is asked of `evaluate`, a small parser: sympy's own call eval(), and text
   that a model wrote is never executed or evaluated as code.
"""

import argparse
import cmath
import json
import logging
import math
import operator
import re
from itertools import accumulate
from pathlib import Path

import torch
from tqdm import tqdm

from model import generate, load_model, whole_file
from prepare_data import InputError, get_tokenizer

EXAMPLES = """\
A baker makes 14 loaves at dawn and 19 at noon. How many are that? She makes 14 + 19 = 33.
A rope of 48 metres is cut into 6 equal parts. How long is each? Each has 48 / 6 = 8.
Nadia reads 12 pages on 5 days, then 20 more. How many? That is 12 * 5 = 60, and 60 + 20 = 80.
Of 90 beads a third is red, the rest blue. How many are blue? Red: 90 / 3 = 30. Blue: 90 - 30 = 60.
A ticket is $7, a drink $3. What do 4 friends pay for both? Each pays 7 + 3 = 10, all 4 * 10 = 40.
Omar has $60 and saves $15 a week. When has he $180? He lacks 180 - 60 = 120. Weeks: 120 / 15 = 8.
A tank of 250 litres loses 12 an hour. What is left after 9 hours? 12 * 9 = 108. 250 - 108 = 142.
A $60 lamp gets 25 percent cheaper. What is the price? It is 60 * 25 / 100 = 15 less: 60 - 15 = 45.
"""
EXAMPLES = [  # in the harness's form
    "Question: {}?\nAnswer: {} The answer is {}".format(*line.split("? "), line.split()[-1])
    for line in EXAMPLES.splitlines()
]
STOPS = r"(?:^|\n)(?:Question|Problem):|\n\n\n"  # there the model begins a question of its own
FIELDS = ("question", "problem", "input"), ("answer", "solution", "target")
LONGEST = 300  # characters; a longer answer is compared as text and never parsed
SIGNS = str.maketrans("−–×·÷", "--**/")
COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")  # of thousands
DECIMAL = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
NUMBER = re.compile(  # group 1: \frac{1}{2}, 2 1/2, 3/4, 1.5, 50%; before it a minus and a currency
    r"(?:(?<![\w)}\]])-)?(?:\\?\$-?|[€£]-?)?"  # a minus after a digit or a bracket subtracts
    r"((?:(?:[0-9]+ ?)?\\[dtc]?frac\{[0-9]+\}\{[0-9]+\}"
    rf"|[0-9]+ [0-9]+/[0-9]+|{DECIMAL}(?:/[0-9]+)?)(?:\\?%)?)"
)
CHOICE = re.compile(r"[\s:]*\(?((?<=\()[a-e](?=\))|[A-E](?=[).,:\n]|\s*$))")
UNITS = (  # "5 dollars per day", "5cm^2", "9 (apples)"; but 5x, 6xy and 2 pi are values
    r"(?<=[\d}).])(?:\s*(?:[kcmd]m|[km]?g|[cm]l|ft|in|lbs?|oz|hrs?|mph)\b|\s+[mghsl]\b"
    r"|\s+\(?(?!\\?pi\b|sqrt|and\b|[a-z]+illion|thousand|hundred|dozen)[a-z]{3,})[a-z./ ]*[\^23)]*$"
)
REWRITES = [  # (what, into what), in this order: one spelling for many
    (r"\\(?:left|right)(?![a-z])|\\[!,;: ]|\\?[$%]|[€£°~]|\^\{?\\circ\}?|\{,\}", ""),
    (r"\\(?:cdot|times)(?![a-z])", "*"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac\s*(\w)", r"\\frac{\1}"),  # \frac12, \frac1{72}
    (r"(\\frac\{[^{}]*\})\s*(\w)", r"\1{\2}"),
    (r"(?<![\w.}^)])(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", r"(\1+\2/\3)"),  # mixed: a sum, no product
    (r"(?<![\w./])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"),
    (r"\\(?=[{}])", ""),  # the set \{1,2\}
    (r"^\\?[a-z]{1,2}\s*(?:=|\\in(?![a-z]))\s*(?=[^=]*$)", ""),  # x = 5
    (r"(?<=\S)\s*\\(?:text|mbox|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$", ""),  # a unit at the end
    (r"\\(?:text|mbox|math)[a-z]*\s*\{([^{}]*)\}", r"\1"),
    (UNITS, ""),
    (r"\\?pi(?![a-z])|π", f"({math.pi})"),
    (r"\\?sqrt|√", r"\\sqrt"),
    (r"_\{(\w+)\}", r"_\1"),
    (r"(?<!\d)\s+|\s+(?!\d)", ""),  # between two digits a space means something
]
TOKEN = re.compile(rf"\\?[a-z]{{3,}}|\\[a-z]+|{DECIMAL}|\S")
RANK = {"+": 0, "-": 0, "*": 1, "/": 1, "^": 2}
APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
CLOSE = {"(": ")", "[": "]", "{": "}"}


def numbers(text):
    """Every number in the text, as written but without thousands commas and currency signs."""
    found = NUMBER.finditer(COMMA.sub("", text.translate(SIGNS)))
    return [("-" if "-" in m[0][: -len(m[1])] else "") + m[1] for m in found]


def tidy(answer):
    """The bare number where the rest is currency, units or prose; else the answer as it stands."""
    answer = re.sub(r"^[^a-zA-Z]*=", "", answer.strip(" \t\n:*\"'`")).strip().rstrip(".")
    found = numbers(answer[:LONGEST])
    prose = re.search("[a-z]{3}", answer) and "\\" not in answer  # "that 15 apples are left"
    return found[0] if len(found) == 1 and (prose or normal(found[0]) == normal(answer)) else answer


def candidates(text):
    r"""What may be the answer, in the harness's order: "final answer is $...$. I hope"; the last
    \boxed{...}; `#### x`, the first, as in GSM8K's own code, and here since a worked step may say
    "the answer is" too; the last "he answer is", to the end of its sentence; the last number."""
    minerva, hope, _ = text.partition("final answer is $")[2].partition("$. I hope")
    if hope:
        yield minerva
    bare = r"\\(?:boxed|fbox)\s*([^{\s][^$\n]*)"  # \boxed 5
    *before, rest = re.split(r"(?:boxed|fbox)\s*(?=\{)", re.sub(bare, r"boxed{\1}", text))
    if before:
        depth = list(accumulate((c == "{") - (c == "}") for c in rest))
        yield rest[1 : depth.index(0) if 0 in depth else None]
    if marked := re.search(rf"#### {{0,3}}(?={NUMBER.pattern})", text):
        yield numbers(text[marked.end() :])[0]
    *before, rest = re.split(r"(?:he|final) (?:answer|choice) is", text)
    if before:
        choice = CHOICE.match(rest)
        yield choice[1].upper() if choice else re.split(r"\.(?=\s|$)|\n", rest.strip(" \t\n:"))[0]
    yield from numbers(text)[-1:]


def extract_answer(text):
    """The first answer that is one of `candidates` of what a model said; None if there is none."""
    text = re.sub(r"<<[^<>]*>>", "", text or "").translate(SIGNS)  # GSM8K's <<3*4=12>>
    return next(filter(None, map(tidy, candidates(text))), None)


def normal(answer):
    r"""One spelling for many: "\$1,234.", "x = \dfrac12", "5 \text{ cm}" lose what is no value."""
    s = answer.translate(SIGNS).lower().strip().rstrip(". ")
    if len(s) > LONGEST:
        return "".join(s.split())
    for what, into in REWRITES:
        s = re.sub(what, into, s.strip(), flags=re.ASCII)
    return s if s.startswith(tuple(CLOSE)) else COMMA.sub("", s)  # (1,234) is a pair


def evaluate(expression, point=0):
    """Value (float or complex) of arithmetic as `normal` spells it; None if it is anything else.

    A letter is a variable, with a value of its own at each `point`. In floats 9^9^9 is an error at
    once, and no wait; LONGEST bounds the depth of the recursion too.
    """
    tokens = ["", *reversed(TOKEN.findall(expression[:LONGEST]))]

    def value(rank):  # of what stands next, as far as operators bind at least so strongly
        token = tokens.pop()
        if token in ("+", "-"):
            left = value(2) * (1 if token == "+" else -1)
        elif token in CLOSE:
            left = value(0)
            if tokens.pop() != CLOSE[token]:
                raise ValueError("a bracket does not close")
        elif token == "\\frac":
            left = value(3) / value(3)
        elif token == "\\sqrt":
            root = value(3) if tokens[-1] == "[" else 2
            left = value(3) ** (1 / root)
        elif len(token) == 1 and token.isalpha():
            left = 2 * math.sin(ord(token) * (point + 1))
        else:
            left = float(token)
        while True:
            if rank < 2 and re.match(r"[a-z(\[{\\]", tokens[-1]):
                tokens.append("*")  # 2x, 3(x+1)
            if RANK.get(tokens[-1], -1) < rank:
                return left
            sign = tokens.pop()
            left = APPLY.get(sign, pow)(left, value(RANK[sign] + (sign != "^")))

    try:
        result = value(0)
        return result if len(tokens) == 1 and cmath.isfinite(result) else None
    except (ValueError, ArithmeticError):
        return None


def is_equiv(prediction, gold, percentage=True):
    """Whether two answers are the same as text, as lists of answers, as numbers or as expressions.

    Numbers agree to a relative 1e-4, and to a factor 100 if `percentage` and both are decimals or
    one has a % sign; expressions agree at three points. None and "" equal nothing. Never raises.
    """
    a, b = (normal("" if s is None else str(s)) for s in (prediction, gold))
    if a == b or not a or not b or max(len(a), len(b)) > LONGEST:
        return a == b != ""
    around = [s[0] + s[-1] if s[0] in CLOSE and s[-1] in CLOSE.values() else "" for s in (a, b)]
    inner = [s[1:-1] if brackets else s for s, brackets in zip((a, b), around, strict=True)]
    x, y = (re.split(r",(?![^(\[{]*[)\]}])", s) for s in inner)  # at outer commas
    if len(x) > 1 or len(y) > 1:
        alike = len(x) == len(y) and (around[0] == around[1] or "" in around)
        return alike and all(is_equiv(p, g, False) for p, g in zip(x, y, strict=True))
    values = [(evaluate(a, point), evaluate(b, point)) for point in range(3)]
    if None in sum(values, ()):
        return False
    tolerance = 1e-4 if len(set(values)) == 1 else 1e-9  # numbers: the harness's; else rounding
    decimals = all(re.fullmatch(f"-?{DECIMAL}", s) for s in (a, b))
    scales = (1, 100, 0.01) if percentage and (decimals or "%" in f"{prediction}{gold}") else (1,)
    return any(all(cmath.isclose(x, s * y, rel_tol=tolerance) for x, y in values) for s in scales)


def load_questions(task, n=None, data="data/demo"):
    """The first n [{"question", "answer"}] of `data` (task "demo"), of GSM8K test ("gsm8k") or of
    a file of JSON lines with the fields of GSM8K, MATH, SVAMP, ASDiv or MAWPS. Else InputError."""
    path = Path(data, "questions.jsonl") if task == "demo" else Path(task)
    if task == "gsm8k":
        try:
            from datasets import load_dataset  # slow to import

            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries say no more
            return list(load_dataset("openai/gsm8k", "main", split="test"))[:n]
        except Exception as error:  # the hub fails in many ways
            raise InputError("gsm8k: hub not reached. Give a local --task FILE.jsonl") from error
    if not path.is_file():
        raise InputError(f"{path} not found. --task: demo (python prepare_data.py), gsm8k, a file")
    questions = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = {name.lower(): value for name, value in json.loads(line).items()}
            filled = {name: str(value) for name, value in row.items() if value not in (None, "")}
            question, answer = ([filled[f] for f in fields if f in filled][0] for fields in FIELDS)
        except (ValueError, AttributeError, IndexError, RecursionError) as error:
            raise InputError(f"{path}:{number}: no JSON with question and answer") from error
        body = filled["body"].strip().removesuffix(".") + ". " if "body" in filled else ""
        questions.append({"question": body + question.strip(), "answer": answer})
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions[:n]


def make_prompt(encoding, question, shots, room):
    """(token ids, examples kept): end-of-text, the last `shots` examples, the question. Examples
    go, the first one first, until `room` tokens are left; the question is never cut."""
    for kept in range(shots, -1, -1):
        text = [*EXAMPLES[len(EXAMPLES) - kept :], f"Question: {question}\nAnswer:"]
        tokens = [encoding.eot_token, *encoding.encode_ordinary("\n\n\n".join(text))]
        if len(tokens) <= room:
            break
    return tokens, kept


@torch.no_grad()
def answer_questions(
    model, encoding, questions, shots=0, batch_size=64, max_new_tokens=256, progress=False
):
    """Greedy answers [{question, completion, prediction, gold, correct, shots}], order as given.

    Prompts of about one length share a batch, whose new tokens end with block_size; examples leave
    half of it. "shots" counts the examples that fitted; it is None, and the answer wrong, where the
    question is too long by itself and was not asked.
    """
    block_size, word = model.config.block_size, encoding.encode_ordinary("Question")
    room = block_size - min(max_new_tokens, block_size // 2)
    prompts = [make_prompt(encoding, q["question"], shots, room) for q in questions]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]))
    order = [i for i in order if len(prompts[i][0]) < block_size]
    stop = {encoding.eot_token, *(word if len(word) == 1 else ())}  # " Question" is another token
    completions, was_training = [""] * len(prompts), model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), unit="batch", disable=not progress):
            batch = order[start : start + batch_size]
            new = min(max_new_tokens, block_size - len(prompts[batch[-1]][0]))
            answers = generate(model, [prompts[i][0] for i in batch], new, stop)
            for i, tokens in zip(batch, answers, strict=True):
                text = encoding.decode([t for t in tokens if t < encoding.n_vocab])
                completions[i] = re.split(STOPS, text.lstrip(), maxsplit=1)[0].rstrip()
    finally:
        model.train(was_training)
    records = []
    for q, completion, (prompt, kept) in zip(questions, completions, prompts, strict=True):
        prediction, gold = extract_answer(completion), str(q["answer"])
        gold = extract_answer(gold) if re.search("####|boxed", gold) else gold
        record = {"question": q["question"], "completion": completion, "prediction": prediction}
        record |= {"gold": gold, "correct": is_equiv(prediction, gold)}
        records.append(record | {"shots": kept if len(prompt) < block_size else None})
    return records


def wilson_interval(right, n):
    """95 % confidence interval (lo, hi), within 0..1, of the share `right` of n (Wilson 1927)."""
    z = 1.959964
    centre, half = right + z * z / 2, z * math.sqrt(right * (n - right) / max(n, 1) + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))


def main(argv=None):
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [name for name in there if there[name]] + ["cpu"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = fail = lambda message: parser.exit(2, f"{message}\n")  # one line, no usage
    flag = parser.add_argument
    flag("--ckpt", required=True, help="checkpoint of rho.py, like out/demo/slm.pt")
    flag("--task", default="demo", help="demo, gsm8k or a file of JSON lines (default: demo)")
    flag("--data", default="data/demo", help="where demo's questions.jsonl is (default: data/demo)")
    flag("--n", type=int, default=10**9, help="only the first N questions (default: all)")
    flag("--shots", type=int, choices=range(9), help="examples in the prompt (default: 8; demo: 0)")
    flag("--batch_size", type=int, default=64, help="prompts answered at a time (default: 64)")
    flag("--max_new_tokens", type=int, default=256, help="longest answer (default: 256)")
    flag("--out", help="JSON lines to write (default: beside the checkpoint)")
    flag("--device", choices=devices, default=devices[0], help=f"(default here: {devices[0]})")
    args = parser.parse_args(argv)
    sizes = args.batch_size, args.max_new_tokens
    if min(args.n, *sizes) < 1:
        fail("--n, --batch_size and --max_new_tokens have to be at least 1")
    shots = args.shots if args.shots is not None else 0 if args.task == "demo" else 8
    ckpt = args.ckpt
    out = Path(args.out or f"{ckpt.removesuffix('.pt')}.{Path(args.task).stem}.answers.jsonl")
    try:
        questions = load_questions(args.task, args.n, args.data)
        model, checkpoint = load_model(ckpt, args.device)
        encoding = get_tokenizer(checkpoint["tokenizer"])
    except FileNotFoundError:
        fail(f"{ckpt} not found. Run: python rho.py --stage slm (or the stage that makes it)")
    except (InputError, OSError) as error:
        fail(error)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        fail(f"{ckpt} is of no use: {' '.join(str(error).split())[:200]}")
    try:
        with whole_file(out) as file:  # opened first: what cannot be written is said at once
            records = answer_questions(model, encoding, questions, shots, *sizes, progress=True)
            file.writelines(f"{json.dumps(record)}\n".encode() for record in records)
    except OSError as error:
        fail(f"--out {out}: {error.strerror}")
    right, n = sum(r["correct"] for r in records), len(records)
    interval = "{:.1%} to {:.1%}".format(*wilson_interval(right, n))
    short = sum(r["shots"] != shots for r in records)
    print(f"{args.task}: {right} of {n} right, {right / n:.1%} (95 % interval: {interval})")
    print(f"{short} prompts shortened or left out for want of room; the answers are in {out}")


if __name__ == "__main__":
    main()
