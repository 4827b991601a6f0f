"""Which experts know capitals? A tiny mixture of experts learns three kinds of sentences, and we ask why it answers so.

    python examples/experts.py [--picture chromium]

Trains in a minute or two, prints the experts that decided each answer, and writes experts.html. `--picture` makes
docs/images/experts.png of it with that browser.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import dlbc
from dlbc_runtime.explanation import Explanation

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Poland": "Warsaw", "Norway": "Oslo",
            "Greece": "Athens", "Egypt": "Cairo", "Japan": "Tokyo", "Peru": "Lima", "Cuba": "Havana",
            "Kenya": "Nairobi", "Austria": "Vienna"}
OPPOSITES = {"hot": "cold", "big": "small", "up": "down", "fast": "slow", "old": "new", "light": "dark",
             "rich": "poor", "wet": "dry", "hard": "soft", "loud": "quiet"}
SENTENCES = [*(f"The capital of {country} is {city}" for country, city in CAPITALS.items()),
             *(f"The opposite of {one} is {other}" for pair in OPPOSITES.items() for one, other in (pair, pair[::-1])),
             *(f"The sum of {a} and {b} is {a + b}" for a in range(10) for b in range(10))]
WORDS = ["<pad>", *sorted({word for sentence in SENTENCES for word in sentence.split()})]
ASKED = ("The capital of France is", "The opposite of hot is", "The sum of 3 and 4 is")
TO = Path(__file__).parents[1] / "docs" / "images" / "experts.png"


def ids_of(sentence: str) -> torch.Tensor:
    return torch.tensor([WORDS.index(word) for word in sentence.split()])


def trained(steps: int = 800) -> Qwen2MoeForCausalLM:
    """Four layers of 16 experts, 2 for each word, that learn the last word of every sentence by heart."""
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(Qwen2MoeConfig(
        vocab_size=len(WORDS), hidden_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        num_experts=16, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.02, pad_token_id=0, eos_token_id=None,
        max_position_embeddings=16, use_cache=False))
    ids = torch.nn.utils.rnn.pad_sequence([ids_of(sentence) for sentence in SENTENCES], batch_first=True)
    mask = (ids != 0).long()
    places, rows = mask.sum(1) - 1, torch.arange(len(ids))
    labels = torch.full_like(ids, -100)
    labels[rows, places] = ids[rows, places]
    # The three kinds are drawn equally often, though there are more sums.
    weights = torch.tensor([1 / len(CAPITALS)] * len(CAPITALS) + [0.05] * 20 + [0.01] * 100)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        drawn = torch.multinomial(weights, 64, replacement=True)
        model(input_ids=ids[drawn], attention_mask=mask[drawn], labels=labels[drawn]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
    model.eval().config.output_router_logits = False
    with torch.no_grad():
        said = model(input_ids=ids, attention_mask=mask).logits[rows, places - 1].argmax(-1)
    print(f"{(said == ids[rows, places]).float().mean():.0%} of the sentences are known")
    return model


def explained(model: Qwen2MoeForCausalLM) -> list[Explanation]:
    """What the model says to each question, and why."""
    ids = ids_of(ASKED[0])[None]
    explainer = dlbc.compile(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, rules="attnlrp",
                             cache=False)
    found = []
    for sentence in ASKED:
        ids = ids_of(sentence)[None]
        explanation = explainer(input_ids=ids, attention_mask=torch.ones_like(ids))
        found.append(explanation.with_tokens([sentence.split()]).with_labels(WORDS))
    return found


def picture(explanation: Explanation, browser: str) -> None:
    from PIL import Image

    assert explanation.experts is not None
    with tempfile.TemporaryDirectory() as folder:
        page, shot = explanation.experts.save(Path(folder) / "page.html"), Path(folder) / "shot.png"
        subprocess.run([browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
                        "--disable-background-networking", "--force-device-scale-factor=1",
                        f"--user-data-dir={folder}/profile", "--window-size=1000,1255", f"--screenshot={shot}",
                        page.as_uri()], check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").point(lambda shade: 3 * round(shade / 3)).save(TO, optimize=True)
    print(f"wrote {TO}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--picture", metavar="BROWSER")
    browser = parser.parse_args().picture
    found = explained(trained())
    for explanation in found:
        assert explanation.experts is not None
        explanation.experts.show()
    print(f"wrote {found[0].save('experts.html')}")
    if browser is not None:
        picture(found[0], browser)
    return 0


if __name__ == "__main__":
    sys.exit(main())
