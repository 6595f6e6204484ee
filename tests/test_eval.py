r"""eval_math.py: what a text answers, when two answers are equal, the nine sets, the command."""

import base64
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_math
from eval_math import TASKS, answer_questions, extract_answer, is_equiv, load_questions, make_prompt
from model import GPT, GPTConfig
from prepare_data import get_tokenizer

eval_math.SECONDS = 1.5  # for the texts below that take for ever
needs_latex = pytest.mark.skipif(
    not eval_math.start_worker(), reason="LaTeX is compared by the extra `math` (math-verify)"
)

# ---- From a model's text to right or wrong ----

# A row: a text, then right answers after == and wrong ones after !=; ⏎ is a line break.
NUMBERS = r"""
7+5=<<7+5=12>>12 eggs.⏎#### 12  == 12  != 7 ⏐ #### $1,250⏎#### 3  == 1250  != 3
#### 2. Divide⏎The answer is 8.  == 8  != 2 ⏐ \boxed{3}, no:⏎#### -4  == -4  != 3
#### 12. Divide⏎The answer is 8.  == 8  != 1 ⏐ #### 3.75 Euros  == 3.75 ⏐ #### 18 Apples  == 18
#### - 5  == -5  != 5 ⏐ **Answer**: **17** apples  == 17 ⏐ so 2**3  != 23
#### −5  == -5  != 5 ⏐ So it is −5  == -5  != 5 ⏐ a change of –12 degrees  == -12 ⏐ 7–5  == 5
Final Answer: The final answer is $[2,5)$. I hope it is correct.  == [2,5)  != 5
So \boxed{24}. The final answer is $16$. I hope it is correct.  == 16  != 24
The answer is 40 by guess. So \boxed{41}  == 41  != 40 ⏐ \boxed{19  == 19 ⏐ $\boxed 5$ of 9  == 5
12 + 9 = \boxed{21}⏎⏎I put it into \boxed as you said.  == 21 ⏐ \fbox{8} of 9  == 8  != 9
The answer is 5. No, the answer is 6. It took 3 steps.  == 6  != 5  != 3
The answer is⏎⏎6⏎and so on, 8  == 6 ⏐ **Answer:** 17⏎in all 20  == 17 ⏐ THE ANSWER IS 9!  == 9
Final answer: 17 of the 40 seats  == 17  != 40 ⏐ she has 12-5  == 5  != -5
it takes 3/4 of an hour  == 0.75  != 4 ⏐ The answer is \(24\).  == 24
The answer is:⏎\[⏎24⏎\]  == 24 ⏐ The answer is ≈ 26.  == 26 ⏐ The answer is about 26;  == 26
He has 6 goats. The answer is $  == 6 ⏐ That makes 15. \boxed{\text{ }}  == 15
The answer is sqrt(7).  == sqrt(7)  != 7 ⏐ So the answer is log 9  != 9
The answer is 3 million dollars.  == 3000000  != 3 ⏐ The answer is 2 dozen eggs.  == 24  != 2
The answer is minus 4.  == -4  != 4 ⏐ So the answer is +8 degrees.  == 8  != -8
The answer is 12, 345  != 12345 ⏐ The answer is 12,345.  == 12345  != 12
The answer is 9 500.  == 9500  != 9 ⏐ The answer is half of 8  != 8
The answer is 3 hundred thousand.  == 300000  != 3 ⏐ The answer is 2 dozens  == 24
The answer is 5. I hope this answer is helpful.  == 5 ⏐ It is 6. Her options are limited.  == 6
The answer is 5 because 3 + 4 = 7.  == 5  != 7 ⏐ The answer is as follows: 12  == 12
The answer is 5 × 3 = 15  == 15  != 5 ⏐ The answer is 5x3=15.  == 15 ⏐ The answer is 5 x = 15  != 15
The answer is 2 cats + 5 dogs = 7 pets.  == 7  != 2 ⏐ The answer is simply 4.  == 4
The answer is 80 + 48 + 4 = 132 miles.  == 132  != 80
The answer is 75 percent.  == 3/4  != 0.76 ⏐ The answer is 12  == 12 (kg)  != 13 (kg)
The answer is 26 rolls (14 at dawn, 12 at noon).  == 26  != 12
The best answer is B  == B  != C ⏐ So the best answer is: (C)⏎Date: 11/02/2001  == C  != 2001
ANSWER IS D. A is incorrect.  == D  != A ⏐ The answer is E because (A) is wrong.  == E  != A
The answer is C, 15.  == C  != 15 ⏐ \boxed{\text{C. } 15}  == C ⏐ The answer is B, D  != B  == B, D
The correct option is (c).  == C ⏐ \boxed{\text{E}}  == E ⏐ \boxed{C: a slower rate}  == C
Answer: let me think⏎ANSWER: B  == B ⏐ Final answer: D.  == D ⏐ The answer is A number  != A
\boxed{\text{6:15 p.m.}}  == 6:15 p.m.  != 6:16 p.m. ⏐ The answer is "even".  == \text{even}  != odd
"""
LATEX = r"""
\boxed{30^\circ, 150^\circ}  == 150^{\circ}, 30^{\circ}  != 30^\circ, 160^\circ
\boxed{11,24,87}  != 11,24,88 ⏐ The answer is $2\\sqrt{5}$.  == 2\sqrt{5}  != 2\sqrt{3}
\boxed{\displaystyle\frac{5}{9}}  == \frac59  != \frac58 ⏐ The answer is $-3+4i.$  == 4i-3
\boxed{\begin{pmatrix}\frac12\\3\end{pmatrix}}  == \begin{pmatrix} 0.5 \\ 3 \end{pmatrix}
\boxed{\\begin{bmatrix}1\\\\2\\end{bmatrix}}  == \begin{pmatrix} 1 \\ 2 \end{pmatrix}
\boxed{\begin{pmatrix}1&4\\2&3\end{pmatrix}}  != \begin{pmatrix} 1 & 4 \\ 3 & 2 \end{pmatrix}
\boxed{2x - 3y + 5 = 0}  == -2x + 3y - 5 = 0 ⏐ \boxed{y = 3x - 4}  == 3x - y = 4  != y = 3x + 4
\boxed{y = 3x - 4}  == 3x-4 ⏐ \boxed{x = 5}  == 5  != y = 5 ⏐ \boxed{2x - y = 5}  != 5
\boxed{3x = 6}  != 6 ⏐ \boxed{(4, +∞)}  == (4,\infty)  != [4,\infty) ⏐ \boxed{3·5}  == 15
\boxed{$5 \times 3 = 15$}  == 15 ⏐ \boxed{\frac{6}{2} = 3}  == 3 ⏐ \boxed{2^3 = 8}  == 8
\boxed{12 ÷ 5}  == \frac{12}{5} ⏐ \boxed{x \lt 6}  == x < 6  != x \le 6 ⏐ \boxed{√8}  == 2\sqrt2
\boxed{x ≥ 3}  == x \geq 3 ⏐ \boxed{5 \text{ and } 9}  == 9, 5 ⏐ \boxed{2}. So \boxed{6}  != 2,6
\boxed{x = -2} \quad \text{and} \quad \boxed{x = 1}  == -2, 1  != 1
\boxed{[2,5)}  != 2,5 ⏐ \boxed{(2,5)}  == 2, 5  != [2,5]  != \{2,5\} ⏐ \boxed{1,2}  == \{2,1\}
\boxed{\frac{1}{\sqrt{m}}}  == \sqrt{1/m}  != \sqrt{m} ⏐ \boxed{|x|}  != x
\boxed{6!}  == 720  != 6 ⏐ \boxed{\binom{6}{2}}  == 15 ⏐ \boxed{1+\sin x}  == \sin(x)+1
\boxed{\alpha}  != \beta ⏐ \boxed{1 \leq x \leq 2}  == [1,2] ⏐ \boxed{x >= 3}  == x \ge 3  != x > 3
\boxed{71}  != 12\sqrt{35} ⏐ The answer is 3.1416  == \pi  != \frac{22}{7} ⏐ \boxed{\pm 3}  == 3,-3
\boxed{2\sqrt{3} \text{ cm}}  == 2\sqrt{3} ⏐ \boxed{15 \mbox{ cm}^2}  == 15
\boxed{(a,b) = (4,1)}  == (4,1)  != (1,4) ⏐ \boxed{12_5}  != 12  != 12_6
The answer is 15 apples  == 3 \cdot 5 ⏐ \boxed{2^{10}}  == 1024 ⏐ \boxed{(x+1)^2}  == x^2+2x+1
"""


def check(table):
    for row in re.split(r" ⏐ |\n", table.strip()):
        text, *golds = re.split("  (==|!=) ", row.replace("⏎", "\n"))
        answer = extract_answer(text)
        for sign, gold in zip(golds[::2], golds[1::2], strict=True):
            assert is_equiv(answer, gold) == is_equiv(gold, answer) == (sign == "=="), (row, gold)


def test_answers_in_numbers_and_words():
    check(NUMBERS)
    for text in ("", None, "no idea", "$", "..."):
        assert extract_answer(text) is None and not is_equiv(text, "0")
        assert is_equiv(text, text) == (text == "no idea")


@needs_latex
def test_answers_in_latex():
    check(LATEX)


def test_each_marker_comes_before_the_next():
    parts = ["#### 1", "The final answer is $2$. I hope it is correct.", r"So \boxed{3}."]
    parts += ["So the answer is 4.", "That took 5 steps"]
    for first in range(5):
        assert extract_answer("\n".join(parts[first:])) == str(first + 1)


SPELLINGS = "{0}; {0:,}; {0}.0; ${0:,}.00; {0} dollars per day; x = {0}; {0} (apples); about {0}"
SPELLINGS += r"; {0}\text{{ cm}}; 1 + 2 = {0}; {0}kg; \${0}; {0}/1; {1}/2; {0},; ${0}$"
SENTENCES = [r"The answer is {}.", r"so \boxed{{{}}}.", "12 or 13?\nAnswer: {}\n7"]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(-(10**9), 10**9), st.fractions(0, 1000, max_denominator=1000))
def test_any_spelling_of_a_number_is_the_number(n, share):
    """Each way to write a number is equal to it, and not to its neighbour."""
    texts = [(text.format(n, 2 * n), n) for text in SPELLINGS.split("; ")]
    latex = rf"\frac{{{share.numerator}}}{{{share.denominator}}}"
    texts += [(latex, share), (f"-{latex}", -share), (str(share), share)]
    for text, value in texts:
        assert is_equiv(text, str(value)) and is_equiv(str(value), text), text
        assert not is_equiv(text, str(value + 1), percentage=False), text
        for sentence in SENTENCES:
            assert is_equiv(extract_answer(sentence.format(text)), str(value)), (sentence, text)


# Not plain numbers: none of them is the number in it.
NO_NUMBER = """5 thousands; 5 trillion; 5 tenths; 3 fifths; 2 infinity; 5 base 6; 5 plus
5x; x5; 2ab; 2 pi; 2c; 3 and 4; 3 or 4; 1 2; (3,4); 5 and a half; 3 thirds
5!; 5^2; 2 squared; 2 log 3; 1/0; 3 times 4; 6_7; 4i; 5 - x; 5 + 2; 5 hundred; 3 + x; Mon. 5"""
PAIRS = """0.5 == 50; 50% == 0.5; 75 != 3/4; 3 != 3000; 33.3333 == 100/3; 33.35 != 100/3
1e3 == 1000; 10000 != 10001; 2001/2002 != 2011/2012; 2 1/2 == 2.5; 0 != 0.0001
10000.5 == 10001.2"""


def test_what_is_no_number_and_how_near_numbers_are():
    for text in re.split(r"; |\n", NO_NUMBER):
        for number in re.findall("[0-9]", text):
            assert not is_equiv(text, number) and not is_equiv(number, text), text
    for a, sign, b in re.findall(r"([^;\n]+) ([!=]=) ([^;\n]+)", PAIRS):
        assert is_equiv(a, b) == is_equiv(b, a) == (sign == "=="), (a, b)
    assert not is_equiv("0.5", "50", percentage=False) and is_equiv(7, "7.0")


# ---- Text of a model is hostile ----

HOSTILE = ["{" * 10_000, "-" * 299 + "1", "1" * 150 + "/" + "0" * 149, "1e999999999", "\0"]
HOSTILE += ["1 " * 10_000, r"\boxed{" * 10_000, r"\boxed{1}, " * 10_000, r"\text{" * 5_000]
HOSTILE += [r"\boxed" + " " * 100_000, "final answer is $" * 10_000, "5 " + "a " * 140]
HOSTILE += ["he answer is" + " :" * 50_000, "<<" * 10_000, "####" * 10_000, "\ud800", "٣ and ²"]
HOSTILE += ["5 " + "of " * 90 + "(x", "5 (" + "ab " * 90, "1," * 140 + "=", "[(1,2)," * 42]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_text_is_answered_at_once(text):
    started = time.process_time()
    answer = extract_answer(text)
    for other in ("5", text + "1", answer):
        assert is_equiv(text, other) == is_equiv(other, text)
    assert time.process_time() - started < 1


@needs_latex
def test_a_comparison_that_never_ends_is_ended():
    eval_math.start_worker().kill()
    eval_math.start_worker().wait()
    is_equiv("x+1", "1+x")  # finds it dead
    for text in ("10^{10^{10}}!", r"9^{9^{9^{9}}}"):
        started = time.perf_counter()
        assert not is_equiv(text, "1") and time.perf_counter() - started < 30
        assert is_equiv(r"\sqrt{8}", r"2\sqrt{2}")  # by another worker


@needs_latex
def test_no_text_is_run_as_code(tmp_path):
    target = tmp_path / "ran"
    code = f"__import__('os').mkdir('{target}')"
    for text in (code, rf"\text{{{code}}}", f"x_{{{code}}}", rf"\operatorname{{{code}}}(1)"):
        eval_math.same_latex(text, "1")
    # The worker's sympy, asked directly.
    source = eval_math.inspect.getsource(eval_math.latex_worker)
    direct = f"{source}\nlatex_worker(9)\nimport sympy\nprint(sympy.sympify({code!r}))"
    said = subprocess.run([sys.executable, "-c", direct], input="", stdout=-1, text=True).stdout
    assert said.strip() == code and not target.exists()  # a name
    assert "torch" not in source


def test_without_math_verify_text_and_numbers_still_count(monkeypatch, capsys):
    monkeypatch.setattr(eval_math.importlib.util, "find_spec", lambda name: None)
    eval_math.start_worker.cache_clear()
    check(NUMBERS)
    assert is_equiv(r"\sqrt 2", r"$\sqrt2$") and not is_equiv("(x+1)^2", "x^2+2x+1")
    assert not eval_math.can_read_latex() and not capsys.readouterr().out
    eval_math.start_worker.cache_clear()


# ---- Prompts and answers ----

RANKS = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
BYTES = {"name": "bytes", "n_vocab": 257, "eot": 256, "pat_str": r"[\s\S]", "ranks": RANKS}
tokenizer = get_tokenizer(BYTES)
FORMS = [("words", "Question: ", "\nAnswer:", 8), ("math", "Problem:\n", "\nSolution:", 4)]
FORMS += [("choice", "Problem:\n", "\nSolution:", 4)]


@pytest.mark.parametrize("form, head, tail, n", FORMS)
def test_prompts_are_the_harness_s_and_their_examples_right(form, head, tail, n):
    question = {"question": "Why?", "prompt": form}
    tokens, kept = make_prompt(tokenizer, question, 8, 10**6)
    *examples, last = tokenizer.decode(tokens[1:]).split("\n\n\n")
    assert tokens[0] == 256 and last == f"{head}Why?{tail}" and kept == len(examples) == n
    for example in examples:
        asked, answer = example.split(tail)
        assert asked.startswith(head) and answer.startswith(" ") and extract_answer(answer)
        assert form != "choice" or f"\n{eval_math.CHOOSE}\n(A)" in asked
        for left, right in re.findall(r"(\d[\d. +*/-]*) = (\d+)", answer if form != "math" else ""):
            assert eval(left) == float(right)  # of our own text
    # Examples go from the front, the question stays.
    assert make_prompt(tokenizer, question, 8, len(tokens)) == (tokens, n)
    cut, kept = make_prompt(tokenizer, question, 8, len(tokens) - 1)
    assert kept == n - 1 and tokens[1 - len(cut) :] == cut[1:]
    assert make_prompt(tokenizer, question, 8, 0) == make_prompt(tokenizer, question, 0, 10**6)


def writer(replies, block_size=4096, then=" and"):
    """A stub of a model: it answers a question by its reply, and writes `then` for ever after."""
    config = SimpleNamespace(block_size=block_size)
    return SimpleNamespace(config=config, replies=replies, then=then, written=0, eval=lambda: None)


@pytest.fixture
def stub(monkeypatch):
    def generate(model, prompts, new, stop):
        assert max(map(len, prompts)) + new <= model.config.block_size
        answers = []
        for prompt in prompts:
            text = tokenizer.decode(prompt[1:])
            [reply] = [model.replies[asked] for asked in model.replies if f"{asked}\n" in text]
            tokens = [*reply, *model.then.encode() * new][:new]
            end = next((i for i, token in enumerate(tokens) if token in stop), new)
            answers.append(tokens[:end])
            model.written += end
        return answers

    monkeypatch.setattr(eval_math, "generate", generate)


QUESTIONS = [
    {"question": "A rather long question, what is six times seven?", "answer": "6*7=42\n#### 42"},
    {"question": "One?", "answer": "1"},
    {"question": "A half, please?", "answer": r"It is $\boxed{\frac{1}{2}}$."},
    {"question": "Which?\n(A) 3, (B) 4", "answer": "B", "prompt": "choice"},
]
ASKED = [question["question"] for question in QUESTIONS]
REPLIES = {
    ASKED[0]: b" So it is 42.\n\n\nQuestion: 1+1?\nAnswer: 2",
    ASKED[1]: b" 1+1=2\n#### 2",
    ASKED[2]: b" 0.5",
    ASKED[3]: b" Answer: (B).",
}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("shots", [0, 8])
def test_answers_in_the_order_given(stub, batch_size, shots):
    model = writer(REPLIES, then="\n\n\n")
    records = answer_questions(model, tokenizer, QUESTIONS, shots, batch_size)
    assert [r["question"] for r in records] == ASKED
    assert [r["prediction"] for r in records] == ["42", "2", "0.5", "B"]
    assert [r["gold"] for r in records] == ["42", "1", r"\frac{1}{2}", "B"]
    assert [r["correct"] for r in records] == [True, False, True, True]
    assert [r["shots"] for r in records] == [shots] * 3 + [min(shots, 4)]
    assert records[0]["completion"] == "So it is 42."


@pytest.mark.parametrize("end", [b"\n\n\nMore 7", b"\nQuestion: 2?", b"\nProblem: 7", [256]])
def test_what_follows_the_end_does_not_count(stub, end):
    model = writer({"One?": [*b" It is 1", *end]}, then=" 7")
    [record] = answer_questions(model, tokenizer, QUESTIONS[1:2], max_new_tokens=50)
    assert record["completion"] == "It is 1" and record["correct"]
    assert model.written == (8 if end == [256] else 50)


def test_the_next_question_s_token_stops_the_model(stub, monkeypatch):
    def encode(text):
        return [10, 7] if text == "\nQuestion" else [*text.encode()]

    monkeypatch.setattr(tokenizer, "encode", encode)
    model = writer({"One?": [*b" 1\n", 7]})
    assert answer_questions(model, tokenizer, QUESTIONS[1:2])[0]["correct"] and model.written == 3


def test_a_small_window_drops_examples_and_counts_what_does_not_fit_as_wrong(stub):
    records = answer_questions(writer(REPLIES, 60), tokenizer, QUESTIONS[:3], shots=2)
    assert [r["shots"] for r in records] == [None, 0, 0]
    assert records[0]["completion"] == "" and not records[0]["correct"]
    length = len(f"Question: {ASKED[0]}\nAnswer:") + 1
    for block_size, written, shots in ((length + 1, 1, 0), (length, 0, None)):
        model = writer(REPLIES, block_size)
        [record] = answer_questions(model, tokenizer, QUESTIONS[:1])
        assert model.written == written and record["shots"] == shots
    model = writer(REPLIES, 512)
    [record] = answer_questions(model, tokenizer, QUESTIONS[1:2], 8, max_new_tokens=200)
    assert 0 < record["shots"] < 8 and model.written == 200


def test_a_real_model_answers_alike_in_any_batch():
    model = GPT(GPTConfig(257, 256, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)).double()
    one, many = (answer_questions(model, tokenizer, QUESTIONS, 0, n, 40) for n in (1, 64))
    assert one == many and any(record["completion"] for record in one)


# ---- The sets ----

# task | a row in its public form | question | answer; ⏎ is a line break, CHOOSE the harness's words
SETS = r"""
gsm8k | {"question": "Q?", "answer": "so\n#### 5"} | Q? | so⏎#### 5
math | {"problem": "P", "solution": "It is 2.", "answer": "2", "level": "1"} | P | 2
math | {"problem": "P", "solution": "It is $\\boxed{2}$."} | P | It is $\boxed{2}$.
svamp | {"Body": "Ann has 3", "Question": "All?", "Answer": 3.0} | Ann has 3. All? | 3.0
asdiv | {"body": "B.", "question": "Q?", "answer": "9 (apples)"} | B. Q? | 9 (apples)
mawps | {"question": "I?", "result": "43"} | I? | 43
mawps | {"input": "I?", "target": 43.0} | I? | 43.0
tabmwp | {"table_title": "A", "table": "r", "question": "Q", "answer": "7", "choices": ["6", "7"]} \
 | Here is a table of A.⏎r⏎Q Choose from: 6, 7. | 7
tabmwp | {"table": "r", "question": "Q", "answer": "7", "choices": null} | Here is a table.⏎r⏎Q | 7
mathqa | {"Problem": "P", "options": "a ) 1 , 200 , b ) 16", "correct": "b"} \
 | P⏎CHOOSE⏎(A) 1 , 200, (B) 16 | B
mathqa | {"Problem": "P", "options": "['a ) 12', 'b ) 16']", "correct": "a"} \
 | P⏎CHOOSE⏎(A) 12, (B) 16 | A
mathqa | {"question": "P", "options": ["A)3", "B)6"], "correct": "A"} | P⏎CHOOSE⏎(A) 3, (B) 6 | A
mmlu_stem | {"question": "P", "subject": "astronomy", "choices": ["x", "y", "z"], "answer": 2} \
 | P⏎CHOOSE⏎(A) x, (B) y, (C) z | C
sat | {"Question": "P", "options": "A) $f(-6)=0$ B) $f(6)=-6$", "Answer": "A"} \
 | P⏎CHOOSE⏎(A) $f(-6)=0$, (B) $f(6)=-6$ | A
"""
SETS = SETS.strip().replace("\\\n", "").replace("CHOOSE", eval_math.CHOOSE).splitlines()
SETS = [re.split(r" +\| ", line) for line in SETS]


@pytest.mark.parametrize("task, row, question, answer", SETS)
def test_a_set_is_read_from_its_file_and_from_the_hub(
    tmp_path, monkeypatch, task, row, question, answer
):
    task = TASKS[task]
    expected = {"question": question.replace("⏎", "\n"), "answer": answer.replace("⏎", "\n")}
    expected["prompt"] = task.prompt
    path = tmp_path / "set.jsonl"
    path.write_text(f"{row}\n{row}\n")
    assert load_questions(path, task=task) == [expected] * 2
    assert load_questions(path, 1, task) == [expected]

    def load_dataset(*name, split):
        assert (":".join(name), split) == (task.hub, task.split)
        return [json.loads(row)]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_questions(None, task=task) == [expected]
    monkeypatch.setattr(datasets, "load_dataset", None)  # fails
    with pytest.raises(SystemExit, match=f"{task.name}: .*--file PATH"):
        load_questions(None, task=task)


OPTIONS = [["3", "4"], "A) 3 B) 4", {"A": "3", "B": "4"}, {"text": ["3", "4"], "label": ["A", "B"]}]


def test_options_of_own_rows_are_asked_with_letters(tmp_path):
    path = tmp_path / "mine.jsonl"
    for answer in (1, "1", "B", "b"):
        rows = [{"question": "P", "answer": answer, "choices": options} for options in OPTIONS]
        path.write_text("\n".join(map(json.dumps, rows)))
        asked = f"P\n{eval_math.CHOOSE}\n(A) 3, (B) 4"
        expected = {"question": asked, "answer": "B", "prompt": "choice"}
        assert load_questions(path) == [expected] * len(OPTIONS)
    path.write_text('{"question": "P", "answer": "3", "options": ["3", "4"]}')
    assert load_questions(path)[0]["answer"] == "3"
    path.write_text('{"question": "P", "answer": ["3", "three"]}')
    with pytest.raises(SystemExit, match="row 1 has no question and answer"):
        load_questions(path)


SAID = "B; (B); B.; **B**; Option (B); Therefore, (B) is right.; B. 60; it is 12 (B)"


def test_an_answer_in_words_and_letters_said_plainly():
    question = {"question": "P", "answer": "So 2 + 2 = 4. The answer is 4."}
    assert eval_math.judge(question, " 2 + 2 is 4.")["correct"]
    assert not eval_math.judge(question, " 2 + 2 is 5.")["correct"]
    for said in SAID.split("; "):
        verdicts = [eval_math.judge({"question": "P", "answer": a}, said)["correct"] for a in "BC"]
        assert verdicts == [True, False], said
    assert not eval_math.judge({"question": "P", "answer": "A"}, "A train is fast")["correct"]


# name | content, ⏎ a line break | how many questions, or what is said
FILES = r"""
svamp.json | [{"Question": "Q?", "Answer": 3},⏎{"Question": "Q?", "Answer": 3}] | 2
tabmwp.json | {⏎"1": {"question": "Q?", "answer": "3"},⏎"2": {"question": "Q?", "answer": "4"}} | 2
asdiv.xml | <M><Problem><Body>B</Body><Question>Q?</Question><Answer>9</Answer></Problem></M> | 1
asdiv.jsonl | {"question": "Q?", "answer": "3; 4"}⏎{"question": "Q?", "answer": "3"} | 1
asdiv.xml | <M><Problem><Body>B</Body> | asdiv.xml
tabmwp.json | {"1": {"question": "Q?", | tabmwp.json
sat.csv | Question,Possible Answers,Answer⏎"P","A) 1 B) 2",B | 1
mmlu_stem.jsonl | {"question": "Q?", "subject": "law", "choices": ["x"], "answer": 0} | no questions
gsm8k.jsonl | {"question": "One?", "answer": "1"}⏎{"question": "Tw | gsm8k.jsonl
svamp.jsonl | {"question": "One?", "answer": "1"}⏎{"question": "One?", "reply": "1"} | row 2 .*reply
mawps.csv | question,answer | no questions
"""


def test_every_form_of_file_and_only_rows_that_the_paper_counts(tmp_path):
    for line in FILES.strip().splitlines():
        name, content, result = re.split(r" \| ?", line)
        path = tmp_path / name
        path.write_text(content.replace("⏎", "\n"))
        if result.isdigit():
            assert len(load_questions(path, task=TASKS[path.stem])) == int(result), name
            continue
        with pytest.raises(SystemExit, match=result) as error:
            load_questions(path, task=TASKS[path.stem])
        assert name in str(error.value) and "\n" not in str(error.value)


# ---- The command ----


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the checkpoint of a tiny random model, and questions."""
    monkeypatch.chdir(tmp_path)
    model = GPT(GPTConfig(257, 256, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    checkpoint = {"model_config": vars(model.config), "model": model.state_dict()}
    torch.save(checkpoint | {"tokenizer": BYTES}, "slm.pt")
    torch.save(checkpoint | {"tokenizer": BYTES | {"n_vocab": 300}}, "rows.pt")
    data = tmp_path / "data/demo"
    data.mkdir(parents=True)
    (data / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS[:3])))
    return tmp_path


def run(arguments):
    eval_math.main(["--device", "cpu", *arguments.split()])


def test_end_to_end(folder, capsys):
    run("--ckpt slm.pt --n 2 --max_new_tokens 20")
    records = [json.loads(line) for line in (folder / "slm.demo.answers.jsonl").open()]
    fields = ["question", "completion", "prediction", "gold", "correct", "shots"]
    assert [list(record) for record in records] == [fields] * 2
    out = capsys.readouterr().out
    assert f"demo: {sum(record['correct'] for record in records)} of 2 right" in out
    run("--ckpt slm.pt --task data/demo/questions.jsonl --max_new_tokens 20")
    # 8 examples are more than 256 bytes.
    assert "3 have fewer examples" in capsys.readouterr().out


def test_all_prints_the_paper_beside_our_run(folder, capsys, monkeypatch):
    for task, row, *_ in SETS[:-1]:
        (folder / f"{task}.jsonl").write_text(row)
    monkeypatch.setattr(eval_math, "generate", lambda model, prompts, *_: [b"5"] * len(prompts))
    run("--ckpt slm.pt --task all --file .")
    out, err = capsys.readouterr()
    assert "sat.jsonl not found" in err  # and the rest is answered
    assert "gsm8k: 1 of 1 right, 100.0 % (the paper: CLM 6.4, SLM 29.8)" in out
    assert "mean of 8: 12.5 % (the paper's of 9: CLM 21.6, SLM 38.1)" in out
    means = [sum(float(task[i]) for task in TASKS.values()) / 9 for i in (-2, -1)]
    assert means == pytest.approx([21.6, 38.1], abs=0.15)


BAD = """--ckpt none.pt => none.pt; --ckpt rows.pt => rows.pt: the tokenizer
--ckpt slm.pt --task gsm9k => gsm9k not found; --ckpt slm.pt --data none => none/questions.jsonl
--ckpt slm.pt --task svamp --file none.json => none.json; --ckpt slm.pt --batch_size 0 => --batch
--ckpt slm.pt --n 0 => --n; --ckpt slm.pt --file mine.jsonl => --task mine.jsonl"""


def test_bad_input_ends_in_one_line(folder):
    before = sorted(folder.rglob("*"))
    for line in re.split(r"; |\n", BAD):
        arguments, said = line.split(" => ")
        with pytest.raises(SystemExit, match=said) as error:
            run(arguments)
        assert "\n" not in str(error.value) and sorted(folder.rglob("*")) == before
