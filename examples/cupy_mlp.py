"""Top-KAST without a framework: an MLP with a hand-written backward pass, in CuPy or in NumPy.

python3 -m pip install . scikit-learn  # '.[cupy]' (CUDA 12) or '.[cupy13]' for a GPU
python examples/cupy_mlp.py [FOLDER]

With a folder, on the MNIST digits in the IDX files in it (t10k-images-idx3-ubyte.gz and
t10k-labels-idx1-ubyte.gz); without one, on scikit-learn's digits. Without a GPU the same code runs
on NumPy arrays: batches and first weights are drawn by NumPy, so that both learn the same.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import topkast_cupy
from sklearn.datasets import load_digits

import topkast

STEPS, BATCH, HIDDEN = 400, 64, 200

reason = topkast_cupy.why_unavailable()
if reason:
    print(f"{reason}. NumPy it is.")
    import numpy as xp
else:
    import cupy as xp


def load(arguments):
    """Images (n, pixels) in [0, 1], labels (n,)."""
    if not arguments:
        digits = load_digits()
        return (digits.data / 16).astype(np.float32), digits.target
    folder = Path(arguments[0])
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"t10k-{name}-ubyte.gz").read_bytes()), np.uint8)
        for name in ("images-idx3", "labels-idx1")
    )
    labels = labels[8:].astype(np.int64)
    return (images[16:].reshape(len(labels), -1) / 255).astype(np.float32), labels


def forward(weights, batch):
    hidden = xp.maximum(batch @ weights["hidden"] + weights["bias"], 0)
    return hidden, hidden @ weights["output"]


def gradients(weights, batch, wanted):
    """Of the mean cross-entropy."""
    hidden, scores = forward(weights, batch)
    scores = xp.exp(scores - scores.max(axis=1, keepdims=True))
    error = scores / scores.sum(axis=1, keepdims=True)
    error[xp.arange(len(wanted)), wanted] -= 1
    error /= len(wanted)
    back = error @ weights["output"].T * (hidden > 0)
    return {"hidden": batch.T @ back, "bias": back.sum(axis=0), "output": hidden.T @ error}


rng = np.random.default_rng(0)
images, digits = load(sys.argv[1:])
inputs, labels = xp.asarray(images), xp.asarray(digits)
pixels, count = images.shape[1], len(digits) * 4 // 5  # the first ones train

params = {
    "hidden": rng.normal(0, pixels**-0.5, (pixels, HIDDEN)),
    "bias": np.zeros(HIDDEN),
    "output": rng.normal(0, HIDDEN**-0.5, (HIDDEN, 10)),
}
params = {name: xp.asarray(param.astype(np.float32)) for name, param in params.items()}
optimizer = topkast.wrap_optimizer(
    topkast.AdamW(3e-3), fwd=0.9, bwd=0.8, refresh_every=10, dense="output"
)
state = optimizer.init(params)
for _ in range(STEPS):
    chosen = xp.asarray(rng.choice(count, BATCH))
    alpha = topkast.forward_params(params, state)
    grads = gradients(alpha, inputs[chosen], labels[chosen])
    params, state = optimizer.step(grads, state, params)

_, scores = forward(topkast.forward_params(params, state), inputs[count:])
accuracy = float((scores.argmax(axis=1) == labels[count:]).mean())
print(topkast.summary(state, params))
print(f"test accuracy {accuracy:.1%}")
