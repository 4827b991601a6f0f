"""Choosing rules by kind of operation and by module: the first that matches wins, a preset does the rest."""

import torch
from torch import nn

import dlbc

torch.manual_seed(0)
model = nn.Sequential()
model.add_module("stem", nn.Conv2d(3, 8, 3, padding=1))
model.add_module("act", nn.ReLU())
model.add_module("body", nn.Conv2d(8, 8, 3, padding=1))
model.add_module("pool", nn.AdaptiveAvgPool2d(1))
model.add_module("flat", nn.Flatten())
model.add_module("head", nn.Linear(8, 4))
image = torch.rand(1, 3, 16, 16)

rules = dlbc.Composite([("stem", "absolute"),  # this module, by its path; `encoder.*` works too
                        ("convolution", "epsilon(1e-3)"),  # all other convolutions, with its parameter
                        ], base="epsilon")  # everything else
explainer = dlbc.compile(model, image, rules=rules)

for row in explainer.rules():
    print(f"{row.place:6} {row.op:18} <{row.rule}>")
print(explainer(image, target=2).conservation().summary())
