"""Top-KAST without a framework: an MLP with a hand-written backward pass, in NumPy.

pip install topkast scikit-learn
python examples/numpy_mlp.py
"""

import numpy as np
from sklearn.datasets import load_digits

import topkast

STEPS, BATCH = 400, 64

rng = np.random.default_rng(0)
digits = load_digits()
inputs = (digits.data / 16).astype(np.float32)
labels = digits.target
train, test = np.arange(1400), np.arange(1400, len(labels))


def forward(weights, batch):
    hidden = np.maximum(batch @ weights["hidden"] + weights["bias"], 0)
    return hidden, hidden @ weights["output"]


def gradients(weights, batch, wanted):
    """Of the mean cross-entropy."""
    hidden, scores = forward(weights, batch)
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    error = scores / scores.sum(axis=1, keepdims=True)
    error[np.arange(len(wanted)), wanted] -= 1
    error /= len(wanted)
    back = error @ weights["output"].T * (hidden > 0)
    return {"hidden": batch.T @ back, "bias": back.sum(axis=0), "output": hidden.T @ error}


params = {
    "hidden": rng.normal(0, 1 / 8, (64, 200)).astype(np.float32),
    "bias": np.zeros(200, dtype=np.float32),
    "output": rng.normal(0, 1 / 14, (200, 10)).astype(np.float32),
}
optimizer = topkast.wrap_optimizer(
    topkast.AdamW(3e-3), fwd=0.9, bwd=0.8, refresh_every=10, dense="output"
)
state = optimizer.init(params)
for _ in range(STEPS):
    chosen = rng.choice(train, BATCH)
    alpha = topkast.forward_params(params, state)
    grads = gradients(alpha, inputs[chosen], labels[chosen])
    updates, state = optimizer.update(grads, state, params)
    params = topkast.apply_updates(params, updates)

_, scores = forward(topkast.forward_params(params, state), inputs[test])
accuracy = (scores.argmax(axis=1) == labels[test]).mean()
print(topkast.summary(state, params))
print(f"test accuracy {accuracy:.1%}")
