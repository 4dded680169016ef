"""Metrics of generated text: against the official scripts' programs (see nlg_oracle.py), and by hand."""

import json
import math
import stat
import sys
from pathlib import Path

import pytest

from trimtab.errors import ConfigError, DataError
from trimtab.tasks import nlg
from trimtab.tasks.ptb import tokenize

CORPUS = json.loads((Path(__file__).parent / "nlg_corpus.json").read_text(encoding="utf-8"))
WRITTEN, WANTED = CORPUS["hypotheses"], CORPUS["references"]

ALL = [nlg.bleu, nlg.nist, nlg.rouge_l, nlg.cider, nlg.rouge, nlg.meteor_nltk, nlg.score_generated]


class NoWordnet:
    """NLTK's reader where its data was never downloaded."""

    def ensure_loaded(self):
        raise LookupError("Resource wordnet not found")


class EmptyWordnet:
    """A WordNet without synonyms."""

    def ensure_loaded(self):
        pass

    def synsets(self, word):
        return []


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Put a program of our own on the PATH as `java`; it is given as the body of a Python script."""

    def put(body):
        program = tmp_path / "bin" / "java"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!{sys.executable}\nimport sys\n{body}", encoding="utf-8")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(program.parent))
        jar = tmp_path / "some.jar"
        jar.touch()
        return str(jar)

    return put


# The words of an answer, and what share of them its references have; each example's, then the corpus's.
METEOR = """
import json, os
sys.stdin.reconfigure(encoding="utf-8")
heard = [" ".join(sys.argv[1:]), os.getcwd()]
for line in sys.stdin:
    heard.append(line.rstrip("\\n"))
    open("heard.json", "w").write(json.dumps(heard))
    kind, *parts = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        *refs, text = parts
        known = {word for ref in refs for word in ref.split()}
        print(len(text.split()), sum(word in known for word in text.split()), flush=True)
    else:
        counts = [[int(n) for n in part.split()] for part in parts]
        for n, hits in counts:
            print(hits / n)
        print(sum(hits for _, hits in counts) / sum(n for n, _ in counts), flush=True)
"""


@pytest.mark.parametrize(
    ("metric", "name"), [(nlg.bleu, "BLEU"), (nlg.nist, "NIST"), (nlg.rouge_l, "ROUGE-L"), (nlg.cider, "CIDEr")]
)
def test_a_metric_is_the_official_programs(metric, name):
    """Each metric equals the official script's own program on a corpus with 1 to 4 references."""
    assert metric(WRITTEN, WANTED) == pytest.approx(CORPUS["scores"][name], rel=1e-9)


@pytest.mark.parametrize("metric", [nlg.bleu, nlg.nist, nlg.rouge_l, nlg.cider])
def test_the_order_of_references_says_nothing(metric):
    """References may come in any order."""
    turned = [list(reversed(texts)) for texts in WANTED]
    assert metric(WRITTEN, turned) == pytest.approx(metric(WRITTEN, WANTED), rel=1e-12)


@pytest.mark.parametrize(("text", "words"), list(zip(CORPUS["texts"], CORPUS["words"], strict=True)))
def test_words_are_stanfords(text, words):
    """The words of a text are those of Stanford's tokenizer as the MS-COCO scripts use it."""
    assert tokenize([text]) == [words.split()]


def test_nist_is_mteval_v13as():
    """NIST equals mteval-v13a's on Papineni's example with three references (figures: nltk/nltk pull request 3901).

    Those were made with the case of letters kept, so that "Party" was another word than "party": "faction" here.
    """
    references = [
        "It is a guide to action that ensures that the military will forever heed faction commands",
        "It is the guiding principle which guarantees the military forces always being under the command of "
        "the faction",
        "It is the practical guide for the army always to heed the directions of the party",
    ]
    good = "It is a guide to action which ensures that the military always obeys the commands of the party"
    bad = "It is to insure the troops forever hearing the activity guidebook that party direct"
    assert nlg.nist([good], [references]) == pytest.approx(5.0379, abs=5e-5)
    assert nlg.nist([bad], [references]) == pytest.approx(2.1139, abs=5e-5)


def test_nist_by_hand():
    """Two words of three, each log2(3) bits; 2/3 of the length halves it. Pairs tell nothing more."""
    assert nlg.nist(["a b"], [["a b"]]) == pytest.approx(1.0)
    assert nlg.nist(["a b"], [["a b c"]]) == pytest.approx(math.log2(3) / 2)


def test_bleu_by_hand():
    """4/5, 3/4, 2/3 and 1/2 of the n-grams are matched, in any case of letters; the nearest length is the shorter."""
    references = [["a b c d e"], ["one two"]]
    assert nlg.bleu(["A b C d x", "one two"], references) == pytest.approx(100 * (6 / 7 * 4 / 5 * 2 / 3 / 2) ** 0.25)
    short = nlg.bleu(["a b c d"], [["a b c d e", "a b c d e f g h", "q"]])
    assert short == pytest.approx(100 * math.exp(1 - 5 / 4))
    # No triple and no quadruple is matched: mteval counts 1/2 and 1/4 of one.
    assert nlg.bleu(["a b c d e"], [["a b x y z"]]) == pytest.approx(100 * (2 / 5 / 4 / (2 * 3) / (4 * 2)) ** 0.25)


def test_rouge_l_by_hand():
    """Precision 3/4 is the first reference's, recall 1 the second's; recall weighs 1.44 times as much."""
    assert nlg.rouge_l(["a b c d"], [["a b c e f g h", "a"]]) == pytest.approx(100 * 2.44 * 0.75 / (1 + 1.44 * 0.75))
    assert nlg.rouge_l(["a", "b"], [["a"], ["c"]]) == pytest.approx(50)
    assert nlg.rouge_l([""], [["a"]]) == 0


def test_cider_by_hand():
    """Texts of two words have two orders of four, so 5 at most; a word in all documents weighs nothing."""
    assert nlg.cider(["a b", "c d"], [["a b"], ["c d"]]) == pytest.approx(5)
    assert nlg.cider(["a b", "a d"], [["a b"], ["a d"]]) == pytest.approx(5)
    assert nlg.cider(["a x", "c d"], [["a b"], ["a d"]]) == pytest.approx(10 * (1 / math.sqrt(2)) / 4 / 2)
    assert nlg.cider(["a b c d"], [["a b c d"]]) == 0


def test_cider_punishes_another_length():
    """Eight pairs too many cost exp(-64/72); the weights of what was added turn the vector, too."""
    one = nlg.cider(["a", "z"], [["a"], ["z"]])
    longer = nlg.cider(["a a a a a a a a a", "z"], [["a"], ["z"]])
    assert one == pytest.approx(2.5)
    # "a" nine times is cut off at the reference's one, over the norm of nine.
    assert longer == pytest.approx((10 / 4) * (math.exp(-64 / 72) / 9 + 1) / 2)


def test_rouge_is_rouge_scores():
    """The best reference of each example; 'pubs' has the stem of 'pub', unless stems are off."""
    found = nlg.rouge(["the pubs", "x"], [["the pub", "no"], ["x"]])
    assert found == pytest.approx({"ROUGE-1": 100, "ROUGE-2": 50, "ROUGE-L": 100})
    assert nlg.rouge(["the pubs"], [["the pub"]], stem=False)["ROUGE-1"] == pytest.approx(50)


def test_without_wordnet_there_is_no_meteor(monkeypatch):
    """Neither METEOR is made up where nothing can compute it."""
    monkeypatch.setattr("nltk.corpus.wordnet", NoWordnet())
    scores = nlg.score_generated(WRITTEN, WANTED)
    assert list(scores) == ["BLEU", "NIST", "ROUGE-L", "CIDEr"]
    assert scores == pytest.approx({name: CORPUS["scores"][name] for name in scores})
    with pytest.raises(ConfigError, match=r"nltk\.downloader wordnet"):
        nlg.meteor_nltk(WRITTEN, WANTED)


def test_nltks_meteor_has_its_own_name(monkeypatch):
    """NLTK's metric never stands in the papers' column."""
    monkeypatch.setattr("nltk.corpus.wordnet", EmptyWordnet())
    scores = nlg.score_generated(["The oak tree.", "x"], [["no", "the oak tree!"], ["y"]])
    assert list(scores) == ["BLEU", "NIST", "METEOR (NLTK)", "ROUGE-L", "CIDEr"]
    # One chunk of three words: 1 - 0.5 * (1/3)^3; the other example has no match.
    assert scores["METEOR (NLTK)"] == pytest.approx(100 * (1 - 0.5 / 27) / 2)


def test_the_meteor_program_is_spoken_to(fake_java, tmp_path):
    """The program gets MS-COCO's words line by line, all its counts at the end, and its last figure is the score."""
    jar = fake_java(METEOR)
    scores = nlg.score_generated(["Le Café, ok ||| fine.", "No"], [["A café!", "Le x"], ["Yes"]], meteor_jar=jar)
    assert list(scores) == ["BLEU", "NIST", "METEOR", "ROUGE-L", "CIDEr"]
    assert scores["METEOR"] == pytest.approx(100 * 2 / 8)
    assert json.loads((tmp_path / "heard.json").read_text()) == [
        f"-Xmx2G -Dfile.encoding=UTF-8 -jar {jar} - - -stdio -l en -norm",
        str(tmp_path),
        "SCORE ||| a café ||| le x ||| le café ok | | | fine",
        "SCORE ||| yes ||| no",
        "EVAL ||| 7 2 ||| 1 0",
    ]


def test_a_meteor_program_that_fails_says_why(fake_java):
    """A program that ends or babbles is an error with its own words, not a hang or a wrong figure."""
    jar = fake_java("print('Exception: no table', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(ConfigError, match=r"meteor_jar.*status 3.*no table"):
        nlg.meteor(["a"], [["a"]], jar)
    jar = fake_java("for line in sys.stdin: print('what?\\nwhat?', flush=True)")
    with pytest.raises(ConfigError, match=r"answered 'what\?'"):
        nlg.meteor(["a"], [["a"]], jar)


def test_the_tokenizer_jar_makes_the_words(fake_java):
    """With the jar, its words are used: here those of a program that turns x into a."""
    jar = fake_java("for line in sys.stdin: print(line.replace('x', 'a').rstrip(), '.')")
    assert tokenize(["x  b", "", "c"], jar) == [["a", "b"], [], ["c"]]
    assert nlg.rouge_l(["x"], [["a"]]) == 0
    assert nlg.rouge_l(["x"], [["a"]], tokenizer_jar=jar) == pytest.approx(100)
    assert nlg.cider(["x", "b"], [["a"], ["b"]], tokenizer_jar=jar) == pytest.approx(2.5)
    jar = fake_java("sys.exit('Could not find or load main class')")
    with pytest.raises(ConfigError, match=r"tokenizer_jar.*main class"):
        tokenize(["x"], jar)


def test_a_jar_that_cannot_be_run(tmp_path, fake_java, monkeypatch):
    """A missing jar and a missing Java are named."""
    jar = fake_java("")
    with pytest.raises(ConfigError, match=r"meteor_jar = '.*none.jar': no such file"):
        nlg.score_generated(["a"], [["a"]], meteor_jar=str(tmp_path / "none.jar"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"tokenizer_jar = .*no `java`"):
        nlg.score_generated(["a"], [["a"]], tokenizer_jar=jar)


@pytest.mark.parametrize("metric", ALL)
def test_what_cannot_be_scored(metric):
    """No example, lengths that differ, an example without references: none of them is a score."""
    for hypotheses, references, what in [
        ([], [], "no hypotheses"),
        (["a"], [["a"], ["b"]], "1 hypotheses, but references for 2"),
        (["a", "b"], [["a"], []], "example 1 has no reference"),
        (["a"], [["a", " "]], "example 0: a reference is empty"),
        (["a"], ["a"], "give a list of texts"),
    ]:
        with pytest.raises(DataError, match=what):
            metric(hypotheses, references)


@pytest.mark.parametrize(("module", "metric"), [("sacrebleu", nlg.bleu), ("rouge_score", nlg.rouge)])
def test_a_missing_extra(module, metric, monkeypatch):
    """A library that is not installed is named with the way to have it."""
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"{module}.rouge_scorer", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[tasks\]'"):
        metric(["a"], [["a"]])
