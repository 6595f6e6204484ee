"""eval_math.py: extraction and comparison by the harness's rules, prompts, files, errors."""

import ast
import base64
import builtins
import json
import math
import os
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_math
from eval_math import (
    EXAMPLES,
    answer_questions,
    evaluate,
    extract_answer,
    is_equiv,
    load_questions,
    main,
    make_prompt,
    normal,
    wilson_interval,
)
from model import GPT, GPTConfig
from prepare_data import InputError, get_tokenizer

steady = settings(max_examples=80, deadline=None, derandomize=True)

BYTES = {"name": "bytes", "n_vocab": 257, "eot": 256, "pat_str": r"[\s\S]"}
BYTES["ranks"] = [base64.b64encode(bytes([i])).decode() for i in range(256)]


@pytest.fixture(scope="module")
def encoding():
    return get_tokenizer(BYTES)


# ---- extraction ----


@pytest.mark.parametrize(
    "text, answer",
    [
        # "final answer is $...$. I hope"
        ("Final Answer: The final answer is $[2,5)$. I hope it is correct.", "[2,5)"),
        (r"so \boxed{24}. The final answer is $16$. I hope it is correct.", "16"),
        # the last \boxed, nested braces, \fbox, no braces, cut short, empty
        (r"so \boxed{3} and $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{\sqrt{\frac{a^{2}}{b}}} is it", r"\sqrt{\frac{a^{2}}{b}}"),
        (r"\boxed{\{1, \{2\}\}} is it", r"\{1, \{2\}\}"),
        (r"we get \fbox{12}.", "12"),
        (r"so $x = \boxed 5$. Done, in 3 steps", "5"),
        (r"so $\boxed{7", "7"),
        (r"\boxed{} from 4", "4"),
        (r"boxed{11}", "11"),
        ("the boxed set costs 5 dollars", "5"),
        (r"\boxed{18 \text{ cm}}", "18"),
        (r"\boxed{\$1,234.50}", "1234.50"),
        (r"\boxed{(1,234)}", "(1,234)"),
        (r"\boxed{x = 5}", "5"),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
        # #### of GSM8K and of the demo, calculator marks, the first of several
        ("12+7=<<12+7=19>>19.\n#### 19\n", "19"),
        ("#### -1,234", "-1234"),
        ("#### $12.50", "12.50"),
        ("#### 5\nmore #### 6", "5"),
        ("the answer is 60/2 = <<60/2=30>>30 a day.\n#### 90", "90"),
        ("#### Step 2\nThe answer is 7.", "7"),
        # the text after the last "he answer is"
        ("The answer is 6.", "6"),
        ("the answer is: 6", "6"),
        ("The answer is\n\n6\nand so on, 8", "6"),
        ("The answer is 5. No, the answer is 6. I used 3 steps.", "6"),
        ("The answer is 18 dollars per day.", "18"),
        ("The answer is $1,234.50.", "1234.50"),
        ("The answer is -$7.", "-7"),
        ("The answer is −7 degrees.", "-7"),
        ("The answer is 50%.", "50%"),
        ("The answer is **12**.", "12"),
        ("The answer is $12$.", "12"),
        ("The answer is that 15 apples are left.", "15"),
        ("The answer is 3 * 4 = 12.", "12"),
        ("The answer is 3*4=<<3*4=12>>12 eggs.", "12"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 2 1/2 cups.", "2 1/2"),
        (r"The answer is \frac{3}{4}.", r"\frac{3}{4}"),
        ("The answer is 5x + 3.", "5x + 3"),
        ("The answer is x^2.", "x^2"),
        ("The answer is yes.", "yes"),
        ("The answer is .5", ".5"),
        ("The answer is 5.", "5"),
        ("The answer is 1.5e3.", "1.5e3"),
        ("He has 4 cows. The answer is", "4"),
        ("The final answer is 9.", "9"),
        # choices
        ("The answer is (C) 492 kms.", "C"),
        ("the answer is: (b).", "B"),
        ("The answer is D.", "D"),
        ("so the choice is (E)", "E"),
        ("The answer is A) 5", "A"),
        ("The answer is a 5", "a 5"),
        # the last number
        ("She has 12 - 5 = 7 eggs", "7"),
        ("she has 12-5", "5"),
        ("it is −3", "-3"),
        ("it is (-3)", "-3"),
        ("they cost $1,234,567.", "1234567"),
        ("of 1,2 and 3,45 pick", "45"),
        ("it takes 3/4 of an hour", "3/4"),
        (r"about $2\frac{1}{2}$ cups", r"2\frac{1}{2}"),
        ("it is 5.", "5"),
        ("a fall of 12.5%", "12.5%"),
        ("costs $-5", "-5"),
        # nothing
        ("", None),
        (None, None),
        ("no idea", None),
        ("٣ and ²", None),
    ],
)
def test_extraction(text, answer):
    assert extract_answer(text) == answer


def test_extraction_order():
    """One text with every marker; strike out the one that won, and the next in order wins."""
    parts = [
        "Final Answer: The final answer is $1$. I hope it is correct.",
        r"\boxed{2}",
        "#### 3",
        "So the answer is 4.",
        "That took 5 steps",
    ]
    for first in range(5):
        for text in ("\n".join(parts[first:]), "\n".join(reversed(parts[first:]))):
            if "hope" in text and text.startswith("That"):
                continue  # a minerva sentence is not last but its "answer is" is
            expected = first + 1
            assert extract_answer(text) == str(expected), text


# ---- comparison ----

EQUAL = [
    ("1,234", "1234"),
    ("1234.0", "1234"),
    ("$5", "5 dollars"),
    ("5 dollars per day", "5"),
    (r"\$5.00", "5"),
    ("£3", "3"),
    ("-5", "−5"),
    ("-$5", "$-5"),
    (".5", "0.5"),
    ("5.", "5"),
    ("007", "7"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac12", "0.5"),
    (r"\dfrac{1}{2}", r"\tfrac12"),
    (r"\frac1{72}", "1/72"),
    (r"-\frac{3}{4}", "-0.75"),
    ("2 1/2", "2.5"),
    (r"2\frac{1}{2}", "5/2"),
    (r"-2\frac12", "-2.5"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^3", "1500"),
    ("2×10^{-2}", "0.02"),
    (r"10,\!000", "10000"),
    (r"10{,}000", "10,000"),
    (r"5\text{ cm}", "5"),
    (r"5 \text{ cm}^2", "5"),
    ("5cm", "5 cm"),
    ("9 (apples)", "9"),
    (r"30^\circ", "30"),
    (r"30^{\circ}", "30°"),
    ("33.3333", "100/3"),
    (r"x = \frac{1}{2}", "0.5"),
    (r"x \in [2,5)", "[2,5)"),
    (r"\left( \frac{1}{2}, 3 \right)", "(0.5,3)"),
    ("(1,2)", "1, 2"),
    (r"\{1,2\}", "1,2"),
    ("((1,2),(3,4))", "((1.0,2),(3,4.0))"),
    ("(C)", "C"),
    (r"\text{(B)}", "b"),
    ("Yes", "yes."),
    ("x^2+2x+1", "(x+1)^2"),
    ("2x+3", "3+2x"),
    (r"\frac{x}{7}+\frac{2}{7}", r"\frac{x+2}{7}"),
    (r"\sqrt{8}", r"2\sqrt2"),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
    (r"\sqrt[3]{27}", "3"),
    ("sqrt(2)", "1.41421"),
    (r"\frac{\pi}{2}", "π/2"),
    ("2^3^2", "512"),
    ("2-3-4", "-5"),
    ("12/2/3", "2"),
    ("-2^2", "-4"),
    ("2(3+4)", "14"),
    ("--5", "5"),
    ("12_{5}", "12_5"),
    (7, "7.0"),
    (43.0, 43),
    # the harness's tolerance and percentages
    ("10000", "10001"),
    ("0.5", "50"),
    ("50", "0.5"),
    ("50%", "0.5"),
    (r"50\%", "50"),
    ("75%", "3/4"),
    ("0", "0.0"),
]
DIFFERENT = [
    ("5", "6"),
    ("5", "-5"),
    ("100", "101"),
    ("0", "0.0001"),
    ("5", "5000"),
    ("75", "3/4"),
    ("2ab", "2"),
    ("5x", "5"),
    ("2 pi", "2"),
    ("2 million", "2"),
    ("3 and 4", "3"),
    ("1 2", "12"),
    (r"\frac{1}{23}", r"\frac{12}{3}"),
    (r"2\frac{1}{2}", "1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(1,2,3)"),
    ("(1,100)", "(1,1)"),
    ("(1,234)", "1234"),
    ("1,2", "12"),
    ("x+1", "x+2"),
    ("x", "y"),
    ("x", f"{evaluate('x'):.9f}"),  # a variable is not the value that it is tried at
    ("north", "thorn"),
    ("A", "B"),
    ("9**9**9", "1"),
    ("9^9^9", "9^9^9^9"),
    ("1/0", "2/0"),
    ("inf", "infinity"),
    ("1e999", "1e998"),
    ("((1)", "1"),
    ("(1]", "1"),
    ("", ""),
    ("", "0"),
    (None, None),
    (None, "None"),
    ("$", ""),
    ("...", "."),
]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal(a, b):
    assert is_equiv(a, b) and is_equiv(b, a)


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different(a, b):
    assert not is_equiv(a, b) and not is_equiv(b, a)


def test_percentage_can_be_switched_off():
    assert is_equiv("0.5", "50") and not is_equiv("0.5", "50", percentage=False)


integers = st.integers(-(10**9), 10**9)


def spellings(n):
    """Ways to write the integer n that all mean n."""
    sign, size = "-" * (n < 0), abs(n)
    yield from (f"{n}", f"{n:,}", f"{n}.0", f"{n}.", f"{n:,}.00", f" {n} ", f"{sign}${size:,}")
    yield from (f"{n} dollars", f"{n} kg", rf"{n}\text{{ cm}}", rf"\${n}", f"${n}$", f"x = {n}")
    yield from (f"{2 * n}/2", rf"\frac{{{2 * n}}}{{2}}", f"{sign}0{size}", f"−{size}" * (n < 0))
    yield from (rf"\left({n}\right)", f"{n}{{}}"[:-2], f"{sign}{size - 1} 1/1" * (size > 1))


@steady
@given(integers)
def test_spellings_of_a_number_are_equal(n):
    for spelling in filter(None, spellings(n)):
        assert is_equiv(spelling, str(n)), spelling
        assert is_equiv(str(n), spelling), spelling


@steady
@given(integers, st.sampled_from(["The answer is {}.", "#### {}", r"so \boxed{{{}}}.", "it is {}"]))
def test_a_number_comes_back_out_of_its_sentence(n, sentence):
    for spelling in (f"{n}", f"{n:,}", f"{n}.25", f"{'-' * (n < 0)}${abs(n):,}"):
        told = extract_answer("In 3 steps: " + sentence.format(spelling))
        assert is_equiv(told, spelling, percentage=False), (told, spelling)


@steady
@given(integers, integers)
def test_different_numbers_are_different(a, b):
    close = [math.isclose(a, b * scale, rel_tol=1e-4) for scale in (1, 100, 0.01)]
    assert is_equiv(str(a), f"{b:,}") == any(close)


@st.composite
def arithmetic(draw, depth=3):
    """(LaTeX, value) of a random expression, the value computed by Python alone."""
    if depth == 0 or draw(st.booleans()):
        n = draw(st.integers(1, 20))
        return str(n), float(n)
    (a, x), (b, y) = draw(arithmetic(depth - 1)), draw(arithmetic(depth - 1))
    return draw(
        st.sampled_from(
            [
                (f"({a}+{b})", x + y),
                (f"({a}-{b})", x - y),
                (rf"({a}) \cdot ({b})", x * y),
                (f"({a})({b})", x * y),
                (rf"\frac{{{a}}}{{{b}}}", x / y if y else math.nan),
                (f"({a})^2", x * x),
                (rf"\sqrt{{({a})^2}}", abs(x)),
            ]
        )
    )


@steady
@given(arithmetic())
def test_evaluate_agrees_with_python(case):
    text, expected = case
    value = evaluate(normal(text))
    if len(normal(text)) <= eval_math.LONGEST and math.isfinite(expected):
        assert value is not None and math.isclose(abs(value - expected), 0, abs_tol=1e-6), text


HOSTILE = [
    "{" * 10_000,
    "(" * 140 + "1" + ")" * 140,
    "9**9**9",
    "9^9^9^9",
    "2^" * 140 + "2",
    "-" * 299 + "1",
    "1" * 100_000,
    "1" * 150 + "/" + "0" * 149,
    "1,111" * 10_000,
    "1 " * 10_000,
    r"\boxed{" * 10_000,
    r"\boxed" + " " * 100_000,
    r"\frac" * 60,
    r"\sqrt[" * 50,
    r"\text{" * 5_000,
    "final answer is $" * 10_000,
    "he answer is " * 10_000,
    "he answer is" + " :" * 50_000,
    "<<" * 10_000,
    "####" * 10_000,
    "[(1,2)," * 42,
    "5 " + "a " * 140,
    "__import__('os').system('false')",
    "(lambda: 0).__globals__",
    "٣٤",
    "１２",
    "\0" * 10,
    "\ud800",
    "nan",
    "1e999",
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_hostile_text_is_answered_at_once(text, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("text of a model was run")

    started = time.process_time()
    with monkeypatch.context() as patch:
        for name in ("eval", "exec", "compile"):
            patch.setattr(builtins, name, refuse)
        answer = extract_answer(text)
        for other in ("5", text, text + "1", answer):
            assert is_equiv(text, other) == is_equiv(other, text)
    assert time.process_time() - started < 1


def test_no_way_to_run_text():
    """eval_math names no function that runs text, nor sympy, whose parsers do."""
    tree = ast.parse(Path(eval_math.__file__).read_text())
    called = {
        n.func.id for n in ast.walk(tree) if isinstance(n, ast.Call) and hasattr(n.func, "id")
    }
    assert not called & {"eval", "exec", "compile", "__import__", "sympify", "parse_expr"}
    assert "sympy" not in {n.name for n in ast.walk(tree) if isinstance(n, ast.alias)}


PIECES = r"""\frac \boxed \text{ \sqrt { } ( ) [ ] , 1 2 30 0 x y + - * / ^ $ % = pi . \\ & ####
<< >> – ½ ans he~answer~is final~answer~is~$ $.~I~hope ٣ inf e5 _ ! | \left million"""
pieces = st.sampled_from(PIECES.split())
noise = st.lists(pieces, max_size=40).map(lambda p: "".join(p).replace("~", " ")) | st.text()


@steady
@given(noise, noise)
@example("", "\n")
def test_any_text_is_answered(a, b):
    for text in (a, b):
        answer = extract_answer(text)
        assert answer is None or (isinstance(answer, str) and answer)
        assert is_equiv(text, text) == (normal(text) != "")
    assert is_equiv(a, b) == is_equiv(b, a)


# ---- prompts ----


def test_examples_are_right_and_in_form():
    assert len(EXAMPLES) == 8
    for text in EXAMPLES:
        question, answer = re.fullmatch(r"Question: (.+\?)\nAnswer: (.+)", text).groups()
        sums = re.findall(r"(\d[\d +*/-]*) = (\d+)", answer)
        assert sums and all(evaluate(normal(left)) == float(right) for left, right in sums)
        assert answer.endswith(f"The answer is {sums[-1][1]}.")
        assert extract_answer(answer) == sums[-1][1]


def test_prompt_form(encoding):
    tokens, kept = make_prompt(encoding, "Why?", 2, 10_000)
    assert kept == 2 and tokens[0] == encoding.eot_token
    expected = f"{EXAMPLES[-2]}\n\n\n{EXAMPLES[-1]}\n\n\nQuestion: Why?\nAnswer:"
    assert encoding.decode(tokens[1:]) == expected
    assert encoding.decode(make_prompt(encoding, "Why?", 0, 99)[0][1:]) == "Question: Why?\nAnswer:"


def test_examples_go_from_the_front_and_the_question_stays(encoding):
    full = len(make_prompt(encoding, "Why?", 8, 10**6)[0])
    for room in range(0, full + 50, 37):
        tokens, kept = make_prompt(encoding, "Why?", 8, room)
        text = encoding.decode(tokens[1:])
        assert text.endswith("Question: Why?\nAnswer:") and text.count("Question: ") == kept + 1
        assert text.startswith(EXAMPLES[8 - kept]) if kept else len(text) == 22
        assert len(tokens) <= room or kept == 0
        if kept < 8:  # one more would not have fitted
            assert len(make_prompt(encoding, "Why?", kept + 1, 10**6)[0]) > room


# ---- answers ----


class Parrot(torch.nn.Module):
    """Stands for a model: `generate` below looks up the prompt's last question in its replies."""

    def __init__(self, replies, block_size=4096):
        super().__init__()
        self.replies, self.config = replies, SimpleNamespace(block_size=block_size)
        self.calls = []


@pytest.fixture
def parrot(monkeypatch, encoding):
    def generate(model, prompts, max_new_tokens, stop):
        assert not model.training and not torch.is_grad_enabled()
        assert max(map(len, prompts)) + max_new_tokens <= model.config.block_size
        model.calls.append((len(prompts), max_new_tokens))
        answers = []
        for prompt in prompts:
            assert prompt[0] == encoding.eot_token
            question = encoding.decode(prompt[1:]).rsplit("Question: ", 1)[1]
            reply = model.replies[question.removesuffix("\nAnswer:")]
            tokens = encoding.encode_ordinary(reply)[:max_new_tokens]
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


def test_completion_ends_at_three_line_breaks(parrot, encoding):
    model = parrot({"One?": " 1\n\n\nUnrelated 2"})
    assert answer_questions(model, encoding, QUESTIONS[1:2])[0]["completion"] == "1"


def test_small_block(parrot, encoding):
    """New tokens are clipped, examples go, a question too long by itself is counted, not cut."""
    model = parrot(REPLIES, block_size=60)
    records = answer_questions(model, encoding, QUESTIONS, shots=2, max_new_tokens=256)
    assert [r["shots"] for r in records] == [None, 0, 0, 0]
    assert records[0]["completion"] == "" and not records[0]["correct"]
    assert model.calls == [(3, 60 - len("Question: Seventeen thousand?\nAnswer:") - 1)]
    room = parrot(REPLIES, block_size=512)
    shots = answer_questions(room, encoding, QUESTIONS[1:2], 8, max_new_tokens=200)[0]["shots"]
    assert 0 < shots < 8 and room.calls == [(1, 200)]


def test_no_questions(parrot, encoding):
    assert answer_questions(parrot({}), encoding, []) == []


def tiny_gpt(vocab_size=257, block_size=256):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size, block_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    return GPT(config)


def test_real_model_answers_alike_in_any_batch(encoding):
    model = tiny_gpt().double()
    one, many = (answer_questions(model, encoding, QUESTIONS, 0, n, 40) for n in (1, 64))
    assert one == many and any(r["completion"] for r in one)


def test_wilson_interval():
    # 8 of 10: (8 + 1.92073 ± 1.959964 · sqrt(8 · 2 / 10 + 0.960365)) / (10 + 3.841459)
    assert wilson_interval(8, 10) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.161125), abs=1e-6)
    assert wilson_interval(20, 20) == pytest.approx((0.838875, 1), abs=1e-6)
    assert wilson_interval(0, 0) == (0, 1)


@steady
@given(st.integers(0, 2000), st.integers(1, 2000))
def test_wilson_interval_holds_the_share(right, n):
    right = min(right, n)
    lo, hi = wilson_interval(right, n)
    assert 0 <= lo <= right / n + 1e-12 and right / n <= hi + 1e-12 <= 1 + 1e-12
    flipped = wilson_interval(n - right, n)
    assert (1 - hi, 1 - lo) == pytest.approx(flipped, abs=1e-9)


# ---- files and the command ----


@pytest.mark.parametrize(
    "row, question, answer",
    [
        ({"question": "Q?", "answer": "so\n#### 5"}, "Q?", "so\n#### 5"),  # GSM8K
        ({"problem": "P", "solution": r"\boxed{2}"}, "P", r"\boxed{2}"),  # MATH
        ({"Body": "Ann has 3.", "Question": "All?", "Answer": 3.0}, "Ann has 3. All?", "3.0"),
        ({"Body": "Ann has 3", "Question": "All?", "Answer": 0}, "Ann has 3. All?", "0"),  # SVAMP
        ({"body": "B.", "question": "Q?", "answer": "9 (apples)"}, "B. Q?", "9 (apples)"),  # ASDiv
        ({"input": "I?", "target": 43.0, "idx": 0}, "I?", "43.0"),  # MAWPS
        ({"question": "", "problem": "P", "answer": None, "solution": "1"}, "P", "1"),
    ],
)
def test_fields_of_the_sets(tmp_path, row, question, answer):
    path = tmp_path / "set.jsonl"
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert load_questions(str(path)) == [{"question": question, "answer": answer}] * 2
    assert len(load_questions(str(path), 1)) == 1


GOOD = b'{"question": "One?", "answer": "1"}\n'


@pytest.mark.parametrize(
    "content, where",
    [
        (GOOD + b'{"question": "Tw', ":2:"),
        (GOOD + b"\xff\xfe\n", ":2:"),
        (GOOD + b"\n" + GOOD, ":2:"),
        (b"[1, 2]\n", ":1:"),
        (b"[" * 100_000 + b"\n", ":1:"),
        (GOOD + b'{"question": "Two?"}\n', ":2:"),
        (b'{"answer": "2"}\n', ":1:"),
        (b'{"question": null, "answer": "2"}\n', ":1:"),
        (b"", "no questions"),
    ],
)
def test_bad_file_is_named_with_its_line(tmp_path, content, where):
    path = tmp_path / "set.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(str(path))) as error:
        load_questions(str(path))
    assert where in str(error.value) and "\n" not in str(error.value)


def test_gsm8k(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    assert load_questions("gsm8k", 3) == rows[:3]

    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match="--task FILE.jsonl"):
        load_questions("gsm8k")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder with the checkpoint of a tiny random model, and questions."""
    monkeypatch.chdir(tmp_path)
    model = tiny_gpt()
    config = vars(model.config) | {}
    checkpoint = {"model_config": config, "model": model.state_dict(), "tokenizer": BYTES}
    torch.save(checkpoint, tmp_path / "slm.pt")
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
    assert all(r["correct"] == is_equiv(r["prediction"], r["gold"]) for r in records)
    right = sum(r["correct"] for r in records)
    out = capsys.readouterr().out
    lo, hi = wilson_interval(right, 3)
    assert f"demo: {right} of 3 right, {right / 3:.1%}" in out and f"{lo:.1%} to {hi:.1%}" in out
    assert "slm.demo.answers.jsonl" in out


def test_a_file_as_task_has_examples_by_default(folder, capsys):
    arguments = ["--ckpt", "slm.pt", "--task", "data/demo/questions.jsonl", "--out", "new/a.jsonl"]
    main([*arguments, "--max_new_tokens", "20"])
    records = [json.loads(line) for line in (folder / "new/a.jsonl").open()]
    assert all(0 < r["shots"] < 8 for r in records)  # 8 do not fit into 256 bytes
    assert "4 prompts shortened" in capsys.readouterr().out
    main([*arguments, "--max_new_tokens", "20", "--shots", "1"])
    assert [json.loads(line)["shots"] for line in (folder / "new/a.jsonl").open()] == [1] * 4


def refused(arguments, capsys):
    """The one line (bar aside) that main prints to stderr, having left with status 2."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if "batch/s" not in line]
    assert out == "" and len([line for line in lines if line.strip()]) == 1, err
    return lines[-1]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "--ckpt"),
        (["--ckpt", "none.pt"], "none.pt not found. Run: python rho.py --stage slm"),
        (["--ckpt", "cut.pt"], "cut.pt"),
        (["--ckpt", "empty.pt"], "empty.pt"),
        (["--ckpt", "text.pt"], "text.pt"),
        (["--ckpt", "other.pt"], "other.pt"),
        (["--ckpt", "no_tokenizer.pt"], "no_tokenizer.pt"),
        (["--ckpt", "wrong_shape.pt"], "wrong_shape.pt"),
        (["--ckpt", "."], "."),
        (["--task", "gsm9k"], "gsm9k"),
        (["--task", "none.jsonl"], "none.jsonl"),
        (["--task", "bad.jsonl"], "bad.jsonl:1"),
        (["--data", "data/none"], "python prepare_data.py"),
        (["--n", "0"], "--n"),
        (["--n", "-3"], "--n"),
        (["--n", "many"], "--n"),
        (["--shots", "-1"], "--shots"),
        (["--shots", "9"], "--shots"),
        (["--batch_size", "0"], "--batch_size"),
        (["--max_new_tokens", "0"], "--max_new_tokens"),
        (["--device", "abacus"], "--device"),
        (["--temperature", "1"], "--temperature"),
        (["--max", "5"], "--max"),  # no abbreviations
        (["--out", "slm.pt/a.jsonl"], "slm.pt"),
    ],
)
def test_bad_input(folder, capsys, arguments, said):
    whole = (folder / "slm.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint")
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


def test_long_error_of_loading_is_one_line(folder, capsys, monkeypatch):
    def mismatch(*_):
        raise RuntimeError("Error(s) in loading state_dict:\n\tsize mismatch\n\tand another")

    monkeypatch.setattr(eval_math, "load_model", mismatch)
    assert "slm.pt" in refused(["--ckpt", "slm.pt"], capsys)


@pytest.mark.parametrize("fails", ["replace", "dumps"])
def test_full_disk_leaves_the_old_file_and_nothing_else(folder, capsys, monkeypatch, fails):
    (folder / "a.jsonl").write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os if fails == "replace" else eval_math.json, fails, full)
    before = sorted(folder.rglob("*"))
    said = refused(["--ckpt", "slm.pt", "--out", "a.jsonl", "--max_new_tokens", "5"], capsys)
    assert "No space left on device" in said and "a.jsonl" in said
    assert (folder / "a.jsonl").read_text() == "old" and sorted(folder.rglob("*")) == before


def test_help_explains_each_flag(capsys):
    with pytest.raises(SystemExit) as error:
        main(["-h"])
    assert error.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for flag in (
        "ckpt",
        "task",
        "data",
        "n",
        "shots",
        "batch_size",
        "max_new_tokens",
        "out",
        "device",
    ):
        usage = text.split("options:")[1].split(f"--{flag} ", 1)[1]
        assert re.match(r"(\{[^}]*\}|[A-Z_]+) [a-zA-Z(]", usage), flag
