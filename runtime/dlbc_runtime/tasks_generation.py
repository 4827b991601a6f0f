"""The task "generation": text is continued by the sampler, and its explanation told in the words of `run_task`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dlbc_runtime.arrays import Array, Arrays, as_numpy
from dlbc_runtime.errors import InputError
from dlbc_runtime.generated_options import SAMPLING
from dlbc_runtime.tasks_inputs import check_ids, check_vocabulary, texts_of, tokenizer_for
from dlbc_runtime.tasks_kinds import Kinds
from dlbc_runtime.tasks_result import TaskResult, Trace

if TYPE_CHECKING:
    from dlbc_runtime.explainer import Explainer
    from dlbc_runtime.generation import GenerationExplanation
    from dlbc_runtime.tasks import Options


def generate(explainer: Explainer, inputs: object, tokenizer: Any, options: Options, kinds: Kinds, reason: str
             ) -> TaskResult:
    """Continue the prompts and explain what came. InputError for prompts and options that do not fit."""
    if tokenizer is not None or _texts(inputs) is not None:  # prompts of token ids need none
        tokenizer = tokenizer_for(explainer, tokenizer)
    prompt, longest = prompt_of(explainer, inputs, tokenizer, kinds)
    sampler = explainer.sampler(tokenizer)
    given = decoding(options.generation, options.temperature, 1 if sampler.encoder_decoder else longest)
    if options.target is not None:
        given["target"] = options.target
    if options.layers:
        given["layers"] = True
    found = sampler.generate(prompt, multiplier=options.multiplier, scaler=options.scaler, **given)
    sequences = tuple(found) if isinstance(found, list) else (found,)
    ids = ids_of(sequences, tokenizer)
    layers = [_activations(explainer, one, kinds) for one in sequences] if options.layers else []
    activations = together(layers) if layers else {}
    return TaskResult(
        "generation", reason, sequences, Arrays({kinds.name: ids, **activations}),
        Arrays(together([relevance_of(one, kinds.name) for one in sequences])),
        relevance_computed=any(len(one.explained) for one in sequences), generated_ids=ids,
        scores_trace=[step for one in sequences for step in _scores(one)] if options.scores else None,
        relevance_trace=[step for one in sequences for step in relevance_trace(one, kinds.name)]
        if options.relevance else None,
        layerwise_output_trace=[
            _until(own, int(place), len(one.ids)) for one, own in zip(sequences, layers, strict=True)
            for place in one.positions()] if options.layers else None)


def prompt_of(explainer: Explainer, inputs: object, tokenizer: Any, kinds: Kinds) -> tuple[Any, int]:
    """The prompts as the sampler takes them, and the length of the longest."""
    if inputs is None:
        raise InputError("there is no prompt", where="inputs",
                         hint="give a text, token ids, or what a tokenizer returns")
    texts = _texts(inputs)
    if texts is not None:
        check_vocabulary(tokenizer, kinds)
        rows: list[Any] = [list(row) for row in tokenizer(texts)["input_ids"]]
        check_ids(rows, kinds, tokenizer)
        return texts if isinstance(inputs, list | tuple) else texts[0], max(map(len, rows))
    if isinstance(inputs, tuple):  # inputs by position, as of a call of the model
        inputs = dict(zip(explainer.manifest.inputs.positional, inputs, strict=False))
    if isinstance(inputs, Mapping):
        if kinds.name not in inputs and "input_ids" not in inputs:
            raise InputError(f"there are no `{kinds.name}` among {', '.join(map(str, inputs))}", where="inputs",
                             hint="give what the tokenizer returns")
        ids = inputs[kinds.name if kinds.name in inputs else "input_ids"]
        inputs = {"input_ids": ids, **{name: value for name, value in inputs.items() if name == "attention_mask"}}
    else:
        ids = inputs
    several = isinstance(ids, list | tuple) and len(ids) > 0 and not np.isscalar(ids[0])
    rows = list(ids) if several else [as_numpy(ids)]
    if any(as_numpy(row).dtype.kind not in "iub" for row in rows):
        raise InputError(f"the prompt is {type(inputs).__name__}, neither text nor token ids", where="inputs",
                         hint="give a text, token ids, or what a tokenizer returns")
    check_ids(rows, kinds)
    return inputs, max(int(as_numpy(row).shape[-1]) for row in rows)


def _texts(inputs: object) -> list[str] | None:
    return texts_of(inputs["text"] if isinstance(inputs, Mapping) and "text" in inputs else inputs)


def decoding(options: Mapping[str, Any], temperature: float, longest: int) -> dict[str, Any]:
    """Options of generation as the sampler has them: what is None is left out, the strategy is told from the others
    where it is not named (`do_sample` among them), and `max_length` counts the prompt."""
    given = {name: value for name, value in options.items() if value is not None or name == "explain_tokens"}
    if given.get("num_beams") == 1:
        del given["num_beams"]
    if temperature != 1:
        given.setdefault("temperature", temperature)
    sampled = given.pop("do_sample", None)
    if "strategy" not in given:
        told = [name for name in ("top_k", "top_p", "temperature") if name in given]
        given["strategy"] = "beam_search" if "num_beams" in given else (
            told[0] if told else "temperature" if sampled else "greedy")
    if sampled is not None and bool(sampled) != (given["strategy"] in SAMPLING):
        raise InputError(f"do_sample={sampled!r}, and the strategy is {given['strategy']!r}", where="generation",
                         hint="leave do_sample out")
    if "max_length" in given:
        if "max_new_tokens" in given:
            raise InputError("max_length and max_new_tokens are both given", where="generation",
                             hint="give one of them: max_length counts the prompt too")
        whole = given.pop("max_length")
        if not isinstance(whole, int) or whole <= longest:
            raise InputError(f"max_length is {whole!r}, the prompt has {longest} tokens", where="generation",
                             hint="max_length counts the prompt too: give more, or max_new_tokens")
        given["max_new_tokens"] = whole - longest
    return given


def relevance_of(explanation: GenerationExplanation, name: str) -> dict[str, Array]:
    """Relevance [N', T] of a sequence by input, and by layer where that was asked for; nothing where none was."""
    if not len(explanation.explained):
        return {}
    found = {name: explanation.relevance, **explanation.layers}
    if explanation.source_relevance is not None:
        found = {"decoder_input_ids" if name == "input_ids" else name: explanation.relevance,
                 "input_ids": explanation.source_relevance, **explanation.layers}
    return found


def together(found: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Arrays of one sequence as they are; of several along a first axis, padded by 0 at their ends."""
    if len(found) == 1:
        return dict(found[0])
    whole: dict[str, Array] = {}
    for name in {name: None for one in found for name in one}:
        arrays = [one[name] for one in found if name in one]
        sizes = tuple(max(each) for each in zip(*(array.shape for array in arrays), strict=True))
        whole[name] = np.zeros((len(found), *sizes), arrays[0].dtype)
        for row, one in enumerate(found):
            if name in one:
                place: tuple[int | slice, ...] = (row, *(slice(size) for size in one[name].shape))
                whole[name][place] = one[name]
    return whole


def relevance_trace(explanation: GenerationExplanation, name: str) -> Trace:
    """For each explained token the relevance [1, T] of what was there when it came."""
    found, length = relevance_of(explanation, name), len(explanation.ids)
    places = explanation.positions().tolist()
    return [{key: array[row:row + 1, :place] if array.shape[1] == length else array[row:row + 1]
             for key, array in found.items()} for row, place in enumerate(places)]


def ids_of(sequences: Sequence[GenerationExplanation], tokenizer: Any) -> Array:
    """The ids of all sequences, int64 [sequences, T], padded at the end."""
    pad = getattr(tokenizer, "pad_token_id", None)
    pad = getattr(tokenizer, "eos_token_id", None) if pad is None else pad
    found = np.full((len(sequences), max(len(one.ids) for one in sequences)), pad or 0, np.int64)
    for row, one in enumerate(sequences):
        found[row, :len(one.ids)] = one.ids
    return found


def _scores(explanation: GenerationExplanation) -> Trace:
    """For each new token its id and probability, then those of the likeliest others."""
    found: Trace = []
    for number, (index, likely) in enumerate(zip(explanation.new_ids, explanation.probabilities, strict=True)):
        others = [one for one in (explanation.alternatives[number] if explanation.alternatives else ())
                  if one[0] != int(index)]
        found.append({"ids": np.array([int(index), *(one[0] for one in others)], np.int64),
                      "probabilities": np.array([float(likely), *(one[2] for one in others)], np.float32)})
    return found


def _activations(explainer: Explainer, explanation: GenerationExplanation, kinds: Kinds) -> dict[str, Array]:
    """What each module gave for the whole sequence: in a causal model that is what it gave as the tokens came."""
    if explanation.source_ids is not None:
        raise InputError("layer-wise outputs of an encoder-decoder are not kept", where="return_layerwise_output",
                         hint="call the explainer with both inputs and keep=\"modules\"")
    ids: dict[str, Any] = {kinds.name: [explanation.ids]}
    found = explainer(**ids, keep="modules", positions="all").activations
    return {name: array[0] for name, array in found.items() if array.ndim and len(array) == 1}


def _until(activations: Mapping[str, Array], place: int, length: int) -> dict[str, Array]:
    return {name: (array[:place] if array.ndim and len(array) == length else array)[None]
            for name, array in activations.items()}
