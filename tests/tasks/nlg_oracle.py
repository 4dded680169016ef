"""Write nlg_corpus.json: what the programs of the official scripts say of the texts in it. Not a test.

    pip install --no-deps --target DIR pycocoevalcap==1.2 gem-metrics-fork==0.1.dev0
    PYTHONPATH=DIR python tests/tasks/nlg_oracle.py

pycocoevalcap brings MS-COCO's ROUGE-L and CIDEr, Stanford's tokenizer and METEOR 1.5 (both need Java);
gem-metrics-fork the Python BLEU and NIST of tuetschek/e2e-metrics.
"""

import importlib.util
import json
from pathlib import Path

HERE = Path(__file__).parent / "nlg_corpus.json"


def main() -> None:
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    package = importlib.util.find_spec("gem_metrics_fork")  # found, not imported: that would need all it names
    spec = importlib.util.spec_from_file_location("m", Path(package.submodule_search_locations[0]) / "impl/pymteval.py")
    mteval = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mteval)

    corpus = json.loads(HERE.read_text())
    written, wanted = corpus["hypotheses"], corpus["references"]
    words = PTBTokenizer()
    refs = words.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(wanted)})
    hyps = words.tokenize({i: [{"caption": text}] for i, text in enumerate(written)})
    bleu, nist = mteval.BLEUScore(), mteval.NISTScore()
    for text, texts in zip(written, wanted, strict=True):
        bleu.append(text, texts)
        nist.append(text, texts)
    corpus["scores"] = {
        "BLEU": 100 * bleu.score(),
        "NIST": nist.score(),
        "METEOR": 100 * Meteor().compute_score(refs, hyps)[0],
        "ROUGE-L": 100 * float(Rouge().compute_score(refs, hyps)[0]),
        "CIDEr": float(Cider().compute_score(refs, hyps)[0]),
    }
    found = words.tokenize({i: [{"caption": text}] for i, text in enumerate(corpus["texts"])})
    corpus["words"] = [found[i][0] for i in range(len(corpus["texts"]))]
    HERE.write_text(json.dumps(corpus, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
