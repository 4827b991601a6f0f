"""Key-value recall with a known answer: small GPT-2- and LLaMA-type models, trained on the spot.

A context holds pairs "key value" strewn among filler tokens; the last token asks for a key, and the next must be its
value. In the items the pair asked for stands in the first quarter of the context, so that the answer depends on an
early token, which is known: the right answer of a faithful explanation is known too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.faithfulness.dataset import DataSet, Split
from benchmarks.faithfulness.storage import trained
from dlbc.evaluate import Item, Tokens, delete, replace, zero

KEYS, VALUES, FILLERS = 16, 16, 16
VOCABULARY = KEYS + VALUES + FILLERS
PAIRS, LENGTH, EARLY, BATCH, RATE = 5, 48, 12, 32, 4e-3
FIRST_FILLER = KEYS + VALUES


def contexts(count: int, *, early: bool, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Contexts [N, 48] that end in the key asked for, the values asked for [N], and where the pair's key stands [N].

    Keys are different from each other; fillers stand anywhere between pairs. `early`: the pair is within the first 12.
    """
    draw = functools.partial(torch.rand, generator=generator)
    keys = draw(count, KEYS).argsort(1)[:, :PAIRS]
    values = KEYS + draw(count, VALUES).argsort(1)[:, :PAIRS]
    free = LENGTH - 1 - 2 * PAIRS
    slots = draw(count, PAIRS + free).argsort(1)[:, :PAIRS].sort(1).values  # pairs and fillers, as slots in order
    if early:
        slots = slots - slots[:, :1] + slots[:, :1] % (EARLY - 1)
    starts = slots + torch.arange(PAIRS)
    tokens = FIRST_FILLER + (draw(count, LENGTH) * FILLERS).long()
    tokens.scatter_(1, starts, keys).scatter_(1, starts + 1, values)
    asked = torch.zeros(count, dtype=torch.long) if early else (draw(count) * PAIRS).long()
    rows = torch.arange(count)
    tokens[:, -1] = keys[rows, asked]
    return tokens, values[rows, asked], starts[rows, asked]


def recall(architecture: str, split: Split) -> DataSet:
    """`gpt2` or `llama`: 2 layers, 64 wide. 300 contexts to tune, 300 held out, of those answered right."""
    model = trained(f"{architecture}-recall", _BUILD[architecture], _train, version=2)
    generator = torch.Generator().manual_seed({"tune": 1, "held": 2}[split])
    tokens, answers, places = contexts(300, early=True, generator=generator)
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
    right = logits.argmax(1) == answers
    rows = right.nonzero().flatten().tolist()
    items = tuple(Item({"input_ids": tokens[row:row + 1]}, target=int(answers[row])) for row in rows)
    truth = tuple((int(places[row]), int(places[row]) + 1) for row in rows)
    fills = (delete, replace(range(FIRST_FILLER, VOCABULARY)), zero)
    return DataSet(f"{architecture}-recall", "lm", model, items, Tokens(last=1), fills, tuple(range(len(items))),
                   float(right.float().mean()), split, truth, batch=128)


def _train(model: nn.Module) -> None:
    """Loss where the next token is known: in sequences repeated, at keys asked for after bare pairs, and after contexts
    with fillers. (Learned from the last alone, recall takes twenty times as long.)

    A stage ends when nearly all is answered right, or at its number of steps: recall is learned in jumps.
    """
    for draw, steps, enough in ((_repeated, 4000, 0.95), (_bare, 1200, 0.98), (_asked, 1200, 0.995)):
        _stage(model, draw, steps, enough)


def _stage(model: nn.Module, draw: Callable[[], tuple[Tensor, int, int]], steps: int, enough: float) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.01)
    recent = 0.0
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50, max(0.05, 3 * (1 - recent)))
        tokens, start, stride = draw()
        logits = model(input_ids=tokens[:, :-1]).logits[:, start::stride]
        answers = tokens[:, start + 1::stride]
        optimiser.zero_grad(set_to_none=True)
        F.cross_entropy(logits.flatten(0, 1), answers.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        recent = 0.95 * recent + 0.05 * float((logits.argmax(-1) == answers).float().mean())
        if recent > enough:
            break


def _repeated() -> tuple[Tensor, int, int]:
    """Any tokens, then the same once more; where what is known starts, and its stride."""
    length = int(torch.randint(6, 14, ()))
    once = torch.randint(0, VOCABULARY, (BATCH, length))
    return torch.cat([once, once], 1), length, 1


def _bare() -> tuple[Tensor, int, int]:
    """Pairs, then the same pairs in two other orders."""
    keys = torch.rand(BATCH, KEYS).argsort(1)[:, :PAIRS]
    values = KEYS + torch.rand(BATCH, VALUES).argsort(1)[:, :PAIRS]
    both = torch.stack([keys, values], 2)
    return torch.cat([both.flatten(1), _reordered(both), _reordered(both)], 1), 2 * PAIRS, 2


def _asked() -> tuple[Tensor, int, int]:
    """Contexts, then their pairs in another order."""
    tokens, _, _ = contexts(BATCH, early=False)
    return torch.cat([tokens[:, :-1], _reordered(_pairs(tokens))], 1), LENGTH - 1, 2


def _reordered(pairs: Tensor) -> Tensor:
    order = torch.rand(pairs.shape[:2]).argsort(1)
    return pairs.gather(1, order[..., None].expand_as(pairs)).flatten(1)


def _pairs(tokens: Tensor) -> Tensor:
    """The pairs of contexts, [N, pairs, 2]."""
    keys = (tokens[:, :-1] < KEYS).nonzero()
    places = keys[:, 1].reshape(len(tokens), PAIRS)
    return torch.stack([tokens.gather(1, places), tokens.gather(1, places + 1)], 2)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=96, n_embd=64, n_layer=2, n_head=4,
                                      resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
                                      bos_token_id=None, eos_token_id=None, initializer_range=0.1))


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=64, intermediate_size=160,
                                        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                                        max_position_embeddings=96, use_cache=False, bos_token_id=None,
                                        eos_token_id=None, initializer_range=0.05))


_BUILD: dict[str, Callable[[], nn.Module]] = {"gpt2": _gpt2, "llama": _llama}
