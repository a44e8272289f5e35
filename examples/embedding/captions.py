"""Which words make a caption match a picture: from nothing to a page of coloured captions.

Run from the root of the repository; every `# %%` is a cell for notebooks.

    python -m examples.embedding.captions
"""

# %% A network of two branches, trained here (half a minute at most), and its words
from pathlib import Path

import numpy as np

import onnx_lrp
from exporters import embedding
from onnx_lrp import evaluate
from onnx_lrp.explanation import save_text
from onnx_lrp.show import text_page

OUT = Path("out/embedding")
OUT.mkdir(parents=True, exist_ok=True)
embedding.main(["--out", f"{OUT}/embedding.onnx", "--tokenizer", f"{OUT}/tokenizer.json"])

# %% Three pictures (vectors of features), and captions for them
THINGS = (("dog", "ball", "beach"), ("child", "kite", "tree"), ("car", "snow", "bike"))
PICTURES = [" · ".join(things) for things in THINGS]
concepts = np.array([[embedding.CONCEPTS.index(thing) for thing in things] for things in THINGS])
image = embedding.pictures(concepts, np.random.default_rng(5))
captions = [
    "a photo of a nice dog with a ball near the beach",
    "here is the ball beside one big dog",
    "look at the child with some kite near the tree",
    "we see a small child next to the dog outside",
    "this picture shows a car and the snow",
    "there is a kite near one bike today",
]

# %% Every caption with every picture, in one call: 6 x 3 explanations, a row per pair
explainer = onnx_lrp.Explainer(
    OUT / "embedding.onnx", "epsilon", inputs=["tokens"], ledger=True, tokenizer=OUT / "tokenizer.json"
)
pairs = explainer({"tokens": captions, "image": image}, target="all")
columns = [pairs[k :: len(PICTURES)] for k in range(len(PICTURES))]
print("\ncaptions x pictures, relevance of words + taken by biases = similarity")
for caption, row in zip(captions, np.arange(len(pairs)).reshape(len(captions), -1), strict=True):
    sums = "   ".join(
        f"{words:+.2f} {biases:+.2f} = {score:+.2f}"
        for words, biases, score in zip(pairs.total()[row], pairs.absorbed[row], pairs.score[row], strict=True)
    )
    print(f"{caption:50}  {sums}")
heading = "Which words make a caption match a picture?"
save_text(OUT / "page.html", text_page(columns, PICTURES, heading, labels=PICTURES))

# %% Retrieval: which of many captions fit one picture best, and which of their words say so
scenes = embedding.scenes(300, seed=7)
candidates = explainer({"tokens": scenes.captions(), "image": image[:1]})
best = np.argsort(-candidates.score)[:6]
texts = [scenes.captions()[k] for k in best]
ranked = explainer({"tokens": texts, "image": image[:1]})
ranks = [f"rank {k + 1} of {len(candidates)}" for k in range(len(texts))]
heading = f"Captions for a picture of {PICTURES[0]}"
ranked.save(OUT / "retrieval.html", heading=heading, labels=PICTURES[:1], names=ranks)

# %% Is it right? Words that name things against all others, and what is lost without the strongest word
count = len(scenes.tokens)
found = explainer({"tokens": scenes.tokens, "image": scenes.image}, target=list(range(count)))
relevance, word = found.relevance["tokens"], scenes.tokens > 0
names = np.isin(scenes.tokens, [embedding.NUMBERS[c] for c in embedding.CONCEPTS])
wins = [(r[c][:, None] > r[w & ~c][None]).mean() for r, c, w in zip(relevance, names, word, strict=True)]
score = evaluate.Scorer(OUT / "embedding.onnx", np.arange(count))
delete, rng = evaluate.replaced_tokens("tokens", 0), np.random.default_rng(0)
lost = {}
for which, order in (("strongest", relevance), ("random", rng.random(word.shape)), ("weakest", -relevance)):
    gone = np.eye(word.shape[1], dtype=bool)[np.where(word, order, -np.inf).argmax(1)]
    feeds = delete({"tokens": scenes.tokens, "image": scenes.image}, gone)
    lost[which] = float((found.score - score(feeds)).mean())
print(f"\na word that names a thing beats one that does not in {np.mean(wins):.1%} of all pairs")
print("similarity lost without the", ", the ".join(f"{which} word {drop:.3f}" for which, drop in lost.items()))
print(f"\nwritten: {OUT}/page.html, {OUT}/retrieval.html")
