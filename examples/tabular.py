"""Which measurements make a network call a tumour malignant?"""

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

import dlbc

data = load_breast_cancer()
values = torch.tensor(data.data, dtype=torch.float32)
values = (values - values.mean(0)) / values.std(0)
classes = torch.tensor(data.target)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))
optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(100):
    optimiser.zero_grad()
    nn.functional.cross_entropy(model(values), classes).backward()
    optimiser.step()

explainer = dlbc.compile(model, values[:1], rules="epsilon")
explanation = explainer(values[:2])  # two samples in one batch
explanation = explanation.with_features(data.feature_names).with_labels(data.target_names)

explanation.show()
print(explanation.conservation().summary())
