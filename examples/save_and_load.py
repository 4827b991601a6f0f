"""Explanations and explainers as files. Nothing in either is executed when it is loaded."""

import tempfile
from pathlib import Path

import torch
from torch import nn

import dlbc

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
values = torch.randn(2, 4)
explainer = dlbc.compile(model, values)

with tempfile.TemporaryDirectory() as folder:
    explainer.save(Path(folder) / "explainer.dlbc")  # rules, graph and code; weights=True adds the weights
    loaded = dlbc.load(Path(folder) / "explainer.dlbc", model)
    explanation = loaded(values)

    explanation.save(Path(folder) / "explanation.safetensors")  # loads again, as .json does; .html and .png to look at
    again = dlbc.Explanation.load(Path(folder) / "explanation.safetensors")

assert (again.relevance["input"] == explainer(values).relevance["input"]).all()
again.show()
