"""A character transformer with one weight in a hundred, chosen anew at every step.

python3 -m pip install '.[torch,cpu]' matplotlib
python examples/weight_sparse_transformer.py [--steps 700] [--output FOLDER] [--seed 0]

It learns the source text of Python's standard library. All linear layers have forward sparsity
0.99 and backward sparsity 0.98; the embedding tables, which are not multiplied, stay dense. It
prints the loss while it trains, the sets of each tensor, the share of active weights and a sample
of text. FOLDER/weight_sparse_transformer.png shows the loss and the masks of the last block.
With other work on the same cores, OMP_NUM_THREADS=1 may be much faster.
"""

import argparse
import math
import sysconfig
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import topkast

CHARACTERS, CONTEXT, BATCH = 128, 64, 32  # ASCII codes; characters in a window; windows in a batch
WIDTH, HEADS, BLOCKS, LEARNING_RATE = 512, 8, 2, 2e-2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attention_out = nn.Linear(WIDTH, WIDTH)
        self.feed_in, self.feed_out = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        normed = self.attention_norm(hidden)
        query, key, value = (
            layer(normed).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).flatten(2))
        fed_forward: Tensor = self.feed_out(gelu(self.feed_in(self.feed_norm(hidden))))
        return hidden + fed_forward


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = (nn.Embedding(n, WIDTH) for n in (CHARACTERS, CONTEXT))
        self.blocks = nn.Sequential(*(Block() for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHARACTERS)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, nn.Linear):  # so large that one weight in 100 carries a signal
                nn.init.kaiming_normal_(module.weight)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, time, characters) of the character after each one of `text`."""
        hidden = self.embedding(text) + self.positions.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(hidden)))
        return logits


def read(paths: list[Path]) -> Tensor:
    """The ASCII codes of the files' text; other characters are left out."""
    text = "".join(path.read_text("ascii", errors="ignore") for path in paths)
    return torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))


def bits_per_character(windows: Tensor) -> Tensor:
    return cross_entropy(model(windows[:, :-1]).mT, windows[:, 1:]) / math.log(2)


def draw_picture(path: Path) -> None:
    from matplotlib.figure import Figure

    attention, points = ["query", "key", "value", "attention_out"], np.array(curve)
    rows: Any = [["loss"] * 4, ["loss"] * 4, attention, ["feed_out"] * 4]  # all masks at one scale
    figure = Figure(figsize=(15, 13), layout="constrained")
    axes = figure.subplot_mosaic([[*row, "feed_in"] for row in rows])
    axes["loss"].plot(points[:, 0], points[:, 1:], label=["training", "validation"])
    axes["loss"].set(xlabel="step", ylabel="bits per character", title="Loss")
    axes["loss"].legend()
    for layer in [*attention, "feed_in", "feed_out"]:
        mask = topkast.masks(optimizer)[f"blocks.{BLOCKS - 1}.{layer}.weight"].forward
        alive = f"{mask.any(0).sum()} inputs and\n{mask.any(1).sum()} outputs alive"
        axes[layer].spy(mask, marker=".", markersize=1.2, color="black")
        axes[layer].set(xlabel="input", ylabel="output", title=f"{layer}\n{alive}")
    figure.savefig(path, dpi=100)


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=700)
parser.add_argument("--output", type=Path, default=Path(), help="folder of the picture")
parser.add_argument("--seed", type=int, default=0)
arguments = parser.parse_args()
arguments.output.mkdir(parents=True, exist_ok=True)
torch.manual_seed(arguments.seed)

modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
valid = read(modules[::10])  # whole modules, which training never sees
valid_windows = valid.unfold(0, CONTEXT + 1, len(valid) // 128)
train = read([path for path in modules if path not in modules[::10]])
windows = train.unfold(0, CONTEXT + 1, 1)  # a view of all; each ends with the last target

model = Transformer()
adamw = torch.optim.AdamW(model.named_parameters(), LEARNING_RATE, betas=(0.9, 0.99))
tables = ("embedding.*", "positions.*")
optimizer = topkast.wrap_optimizer(adamw, fwd=0.99, bwd=0.98, refresh_every=1, dense=tables)
topkast.sparsify(model, optimizer)  # the same training, with sparse products
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=arguments.steps)

curve, start = [], time.perf_counter()
for step in range(1, arguments.steps + 1):
    optimizer.zero_grad()
    loss = bits_per_character(windows[torch.randint(len(windows), (BATCH,))])
    loss.backward()
    optimizer.step()
    scheduler.step()
    if step % 25 == 0 or step in (1, arguments.steps):
        with torch.no_grad():
            valid_loss = bits_per_character(valid_windows).item()
        curve.append((step, loss.item(), valid_loss))
        losses = f"training {loss:.2f}, validation {valid_loss:.2f} bits per character"
        print(f"step {step}: {losses}, {time.perf_counter() - start:.0f} s", flush=True)

print(summary := topkast.summary(optimizer))
sparse = [row for row in summary.tensors if row.forward_sparsity > 0]
active, total = sum(row.forward for row in sparse), sum(math.prod(row.shape) for row in sparse)
print(f"linear layers: {active:,} of {total:,} weights active ({active / total:.2%})\n")

text = valid[:CONTEXT]
for _ in range(400):
    logits = model(text[None, -CONTEXT:])[0, -1].detach()
    text = torch.cat([text, torch.multinomial(logits.softmax(0), 1)])
print(bytes(text[CONTEXT:].tolist()).decode())

if find_spec("matplotlib"):
    draw_picture(arguments.output / "weight_sparse_transformer.png")
else:
    print("no picture: matplotlib is not installed")
