r"""A question goes in, right or wrong comes out: prompt, greedy answer, extraction, comparison.

    python eval_math.py --ckpt out/demo/slm.pt                 the demo's questions, no examples
    python eval_math.py --ckpt out/real/slm.pt --task gsm8k    8 examples in the prompt
    python eval_math.py --ckpt FOLDER --task svamp --file SVAMP.json    a set from its public file
    python eval_math.py --ckpt FOLDER --task all               the paper's table, all nine sets

The file has four parts: numbers (all that GSM8K needs), MATH's LaTeX, the nine sets, the answers.
The rules are those of the harness that scored the paper's models (ZubinGou/math-evaluation-harness,
parser.py and grader.py), its looseness included: 0.5 is 50, for one may be a percentage. We differ:
1. A marker with nothing after it passes on to the next rule; "the answer is" ends at its sentence.
2. `#### x` is read, since models trained on GSM8K write it.
3. "3 + 4 = 7", "7 dollars" and "7 thousand" are numbers; the last number may be a fraction.
4. Exact numbers have to be equal; only where one is a decimal is a relative 1e-4 close enough.
5. Brackets count: (1,2) is not [1,2], and \frac{1}{23} is not \frac{12}{3}.
6. Expressions are compared by the package math-verify, in a process of its own that is ended after
   a moment. The harness asks sympy's eval(); text that a model wrote is never run as code here.
"""

import csv
import functools
import importlib.util
import inspect
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import torch
from tqdm import tqdm

from model import generate, load_model
from prepare_data import (
    InputError,
    OneLineParser,
    get_tokenizer,
    prompt_start,
    raise_interrupted,
    stop_tokens,
    whole_file,
)

# ---- 1. Numbers: all that GSM8K, SVAMP, ASDiv, MAWPS and TabMWP need ----

COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")  # of thousands; in "12, 345" it is none
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
NUMBER = rf"(?:[0-9]+ [0-9]+/[0-9]+|[0-9]+/[0-9]+|{DECIMAL})"  # 2 1/2, 3/4, 1.5, 1.5e3
GSM8K = re.compile(rf"#### {{0,3}}(-?\$?-?{NUMBER}%?)(?![.)]? +[A-Z])")  # no "#### 2. Step"


def gsm8k_answer(text):
    """The number after `####`, the first one as in GSM8K's own code; "" if there is none."""
    found = GSM8K.search(COMMA.sub("", text))
    return found[1] if found else ""


Number = namedtuple("Number", "value exact decimal percent")
LONGEST = 300  # characters; a longer answer is compared as text and never parsed
SPACED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?: [0-9]{3})+(?![0-9/.])")  # 9 500
SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
# Words that change a number's value: what has one of them is no plain number.
CHANGING = """half halves third thirds twice double triple root squared cubed factorial choose plus
minus times over log ln sin cos tan sec csc cot pi infinity infty sqrt frac""".split()
# Short words that are units. Others of one or two letters may be variables: 5x, 2ab.
UNITS = """a m s g l h c f in ft yd mi cm mm km kg mg lb lbs oz ml cl hr hrs min sec mph kph am pm
rs sq cu st nd rd th""".split()
UNIT_POWER = re.compile(rf"\b({'|'.join(UNITS)}|[a-z]{{3,}})\s*\^\s*\{{?[23]\}}?(?![0-9])")
ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen""".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SPOKEN = dict(zip([*ONES, *TENS], [*range(20), *range(20, 100, 10)], strict=True))
TWENTY_ONE = re.compile(rf"\b(?:(?:{'|'.join(TENS)})[- ])?(?:{'|'.join(SPOKEN)})\b")


def spoken(found):
    """The figures of a match of TWENTY_ONE."""
    return str(sum(SPOKEN[word] for word in re.split("[- ]", found[0])))


def in_figures(text):
    """The text with its number written as 12345: no words, groups of thousands or `\\frac`."""
    if not re.search("[0-9]", text):
        text = re.sub(rf"\ban?(?= (?:{'|'.join(SCALES)})\b)", "one", text)
        text = TWENTY_ONE.sub(spoken, text)
    if not text.startswith(("(", "[")):  # (1,234) is a pair
        text = COMMA.sub("", text)
        text = SPACED.sub(lambda m: m[0].replace(" ", ""), text)
    return re.sub(r"\\frac\{([0-9]+)\}\{([0-9]+)\}", r" \1/\2", text)


def keeps_value(rest):
    """Whether the text around a number is units or prose, and so leaves the number as it is."""
    words = re.findall("[a-z]+", rest)
    signs = set(re.sub("[a-z]", "", rest))
    if set(CHANGING).intersection(words) or not signs <= set(" .,;:?'\"%()[]-/#"):
        return False
    prose = any(len(word) > 2 and word not in SCALES for word in words)
    return prose or set(UNITS).issuperset(word for word in words if len(word) < 3)


def read_number(text):
    """The Number that a text says, as "$1,234.50", "12 (kg)", "3 + 4 = 7" or "two million" do.

    None if it says none, several, or anything that is not a number alone: 5x, 2 pi, (1,2).
    """
    # "3 + 4 = 7" and "x = 7" say 7
    text = re.sub(r"^[^a-z\\]*=|^\\?[a-z]{1,2}\s*=(?=[^=]*$)", "", text.lower()).strip()
    text = in_figures(UNIT_POWER.sub(r"\1", text[:LONGEST]))
    found = list(re.finditer(NUMBER, text))
    if len(found) != 1:
        return None
    written = found[0][0]
    before = text[: found[0].start()]
    after = text[found[0].end() :]
    glued = re.match("[a-z]*", after)[0]
    if before[-1:].isalpha() or len(glued) == 1 or glued not in {"", *UNITS}:
        return None  # x2, 5x; but 5cm is 5
    before = before.rstrip()
    rest = f"{before.removesuffix('-')} # {after}"
    if not keeps_value(rest):
        return None
    try:
        value = sum(Fraction(part) for part in written.split())
    except ZeroDivisionError:
        return None
    if before.endswith("-"):
        value = -value
    scales = [SCALES[word] for word in re.findall("[a-z]+?(?=s?\\b)", rest) if word in SCALES]
    value *= math.prod(scales)
    exact = value.denominator == 1 or "/" in written
    decimal = "/" not in written and not scales
    return Number(value, exact, decimal, "%" in rest or "percent" in rest)


def same_number(a, b, percentage):
    """Whether two Numbers agree, or do so to a factor 100 if one of them may be a percentage."""
    scales = [1]
    if percentage and (a.percent or b.percent or (a.decimal and b.decimal)):
        scales = [1, 100, Fraction(1, 100)]
    # Two exact numbers are equal or not: 2001/2002 is not 2011/2012.
    tolerance = 0 if a.exact and b.exact else Fraction(1, 10_000)
    for scale in scales:
        x = a.value
        y = b.value * scale
        if abs(x - y) <= tolerance * max(abs(x), abs(y)):
            return True
    return False


# ---- What a text answers ----

# "the answer is", "the answers are", "the correct option is", "Answer:"
MARKER = re.compile(r"(?:answer|choice|option)s? (?:is|are)\b|\bAnswer:")
# (b), or a capital letter that ends there or is given a reason
CHOICE = re.compile(
    r"[\s:*$]*(?:option |choice )?\(?"
    r"((?<=\()[a-e](?=\))|[A-E](?=[).,:;*$]|\s*$|\s*\n|\s+(?:because|since|as)\b))"
)
JOINT = re.compile(r"[\s$\\().]*(?:,|;|,? ?(?:\\text\{ ?)?(?:and|or)(?: ?\})?)[\s$\\()]*")
LAST = re.compile(  # a minus after a digit or a bracket subtracts
    r"(?:(?<![\w)}\]])-)?(?:\\?\$-?|[€£]-?)?"
    rf"(?:(?:[0-9]+ ?)?\\[dtc]?frac\{{[0-9]+\}}\{{[0-9]+\}}|{NUMBER})(?:\\?%)?"
)
DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]")  # \( \) \[ \]; \\[2pt] ends a matrix's row


def closing_brace(text, start):
    """Where the brace that was opened before `start` closes; the text's end if it never does."""
    depth = 1
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    return len(text)


def boxed_answer(text):
    r"""The content of the last \boxed{}; "2, -6" where several are joined by "and" or a comma."""
    text = re.sub(r"\\(?:boxed|fbox)\s*([^{\s][^$\n]*)", r"boxed{\1}", text)  # \boxed 5
    answers = []
    following = None  # where the box after this one starts
    for box in reversed(list(re.finditer(r"\\?(?:boxed|fbox)\s*\{", text))):
        end = closing_brace(text, box.end())
        if answers and not JOINT.fullmatch(text, end + 1, following):
            break
        answers.insert(0, text[box.end() : end])
        following = box.start()
    return ", ".join(answers)


def candidates(text):
    r"""What may be the answer, best first: "final answer is $...$. I hope"; the last \boxed{...};
    `#### x`; what follows "the answer is" in its sentence; the last number."""
    minerva, hope, _ = text.partition("final answer is $")[2].partition("$. I hope")
    if hope:
        yield minerva
    yield boxed_answer(text)
    yield gsm8k_answer(text)
    *before, rest = MARKER.split(text)
    if before:
        choice = CHOICE.match(rest)
        if choice:
            yield choice[1].upper()
        rest = DELIMITERS.sub(" ", rest).strip(" \t\n:*$")
        sentence = re.split(r"\.(?=\$?(?:\s|$))|\n", rest)[0]
        yield sentence.rstrip("!? ")
    numbers = LAST.findall(COMMA.sub("", text))
    yield from numbers[-1:]


def extract_answer(text):
    """The answer in what a model said, by the first of `candidates` that is not empty; or None."""
    text = (text or "").translate(SIGNS)
    text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K's calculator marks, <<3*4=12>>
    text = re.sub(r"\\(?:boxed|fbox)\s*\{\s*(?:\\text\{\s*\}\s*)?\}", "", text)
    for candidate in candidates(text):
        answer = candidate.lstrip(" \t\n:*\"'`,;$").rstrip(" \t\n:*\"'`.,;$\\")
        if says_something(answer):
            return answer
    return None


def says_something(answer):
    """Whether there is more than decoration in it."""
    return bool(re.search(r"\w|[∞π∅]", answer))


# ---- 2. MATH: answers in LaTeX ----

SIGNS = str.maketrans("−–", "--")
# What math-verify does not know by itself, or what a number has to lose.
SYNONYMS = r"""∞ \infty  √ \sqrt  ≈ \approx  · \cdot  ° ^\circ  ² ^2  ³ ^3  \dfrac \frac
\tfrac \frac  \lbrace \{  \rbrace \}  \varnothing \emptyset  \% %  {,} ,  ,\! ,""".split()
SYNONYMS = list(zip(SYNONYMS[::2], SYNONYMS[1::2], strict=True))
REWRITES = [  # (what, into what), in this order, after the synonyms
    (r"\\(?:left|right|displaystyle|textstyle|[bB]igg?[lrm]?)(?![a-zA-Z])", ""),
    (r"\\?\$|[€£]|\\!", ""),
    (r"(?<!\\)\\(?:[()\[\],;:> ]|q?quad(?![a-z]))|~", " "),  # delimiters and spaces
    (r"\\(?:text|mbox|operatorname|math(?=rm|bf|it|sf))[a-z]*\s*\{([^{}]*)\}", r" \1 "),
    (r"\s*\^\s*\{?\s*\\circ\s*\}?(?:\s*[CF](?![a-zA-Z]))?", ""),  # degrees
    (r"\\frac\s*([0-9])\s*(?=[0-9a-z{])", r"\\frac{\1}"),  # \frac12
    (r"(\\frac\{[^{}]*\})\s*([0-9a-z])", r"\1{\2}"),
    (r"\\(begin|end)\{array\}(?:\{[^{}]*\})?", r"\\\1{pmatrix}"),
    (r"_\{(\w)\}", r"_\1"),
    (r"^\s*\(([A-Ea-e])\)\s*$", r"\1"),  # a choice
    (r"(?<=[0-9])\s*\((?=[0-9.]+\))", r" \\cdot ("),  # 1000(26)
    (r"^\s*(?:\\approx|about|approximately|around|roughly)(?![a-z])", ""),
    (r"\b(?:minus|negative)\s+(?=[0-9$\\.])", "-"),
    (r"(?<![\\a-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?:(?<![\\a-z])sqrt|(?:the )?square root of)\s*([0-9a-z.]+)", r"\\sqrt{\1}"),
    (r"(?<![\\a-zA-Z])(pi|infty|infinity|log|ln|sin|cos|tan)(?![a-zA-Z])", r"\\\1 "),
    (r"\\infinity", r"\\infty"),
    (r" squared\b", "^2"),
    (r" cubed\b", "^3"),
    # units after an expression
    (r"([})]|\\pi)\s+(?:[a-z]{4,} )?(?:[cmk]?m|[km]g|ft|[a-z]{4,})\.?(?:\s*\^\s*[23])?\s*$", r"\1"),
]
REWRITES = [(re.compile(what), into) for what, into in REWRITES]


def tidy(answer):
    r"""One spelling for many: "\dfrac12" and "\\frac{1}{2}" are \frac{1}{2}."""
    answer = str(answer).translate(SIGNS)
    if len(answer) > LONGEST:
        return " ".join(answer.split())
    # A model may double each backslash. In a matrix two of them end a row, and four do if doubled.
    if r"\\begin" in answer:
        answer = answer.replace(r"\\", "\\")
    elif r"\begin" not in answer:
        answer = re.sub(r"\\\\(?=[a-zA-Z{}()\[\]])", r"\\", answer)
    for what, into in SYNONYMS:
        answer = answer.replace(what, f"{into} " if len(what) == 1 else into)
    for what, into in REWRITES:
        answer = what.sub(into, answer)
    answer = " ".join(answer.split())
    return answer.lstrip(" :*\"'`,;").rstrip(" :*\"'`.,;\\")


def read_latex(text):
    """[sympy's object] of LaTeX without its dollar signs; [] of what is none. Worker only."""
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse

    rules = LatexNormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    grammar = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)
    return parse(f"${text}$", [grammar], "no_fallback", parsing_timeout=None)


def equal_latex(a, b):
    """Whether two LaTeX texts are the same expression, equation, matrix, set or interval."""
    import cmath

    from math_verify import verify
    from sympy import Abs, Add, Eq, Expr, Float, Symbol, simplify

    readings = [read_latex(text) for text in (a, b)]
    if [] in readings:
        return False
    [x], [y] = readings
    plain = isinstance(x, Expr) and isinstance(y, Expr)
    if plain and x.is_number and y.is_number and (x.has(Float) or y.has(Float)):
        return cmath.isclose(complex(x), complex(y), rel_tol=1e-4)
    equations = [side for side in (x, y) if isinstance(side, Eq)]
    if len(equations) == 1 and isinstance(equations[0].lhs, Add):
        return False  # 2x - y = 5 is not 5, as y = 5 is
    # math-verify unwraps x = 5 on one side only: ask both ways.
    if any(verify(p, q, float_rounding=4, timeout_seconds=None) for p, q in [(x, y), (y, x)]):
        return True
    if len(equations) == 2:  # 2x = 6 is x = 3
        ratio = simplify((x.lhs - x.rhs) / (y.lhs - y.rhs))
        return bool(ratio.is_number and ratio.is_nonzero)
    if plain and not x.has(Abs) and not y.has(Abs):  # sqrt(1/m) is 1/sqrt(m) if m is positive
        letters = x.free_symbols | y.free_symbols
        positive = {letter: Symbol(letter.name, positive=True) for letter in letters}
        return verify(x.subs(positive), y.subs(positive), timeout_seconds=None)
    return False


def latex_worker():
    """Answers pairs of LaTeX, JSON lines on stdin, with 0 on stdout where they are equal.

    Each pair is judged in a forked child, which the kernel ends after SECONDS of processor time:
    that bounds any thread of the caller, and C code too, which no Python signal handler could stop.
    """
    import builtins
    import resource

    import sympy
    from latex2sympy2_extended import latex2sympy2

    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))

    def number(text):
        digits = text.replace(",", "").strip()
        return sympy.Integer(digits) if digits.isdigit() else sympy.Float(digits)

    def parse_number(converter, text):
        return number(text)

    # The grammar gives its number tokens, and only those, to sympy.Number, which calls eval():
    # they are read here instead. Then eval is taken away, once sympy has imported what it needs.
    latex2sympy2.Number = number
    latex2sympy2._Latex2Sympy.parse_number = parse_number
    for a, b in WARM_UP:
        equal_latex(a, b)
    builtins.eval = builtins.compile = None
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                status = 0 if equal_latex(*json.loads(line)) else 1
            finally:
                os._exit(status)
        print(os.waitpid(child, 0)[1], flush=True)


# Of processor time for one comparison. The slowest in our tests takes about a tenth of it.
SECONDS = 1
# What the worker compares first, so that sympy and the grammar have loaded what they load lazily.
WARM_UP = [
    ("(x+1)(x-1)", "x^2-1"),
    ("y=3x-4", "3x-y=4"),
    ("2x=6", "x=3"),
    (r"\frac{\sqrt{2}}{2}", "0.7071"),
    (r"[2,\infty)", r"\{1,2\}"),
    (r"\sin x", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"x\leq 3", r"(1,2)\cup(3,4)"),
    (r"1 \leq x \leq 2", "[1,2]"),
    (r"x \in [2,5)", "[2,5)"),
    ("(0.5,3)", r"(\frac{1}{2},3)"),
    ("(0.6,2]", r"(\frac{3}{5},2]"),
    ("(a,b)=(4,1)", "(4,1)"),
    (r"\frac{1}{\sqrt{m}}", r"\sqrt{1/m}"),
]
WORKER_LOCK = threading.Lock()


def has_math_verify():
    """Whether LaTeX can be compared: the extra is there, and processes can fork (no Windows)."""
    return hasattr(os, "fork") and importlib.util.find_spec("math_verify") is not None


@functools.cache
def start_worker(process_id):
    """The worker of this process (a fork of it gets its own): latex_worker alone, without torch."""
    functions = [read_latex, equal_latex, latex_worker]
    source = "import json, logging, os, signal, sys\n"
    source += f"SECONDS = {SECONDS}\nWARM_UP = {WARM_UP}\n"
    source += "\n".join(inspect.getsource(function) for function in functions)
    return subprocess.Popen(
        [sys.executable, "-c", f"{source}\nlatex_worker()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for us
    )


def same_latex(a, b):
    """equal_latex by the worker; False where the extra is missing or the time is over."""
    words = r"(?<![\\a-zA-Z])[a-zA-Z]{4,}"  # the grammar would read "north" as n·o·r·t·h
    for text in (a, b):
        bare = re.sub(r"\\(?:begin|end)\{[a-z]+\}", "", text)
        # It drops the base of 12_5, and takes \{1,2\} for (1,2).
        if re.search(words, bare) or re.search(r"[0-9]_", text) or len(text) > LONGEST:
            return False
    if "," in a and "," in b and brackets(a) and brackets(b) and brackets(a) != brackets(b):
        return False
    if not has_math_verify():
        return False
    with WORKER_LOCK:
        worker = start_worker(os.getpid())
        try:
            worker.stdin.write(json.dumps([a, b]).encode() + b"\n")
            worker.stdin.flush()
            status = worker.stdout.readline()
        except OSError:
            status = b""
        if not status:  # it died: the next comparison starts another
            start_worker.cache_clear()
    return status.strip() == b"0"


def brackets(text):
    """The brackets around a list, as in "[)"; "" around a bare one."""
    return f"{text[0]}{text[-1]}" if text[0] in "([\\" and text[-1] in ")]}" else ""


# ---- Right or wrong ----


def is_equiv(prediction, gold, percentage=True):
    """Whether two answers are the same as text, as numbers or as LaTeX. Never raises.

    Exact numbers have to be equal; decimals agree to a relative 1e-4, and to a factor 100 if
    `percentage` and both are decimals or one has a % sign. None and "" equal nothing.
    """
    a = tidy("" if prediction is None else prediction)
    b = tidy("" if gold is None else gold)
    if not says_something(a) or not says_something(b):
        return False
    # Between two digits a space means something.
    texts = [re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).lower() for text in (a, b)]
    if texts[0] == texts[1]:
        return True
    x = read_number(a)
    y = read_number(b)
    both_labeled = "=" in a and "=" in b  # x = 5 is not y = 5
    if x and y and not both_labeled:
        return same_number(x, y, percentage)
    return same_latex(in_latex(a, x), in_latex(b, y))


def in_latex(text, number):
    """ "15 apples" is 15."""
    if number is None or "=" in text:
        return text
    return str(number.value) if number.exact else repr(float(number.value))


# ---- 3. The paper's nine sets ----

# hub: "name" or "name:config". question, answer: fields, in lower case; of several the first there
# is. CLM, SLM: the paper's Table 1, percent right of TinyLlama after 15 B tokens of plain training
# and after 9 B selected ones of them.
Task = namedtuple("Task", "name hub split question answer shots prompt kind clm slm")
TASKS = """
gsm8k     openai/gsm8k:main      test       question       answer          8 words  number 6.4  29.8
math      HuggingFaceH4/MATH-500 test       problem        answer,solution 4 math   latex  2.4  14.0
svamp     ChilleD/SVAMP          train+test question       answer          8 words  number 21.7 49.2
asdiv     EleutherAI/asdiv       validation question       answer          8 words  number 36.7 61.4
mawps     MU-NLPC/Calc-mawps     test       question,input result,target   8 words  number 47.7 79.8
tabmwp    Arietem/tabmwp         train      question       answer          4 table  number 17.9 25.8
mathqa    allenai/math_qa        test       problem        correct         4 choice choice 13.9 30.4
mmlu_stem cais/mmlu:all          test       question       answer          4 choice choice 23.0 24.7
sat       mcaleste/sat_multiple_choice_math_may_23 train question answer 4 choice choice 25.0 28.1
"""
TASKS = [Task(*line.split()) for line in TASKS.strip().splitlines()]
TASKS = {task.name: task for task in TASKS}
OWN = Task(  # demo, and any file of JSON lines
    "own", "", "", "question,problem,input", "answer,solution,target", 8, "words", "number", 0, 0
)
STEM = """abstract_algebra astronomy college_biology college_chemistry college_computer_science
college_mathematics college_physics computer_security conceptual_physics electrical_engineering
elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
high_school_mathematics high_school_physics high_school_statistics machine_learning""".split()


def hub_rows(name, task):
    """The rows of a set on the hub."""
    hub, _, config = task.hub.partition(":")
    try:
        from datasets import load_dataset  # slow to import

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries say no more
        return list(load_dataset(hub, config or None, split=task.split))
    except Exception as error:  # the hub fails in many ways
        raise InputError(
            f"{name}: {hub} could not be read from the hub. Give a local file: --file PATH"
        ) from error


def file_rows(path):
    """The rows of a file: JSON lines, one JSON list or object of rows, CSV, or ASDiv's XML."""
    if not path.is_file():
        names = ", ".join(["demo (python prepare_data.py)", *TASKS, "all"])
        raise InputError(f"{path} not found. --task takes {names} or a file; --file a file")
    where = path
    try:
        if path.suffix == ".xml":
            problems = ElementTree.parse(path).iter("Problem")
            return [{field.tag: field.text for field in problem} for problem in problems]
        if path.suffix == ".csv":
            return list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
        content = path.read_bytes()
        if path.suffix == ".json":
            try:
                rows = json.loads(content)
                return list(rows.values()) if isinstance(rows, dict) else rows
            except ValueError:
                pass  # JSON lines under another name
        rows = []
        for number, line in enumerate(content.splitlines(), 1):
            where = f"{path}:{number}"
            rows.append(json.loads(line))
        return rows
    except (ValueError, RecursionError, ElementTree.ParseError) as error:
        raise InputError(f"{where}: no JSON, CSV or XML with question and answer") from error


def read_options(options):
    """["12", "16", ...] of "a ) 12 , b ) 16", "A) 12 B) 16" or a list of either form."""
    if isinstance(options, list):
        labels = r"^\s*\(?[A-Ea-e] ?\)"
        return [re.sub(labels, "", str(option)).strip() for option in options]
    parts = re.split(r"(?:^|(?<=[\s\['\"]))\(?[A-Ea-e] ?\)\s*", str(options))
    parts = [part.strip(" ,'\"[]\n") for part in parts]
    return [part for part in parts if part]


def read_row(row, task):
    """{"question", "answer"} of a row of a set; KeyError if it lacks one of them."""
    row = {name.lower(): value for name, value in row.items() if value not in (None, "")}
    question = str(next(row[name] for name in task.question.split(",") if name in row)).strip()
    answer = next(row[name] for name in task.answer.split(",") if name in row)
    if "body" in row:  # SVAMP, ASDiv
        question = f"{row['body'].strip().removesuffix('.')}. {question}"
    if "table" in row:  # TabMWP
        title = f" of {row['table_title']}" if "table_title" in row else ""
        question = f"Here is a table{title}.\n{row['table']}\n{question}"
    options = row.get("options", row.get("choices", row.get("possible answers")))
    if task.kind == "choice":
        options = read_options(options)[:5]
        letters = "ABCDE"[: len(options)]
        options = [f"({letter}) {text}" for letter, text in zip(letters, options, strict=True)]
        question = f"{question}\n{', '.join(options)}"
        answer = "ABCD"[answer] if isinstance(answer, int) else str(answer).strip().upper()
    elif options:
        question = f"{question} Choose from: {', '.join(options)}."
    read = {"question": question, "answer": str(answer)}
    return read if task.prompt == "words" else read | {"prompt": task.prompt, "kind": task.kind}


def load_questions(task, n=None, data="data/demo", file=None):
    """The first n [{"question", "answer"}] of a task: "demo" (in `data`), a name in TASKS, from
    its public `file` or else from the hub, or the path of a file of one's own. Else InputError."""
    row_of = TASKS.get(task, OWN)
    path = Path(data, "questions.jsonl") if task == "demo" else Path(file or task)
    rows = hub_rows(task, row_of) if task in TASKS and not file else file_rows(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: no list of rows with question and answer")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: a row is no object with question and answer")
    if task == "asdiv":  # as in the harness: one answer each
        rows = [row for row in rows if ";" not in str(row.get("answer", row.get("Answer")))]
    if task == "mmlu_stem":
        rows = [row for row in rows if row.get("subject", row.get("type")) in {None, *STEM}]
    questions = []
    for number, row in enumerate(rows[:n], 1):
        try:
            questions.append(read_row(row, row_of))
        except (StopIteration, KeyError, AttributeError, IndexError, TypeError) as error:
            fields = f"{row_of.question} and {row_of.answer}".replace(",", " or ")
            raise InputError(f"{path}:{number}: a row without {fields}") from error
    if not questions:
        raise InputError(f"{path} holds no questions")
    return questions


# ---- 4. Prompts and answers ----

WORD_EXAMPLES = """\
A baker makes 14 loaves at dawn and 19 at noon. How many are that? She makes 14 + 19 = 33.
A rope of 48 metres is cut into 6 equal parts. How long is each? Each has 48 / 6 = 8.
Nadia reads 12 pages on 5 days, then 20 more. How many? That is 12 * 5 = 60, and 60 + 20 = 80.
Of 90 beads a third is red, the rest blue. How many are blue? Red: 90 / 3 = 30. Blue: 90 - 30 = 60.
A ticket is $7, a drink $3. What do 4 friends pay for both? Each pays 7 + 3 = 10, all 4 * 10 = 40.
Omar has $60 and saves $15 a week. When has he $180? He lacks 180 - 60 = 120. Weeks: 120 / 15 = 8.
A tank of 250 litres loses 12 an hour. What is left after 9 hours? 12 * 9 = 108. 250 - 108 = 142.
A $60 lamp gets 25 percent cheaper. What is the price? It is 60 * 25 / 100 = 15 less: 60 - 15 = 45.
"""
WORD_EXAMPLES = [
    "Question: {}?\nAnswer: {} The answer is {}".format(*line.split("? "), line.split()[-1])
    for line in WORD_EXAMPLES.splitlines()
]
# The other examples are pairs of lines; " / " in a question is a line break.
TABLE_EXAMPLES = """\
Here is a table. / pencil | $0.40 / eraser | $0.75 / ruler | $1.10 / What do 2 rulers cost?
A ruler costs 1.10, and 2 * 1.10 = 2.20. The answer is 2.20.
Here is a table of books read. / Ida | 6 / Ben | 9 / Tom | 3 / How many books are that in all?
They read 6 + 9 + 3 = 18 books. The answer is 18.
Here is a table. / Fri | 120 / Sat | 210 / Sun | 185 / Which is most? Choose from: Fri, Sat, Sun.
The largest of 120, 210 and 185 is 210. The answer is Sat.
Here is a table of points. / Game 1 | 14 / Game 2 | 20 / Game 3 | 17 / What is the mean?
The sum is 14 + 20 + 17 = 51, and 51 / 3 = 17. The answer is 17.
"""
MATH_EXAMPLES = r"""
What is the sum of the solutions of $x^2 - 7x + 10 = 0$?
The left side is $(x - 2)(x - 5)$. So $x$ is $2$ or $5$, and $2 + 5 = 7$. The answer is $\boxed{7}$.
Which line passes through $(1, 2)$ and $(3, 8)$? Give it in the form $y = mx + b$.
Here $m = \frac{8 - 2}{3 - 1} = 3$ and $b = 2 - 3 = -1$. The answer is $\boxed{y = 3x - 1}$.
Simplify $\frac{\sqrt{12}}{4}$.
As $\sqrt{12} = 2\sqrt{3}$, it is half of $\sqrt{3}$. The answer is $\boxed{\frac{\sqrt{3}}{2}}$.
For which real numbers $x$ is $x^2 - 4 < 0$?
We need $x^2 < 4$, so $x$ lies between $-2$ and $2$. The answer is $\boxed{(-2, 2)}$.
"""
CHOICE_EXAMPLES = """
A train covers 150 km in 2.5 hours. What is its speed? / (A) 45 km/h, (B) 60 km/h, (C) 375 km/h
The speed is 150 : 2.5 = 60 km/h. The answer is (B).
If 3x + 5 = 20, what is 2x? / (A) 5, (B) 8, (C) 15, (D) 10
We have 3x = 20 - 5 = 15, so that x = 5 and 2x = 10. The answer is (D).
Which gas do green plants make sugar from? / (A) carbon dioxide, (B) oxygen, (C) helium
In photosynthesis they make it from water and carbon dioxide. The answer is (A).
A coat of $80 is sold at 15 percent less. What does it cost? / (A) $12, (B) $65, (C) $68, (D) $92
15 percent of 80 is 12, and 80 - 12 = 68. The answer is (C).
"""


def examples_of(form, text):
    """The examples of a text of pairs of lines, each in the prompt's form."""
    lines = text.strip().splitlines()
    questions = [question.replace(" / ", "\n") for question in lines[::2]]
    pairs = zip(questions, lines[1::2], strict=True)
    return [f"{form.format(question)} {answer}" for question, answer in pairs]


BETWEEN = "\n\n\n"
QUESTION = "Question: {}\nAnswer:"
PROBLEM = "Problem:\n{}\nSolution:"
PROMPTS = {  # form: (the question, its examples)
    "words": (QUESTION, WORD_EXAMPLES),
    "table": (QUESTION, examples_of(QUESTION, TABLE_EXAMPLES)),
    "math": (PROBLEM, examples_of(PROBLEM, MATH_EXAMPLES)),
    "choice": (PROBLEM, examples_of(PROBLEM, CHOICE_EXAMPLES)),
}
STOPS = rf"(?:^|\n)(?:Question|Problem):|{BETWEEN}"  # there the model begins a question of its own


def make_prompt(encoding, question, shots, room, form="words"):
    """(token ids, examples kept): a document's start, the last `shots` examples, the question.

    Examples go, the first one first, until `room` tokens are left; the question is never cut.
    """
    asked, examples = PROMPTS[form]
    for kept in range(min(shots, len(examples)), -1, -1):
        texts = [*examples[len(examples) - kept :], asked.format(question)]
        tokens = [*prompt_start(encoding), *encoding.encode_ordinary(BETWEEN.join(texts))]
        if len(tokens) <= room:
            break
    return tokens, kept


def extract_choice(text):
    """The letter that a text chooses: the first "answer is (C)", as in the harness; or None."""
    chosen = r"(?:answer|choice|option) is:?[\s*$]*(?:option |choice )?"
    found = re.search(chosen + r"(?:\(([A-Ea-e])\)|([A-E])\b|([b-e])\b)", text)
    if found:
        return found[0].strip("()")[-1].upper()
    answer = (extract_answer(text) or "").strip("()")
    return answer.upper() if re.fullmatch("[A-Ea-e]", answer) else None


def judge(question, completion):
    """The record of one answer."""
    gold = question["answer"]
    if question.get("kind") == "choice":
        prediction = extract_choice(completion)
        correct = prediction == gold
    else:
        if re.search("####|boxed", gold):
            gold = extract_answer(gold)
        prediction = extract_answer(completion)
        correct = is_equiv(prediction, gold)
    return {
        "question": question["question"],
        "completion": completion,
        "prediction": prediction,
        "gold": gold,
        "correct": correct,
    }


@torch.no_grad()
def answer_questions(
    model, encoding, questions, shots=0, batch_size=64, max_new_tokens=256, progress=False
):
    """Greedy answers [{question, completion, prediction, gold, correct, shots}], order as given.

    Prompts of about one length share a batch, whose new tokens end with block_size; examples leave
    half of it. "shots" counts the examples that fitted; it is None, and the answer wrong, where the
    question is too long by itself and was not asked.
    """
    block_size = model.config.block_size
    room = block_size - min(max_new_tokens, block_size // 2)
    prompts = []
    stop = set(stop_tokens(encoding))
    for question in questions:
        form = question.get("prompt", "words")
        prompts.append(make_prompt(encoding, question["question"], shots, room, form))
        # A question of the model's own begins with a token like this; " Question" is another.
        first_word = PROMPTS[form][0].split(":")[0]
        word = encoding.encode_ordinary(first_word)
        if len(word) == 1:
            stop.update(word)
    order = [i for i, (tokens, _) in enumerate(prompts) if len(tokens) < block_size]
    order.sort(key=lambda i: len(prompts[i][0]))
    completions = [""] * len(prompts)
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(range(0, len(order), batch_size), unit="batch", disable=not progress):
            batch = order[start : start + batch_size]
            longest = len(prompts[batch[-1]][0])
            new = min(max_new_tokens, block_size - longest)
            answers = generate(model, [prompts[i][0] for i in batch], new, stop)
            for i, tokens in zip(batch, answers, strict=True):
                # A model's matrix may have more rows than its tokenizer has tokens.
                text = encoding.decode([t for t in tokens if t < encoding.n_vocab])
                completions[i] = re.split(STOPS, text.lstrip(), maxsplit=1)[0].rstrip()
    finally:
        model.train(was_training)
    records = []
    for question, completion, (tokens, kept) in zip(questions, completions, prompts, strict=True):
        shots_kept = kept if len(tokens) < block_size else None
        records.append({**judge(question, completion), "shots": shots_kept})
    return records


def wilson_interval(right, n):
    """95 % confidence interval (lo, hi), within 0..1, of the share `right` of n (Wilson 1927)."""
    z = 1.959964
    center = right + z * z / 2
    half = z * math.sqrt(right * (n - right) / max(n, 1) + z * z / 4)
    return max(0.0, (center - half) / (n + z * z)), min(1.0, (center + half) / (n + z * z))


# ---- The command ----


def make_parser():
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = [name for name in there if there[name]] + ["cpu"]
    parser = OneLineParser("eval_math.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    flag = parser.add_argument
    tasks = ", ".join(TASKS)
    flag("--ckpt", required=True, help="checkpoint of rho.py, or a Hugging Face folder")
    flag("--task", default="demo", help=f"demo, {tasks}, all, or a file of JSON lines")
    flag("--file", help="the task's public file; for --task all a folder with gsm8k.jsonl, ...")
    flag("--data", default="data/demo", help="where demo's questions.jsonl is (default: data/demo)")
    flag("--n", type=int, default=10**9, help="only the first N questions (default: all)")
    flag("--shots", type=int, choices=range(9), help="examples (default: the task's; demo: 0)")
    flag("--batch_size", type=int, default=64, help="prompts answered at a time (default: 64)")
    flag("--max_new_tokens", type=int, default=256, help="longest answer (default: 256)")
    flag("--out", help="JSON lines to write (default: beside the checkpoint)")
    flag("--device", choices=devices, default=devices[0], help=f"(default here: {devices[0]})")
    return parser


def load_tasks(args):
    """{task: questions} of --task; for all, what can be loaded, and a line for what cannot."""
    if args.task != "all":
        return {args.task: load_questions(args.task, args.n, args.data, args.file)}
    loaded = {}
    for name in TASKS:
        file = None
        if args.file:
            files = sorted(Path(args.file).glob(f"{name}.*"))
            file = files[0] if files else Path(args.file, f"{name}.jsonl")
        try:
            loaded[name] = load_questions(name, args.n, file=file)
        except InputError as error:
            print(error, file=sys.stderr)
    if not loaded:
        raise InputError("--task all: no set could be read; see the lines above")
    return loaded


def load_student(args):
    """(model, encoding) of --ckpt; InputError if it cannot be loaded."""
    try:
        model, checkpoint = load_model(args.ckpt, args.device)
    except FileNotFoundError as error:
        remedy = "Run: python rho.py --stage slm (or the stage that makes it)"
        raise InputError(f"{args.ckpt} not found. {remedy}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{args.ckpt} cannot be loaded: {why}") from error
    if "tokenizer" not in checkpoint:
        raise InputError(f"{args.ckpt} has no tokenizer (a folder needs a tokenizer.json)")
    return model, get_tokenizer(checkpoint["tokenizer"])


def evaluate_task(args, name, questions, model, encoding):
    """Answers one task's questions, writes them to a file, prints the result: the share right."""
    shots = args.shots
    if shots is None:
        shots = 0 if name == "demo" else int(TASKS.get(name, OWN).shots)
    stem = str(args.ckpt).rstrip("/").removesuffix(".pt")
    out = Path(args.out or f"{stem}.{Path(name).stem}.answers.jsonl")
    if args.out and args.task == "all":
        out = out.with_name(f"{out.stem}.{name}{out.suffix}")
    try:
        with whole_file(out) as file:  # opened first: what cannot be written is said at once
            records = answer_questions(
                model, encoding, questions, shots, args.batch_size, args.max_new_tokens, True
            )
            file.writelines(f"{json.dumps(record)}\n".encode() for record in records)
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from error
    for record in records[:3]:
        verdict = "right" if record["correct"] else f"wrong, it is {record['gold']}"
        print(f"\nQuestion: {record['question']}\nAnswer: {record['completion']}\n[{verdict}]")
    n = len(records)
    right = sum(record["correct"] for record in records)
    low, high = wilson_interval(right, n)
    short = sum(record["shots"] != shots for record in records)
    print(
        f"\n{name}: {right} of {n} right, {right / n:.1%} (95 % interval: {low:.1%} to {high:.1%})"
    )
    print(f"{short} prompts shortened or left out for lack of room; the answers are in {out}")
    return right / n


def print_table(shares):
    """The paper's table: our run beside its CLM and SLM, TinyLlama on 15 B tokens, in percent."""
    print(f"\n{'':10} {'here':>6} {'CLM':>6} {'SLM':>6}   (CLM, SLM: the paper's 1B runs)")
    columns = []
    for name, share in shares.items():
        columns.append((100 * share, float(TASKS[name].clm), float(TASKS[name].slm)))
        print("{:10} {:6.1f} {:6.1f} {:6.1f}".format(name, *columns[-1]))
    means = [sum(column) / len(columns) for column in zip(*columns, strict=True)]
    label = "mean" if len(columns) == len(TASKS) else f"mean of {len(columns)}"
    print("{:10} {:6.1f} {:6.1f} {:6.1f}".format(label, *means))


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    if min(args.n, args.batch_size, args.max_new_tokens) < 1:
        parser.error("--n, --batch_size and --max_new_tokens have to be at least 1")
    if args.file and args.task not in {*TASKS, "all"}:
        parser.error("--file goes with --task all or a set's name; a file of your own is a --task")
    try:
        loaded = load_tasks(args)
        if "math" in loaded and not has_math_verify():
            print("LaTeX is compared as text and numbers only. For more: pip install math-verify")
        model, encoding = load_student(args)
        shares = {
            name: evaluate_task(args, name, questions, model, encoding)
            for name, questions in loaded.items()
        }
    except (InputError, OSError) as error:
        parser.exit(2, f"eval_math.py: {error}\n")
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        parser.exit(128 + number, "eval_math.py: interrupted; the same command starts again\n")
    if args.task == "all":
        print_table(shares)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, raise_interrupted)
    main()
