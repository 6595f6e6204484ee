r"""A question goes in, right or wrong comes out: prompt, greedy answer, extraction, comparison.

    python eval_math.py --ckpt out/demo/slm.pt                 the demo's questions, no examples
    python eval_math.py --ckpt out/real/slm.pt --task gsm8k    8 examples in the prompt
    python eval_math.py --ckpt FOLDER --task svamp --file SVAMP.json    a set from its public file
    python eval_math.py --ckpt FOLDER --task all               the paper's table, all nine sets

Numbers, all that the demo and GSM8K need, come first. The rules are those of the harness that
scored the paper's models (ZubinGou/math-evaluation-harness, parser.py, grader.py), its looseness
included: 0.5 is 50, for one may be a percentage. We differ:
1. `#### x` is read, since models trained on GSM8K write it. "The answer is" ends at its sentence,
   and a marker with nothing after it passes on to the next rule.
2. "3 + 4 = 7", "7 dollars" and "7 thousand" are numbers; the last number may be a fraction.
3. Exact numbers have to be equal; only where one is a decimal is a relative 1e-4 close enough.
4. Expressions are compared by the package math-verify, in a process of its own that is ended after
   a moment. The harness asks sympy's eval(); text that a model wrote is never run as code here.
"""

import argparse
import functools
import importlib.util
import inspect
import json
import re
import signal
import subprocess
import sys
from collections import namedtuple
from fractions import Fraction
from pathlib import Path
from xml.etree import ElementTree

import torch
from tqdm import tqdm

from model import BEST_DEVICE, check_rows, generate, load_model
from prepare_data import get_tokenizer, read_rows, run_script, whole_file

# ---- Numbers: all that the demo and GSM8K need ----

COMMA = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")  # of thousands; in "12, 345" it is none
DECIMAL = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3}(?![0-9]))?"
NUMBER = rf"(?:[0-9]+ [0-9]+/[0-9]+|[0-9]+/[0-9]+|{DECIMAL})"  # 2 1/2, 3/4, 1.5, 1.5e3
# A heading such as "#### 2. Add them" is no answer.
GSM8K = re.compile(rf"#### {{0,3}}(?![0-9]+[.)] +[A-Z])((?:- ?)?\$?-?{NUMBER}%?)")


def gsm8k_answer(text):
    """The number after `####`, the first one as in GSM8K's own code; "" if there is none."""
    found = GSM8K.search(COMMA.sub("", text))
    return found[1] if found else ""


SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3}
SCALES |= {"million": 10**6, "billion": 10**9, "trillion": 10**12}
SPACED = re.compile(r"(?<![0-9.])[0-9]{1,3}(?: [0-9]{3})+(?![0-9/.])")  # 9 500
# A word of three letters is a unit, unless it changes the value; "x" and "ab" may be variables.
UNIT = r"""(?:(?<![a-z])(?:[cmk]m|[km]g|ft|in|yd|mi|lbs?|oz|ml|sec|rs|am|pm|st|nd|rd|th)
    |(?<![a-z0-9])(?:[mglhs]|a|an|at|by|to|he|it|is|on|of\b.*|sq|cu|hr
    |(?!(?:half|halves|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|hundred)ths?
        |squared|cubed|factorial|plus|minus|base|infinity)\b)[a-z]{3,})
    )(?![a-z])(?:\s*\^\s*\{?[23]\}?)?"""
SAYS_A_NUMBER = re.compile(
    rf"""(?:\\approx|[~+:\s]|(?:about|approximately|around|roughly|exactly|only|just|simply|an?)\b)*
    (?P<minus>-|minus\ |negative\ )?\s*
    (?P<number>{NUMBER.replace(" ", r"[ ]")})(?![0-9])
    \s*(?P<scales>(?:(?:{"|".join(SCALES)})s?\b\s*)*)(?P<percent>%|percent)?
    # then nothing but units, and remarks in brackets that have words in them
    (?:[\s.,:;/?%'"-]|{UNIT}|\((?=[^()]*[a-z]{{2}})[^()]*\))*""",
    re.VERBOSE,
)
# in_digits: written as digits alone, not as a fraction and not with a word such as "million"
Number = namedtuple("Number", "value exact in_digits")


def read_number(text):
    """The Number that a text says, as "1,234.50", "12 (kg)", "-2 million" or "17 of the 40" do.

    None if it says none, or anything that is not a number alone: 5x, 2 pi, (1,2), 3 and 4.
    """
    text = re.sub(r"\\[dt]?frac\{([0-9]+)\}\{([0-9]+)\}", r" \1/\2", text.lower())
    text = SPACED.sub(lambda found: found[0].replace(" ", ""), COMMA.sub("", text))
    found = SAYS_A_NUMBER.fullmatch(text)
    if not found:
        return None
    try:
        value = sum(Fraction(part) for part in found["number"].split())
    except ZeroDivisionError:
        return None
    for scale in re.findall("|".join(SCALES), found["scales"]):
        value *= SCALES[scale]
    if found["minus"]:
        value = -value
    if found["percent"]:
        value /= 100
    fraction = "/" in found["number"]
    return Number(value, fraction or value.denominator == 1, not fraction and not found["scales"])


def same_number(a, b, percentage):
    """Whether two Numbers agree, or do so to a factor 100 if one of them may be a percentage."""
    percentage = percentage and a.in_digits and b.in_digits
    # Two exact numbers are equal or not: 2001/2002 is not 2011/2012.
    tolerance = 0 if a.exact and b.exact else Fraction(1, 10_000)
    for factor in [1, 100, Fraction(1, 100)] if percentage else [1]:
        difference = abs(a.value - b.value * factor)
        if difference <= tolerance * max(abs(a.value), abs(b.value * factor)):
            return True
    return False


# ---- What a text answers ----

SIGNS = r"""− -  – -  ∞ \infty  √ \sqrt  ≈ \approx  π \pi  · \cdot  × \times  ÷ \div
≤ \le  ≥ \ge  ° ^\circ  ² ^2  ³ ^3  ½ \frac{1}{2}  ∅ \emptyset""".split()
SIGNS = {ord(sign): latex for sign, latex in zip(SIGNS[::2], SIGNS[1::2], strict=True)}
WORDS = re.compile(r"\\(?:text|mbox|operatorname|math(?=rm|bf|it|sf))[a-z]*\s*\{([^{}]*)\}")


def plain(text):
    r"""The text with `\text{cm}` as cm, `\(` as $, signs in LaTeX, without <<3*4=12>> and **."""
    text = re.sub("<<[^<>]*>>", "", text.translate(SIGNS))
    text = re.sub(r"(?<![\w)])\*\*|\*\*(?![\w(])", "", text)  # **17** apples, but 2**3
    return re.sub(r"(?<!\\)\\[()\[\]]", "$", WORDS.sub(r" \1 ", text))


BRACED = "[^{}]*"
for _ in range(4):  # braces inside braces, to a depth of four
    BRACED = rf"(?:[^{{}}]|\{{{BRACED}\}})*"
BOX = re.compile(rf"\\?(?:boxed|fbox)\s*\{{({BRACED})(?:\}}|$)")  # one that is cut short counts
JOINT = re.compile(r"(?:[\s$().,;]|\\quad|and|or)*")  # between boxes that are one answer
# "the answer is", "the answers are", "the correct option is", "Answer:", "**ANSWER**:"
MARKER = re.compile(
    r"(?i)(?:answer|\b(?:the|correct|best|right) (?:choice|option))s? (?:is|are)\b|\banswer\**:"
)
# A sentence ends at its full stop or line, an answer before its reason.
SENTENCE_END = re.compile(r"\.(?=\$?(?:\s|$))|\n|(?:^|,? )(?:because|since|as)\b")
# As the prompts of MATH end: "The final answer is $5$. I hope it is correct."
HOPED = re.compile(r"final answer is([^\n]{0,300}?)[.$]* I hope")
LAST = re.compile(  # a minus after a digit or a bracket subtracts
    r"(?:(?<![\w)}\]])-)?(?:\\?\$-?|[€£]-?)?"
    rf"(?:(?:[0-9]+ ?)?\\[dtc]?frac\{{[0-9]+\}}\{{[0-9]+\}}|{NUMBER})(?:\\?%)?"
)


def boxed_answer(text):
    r"""The content of the last \boxed{}; "2, -6" where several are joined by "and" or a comma."""
    text = re.sub(r"\\(?:boxed|fbox)\s{0,3}(-?[0-9][0-9.,/]*)", r"\\boxed{\1}", text)  # \boxed 5
    answers = []
    end = 0
    for box in BOX.finditer(text):
        if not JOINT.fullmatch(text, end, box.start()):
            answers = []
        answers.append(box[1])
        end = box.end()
    return ", ".join(answers)


def said_answer(text):
    """What follows "the answer is" in its sentence: the last such text with a number, LaTeX or a
    choice ("I hope this answer is helpful" has none of them), or else the last one."""
    sentences = []
    for rest in MARKER.split(text)[1:]:
        sentence = SENTENCE_END.split(rest.lstrip(" \t\n:*$"), maxsplit=1)[0].rstrip("!? ")
        sentences.append(sentence)
    for sentence in reversed(sentences):
        if re.search(r"[0-9\\]", sentence) or CHOICE.match(sentence):
            return sentence
    return sentences[-1] if sentences else ""


# (b), B) 12, or a capital letter that ends there or goes on as B: 12 or B, 12. But A, B is a list.
CHOICE = re.compile(
    r"(?:the )?(?:option |choice )?(?:\(?([A-Ea-e])\)(?=$|[\s.,:;])"
    r"|([A-E])(?=$|[.,:] +(?![A-E]\b)| [0-9]))"
)


def extract_answer(text):
    r"""The answer in what a model said: after `####`; "final answer is ... I hope"; the last
    \boxed; after the last "the answer is"; the last number. None if there is none of them."""
    text = plain(text or "")
    candidates = [gsm8k_answer(text), *HOPED.findall(text)[:1], boxed_answer(text)]
    candidates += [said_answer(text), *LAST.findall(COMMA.sub("", text))[-1:]]
    for candidate in candidates:
        answer = candidate.lstrip(" \t\n:*\"'`,;$").rstrip(" \t\n:*\"'`.,;$\\")
        # Decoration alone is no answer: the next rule is asked.
        if re.search(r"\w", answer):
            choice = CHOICE.match(answer)
            return (choice[1] or choice[2]).upper() if choice else answer
    return None


# ---- LaTeX ----

SECONDS = 5  # of processor time for one comparison


def latex_worker(seconds):
    """Reads pairs of LaTeX, JSON lines on stdin, and prints for each whether they are equal.

    The kernel ends the process where one pair takes longer: no handler in Python could stop C code.
    """
    import json
    import logging
    import signal
    import sys

    import sympy
    from math_verify import LatexExtractionConfig, LatexNormalizationConfig, parse, verify
    from sympy.parsing import sympy_parser

    def number_or_name(text, *_, **__):
        try:
            return sympy.Integer(text) if text.isdigit() else sympy.Float(text)
        except ValueError:
            return sympy.Symbol(text)

    # The one way from text to eval() in sympy; the grammar sends its numbers there. Now text is
    # a number or a name, and is never run.
    sympy_parser.parse_expr = number_or_name
    logging.disable()
    rules = LatexNormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    grammar = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=rules)]

    def read(text):
        [value] = parse(f"${text}$", grammar, "no_fallback", parsing_timeout=None)
        if isinstance(value, sympy.Expr) and not value.has(sympy.Abs):
            # sqrt(1/m) is 1/sqrt(m) where m is positive, as it mostly is in an answer.
            for letter in value.free_symbols:
                value = value.subs(letter, sympy.Symbol(letter.name, positive=True))
        return value

    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            a, b = map(read, json.loads(line))
            # verify() unwraps x = 5 on one side only, and so is asked both ways.
            equal = any(verify(x, y, 4, timeout_seconds=None) for x, y in [(a, b), (b, a)])
        except Exception:  # not LaTeX, or something that sympy cannot do
            equal = False
        print(int(equal), flush=True)


def can_read_latex():
    # Windows has no timer that ends a process.
    return importlib.util.find_spec("math_verify") and hasattr(signal, "setitimer")


@functools.cache
def start_worker():
    """latex_worker alone in a process of its own, without torch; None without math-verify."""
    if not can_read_latex():
        return None
    source = f"{inspect.getsource(latex_worker)}\nlatex_worker({SECONDS})"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    # In a session of its own, so that Ctrl-C is for us alone.
    return subprocess.Popen([sys.executable, "-c", source], start_new_session=True, **pipes)


def same_latex(a, b):
    """Whether two LaTeX texts are the same expression, equation, matrix, set or interval."""
    for x, y in [(a, b), (b, a)]:
        # The grammar reads "north" as n·o·r·t·h, and drops the base of 12_5.
        if re.search(r"(?<![\\{a-zA-Z])(?!sqrt)[a-zA-Z]{4,}|[0-9]_", x):
            return False
        if x.startswith("(") and y.startswith(r"\{"):
            return False  # a pair is no set
    worker = start_worker()
    if not worker:
        return False
    verdict = ""
    try:
        worker.stdin.write(json.dumps([a, b]) + "\n")
        verdict = worker.stdout.readline()
    except BrokenPipeError:
        pass
    finally:
        if not verdict:  # its time was over, or ours: the next comparison starts another
            start_worker.cache_clear()
    return verdict == "1\n"


# ---- Right or wrong ----

NOISE = re.compile(r"\\?[$€£]|(?<!\\)\\[!;:, ]|~|\\(?:left|right)(?![a-z])|\^\s*\{?\\circ\s*\}?")
# y = 3x is 3x; (a, b) = (4, 1) is (4, 1); 3 x 4 eggs = 12 is 12. But 2x - y = 5 is an equation.
LABEL = re.compile(
    r"(?:^|(?<=,))\s*(?:\\?[a-zA-Z]\w*(?:\(\w\))?|\([a-z](?:, ?[a-z])+\)"
    r"|(?:[-0-9+*/.,%(){}^ ]|\\(?:times|cdot|div|[dt]?frac)|x(?= ?[0-9])"
    r"|[a-zA-Z]{3,}(?![a-zA-Z]))*)\s*=\s*"
)
UNIT_AFTER = re.compile(rf"(?<=[}})i])(?:\s+{UNIT})+$", re.VERBOSE)
LONGEST = 300  # characters; a longer answer is compared as text alone


def tidy(answer):
    """One spelling for many, by what an answer looks like and not by what it is worth."""
    text = NOISE.sub("", plain(answer))
    for what, into in [("{,}", ","), (r"\%", "%"), ("<=", r"\le "), (">=", r"\ge ")]:
        text = text.replace(what, into)
    # A model may double each backslash. In a matrix two of them end a row, and four do if doubled.
    if r"\\begin" in text:
        text = text.replace(r"\\", "\\")
    text = re.sub(r"_\{(\w)\}", r"_\1", " ".join(text.split()))
    return text.lstrip(" :*\"'`,;").rstrip(" :*\"'`.,;\\")


def is_equiv(prediction, gold, percentage=True):
    """Whether two answers are the same as text, as numbers or as LaTeX. Never raises.

    Exact numbers have to be equal; where one is none, a relative 1e-4 is near enough. If
    `percentage`, two numbers in digits may differ by a factor 100. None and "" equal nothing.
    """
    a = tidy("" if prediction is None else str(prediction))
    b = tidy("" if gold is None else str(gold))
    # Between two digits a space means something.
    spelled = [re.sub(r"(?<![0-9])\s+|\s+(?![0-9])", "", text).lower() for text in (a, b)]
    if spelled[0] == spelled[1] or max(len(a), len(b)) > LONGEST:
        return spelled[0] == spelled[1] and bool(re.search(r"\w", a))
    # x = 5 is 5, but it is not y = 5.
    if "=" not in b:
        a = LABEL.sub("", a)
    if "=" not in a:
        b = LABEL.sub("", b)
    if ("=" in a) != ("=" in b):
        return False
    x = read_number(a)
    y = read_number(b)
    if x and y:
        return same_number(x, y, percentage)
    return same_latex(in_latex(a, x), in_latex(b, y))


def in_latex(text, number):
    r"""15 apples are 15, and 2\sqrt{3} cm are 2\sqrt{3}."""
    if number is None:
        return UNIT_AFTER.sub("", text)
    return str(number.value) if number.exact else str(float(number.value))


# ---- The paper's nine sets ----

# hub: "name" or "name:config". CLM, SLM: the paper's Table 1, percent right of TinyLlama after
# 15 B tokens of plain training, and after training on a selected 9 B of them.
Task = namedtuple("Task", "name hub split prompt clm slm")
TASKS = """
gsm8k     openai/gsm8k:main                        test       words   6.4 29.8
math      HuggingFaceH4/MATH-500                   test       math    2.4 14.0
svamp     ChilleD/SVAMP                            train+test words  21.7 49.2
asdiv     EleutherAI/asdiv                         validation words  36.7 61.4
mawps     MU-NLPC/Calc-mawps                       test       words  47.7 79.8
tabmwp    Arietem/tabmwp                           train      words  17.9 25.8
mathqa    allenai/math_qa                          test       choice 13.9 30.4
mmlu_stem cais/mmlu:all                            test       choice 23.0 24.7
sat       mcaleste/sat_multiple_choice_math_may_23 train      choice 25.0 28.1
"""
TASKS = {line.split()[0]: Task(*line.split()) for line in TASKS.strip().splitlines()}
OWN = Task("own", "", "", "words", "", "")  # the demo, and any file of questions
STEM = """abstract_algebra astronomy college_biology college_chemistry college_computer_science
college_mathematics college_physics computer_security conceptual_physics electrical_engineering
elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
high_school_mathematics high_school_physics high_school_statistics machine_learning""".split()
QUESTION = "question problem input".split()  # a row's fields; of several the first
ANSWER = "answer correct result target solution".split()
CHOOSE = "What of the following is the right choice? Explain your answer."


def read_options(options):
    """["12", "16", ...] of "a ) 12 , b ) 16", "A) 12 B) 16" or a list of either form."""
    label = r"\(?[A-Ea-e] ?\)"
    if isinstance(options, list):
        return [re.sub(rf"^\s*{label}", "", str(option)).strip() for option in options]
    parts = re.split(rf"(?:^|(?<=[\s\['\"])){label}", options)
    return [part.strip(" ,'\"[]\n") for part in parts[1:]]


def read_question(row, prompt):
    """{"question", "answer", "prompt"} of a row of any set; StopIteration if it lacks one."""
    row = {name.lower(): value for name, value in row.items() if value not in (None, "")}
    question = next(row[name] for name in QUESTION if name in row)
    answer = next(row[name] for name in ANSWER if name in row)
    if "body" in row:  # SVAMP, ASDiv
        question = f"{row['body'].strip().removesuffix('.')}. {question}"
    if "table" in row:  # TabMWP
        title = f" of {row['table_title']}" if "table_title" in row else ""
        question = f"Here is a table{title}.\n{row['table']}\n{question}"
    if isinstance(answer, (list, dict)):
        raise TypeError
    options = row.get("options", row.get("choices", row.get("possible answers")))
    if isinstance(options, dict):  # {"A": "12", ...}, or {"text": ["12", ...], "label": [...]}
        options = options.get("text", [*options.values()])
    # The answer is a letter or place, and no option itself.
    is_place = re.fullmatch("[A-Ea-e0-4]", str(answer).strip())
    if options and is_place and not (isinstance(options, list) and answer in options):
        prompt = "choice"
    if prompt == "choice":
        answer = str(answer).strip().upper()
        answer = "ABCDE"[int(answer)] if answer.isdigit() else answer
        options = zip("ABCDE", read_options(options), strict=False)
        options = ", ".join(f"({letter}) {option}" for letter, option in options)
        question = f"{question}\n{CHOOSE}\n{options}"
    elif options:
        question = f"{question} Choose from: {', '.join(options)}."
    return {"question": question.strip(), "answer": str(answer), "prompt": prompt}


def read_file(path):
    """The rows of a file: what prepare_data.py reads, ASDiv's XML, or TabMWP's object of rows."""
    if not path.is_file():
        sys.exit(f"{path} not found; --task takes demo, {', '.join(TASKS)}, all or a file")
    try:
        if path.suffix == ".xml":
            problems = ElementTree.parse(path).iter("Problem")
            return [{field.tag: field.text for field in problem} for problem in problems]
        if path.suffix == ".json" and re.match(r'\{\s*"\d+":\s*\{', path.read_text("utf-8")):
            return list(json.loads(path.read_text("utf-8")).values())
    except (ValueError, ElementTree.ParseError) as error:
        sys.exit(f"{path}: {error}")
    return list(read_rows(path))


def hub_rows(task):
    """The rows of a set on the hub."""
    from datasets import load_dataset  # slow to import

    try:
        return list(load_dataset(*task.hub.split(":"), split=task.split))
    except Exception as error:  # the hub fails in many ways
        sys.exit(f"{task.name}: {type(error).__name__} on the hub; give its file: --file PATH")


def load_questions(path, n=None, task=OWN):
    """The first n [{"question", "answer", "prompt"}] of a file; of the hub if `path` is None."""
    rows = read_file(Path(path)) if path else hub_rows(task)
    if task.name == "asdiv":  # as in the harness: one answer each
        rows = [row for row in rows if ";" not in str(row.get("answer", row.get("Answer")))]
    if task.name == "mmlu_stem":
        rows = [row for row in rows if row.get("subject", row.get("type")) in {None, *STEM}]
    questions = []
    for number, row in enumerate(rows[:n], 1):
        try:
            questions.append(read_question(row, task.prompt))
        except (StopIteration, AttributeError, IndexError, TypeError):
            fields = ", ".join(row)
            sys.exit(f"{path or task.hub}: row {number} has no question and answer in {fields}")
    return questions or sys.exit(f"{path or task.hub} holds no questions")


# ---- Prompts and answers ----

EXAMPLES = {  # question => answer; " / " is a line break
    "words": """
A baker makes 14 loaves at dawn and 19 at noon. How many? => 14 + 19 = 33. The answer is 33.
A rope of 48 metres is cut into 6 parts. How long is each? => 48 / 6 = 8. The answer is 8.
Nadia reads 12 pages a day for 5 days, then 20 more. How many pages has she read?
=> In 5 days she reads 12 * 5 = 60 pages. With 20 more it is 60 + 20 = 80. The answer is 80.
A third of 90 beads are red. How many are not red?
=> There are 90 / 3 = 30 red beads, so 90 - 30 = 60 are not red. The answer is 60.
A ticket costs $7 and a drink $3. What do 4 friends pay if each buys both?
=> Each of them pays 7 + 3 = 10 dollars. Together they pay 4 * 10 = 40. The answer is 40.
Omar has $60 and saves $15 a week. After how many weeks does he have $180?
=> He needs 180 - 60 = 120 dollars more. That takes 120 / 15 = 8 weeks. The answer is 8.
A tank of 250 litres loses 12 litres an hour. How much is left after 9 hours?
=> By then it has lost 12 * 9 = 108 litres, so 250 - 108 = 142 are left. The answer is 142.
A $60 lamp gets 25 percent cheaper. What is the new price?
=> It gets 60 * 25 / 100 = 15 dollars cheaper and costs 60 - 15 = 45. The answer is 45.
""",
    "math": r"""
What is the sum of the solutions of $x^2 - 7x + 10 = 0$?
=> As it is $(x - 2)(x - 5)$, $x$ is $2$ or $5$, and $2 + 5 = 7$. The answer is $\boxed{7}$.
Which line passes through $(1, 2)$ and $(3, 8)$? Give it in the form $y = mx + b$.
=> Here $m = \frac{8 - 2}{3 - 1} = 3$ and $b = 2 - 3 = -1$. The answer is $\boxed{y = 3x - 1}$.
Simplify $\frac{\sqrt{12}}{4}$.
=> As $\sqrt{12} = 2\sqrt{3}$, it is half of $\sqrt{3}$. The answer is $\boxed{\frac{\sqrt{3}}{2}}$.
For which real numbers $x$ is $x^2 - 4 < 0$?
=> We need $x^2 < 4$, so $x$ lies between $-2$ and $2$. The answer is $\boxed{(-2, 2)}$.
""",
    "choice": f"""
A train covers 150 km in 2.5 hours. What is its speed? / {CHOOSE} / (A) 45 km/h, (B) 60 km/h
=> The speed is 150 / 2.5 = 60 km/h. The answer is (B).
If 3x + 5 = 20, what is 2x? / {CHOOSE} / (A) 5, (B) 8, (C) 15, (D) 10
=> We have 3x = 20 - 5 = 15, so that x = 5 and 2x = 10. The answer is (D).
Which gas do green plants make sugar from? / {CHOOSE} / (A) carbon dioxide, (B) oxygen
=> In photosynthesis they make it from water and carbon dioxide. The answer is (A).
A coat of $80 is sold at 15 percent less. What does it cost? / {CHOOSE} / (A) $12, (B) $65, (C) $68
=> 15 percent of 80 is 12, and 80 - 12 = 68. The answer is (C).
""",
}
ASKED = {"words": ("Question: ", "\nAnswer:"), "math": ("Problem:\n", "\nSolution:")}
ASKED["choice"] = ASKED["math"]
BETWEEN = "\n\n\n"
# Where a model begins to write the next question.
NEXT_QUESTION = re.compile(rf"(?:^|\n)(?:Question|Problem):|{BETWEEN}")


def make_prompt(tokenizer, question, shots, room):
    """(token ids, examples kept): a prompt's start, the last `shots` examples, the question.

    Examples go, the first one first, until `room` tokens are left; the question is never cut.
    """
    form = question.get("prompt", "words")
    head, tail = ASKED[form]
    pairs = re.findall(r"(.+)\s=>( .+)", EXAMPLES[form])
    examples = [head + asked.replace(" / ", "\n") + tail + answer for asked, answer in pairs]
    for kept in range(min(shots, len(pairs)), -1, -1):
        parts = [*examples[len(pairs) - kept :], head + question["question"] + tail]
        tokens = tokenizer.prompt_start + tokenizer.encode(BETWEEN.join(parts))
        if len(tokens) <= room:
            break
    return tokens, kept


# Where a letter is asked for: (B), or B. and "B: 12" at the beginning, or option B.
LETTER = re.compile(r"\(([A-Ea-e])\)|^\W*([A-Ea-e])(?=[).:]|\W*$)|[Oo]ption ([A-E])\b")


def judge(question, completion):
    """{question, completion, prediction, gold, correct} of one answer."""
    gold = question["answer"]
    if re.search("####|boxed", gold) or MARKER.search(gold):
        gold = extract_answer(gold)
    prediction = extract_answer(completion)
    if re.fullmatch("[A-E]", gold) and not re.fullmatch("[A-E]", prediction or ""):
        for found in LETTER.finditer(completion):  # the last one counts
            prediction = found[found.lastindex].upper()
    verdict = {"prediction": prediction, "gold": gold, "correct": is_equiv(prediction, gold)}
    return {"question": question["question"], "completion": completion, **verdict}


@torch.no_grad()
def answer_questions(model, tokenizer, questions, shots=0, batch_size=64, max_new_tokens=256):
    """Greedy answers [{question, completion, prediction, gold, correct, shots}], order as given.

    An answer ends with block_size at the latest. Examples are left out until max_new_tokens, or
    half of block_size, are free; "shots" counts those that stay. It is None, and the answer wrong,
    where the question alone is too long and was not asked.
    """
    block_size = model.config.block_size
    room = block_size - min(max_new_tokens, block_size // 2)
    prompts = [make_prompt(tokenizer, question, shots, room) for question in questions]
    stop = set(tokenizer.stops)
    line_break = tokenizer.encode("\n")
    for word in ("Question", "Problem"):
        # The token with which a line begins. After a space the same word is another one.
        *before, first = tokenizer.encode(f"\n{word}")
        if before == line_break:
            stop.add(first)
    records = [{**judge(question, ""), "shots": None} for question in questions]
    asked = [i for i, (tokens, _) in enumerate(prompts) if len(tokens) < block_size]
    # Prompts of about one length share a batch: that needs little padding, and leaves most room.
    asked.sort(key=lambda i: len(prompts[i][0]))
    model.eval()
    for start in tqdm(range(0, len(asked), batch_size), leave=False, disable=None):
        batch = asked[start : start + batch_size]
        longest = len(prompts[batch[-1]][0])
        new = min(max_new_tokens, block_size - longest)
        answers = generate(model, [prompts[i][0] for i in batch], new, stop)
        for i, tokens in zip(batch, answers, strict=True):
            completion = NEXT_QUESTION.split(tokenizer.decode(tokens).lstrip())[0].rstrip()
            records[i] = {**judge(questions[i], completion), "shots": prompts[i][1]}
    return records


# ---- The command ----


def evaluate_task(args, name, model, tokenizer):
    """Answers one task's questions, writes them to a file, prints the result: percent right."""
    task = TASKS.get(name, OWN)
    path = args.file if name in TASKS else name
    if name == "demo":
        path = Path(args.data, "questions.jsonl")
    if args.task == "all" and path:
        path = next(Path(path).glob(f"{name}.*"), Path(path, f"{name}.jsonl"))
    questions = load_questions(path, args.n, task)
    shots = args.shots
    if shots is None:
        shots = 0 if name == "demo" else 8 if task.prompt == "words" else 4
    out = f"{args.ckpt.rstrip('/').removesuffix('.pt')}.{Path(name).stem}.answers.jsonl"
    with whole_file(out) as file:  # opened first: what cannot be written is said at once
        records = answer_questions(
            model, tokenizer, questions, shots, args.batch_size, args.max_new_tokens
        )
        file.writelines(f"{json.dumps(record)}\n".encode() for record in records)
    for record in records[:3]:
        verdict = "right" if record["correct"] else f"wrong, it is {record['gold']}"
        print(f"\nQuestion: {record['question']}\nAnswer: {record['completion']}\n[{verdict}]")
    right = sum(record["correct"] for record in records)
    percent = 100 * right / len(records)
    paper = f" (the paper: CLM {task.clm}, SLM {task.slm})" if name in TASKS else ""
    print(f"\n{name}: {right} of {len(records)} right, {percent:.1f} %{paper}; answers in {out}")
    unasked = sum(record["shots"] is None for record in records)
    short = sum(record["shots"] != shots for record in records) - unasked
    print(f"for lack of room {short} have fewer examples, and {unasked} were not asked (wrong)")
    return percent


def main(argv=None):
    parser = argparse.ArgumentParser("eval_math.py", description=__doc__.split("\n")[0])
    flag = parser.add_argument
    flag("--ckpt", required=True, help="checkpoint of rho.py, or a Hugging Face folder")
    flag("--task", default="demo", help=f"demo, {', '.join(TASKS)}, all, or a file of questions")
    flag("--file", help="the task's public file; for --task all a folder with gsm8k.jsonl, ...")
    flag("--data", default="data/demo", help="where demo's questions.jsonl is (default: data/demo)")
    flag("--n", type=int, help="only the first N questions (default: all)")
    flag("--shots", type=int, choices=range(9), help="examples (default: 8 or 4; demo: 0)")
    flag("--batch_size", type=int, default=64, help="prompts answered at a time (default: 64)")
    flag("--max_new_tokens", type=int, default=256, help="longest answer (default: 256)")
    flag("--device", default=BEST_DEVICE, choices=sorted({BEST_DEVICE, "cpu"}))
    args = parser.parse_args(argv)
    if min(args.batch_size, args.max_new_tokens, 1 if args.n is None else args.n) < 1:
        sys.exit("--batch_size, --max_new_tokens and --n have to be at least 1")
    if args.file and args.task not in [*TASKS, "all"]:
        sys.exit(f"--file is the file of a named --task; for your own: --task {args.file}")
    model, checkpoint = load_model(args.ckpt, args.device)
    if "tokenizer" not in checkpoint:
        sys.exit(f"{args.ckpt} has no tokenizer (a folder needs a tokenizer.json)")
    check_rows(model, checkpoint["tokenizer"], args.ckpt)
    tokenizer = get_tokenizer(checkpoint["tokenizer"])
    if not can_read_latex():
        print("LaTeX is compared as text and numbers only; for more: pip install math-verify")
    if args.task != "all":
        evaluate_task(args, args.task, model, tokenizer)
        return
    percents = []
    for name in TASKS:
        try:
            percents.append(evaluate_task(args, name, model, tokenizer))
        except SystemExit as error:  # a set that cannot be read: the others can
            print(error, file=sys.stderr)
    if percents:
        mean = sum(percents) / len(percents)
        print(f"\nmean of {len(percents)}: {mean:.1f} % (the paper's of 9: CLM 21.6, SLM 38.1)")


if __name__ == "__main__":
    run_script(main)
