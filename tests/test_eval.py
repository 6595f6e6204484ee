"""eval_math.py: what a text answers, when two answers are equal, the nine sets, the command."""

import base64
import json
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_math
from eval_math import (
    PROMPTS,
    TASKS,
    answer_questions,
    extract_answer,
    extract_choice,
    is_equiv,
    load_questions,
    main,
    make_prompt,
    same_latex,
    tidy,
    wilson_interval,
)
from model import GPT, GPTConfig
from prepare_data import InputError, get_tokenizer

steady = settings(max_examples=80, deadline=None, derandomize=True)
needs_latex = pytest.mark.skipif(
    not eval_math.has_math_verify(), reason="LaTeX is compared by the extra `math` (math-verify)"
)


@pytest.fixture(scope="module")
def encoding():
    ranks = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    return get_tokenizer({**BYTES, "ranks": ranks})


BYTES = {"name": "bytes", "n_vocab": 257, "eot": 256, "pat_str": r"[\s\S]"}

# ---- From a model's text to right or wrong: kinds of answers found in the wild ----

NUMBERS = r"""
# words that carry value
The answer is sqrt(7).  == sqrt(7)  != 7 ⏐ So the answer is log 9  != 9
The answer is 3 million dollars.  == 3000000  != 3 ⏐ The answer is 14 thousand  != 14
The answer is 5 hundred  != 5 ⏐ The answer is 2 dozen eggs.  == 24  != 2
The answer is minus 4.  != 4  == -4 ⏐ The answer is twenty-five dollars.  == 25
The answer is half of 8.  != 8 ⏐ The answer is 75 percent.  == 3/4
# a comma and a space make a list
The answer is 12, 345  != 12345 ⏐ The answer is 12,345.  == 12345
# delimiters of mathematics
The answer is \(24\).  == 24 ⏐ The answer is \[ 24 \]  == 24 ⏐ The answer is:⏎\[⏎24⏎\]  == 24
Final Answer: The final answer is \((-2, 7)\). I hope it is correct.  == (-2,7)
# a marker with nothing but decoration after it
He has 6 goats. The answer is $  == 6 ⏐ That makes 15. \boxed{}  == 15
That makes 15. \boxed{\text{ }}  == 15 ⏐ So 8 are left. The answer is \(  == 8
So 8 are left. The answer is **  == 8
# units in brackets
The answer is 12  == 12 (kg) ⏐ The answer is 7  == 7 (push-ups) ⏐ The answer is 12  != 13 (kg)
# choices
The best answer is B  == B ⏐ So the best answer is: (C)⏎Date: 11/02/2001  == C
The answer is D because (A) and (B) are wrong.  == D ⏐ The answer is (e).  == E
The correct option is D.  == D ⏐ The answer is E  != C
# end marks
The answer is 26,  == 26 ⏐ The answer is 26;  == 26 ⏐ \boxed{\text{6:15 p.m.}}  == 6:15 p.m.
The answer is ≈ 26.  == 26 ⏐ The answer is ~26.  == 26 ⏐ Q1. The answer is 9 500.  == 9500
"""
LATEX = r"""
# a comma and a space make a list
\boxed{30^\circ, 150^\circ}  != 30^\circ, 160^\circ  == 150^{\circ}, 30^{\circ}
\boxed{11,24,87}  != 11,24,88
# doubled backslash, display style
The answer is $2\\sqrt{5}$.  == 2\sqrt{5} ⏐ \boxed{\\frac{3}{7}}  == \frac{3}{7}
\boxed{\displaystyle\frac{5}{9}}  == \frac{5}{9} ⏐ The answer is $-3 + 4i.$  == -3+4i
# matrices
\boxed{\begin{pmatrix}2&0\\0&5\end{pmatrix}}  == \begin{pmatrix} 2 & 0 \\ 0 & 5 \end{pmatrix}
\boxed{\begin{pmatrix}\frac12\\3\end{pmatrix}}  == \begin{pmatrix} 0.5 \\ 3 \end{pmatrix}
\boxed{\begin{bmatrix}1&4\\2&3\end{bmatrix}}  == \begin{pmatrix} 1 & 4 \\ 2 & 3 \end{pmatrix}
\boxed{\begin{pmatrix}1&4\\2&3\end{pmatrix}}  != \begin{pmatrix} 1 & 4 \\ 3 & 2 \end{pmatrix}
\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}  == \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\boxed{\left(\begin{array}{c}1\\2\end{array}\right)}  == \begin{pmatrix} 1 \\ 2 \end{pmatrix}
# equations
\boxed{2x - 3y + 5 = 0}  == -2x + 3y - 5 = 0 ⏐ \boxed{y = 3x - 4}  == 3x - y = 4  != y = 3x + 4
\boxed{x + 2y = 4}  == 2x + 4y = 8 ⏐ \boxed{x = 5}  != y = 5
# synonyms
\boxed{x \ge 3}  == x \geq 3 ⏐ \boxed{(4, +\infty)}  == (4,\infty)
\boxed{12 \div 5}  == \frac{12}{5} ⏐ \boxed{12 ÷ 5}  == \frac{12}{5} ⏐ \boxed{3·5}  == 15
\boxed{(−∞, 2)}  == (-\infty, 2) ⏐ \boxed{x \lt 6}  == x < 6
\boxed{\lbrace 1, 2 \rbrace}  == \{1,2\}
# joined lists and labels
\boxed{5 \text{ and } 9}  == 5,9 ⏐ \boxed{14 \text{ or } 3}  == 3,14
\boxed{(a,b) = (4,1)}  == (4,1) ⏐ The answers are \boxed{2} and \boxed{-6}.  == 2,-6
First \boxed{2}. So we get \boxed{-6}.  == -6
# a bare list is no half-open interval
\boxed{0,3}  != (0,3] ⏐ \boxed{[2,5)}  != 2,5 ⏐ \boxed{(2,5)}  != [2,5]
\boxed{\{2,5\}}  != (2,5) ⏐ \boxed{(2,5)}  == 2, 5
# letters and functions
\boxed{\frac{1}{\sqrt{m}}}  == \sqrt{1/m} ⏐ \boxed{\sin x + 1}  == 1 + \sin(x)
\boxed{6!}  == 720 ⏐ \boxed{\binom{6}{2}}  == 15 ⏐ \boxed{2\theta + 1}  == 1 + 2\theta
\boxed{|x|}  != x ⏐ \boxed{\alpha}  != \beta
# near numbers are not equal where both are exact
\boxed{71}  != 12\sqrt{35} ⏐ \boxed{\frac{2001}{2002}}  != \frac{2011}{2012}
The answer is 3.1416  == \pi ⏐ The answer is 3.15  != \pi
"""


def check_rows(table):
    """A row: a text, then right answers after == and wrong ones after !=; ⏎ is a line break."""
    for row in re.split(r" ⏐ |\n", re.sub("(?m)^# .*\n", "", table.strip())):
        text, *golds = re.split("  (==|!=) ", row.replace("⏎", "\n"))
        answer = extract_answer(text)
        for sign, gold in zip(golds[::2], golds[1::2], strict=True):
            assert is_equiv(answer, gold) == (sign == "=="), row
            assert is_equiv(gold, answer) == (sign == "=="), row


def test_answers_in_numbers_and_words():
    check_rows(NUMBERS)


@needs_latex
def test_answers_in_latex():
    check_rows(LATEX)


# ---- Extraction ----


EXTRACTION = r"""
Final Answer: The final answer is $[2,5)$. I hope it is correct.  => [2,5)
so \boxed{24}. The final answer is $16$. I hope it is correct.  => 16
# the last \boxed: nested braces, \fbox, no braces, cut short
so \boxed{3} and so $\boxed{\frac{1}{2}}$.  => \frac{1}{2}
\boxed{\sqrt{\frac{a^{2}}{b}}} is it  => \sqrt{\frac{a^{2}}{b}}
so $x = \boxed 5$. Done, in 3 steps  => 5 ⏐ so $\boxed{7  => 7
the boxed set costs 5 dollars  => 5
# #### of GSM8K and of the demo: calculator marks, two spaces, the first of several
12+7=<<12+7=19>>19.⏎#### 19⏎  => 19 ⏐ 7 and 8 are 15.⏎####  15 in 2 steps  => 15
#### -1,234  => -1234 ⏐ #### 5⏎more #### 6  => 5
the answer is 60/2 = <<60/2=30>>30 a day.⏎#### 90  => 90
#### 2. Add them⏎The answer is 7.  => 7
# the last "the answer is", to the end of its sentence
The answer is⏎⏎6⏎and so on, 8  => 6 ⏐ The answer is 5. No, the answer is 6. I used 3 steps.  => 6
I say final answer is 9. It took 3 steps.  => 9 ⏐ The answer is $1,234.50.  => 1,234.50
the answer is (b). Why 7?  => B ⏐ The answer is a 5  => a 5
# the last number
she has 12-5  => 5 ⏐ they cost $1,234,567.  => 1234567 ⏐ it takes 3/4 of an hour  => 3/4
about $2\frac{1}{2}$ cups  => 2\frac{1}{2} ⏐ a fall of 12.5%  => 12.5% ⏐ it is 1.5E3  => 1.5E3
"""


def test_extraction():
    for row in re.split(r" ⏐ |\n", re.sub("(?m)^# .*\n", "", EXTRACTION.strip())):
        text, answer = row.replace("⏎", "\n").split("  => ")
        assert extract_answer(text) == answer, row
    for text in ("", None, "no idea", "٣ and ²"):
        assert extract_answer(text) is None


def test_each_marker_comes_before_the_next():
    parts = [
        "Final Answer: The final answer is $1$. I hope it is correct.",
        r"So \boxed{2}.",
        "#### 3",
        "So the answer is 4.",
        "That took 5 steps",
    ]
    for first in range(1, 6):
        assert extract_answer("\n".join(parts[first - 1 :])) == str(first)


def test_choice():
    for text, letter in {
        "So it is 16. The answer is (D).": "D",
        "the answer is b": "B",
        "The answer is E 12 km": "E",
        "The answer is (a) 24, not (b).": "A",
        r"\boxed{C}": "C",
        "The answer is a number.": None,
    }.items():
        assert extract_choice(text) == letter, text


# ---- Numbers ----

EQUAL = r"""
1,234 = 1234 | 1234.0 = 1234 | $5 = 5 dollars | 5 dollars per day = 5 | \$5.00 = 5 | £3 = 3 | €3 = 3
-5 = −5 | -$5 = $-5 | .5 = 0.5 | 5. = 5 | 007 = 7 | 1/2 = \frac{1}{2} | \frac12 = 0.5 | 5th = 5
\dfrac{1}{2} = \tfrac12 | -\frac{3}{4} = -0.75 | 2 1/2 = 2.5 | 2\frac{1}{2} = 5/2 | 1.5e3 = 1500
1.5E3 = 1500 | 10,\!000 = 10000 | 10{,}000 = 10,000 | 5\text{ cm} = 5 | 5cm = 5 cm | 5 cm^2 = 5
5 \text{ cm}^3 = 5 | 12 square feet = 12 | 9 (apples) = 9 | 30^\circ = 30 | 30^{\circ} = 30°
33.3333 = 100/3 | 10000.5 = 10001.2 | 0.5 = 50 | 50% = 0.5 | 50\% = 50 | 75% = 3/4 | 0 = 0.0
\left(5\right) = 5 | (C) = C | \text{(B)} = b | Yes = yes. | 12_{5} = 12_5"""
DIFFERENT = r"""
5 = 6 | 5 = -5 | 100 = 101 | 10000 = 10001 | 0 = 0.0001 | 5 = 5000 | 75 = 3/4 | 2ab = 2 | 5x = 5
x5 = 5 | 2 pi = 2 | 2 million = 2 | 3 and 4 = 3 | 1 2 = 12 | 100.0 = 100.05 | 33.35 = 100/3
\frac{1}{23} = \frac{12}{3} | (1,234) = 1234 | A = B | night = thing | Mon. 5 = Tue. 6 | 1/0 = 2/0
12_5 = 12 | 5 and a half = 5 | 5x^2 = 5 | 5 \text{ hundred} = 5"""
SAME = r"""
x^2+2x+1 = (x+1)^2 | \sqrt{8} = 2\sqrt2 | \sqrt[3]{27} = 3 | \frac{\pi}{2} = π/2 | 2^{10} = 1024
\frac{x}{7}+\frac{2}{7} = \frac{x+2}{7} | 1.5 \times 10^3 = 1500 | (0.5,3) = (\frac{1}{2},3)
(0.6,2.6667] = (\frac{3}{5},\frac{8}{3}] | \pm 3 = 3,-3 | x \in [2,5) = [2,5) | e = 2.71828
2\sqrt{3} \text{ cm} = 2\sqrt{3} | 1000(26) = 26000 | 15 apples = 3 \cdot 5 | 3 squared = 9
1 \leq x \leq 2 = [1,2]"""
OTHER = r"""
(1,2) = (2,1) | (1,2) = [1,2] | (1,2) = (1,2,3) | x+1 = x+2 | x = y | a+b = a+c
9^{9^{9^{9}}} = 1 | 1.4149 = \sqrt{2} | x > 3 = x \ge 3 | \frac{22}{7} = \pi"""


def check_pairs(table, expected):
    for pair in re.split(r" \| |\n", table.strip()):
        a, b = pair.split(" = ")
        assert is_equiv(a, b) == expected, pair
        assert is_equiv(b, a) == expected, pair


def test_equal_and_different_numbers():
    check_pairs(EQUAL, True)
    check_pairs(DIFFERENT, False)


@needs_latex
def test_equal_and_different_latex():
    check_pairs(SAME, True)
    check_pairs(OTHER, False)


def test_a_name_before_the_equals_sign_is_a_label():
    for name in ("x", "AB", "n"):
        assert is_equiv(f"{name} = 5", "5") and is_equiv("7", f"{name} = 7.0")
    assert is_equiv("3 + 4 = 7", "7")
    assert not is_equiv("2x - y = 5", "5")


def test_nothing_equals_nothing():
    for a in ("", None, "$", "...", r"\text{}"):
        assert not is_equiv(a, a) and not is_equiv(a, "0")


def test_numbers_of_python_and_percentages():
    assert is_equiv(7, "7.0") and is_equiv(43.0, 43)
    assert is_equiv("0.5", "50") and not is_equiv("0.5", "50", percentage=False)


integers = st.integers(-(10**9), 10**9)


def spellings(n):
    """Ways to write the integer n that all mean n."""
    sign = "-" if n < 0 else ""
    size = abs(n)
    yield from (f"{n}", f"{n:,}", f"{n}.0", f"{n}.", f"{n:,}.00", f" {n} ", f"{sign}${size:,}")
    yield from (f"{n} dollars", f"{n} kg", rf"{n}\text{{ cm}}", rf"\${n}", f"${n}$", f"x = {n}")
    yield from (f"{2 * n}/2", rf"\frac{{{2 * n}}}{{2}}", f"{sign}0{size}", rf"\left({n}\right)")
    yield from (rf"\({n}\)", f"{size:,} km".replace(",", " ") if n > 0 else f"{n}")


@steady
@given(integers, st.sampled_from(["The answer is {}.", "#### {}", r"so \boxed{{{}}}.", "it is {}"]))
def test_any_spelling_of_a_number_is_the_number(n, sentence):
    for spelling in spellings(n):
        assert is_equiv(spelling, str(n)), spelling
        assert is_equiv(str(n), spelling), spelling
    for spelling in (f"{n}", f"{n:,}", f"{n}.25"):
        answer = extract_answer("In 3 steps: " + sentence.format(spelling))
        assert is_equiv(answer, spelling, percentage=False), (answer, spelling)


@steady
@given(integers, integers)
def test_different_integers_are_different(a, b):
    assert is_equiv(str(a), f"{b:,}", percentage=False) == (a == b)


# ---- LaTeX ----


def test_without_the_extra_text_and_numbers_still_count(monkeypatch):
    monkeypatch.setattr(eval_math, "has_math_verify", lambda: False)
    check_rows(NUMBERS)
    check_pairs(EQUAL, True)
    test_a_name_before_the_equals_sign_is_a_label()
    assert is_equiv(r"\sqrt 2", r"$\sqrt2$")
    assert not is_equiv("(x+1)^2", "x^2+2x+1")


@needs_latex
def test_latex_is_compared_in_any_thread_and_in_bounded_time():
    heavy = [
        "9^{9^{9^{9}}}",
        r"10^{10^{10}}!",
        r"\sum_{k=1}^{10^{9}} \frac{1}{k^{k}}",
        "(x+y)^{9999}",
    ]
    same_latex("x+1", "1+x")  # the worker is there
    verdicts = {}

    def judge(text):
        verdicts[text] = is_equiv(text, "1"), is_equiv(r"\sqrt{8}", r"2\sqrt{2}")

    threads = [threading.Thread(target=judge, args=(text,), daemon=True) for text in heavy]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert time.perf_counter() - started < 60
    assert verdicts == {text: (False, True) for text in heavy}


@needs_latex
def test_a_worker_that_died_is_replaced():
    assert same_latex("x+1", "1+x")
    worker = eval_math.start_worker(os.getpid())
    worker.kill()
    worker.wait()
    same_latex("x+1", "1+x")
    assert same_latex("x+1", "1+x") and eval_math.start_worker(os.getpid()) is not worker


@needs_latex
def test_no_text_is_run_as_code(tmp_path):
    """Numbers are read without sympy's eval(), and nothing else of the grammar reaches it."""
    source = eval_math.inspect.getsource(eval_math.latex_worker)
    assert "builtins.eval = builtins.compile = None" in source
    assert same_latex("2 + 720.5", "722.5")  # would fail if numbers still went through eval
    target = tmp_path / "ran"
    code = f"__import__('os').mkdir('{target}')"
    for text in (code, rf"\text{{{code}}}", f"x_{{{code}}}", rf"\operatorname{{{code}}}(1)"):
        is_equiv(text, "1")
        same_latex(text, "1")
    assert not target.exists()


# ---- Any text ----

HOSTILE = [
    *("{" * 10_000, "(" * 140 + "1" + ")" * 140, "9^9^9^9", "2^" * 140 + "2", "-" * 299 + "1"),
    *("1" * 100_000, "1" * 150 + "/" + "0" * 149, "1e999999999", "1 " * 10_000, "1e99" * 70),
    *(r"\boxed{" * 10_000, r"\boxed{1}, " * 10_000, r"\boxed" + " " * 100_000, r"\frac" * 60),
    *(r"\text{" * 5_000, "final answer is $" * 10_000, "he answer is" + " :" * 50_000, "nan"),
    *("<<" * 10_000, "####" * 10_000, "[(1,2)," * 42, "5 " + "a " * 140, "٣٤", "\0" * 10, "\ud800"),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_text_is_answered_at_once(text):
    started = time.process_time()
    answer = extract_answer(text)
    for other in ("5", text + "1", answer):
        assert is_equiv(text, other) == is_equiv(other, text)
    is_equiv(text, text)
    assert time.process_time() - started < 1


PIECES = r"""\frac \boxed \text{ \sqrt { } ( ) [ ] , 1 2 30 0 x y + - * / ^ $ % = pi . \\ & ####
<< >> – ½ ans he~answer~is final~answer~is~$ $.~I~hope ٣ inf e5 _ ! | \left million
and \begin{pmatrix}
"""
pieces = st.sampled_from(PIECES.split())
noise = st.lists(pieces, max_size=40).map(lambda p: "".join(p).replace("~", " ")) | st.text()


@steady
@given(noise, noise)
def test_any_text_is_answered(a, b):
    for text in (a, b):
        answer = extract_answer(text)
        assert answer is None or (isinstance(answer, str) and answer)
        assert is_equiv(text, text) == eval_math.says_something(tidy(text))
    assert is_equiv(a, b) == is_equiv(b, a)


# ---- Prompts ----


@pytest.mark.parametrize("form", PROMPTS)
def test_examples_are_right_and_in_form(form):
    asked, examples = PROMPTS[form]
    head, tail = asked.split("{}")
    assert len(examples) == (8 if form == "words" else 4)
    for text in examples:
        question, answer = text.removeprefix(head).split(tail)
        assert text.startswith(head) and question and eval_math.BETWEEN not in text
        for left, right in re.findall(r"(\d[\d. +*/:-]*) = (\d+(?:\.\d+)?)", answer):
            if form != "math":
                value = eval(left.replace(":", "/"))  # of our own text
                assert value == pytest.approx(float(right)), left
        if form == "choice":
            assert f"({extract_choice(answer)})" in question
        else:
            said = answer.rsplit("The answer is", 1)[1].strip(" .$")
            assert is_equiv(extract_answer(answer), extract_answer(said) or said)


def test_prompt_form(encoding):
    tokens, kept = make_prompt(encoding, "Why?", 2, 10_000)
    examples = PROMPTS["words"][1]
    assert kept == 2 and tokens[0] == encoding.eot_token
    expected = f"{examples[-2]}\n\n\n{examples[-1]}\n\n\nQuestion: Why?\nAnswer:"
    assert encoding.decode(tokens[1:]) == expected
    assert encoding.decode(make_prompt(encoding, "Why?", 0, 99)[0][1:]) == "Question: Why?\nAnswer:"
    tokens, _ = make_prompt(encoding, "Why?", 0, 99, "math")
    assert encoding.decode(tokens[1:]) == "Problem:\nWhy?\nSolution:"


def test_a_bos_token_starts_the_prompt_where_there_is_one(encoding):
    parts = {name: getattr(encoding, name) for name in ("encode_ordinary", "decode", "n_vocab")}
    with_bos = SimpleNamespace(**parts, eot_token=256, bos_token=7)
    assert make_prompt(with_bos, "Why?", 0, 99)[0][0] == 7


def test_examples_go_from_the_front_and_the_question_stays(encoding):
    full = len(make_prompt(encoding, "Why?", 8, 10**6)[0])
    for room in range(0, full + 50, 37):
        tokens, kept = make_prompt(encoding, "Why?", 8, room)
        text = encoding.decode(tokens[1:])
        assert text.endswith("Question: Why?\nAnswer:") and text.count("Question: ") == kept + 1
        assert len(tokens) <= room or kept == 0
        if kept < 8:  # one more would not have fitted
            assert len(make_prompt(encoding, "Why?", kept + 1, 10**6)[0]) > room


# ---- Answers ----


class Parrot(torch.nn.Module):
    """Stands for a model: `generate` below looks up the prompt's last question in its replies."""

    def __init__(self, replies, block_size=4096):
        super().__init__()
        self.replies = replies
        self.config = SimpleNamespace(block_size=block_size)
        self.calls = []


@pytest.fixture
def parrot(monkeypatch, encoding):
    def generate(model, prompts, max_new_tokens, stop):
        assert not model.training and not torch.is_grad_enabled()
        assert max(map(len, prompts)) + max_new_tokens <= model.config.block_size
        model.calls.append((len(prompts), max_new_tokens))
        answers = []
        for prompt in prompts:
            asked = encoding.decode(prompt[1:])
            question = re.split(r"Question: |Problem:\n", asked)[-1]
            reply = model.replies[re.split("\nAnswer:|\nSolution:", question)[0]]
            tokens = reply if isinstance(reply, list) else encoding.encode_ordinary(reply)
            tokens = tokens[:max_new_tokens]
            answers.append(tokens[: next((i for i, t in enumerate(tokens) if t in stop), None)])
        return answers

    monkeypatch.setattr(eval_math, "generate", generate)
    return Parrot


QUESTIONS = [
    {"question": "A rather long question, what is six times seven?", "answer": "6*7=42\n#### 42"},
    {"question": "One?", "answer": "1"},
    {"question": "A half, please?", "answer": r"It is $\boxed{\frac{1}{2}}$."},
    {"question": "Seventeen thousand?", "answer": "17,000"},
]
REPLIES = {
    QUESTIONS[0]["question"]: " 6 * 7 = 42. The answer is 42.\n\n\nQuestion: 1+1?\nAnswer: 2",
    "One?": " 1+1=2\n#### 2",
    "A half, please?": " The answer is 0.5",
    "Seventeen thousand?": "\nQuestion: What is 17000?",
}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("shots", [0, 8])
def test_answers_in_the_order_given(parrot, encoding, batch_size, shots):
    model = parrot(REPLIES).train()
    records = answer_questions(model, encoding, QUESTIONS, shots, batch_size)
    assert [r["question"] for r in records] == [q["question"] for q in QUESTIONS]
    assert [r["prediction"] for r in records] == ["42", "2", "0.5", None]
    assert [r["gold"] for r in records] == ["42", "1", r"\frac{1}{2}", "17,000"]
    assert [r["correct"] for r in records] == [True, False, True, False]
    assert [r["shots"] for r in records] == [shots] * 4
    assert records[0]["completion"] == "6 * 7 = 42. The answer is 42."  # cut at the next question
    assert records[3]["completion"] == ""
    assert sum(n for n, _ in model.calls) == 4 and max(n for n, _ in model.calls) <= batch_size
    assert model.training
    answer_questions(model.eval(), encoding, QUESTIONS)
    assert not model.training


def test_mode_comes_back_after_an_error(parrot, encoding):
    model = parrot({}).train()
    with pytest.raises(KeyError):
        answer_questions(model, encoding, QUESTIONS)
    assert model.training


@pytest.mark.parametrize("next_one", ["\n\n\nUnrelated", "\nQuestion: 2?", "\nProblem: 2 + 2?"])
def test_completion_ends_where_the_next_question_begins(parrot, encoding, next_one):
    model = parrot({"One?": f" It is 1{next_one} 7"})
    assert answer_questions(model, encoding, QUESTIONS[1:2])[0]["completion"] == "It is 1"


def test_ids_beyond_the_vocabulary_are_left_out(parrot, encoding):
    """A model's matrix may have more rows than its tokenizer has tokens."""
    bare = SimpleNamespace(
        encode_ordinary=encoding.encode_ordinary, n_vocab=257, eot_token=256, decode=strict_decode
    )
    model = parrot({"One?": [ord(" "), 257, ord("1"), 300]})
    [record] = answer_questions(model, bare, QUESTIONS[1:2])
    assert record["completion"] == "1" and record["correct"]


def strict_decode(tokens):
    return bytes(tokens).decode()  # raises at 256 and above


def test_choices_are_judged_by_their_letter(parrot, encoding):
    question = {"question": "Which?\n(A) 3, (B) 4", "answer": "B", "prompt": "choice"}
    question["kind"] = "choice"
    model = parrot({question["question"]: " It is 4. The answer is (B)."})
    [record] = answer_questions(model, encoding, [question], shots=4)
    assert record["correct"] and record["prediction"] == "B" and record["shots"] == 4


def test_small_block(parrot, encoding):
    """New tokens are clipped, examples go, a question too long by itself is counted, not cut."""
    model = parrot(REPLIES, block_size=60)
    records = answer_questions(model, encoding, QUESTIONS, shots=2, max_new_tokens=256)
    assert [r["shots"] for r in records] == [None, 0, 0, 0]
    assert records[0]["completion"] == "" and not records[0]["correct"]
    assert model.calls == [(3, 60 - len("Question: Seventeen thousand?\nAnswer:") - 1)]
    # With room for one new token it is asked, with room for none it is not.
    longest = len(f"Question: {QUESTIONS[0]['question']}\nAnswer:") + 1
    for block_size, asked in ((longest + 1, 0), (longest, None)):
        tight = parrot(REPLIES, block_size=block_size)
        (record,) = answer_questions(tight, encoding, QUESTIONS[:1])
        assert record["shots"] == asked
        assert tight.calls == ([] if asked is None else [(1, 1)])
    room = parrot(REPLIES, block_size=512)
    shots = answer_questions(room, encoding, QUESTIONS[1:2], 8, max_new_tokens=200)[0]["shots"]
    assert 0 < shots < 8 and room.calls == [(1, 200)]
    assert answer_questions(room, encoding, []) == []


def tiny_gpt():
    torch.manual_seed(0)
    return GPT(GPTConfig(257, 256, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))


def test_real_model_answers_alike_in_any_batch(encoding):
    model = tiny_gpt().double()
    one, many = (answer_questions(model, encoding, QUESTIONS, 0, n, 40) for n in (1, 64))
    assert one == many and any(r["completion"] for r in one)


def test_wilson_interval():
    # 8 of 10: (8 + 1.92073 ± 1.959964 · sqrt(8 · 2 / 10 + 0.960365)) / (10 + 3.841459)
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.161125), abs=1e-6)
    assert wilson_interval(0, 0) == (0, 1)
    low, high = wilson_interval(3, 20)
    assert (1 - high, 1 - low) == pytest.approx(wilson_interval(17, 20), abs=1e-9)


# ---- The sets ----

CHOICE_END = {"prompt": "choice", "kind": "choice"}
TABLE = {"table_title": "Pens", "table": "red | 3\nblue | 4", "question": "How many?"}
MMLU = {"question": "P", "subject": "astronomy", "choices": ["x", "y", "z", "w"], "answer": 2}
SETS = [  # task, a row in its public form, what is read
    ("gsm8k", {"question": "Q?", "answer": "so\n#### 5"}, "Q?", "so\n#### 5"),
    ("math", {"problem": "P", "solution": r"It is $\boxed{2}$.", "level": "1"}, "P", "boxed"),
    ("svamp", {"Body": "Ann has 3", "Question": "All?", "Answer": 3.0}, "Ann has 3. All?", "3.0"),
    ("asdiv", {"body": "B.", "question": "Q?", "answer": "9 (apples)"}, "B. Q?", "9 (apples)"),
    ("mawps", {"input": "I?", "target": 43.0}, "I?", "43.0"),
    ("mawps", {"question": "I?", "result": "43"}, "I?", "43"),
    ("tabmwp", {**TABLE, "choices": None, "answer": "7"},
     "Here is a table of Pens.\nred | 3\nblue | 4\nHow many?", "7"),
    ("tabmwp", {**TABLE, "choices": ["6", "7"], "answer": "7"},
     "Here is a table of Pens.\nred | 3\nblue | 4\nHow many? Choose from: 6, 7.", "7"),
    ("mathqa", {"Problem": "P", "options": "a ) 1 , 200 , b ) 16", "correct": "b"},
     "P\n(A) 1 , 200, (B) 16", "B"),
    ("mathqa", {"Problem": "P", "options": "['a ) 12', 'b ) 16']", "correct": "a"},
     "P\n(A) 12, (B) 16", "A"),
    ("mathqa", {"Problem": "P", "options": "a ) 1 , b ) 2 , c ) 3 , d ) 4 , e ) 5", "correct": "e"},
     "P\n(A) 1, (B) 2, (C) 3, (D) 4, (E) 5", "E"),
    ("mmlu_stem", MMLU, "P\n(A) x, (B) y, (C) z, (D) w", "C"),
    ("sat", {"Question": "P", "options": "A) $f(-6)=0$ B) $f(6)=-6$", "Answer": "A"},
     "P\n(A) $f(-6)=0$, (B) $f(6)=-6$", "A"),
]  # fmt: skip


@pytest.mark.parametrize("task, row, question, answer", SETS)
def test_a_set_is_read_from_its_public_file(tmp_path, task, row, question, answer):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    read = load_questions(task, file=path)
    assert len(read) == 2 and len(load_questions(task, 1, file=path)) == 1
    assert read[0]["question"] == question and answer in read[0]["answer"]
    assert read[0].get("prompt", "words") == TASKS[task].prompt


def test_files_of_json_lists_and_objects_xml_and_csv(tmp_path):
    row = {"Question": "Q?", "Answer": 3}
    forms = {
        "svamp.json": json.dumps([row, row]),
        "tabmwp.json": json.dumps({"1": {**row, "table": "a | 3"}}),
        "lines.json": json.dumps(row) + "\n" + json.dumps(row),
        "asdiv.xml": "<M><Problem ID='1'><Body>B.</Body><Question>Q?</Question>"
        "<Answer>9 (apples)</Answer></Problem></M>",
        "sat.csv": 'Question,Possible Answers,Answer\n"P, or?","A) 1 B) 2",B\n',
    }
    for name, content in forms.items():
        (tmp_path / name).write_text(content)
    read = {name: load_questions(name.split(".")[0], file=tmp_path / name) for name in forms
            if name != "lines.json"}  # fmt: skip
    assert read["svamp.json"] == [{"question": "Q?", "answer": "3"}] * 2
    assert read["tabmwp.json"][0]["question"] == "Here is a table.\na | 3\nQ?"
    assert read["asdiv.xml"] == [{"question": "B. Q?", "answer": "9 (apples)"}]
    assert read["sat.csv"][0]["question"] == "P, or?\n(A) 1, (B) 2"
    assert len(load_questions(str(tmp_path / "lines.json"))) == 2


def test_only_rows_that_the_paper_counts(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text(
        "".join(json.dumps({**MMLU, "subject": s}) + "\n" for s in ("law", "astronomy"))
    )
    assert len(load_questions("mmlu_stem", file=path)) == 1
    rows = [{"body": "B", "question": "Q?", "answer": a} for a in ("3", "3; 4")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_questions("asdiv", file=path)) == 1


GOOD = b'{"question": "One?", "answer": "1"}\n'


@pytest.mark.parametrize(
    "content, where",
    [
        (GOOD + b'{"question": "Tw', ":2:"),
        (GOOD + b"\xff\xfe\n", ":2:"),
        (b"[1, 2]\n", ":1:"),
        (b"[" * 100_000 + b"\n", ":1:"),
        (GOOD + b'{"question": "Two?"}\n', ":2:"),
        (b'{"question": null, "answer": "2"}\n', ":1:"),
        (b"", "no questions"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, content, where):
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    for arguments in ({"task": str(path)}, {"task": "gsm8k", "file": path}):
        with pytest.raises(InputError, match=re.escape(str(path))) as error:
            load_questions(**arguments)
        assert where in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_the_hub_is_asked_for_the_set_and_its_failure_is_one_line(monkeypatch, task):
    datasets = pytest.importorskip("datasets", reason="the hub is reached through it")
    row = next(row for name, row, *_ in SETS if name == task)
    asked = []

    def load_dataset(*arguments, **keywords):
        asked.append((*arguments, keywords["split"]))
        return [row]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_questions(task)) == 1
    hub, _, config = TASKS[task].hub.partition(":")
    assert asked == [(hub, config or None, TASKS[task].split)]

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=f"{task}: .*--file PATH") as error:
        load_questions(task)
    assert "\n" not in str(error.value)


# ---- The command ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the checkpoint of a tiny random model, and questions."""
    monkeypatch.chdir(tmp_path)
    model = tiny_gpt()
    ranks = [base64.b64encode(bytes([i])).decode() for i in range(256)]
    checkpoint = {"model_config": vars(model.config), "model": model.state_dict()}
    torch.save({**checkpoint, "tokenizer": {**BYTES, "ranks": ranks}}, tmp_path / "slm.pt")
    (tmp_path / "data/demo").mkdir(parents=True)
    lines = "".join(json.dumps(q) + "\n" for q in QUESTIONS)
    (tmp_path / "data/demo/questions.jsonl").write_text(lines)
    return tmp_path


def test_end_to_end(folder, capsys):
    main(["--ckpt", "slm.pt", "--n", "3", "--max_new_tokens", "20", "--device", "cpu"])
    records = [json.loads(line) for line in (folder / "slm.demo.answers.jsonl").open()]
    assert [r["question"] for r in records] == [q["question"] for q in QUESTIONS[:3]]
    fields = {"question", "completion", "prediction", "gold", "correct", "shots"}
    assert all(set(r) == fields and r["shots"] == 0 for r in records)
    right = sum(r["correct"] for r in records)
    out = capsys.readouterr().out
    low, high = wilson_interval(right, 3)
    assert f"demo: {right} of 3 right, {right / 3:.1%}" in out and f"{low:.1%} to {high:.1%}" in out
    assert out.count("Question: ") == 3 and out.count("[wrong, it is ") + out.count("[right]") == 3
    assert "slm.demo.answers.jsonl" in out


def test_a_file_as_task_has_examples_by_default(folder, capsys):
    arguments = ["--ckpt", "slm.pt", "--task", "data/demo/questions.jsonl", "--out", "new/a.jsonl"]
    main([*arguments, "--max_new_tokens", "20"])
    records = [json.loads(line) for line in (folder / "new/a.jsonl").open()]
    assert all(0 < r["shots"] < 8 for r in records)  # 8 do not fit into 256 bytes
    assert "4 prompts shortened" in capsys.readouterr().out


def test_all_prints_the_paper_beside_our_run(folder, capsys, monkeypatch, parrot):
    for task, row, *_ in SETS:
        (folder / "sets").mkdir(exist_ok=True)
        (folder / f"sets/{task}.jsonl").write_text(json.dumps(row))
    (folder / "sets/sat.jsonl").unlink()
    monkeypatch.setattr(
        eval_math, "generate", lambda model, prompts, *_: [[ord("5")]] * len(prompts)
    )
    main(["--ckpt", "slm.pt", "--task", "all", "--file", "sets", "--max_new_tokens", "9"])
    out, err = capsys.readouterr()
    assert "sets/sat.jsonl not found" in err  # and the rest is answered
    table = out[out.index("CLM") :]
    assert re.search(r"gsm8k +100\.0 +6\.4 +29\.8", table)
    assert re.search(r"svamp +0\.0 +21\.7 +49\.2", table)
    clm = sum(float(task.clm) for task in TASKS.values() if task.name != "sat") / 8
    assert re.search(rf"mean of 8 +12\.5 +{clm:.1f} ", table)
    assert (folder / "slm.mathqa.answers.jsonl").exists()


def test_the_paper_s_means():
    for column, mean in (("clm", 21.6), ("slm", 38.1)):
        values = [float(getattr(task, column)) for task in TASKS.values()]
        assert len(values) == 9 and round(sum(values) / 9, 1) == pytest.approx(mean, abs=0.11)


def refused(arguments, capsys, status=2):
    """The one line (bar aside) that main prints to stderr, having left with this status."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == status
    lines = [
        line
        for line in capsys.readouterr().err.splitlines()
        if "/batch" not in line and "batch/s" not in line
    ]
    assert len([line for line in lines if line.strip()]) == 1, lines
    return lines[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--ckpt"),
        (["--ckpt", "none.pt"], "none.pt not found. Run: python rho.py --stage slm"),
        (["--ckpt", "cut.pt"], "cut.pt"),
        (["--ckpt", "empty.pt"], "empty.pt"),
        (["--ckpt", "other.pt"], "other.pt"),
        (["--ckpt", "no_tokenizer.pt"], "no_tokenizer.pt"),
        (["--ckpt", "wrong_shape.pt"], "wrong_shape.pt"),
        (["--ckpt", "."], "."),
        (["--task", "gsm9k"], "gsm9k"),
        (["--task", "bad.jsonl"], "bad.jsonl:1"),
        (["--task", "svamp", "--file", "none.json"], "none.json"),
        (["--task", "slm.pt", "--file", "slm.pt"], "--file"),
        (["--data", "data/none"], "python prepare_data.py"),
        *[([flag, "0"], flag) for flag in ("--n", "--batch_size", "--max_new_tokens", "--device")],
        (["--n", "many"], "--n"),
        (["--shots", "9"], "--shots"),
        (["--max", "5"], "--max"),  # no abbreviations
        (["--out", "slm.pt/a.jsonl"], "slm.pt"),
    ],
)
def test_bad_input(folder, capsys, arguments, said):
    whole = (folder / "slm.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "bad.jsonl").write_text("{")
    good = torch.load(folder / "slm.pt", weights_only=True)
    torch.save({"weights": 1}, folder / "other.pt")
    torch.save({k: v for k, v in good.items() if k != "tokenizer"}, folder / "no_tokenizer.pt")
    good["model_config"]["n_embd"] = 64
    torch.save(good, folder / "wrong_shape.pt")
    before = sorted(folder.rglob("*"))
    ckpt = [] if "--ckpt" in arguments or not arguments else ["--ckpt", "slm.pt"]
    assert said in refused([*ckpt, *arguments], capsys)
    assert sorted(folder.rglob("*")) == before


def test_full_disk_leaves_the_old_file_and_nothing_else(folder, capsys, monkeypatch):
    (folder / "a.jsonl").write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    before = sorted(folder.rglob("*"))
    said = refused(["--ckpt", "slm.pt", "--out", "a.jsonl", "--max_new_tokens", "5"], capsys)
    assert "No space left on device" in said and "a.jsonl" in said
    assert (folder / "a.jsonl").read_text() == "old" and sorted(folder.rglob("*")) == before


def test_ctrl_c_ends_in_one_line(folder, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(eval_math, "generate", interrupted)
    before = sorted(folder.rglob("*"))
    said = refused(["--ckpt", "slm.pt", "--max_new_tokens", "5"], capsys, status=130)
    assert said == "eval_math.py: interrupted; the same command starts again"
    assert sorted(folder.rglob("*")) == before


def test_a_hugging_face_folder_is_a_checkpoint(folder, capsys, monkeypatch):
    checkpoint = torch.load(folder / "slm.pt", weights_only=True)
    (folder / "llama").mkdir()

    def load_model(path, device):
        assert path == "llama/"
        return tiny_gpt(), {"tokenizer": checkpoint["tokenizer"]}

    monkeypatch.setattr(eval_math, "load_model", load_model)
    main(["--ckpt", "llama/", "--n", "1", "--max_new_tokens", "5"])
    assert (folder / "llama.demo.answers.jsonl").exists()
    monkeypatch.setattr(eval_math, "load_model", lambda *_: (tiny_gpt(), {}))
    assert "llama has no tokenizer" in refused(["--ckpt", "llama"], capsys)
