"""A PyTorch training loop with one line more: scikit-learn's digits, 90 % of the weights zero.

python3 -m pip install '.[torch]' scikit-learn
python examples/pytorch_digits.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import topkast

EPOCHS, BATCH = 20, 64

torch.manual_seed(0)
digits = load_digits()
inputs = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
train, test = slice(0, 1400), slice(1400, None)

model = nn.Sequential(
    nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)
)
optimizer = torch.optim.AdamW(model.named_parameters(), lr=2e-3)
optimizer = topkast.wrap_optimizer(optimizer, fwd=0.9, bwd=0.8, refresh_every=10, dense="4.*")
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=EPOCHS)

for _ in range(EPOCHS):
    for chosen in torch.randperm(1400).split(BATCH):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs[train][chosen]), labels[train][chosen])
        loss.backward()
        optimizer.step()
    scheduler.step()

with torch.no_grad():
    accuracy = (model(inputs[test]).argmax(1) == labels[test]).float().mean().item()
print(topkast.summary(optimizer))
print(f"test accuracy {accuracy:.1%}")
