"""Transformer-XL on characters and words, end to end on a short made text."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import topkast_torch
import torch
from paper_data import write_enwik8, write_wikitext
from test_paper_images import assert_equal, saved
from torch import Tensor

import topkast
from topkast.methods import Method, RigL, TopKAST
from topkast_paper import PaperError
from topkast_paper.language import Segments, load_enwik8, load_wikitext103
from topkast_paper.train_transformer_xl import (
    ENWIK8,
    ENWIK8_SMALL,
    WIKITEXT103,
    LanguageSettings,
    describe_layers,
    train,
)
from topkast_paper.transformer_xl import RelativeAttention, TransformerXL, encode_distances
from topkast_paper.vocabulary import Vocabulary

SIZES: dict[str, Any] = {
    "steps": 6,
    "batch": 4,
    "micro_batch": 2,
    "layers": 2,
    "width": 16,
    "heads": 2,
    "inner": 24,
    "window": 10,
    "memory": 15,
    "eval_memory": 20,
    "lr": 5e-3,
    "warm_up": 2,
    "evaluations": 2,
    "checkpoint_every": 2,
    "device": "cpu",
}
CHARACTERS = dataclasses.replace(ENWIK8, **SIZES, embed=8, parts=(1800, 100, 100))
WORDS = dataclasses.replace(WIKITEXT103, **SIZES, embed=32, cutoffs=(8, 20))


def write(settings: LanguageSettings, folder: Path) -> Path:
    return (write_enwik8 if settings.corpus == "enwik8" else write_wikitext)(folder)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [CHARACTERS, WORDS], ids=["enwik8", "wikitext"])
@pytest.mark.parametrize(
    ("method", "fwd", "bwd"), [(TopKAST(), 0.8, 0.6), (RigL(until=4), 0.9, 0.9)]
)
def test_training_keeps_exact_counts_and_resumes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: LanguageSettings,
    method: Method,
    fwd: float,
    bwd: float,
) -> None:
    text = write(settings, tmp_path / "text")
    run = dataclasses.replace(settings, method=method, fwd=fwd, bwd=bwd, refresh_every=2)
    result = train(run, text, tmp_path / "whole", seed=0)
    model = run.build(_size(text))
    assert set(result["tensors"]) == {
        name for name, param in model.named_parameters() if param.ndim > 1 and "bands" not in name
    }
    for size, forward, backward in result["tensors"].values():
        assert forward == size - math.floor(size * fwd + 1e-9)
        assert backward == size - math.floor(size * bwd + 1e-9)
    assert result["parameters"] == sum(param.numel() for param in model.parameters())
    assert 0 < result["training_fraction"] < 1
    assert [row["step"] for row in result["curve"]] == [3, 6]

    lr_after = LanguageSettings.lr_after

    def killed(self: LanguageSettings, step: int) -> float:
        if step == 5:  # the last checkpoint is after the fourth update
            raise KeyboardInterrupt
        return lr_after(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageSettings, "lr_after", killed)
        with pytest.raises(KeyboardInterrupt):
            train(run, text, tmp_path / "killed", seed=0)
    assert saved(tmp_path / "killed")["step"] == 4
    assert train(run, text, tmp_path / "killed", seed=0) == result
    assert_equal(saved(tmp_path / "killed"), saved(tmp_path / "whole"))


@pytest.mark.slow
def test_it_learns(tmp_path: Path) -> None:
    text = write_enwik8(tmp_path / "text")
    run = dataclasses.replace(CHARACTERS, multiplier=20, dropout=0.0, method=TopKAST(), fwd=0.5)
    result = train(run, text, tmp_path / "run", seed=0)
    assert result["metric"] == "bits per character"
    assert result["curve"][0]["value"] > result["curve"][-1]["value"]
    assert result["final"] < 3.9  # log2 of 27 characters: 4.75; by their frequencies: 3.5
    words = dataclasses.replace(WORDS, multiplier=10, dropout=0.0, method=TopKAST(), fwd=0.5)
    found = train(words, write_wikitext(tmp_path / "words"), tmp_path / "words_run", seed=0)
    assert found["metric"] == "perplexity"
    assert 5 < found["final"] < 25  # 33 by chance


def test_the_defaults_are_the_papers() -> None:
    with torch.device("meta"):
        sizes = [
            sum(param.numel() for param in settings.build(size).parameters())
            for settings, size in ((ENWIK8, 256), (ENWIK8_SMALL, 256), (WIKITEXT103, 267_735))
        ]
    assert [round(size / 1e6) for size in sizes] == [278, 69, 285]
    # By hand: matrices of attention and feed-forward layers; their biases, layer norms, u and v;
    # the table and its biases; the projection between 512 and 1024.
    layers = 24 * (5 * 1024**2 + 2 * 1024 * 3072 + (3072 + 1024) + 4 * 1024 + 2 * 1024)
    assert sizes[0] == layers + 256 * 512 + 256 + 512 * 1024
    assert (ENWIK8.window, ENWIK8.memory, ENWIK8.eval_memory) == (768, 2304, 5000)
    assert (WIKITEXT103.window, WIKITEXT103.memory, WIKITEXT103.eval_memory) == (512, 768, 2000)
    assert ENWIK8.lr == WIKITEXT103.lr == 2e-4
    assert ENWIK8.max_norm == 0.25


def test_the_learning_rate() -> None:
    settings = dataclasses.replace(ENWIK8, steps=10_000, multiplier=2)
    assert settings.lr_after(0) == 1e-7
    assert settings.lr_after(4000) == pytest.approx((1e-7 + 2e-4) / 2)
    assert settings.lr_after(8000) == pytest.approx(2e-4)
    assert settings.lr_after(14_000) == pytest.approx(1e-4)
    assert settings.lr_after(20_000) == pytest.approx(0)


def test_attention_by_distances_is_that_of_the_definition() -> None:
    torch.manual_seed(0)
    heads, width, earlier, time = 2, 8, 3, 4
    attention = RelativeAttention(width, heads, 0.0).double()
    torch.nn.init.normal_(attention.content_bias)
    torch.nn.init.normal_(attention.distance_bias)
    inputs = torch.randn(2, time, width, dtype=torch.float64)
    context = torch.cat((torch.randn(2, earlier, width, dtype=torch.float64), inputs), dim=1)
    positions = encode_distances(earlier + time, width, inputs.device).double()
    output = attention(inputs, context, positions)
    own = width // heads
    for sample in range(2):
        for i in range(time):
            attended = []
            for head in range(heads):
                part = slice(head * own, (head + 1) * own)
                u, v = attention.content_bias[part], attention.distance_bias[part]
                query = (attention.query.weight @ inputs[sample, i])[part]
                scores, values = [], []
                for j in range(earlier + i + 1):
                    distance = earlier + i - j
                    angles = [distance / 10_000 ** (2 * pair / width) for pair in range(width // 2)]
                    encoded = torch.tensor(
                        [*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64
                    )
                    key = (attention.key.weight @ context[sample, j])[part]
                    relative = (attention.distance.weight @ encoded)[part]
                    scores.append((query + u) @ key + (query + v) @ relative)
                    values.append((attention.value.weight @ context[sample, j])[part])
                weights = (torch.stack(scores) / own**0.5).softmax(dim=0)
                attended.append(weights @ torch.stack(values))
            expected = attention.output.weight @ torch.cat(attended)
            torch.testing.assert_close(output[sample, i], expected, rtol=1e-6, atol=1e-7)


def _small_model() -> TransformerXL:
    torch.manual_seed(1)
    model = TransformerXL(11, layers=3, width=16, heads=4, inner=32, embed=16).double().eval()
    for param in model.parameters():
        torch.nn.init.normal_(param, std=0.3)
    return model


@torch.no_grad()
def test_memory_of_the_whole_past_is_one_long_context() -> None:
    model = _small_model()
    tokens = torch.randint(11, (2, 24))
    whole, _ = model(tokens, None, keep=0)
    memory, parts = None, []
    for part in tokens.split(5, dim=1):
        hidden, memory = model(part, memory, keep=24)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-6)
    assert memory is not None
    assert memory.shape == (3, 2, 24, 16)


@torch.no_grad()
def test_a_short_memory_sees_the_last_tokens_only() -> None:
    model = _small_model()
    tokens = torch.randint(11, (1, 10))
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 11

    def last(text: Tensor, keep: int) -> Tensor:
        memory = None
        for part in text.split(1, dim=1):
            hidden, memory = model(part, memory, keep=keep)
        vectors: Tensor = hidden
        return vectors

    # Three layers see 3 · 2 tokens before the last one.
    assert torch.equal(last(tokens, 2), last(other, 2))
    assert not torch.equal(last(tokens, 4), last(other, 4))
    alone, _ = model(tokens[:, -1:], None, keep=0)
    torch.testing.assert_close(last(tokens, 0), alone)


def test_no_token_sees_the_next() -> None:
    model = _small_model()
    tokens = torch.randint(11, (1, 8))
    vectors = model.vocabulary(tokens).detach().requires_grad_()
    model.vocabulary.forward = lambda tokens: vectors  # type: ignore[method-assign]
    hidden, _ = model(tokens, None, keep=0)
    for time in range(8):
        (gradient,) = torch.autograd.grad(hidden[0, time].sum(), vectors, retain_graph=True)
        assert gradient[0, : time + 1].abs().sum(dim=1).min() > 0 or time == 7
        assert not gradient[0, time + 1 :].any()


def test_the_softmax_in_bands_is_a_distribution() -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary(20, width=8, embed=16, cutoffs=(5, 12)).double()
    for param in vocabulary.parameters():
        torch.nn.init.normal_(param)
    hidden = torch.randn(1, 8, dtype=torch.float64)
    losses = vocabulary.loss(hidden.expand(20, 8), torch.arange(20)).double()
    assert (-losses).exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert vocabulary.head is not None
    assert vocabulary.bands is not None
    first = vocabulary.head.weight @ hidden[0]
    logits = vocabulary.tables[0] @ first + vocabulary.biases[0]
    bands = vocabulary.bands.weight @ first + vocabulary.bands.bias
    scores = torch.cat((logits, bands)).log_softmax(dim=0)
    torch.testing.assert_close(-losses[:5], scores[:5], rtol=1e-5, atol=1e-6)
    inner = vocabulary.tables[2] @ (hidden[0] @ vocabulary.projections[2].get_parameter("weight"))
    expected = scores[6] + (inner + vocabulary.biases[2]).log_softmax(dim=0)
    torch.testing.assert_close(-losses[12:], expected, rtol=1e-5, atol=1e-6)
    rows = vocabulary(torch.tensor([3, 6]))
    for band, row, token in ((0, 3, 0), (1, 1, 1)):
        weight = vocabulary.projections[band].get_parameter("weight")
        expected = weight @ vocabulary.tables[band][row] * 8**0.5
        torch.testing.assert_close(rows[token], expected)


def test_evaluation_carries_the_memory(tmp_path: Path) -> None:
    """With a memory of the whole text, windows of any length give the loss of one pass."""
    text = write_enwik8(tmp_path / "text")
    run = dataclasses.replace(CHARACTERS, eval_memory=100, multiplier=0.2)
    result = train(run, text, tmp_path / "run", seed=0)
    model = run.build(256).eval()
    model.load_state_dict(saved(tmp_path / "run")["model"])
    content = torch.tensor(list((text / "enwik8").read_bytes()[-100:]))[None]
    with torch.no_grad():
        hidden, _ = model(content[:, :-1], None, keep=0)
        expected = model.loss(hidden, content[:, 1:]).mean().item() / math.log(2)
    assert result["final"] == pytest.approx(expected, rel=1e-5)


def test_the_memory_of_training_is_that_of_its_stream(tmp_path: Path) -> None:
    """Accumulation changes nothing: each micro-batch has the memory of its own streams."""
    text = write_enwik8(tmp_path / "text")
    states = []
    for size in (4, 1):
        run = dataclasses.replace(CHARACTERS, micro_batch=size, dropout=0.0, lr=1e-4)
        train(run, text, tmp_path / f"run{size}", seed=0)
        states.append(saved(tmp_path / f"run{size}"))
    for name, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][name], value, rtol=1e-3, atol=1e-5)
    (whole,), parts = (state["experiment"]["memories"] for state in states)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-3, atol=1e-4)
    assert whole.shape == (2, 4, 15, 16)


def test_the_memory_begins_anew_with_the_text(tmp_path: Path) -> None:
    text = write_enwik8(tmp_path / "text")
    run = dataclasses.replace(CHARACTERS, layers=1, steps=45, evaluations=1)
    assert len(Segments(np.arange(1800), run.batch, run.window)) == 44
    train(run, text, tmp_path / "run", seed=0)
    assert saved(tmp_path / "run")["experiment"]["memories"][0].shape == (1, 2, 10, 16)


def test_the_recipe_written_out(tmp_path: Path) -> None:
    text = write_enwik8(tmp_path / "text")
    run = dataclasses.replace(CHARACTERS, dropout=0.0, micro_batch=None, max_norm=0.01)
    train(run, text, tmp_path / "run", seed=5)
    torch.manual_seed(5)
    model = run.build(256)
    adam = torch.optim.Adam(model.parameters())
    content = torch.tensor(list((text / "enwik8").read_bytes()[:1800])).reshape(4, 450)
    memory = None
    for step in range(6):
        start = 10 * step
        hidden, memory = model(content[:, start : start + 10], memory, keep=15)
        losses = model.loss(hidden, content[:, start + 1 : start + 11])
        adam.zero_grad()
        losses.mean().backward()
        grads = [param.grad for param in model.parameters() if param.grad is not None]
        norm = torch.cat([grad.flatten() for grad in grads]).norm()
        for grad in grads:
            grad *= 0.01 / norm
        linear = 1e-7 + (5e-3 - 1e-7) * step / 2
        cosine = 5e-3 * (1 + math.cos(math.pi * (step - 2) / 4)) / 2
        adam.param_groups[0]["lr"] = linear if step < 2 else cosine
        adam.step()
    for name, value in saved(tmp_path / "run")["model"].items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [CHARACTERS, WORDS], ids=["enwik8", "wikitext"])
def test_flops_are_those_of_the_layers_as_they_run(
    tmp_path: Path, settings: LanguageSettings
) -> None:
    corpus = settings.load(write(settings, tmp_path / "text"))
    model = settings.build(corpus.size)
    layers = describe_layers(model, settings, corpus.train)
    tokens, _ = Segments(corpus.train, 2, 10)[0]
    memory = torch.zeros(2, 2, 15, 16)
    measured = topkast_torch.measure_layers(_WithMemory(model, settings.memory), (tokens, memory))
    for name, layer in layers.items():
        if name.startswith("layers"):
            assert layer.positions == measured[f"model.{name}"].positions, name
    vocabulary = model.vocabulary
    shares = [
        float(np.mean((corpus.train >= start) & (corpus.train < end)))
        for start, end in zip((0, *settings.cutoffs), (*settings.cutoffs, corpus.size), strict=True)
    ]
    for band, share in enumerate(shares):
        table = layers[f"vocabulary.tables.{band}"].positions
        assert table == pytest.approx(10 * share if band else 10)
        projection = layers[f"vocabulary.projections.{band}.weight"].positions
        both = share + (share if band else 0) if vocabulary.head is not None else 2
        assert projection == pytest.approx(10 * both)
    cost = topkast.cost(layers, method="dense")
    assert set(cost.uncounted) == set()


class _WithMemory(torch.nn.Module):
    def __init__(self, model: TransformerXL, keep: int) -> None:
        super().__init__()
        self.model = model
        self._keep = keep

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        hidden, _ = self.model(tokens, memory, keep=self._keep)
        vectors: Tensor = hidden
        return vectors


@pytest.mark.parametrize("settings", [CHARACTERS, WORDS], ids=["enwik8", "wikitext"])
def test_bfloat16_and_clipping(tmp_path: Path, settings: LanguageSettings) -> None:
    text = write(settings, tmp_path / "text")
    run = dataclasses.replace(settings, multiplier=0.5, evaluations=1)
    losses = {}
    for precision in ("float32", "bfloat16"):
        precise = dataclasses.replace(run, precision=precision)
        result = train(precise, text, tmp_path / precision, seed=0)
        losses[precision] = result["curve"][0]["loss"]
    assert 0 < abs(losses["bfloat16"] - losses["float32"]) < 0.1
    still = dataclasses.replace(run, max_norm=0.0)
    train(still, text, tmp_path / "still", seed=0)
    torch.manual_seed(0)
    assert_equal(saved(tmp_path / "still")["model"], settings.build(_size(text)).state_dict())


def _size(text: Path) -> int:
    return 256 if (text / "enwik8").exists() else 33


@pytest.mark.slow
def test_methods_see_the_accumulated_gradient(tmp_path: Path) -> None:
    """RigL grows the same weights from whole batches and from their parts."""
    text = write_enwik8(tmp_path / "text")
    active = []
    for size in (4, 1):
        run = dataclasses.replace(CHARACTERS, micro_batch=size, dropout=0.0, steps=4)
        run = dataclasses.replace(run, method=RigL(), fwd=0.9, bwd=0.9, refresh_every=2)
        train(run, text, tmp_path / f"run{size}", seed=0)
        indices = [
            set(state["topkast"]["indices"].tolist())
            for state in saved(tmp_path / f"run{size}")["optimizer"]["state"].values()
            if "indices" in state.get("topkast", {})
        ]
        active.append(indices)
    common = sum(len(one & other) for one, other in zip(*active, strict=True))
    assert common / sum(map(len, active[0])) > 0.99  # sums are rounded otherwise


def test_segments_of_a_text_follow_each_other() -> None:
    segments = Segments(np.arange(100), streams=3, window=4)
    assert segments.length == 33
    assert len(segments) == 8
    for number in range(8):
        inputs, targets = segments[number]
        assert inputs[:, 0].tolist() == [4 * number, 33 + 4 * number, 66 + 4 * number]
        assert torch.equal(targets, inputs + 1)
    every = list(Segments(np.arange(10), streams=1, window=4).all())
    assert [inputs.shape[1] for inputs, _ in every] == [4, 4, 1]
    assert torch.cat([targets for _, targets in every], dim=1).tolist() == [list(range(1, 10))]


def test_texts_are_numbered(tmp_path: Path) -> None:
    corpus = load_enwik8(write_enwik8(tmp_path / "characters"), (1800, 150, 50))
    content = (tmp_path / "characters" / "enwik8").read_bytes()
    assert bytes(corpus.train) == content[:1800]
    assert bytes(corpus.test) == content[-50:]
    folder = tmp_path / "words"
    folder.mkdir()
    (folder / "wiki.train.tokens").write_text(" \n = a = \n b b <unk> \n", encoding="utf-8")
    (folder / "wiki.valid.tokens").write_text("b new\n", encoding="utf-8")
    (folder / "wiki.test.tokens").write_text("a\n\n", encoding="utf-8")
    words = load_wikitext103(folder)
    # <eos> 3, '=' 2, 'b' 2, '<unk>' 1, 'a' 1
    assert words.train.tolist() == [0, 1, 4, 1, 0, 2, 2, 3, 0]
    assert words.valid.tolist() == [2, 3, 0]
    assert words.test.tolist() == [4, 0, 0]


def test_missing_and_wrong_texts_are_named(tmp_path: Path) -> None:
    output = tmp_path / "run"

    def error(settings: LanguageSettings, folder: Path) -> str:
        with pytest.raises(PaperError) as caught:
            train(settings, folder, output, seed=0)
        assert not output.exists()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    missing = error(ENWIK8, tmp_path)
    assert f"there is no file {tmp_path / 'enwik8'}" in missing
    assert "100,000,000 bytes" in missing
    assert "mattmahoney.net" in missing
    (tmp_path / "unpacked" / "enwik8").mkdir(parents=True)  # a folder, not the file in it
    assert "enwik8 cannot be read: Is a directory: expected" in error(ENWIK8, tmp_path / "unpacked")
    characters = write_enwik8(tmp_path / "characters")
    assert "enwik8 has 2,000 bytes: expected" in error(ENWIK8, characters)
    long = dataclasses.replace(CHARACTERS, window=500)
    assert "too short for 4 streams" in error(long, characters)
    words = write_wikitext(tmp_path / "words")
    assert "only 33 different ones" in error(dataclasses.replace(WORDS, cutoffs=(8, 20_000)), words)
    (words / "wiki.valid.tokens").write_text("\n", encoding="utf-8")
    assert "wiki.valid.tokens has no words" in error(WORDS, words)
    (words / "wiki.valid.tokens").write_bytes(b"\xff\n")
    assert "wiki.valid.tokens is not text in UTF-8" in error(WORDS, words)
    (words / "wiki.train.tokens").write_text("a b\n" * 100, encoding="utf-8")
    (words / "wiki.valid.tokens").write_text("c\n", encoding="utf-8")
    assert "the word 'c', which wiki.train.tokens lacks" in error(WORDS, words)
    (words / "wiki.test.tokens").unlink()
    missing = error(WORDS, words)
    assert f"there is no file {words / 'wiki.test.tokens'}" in missing
    assert "Salesforce" in missing
    with pytest.raises(PaperError, match="width must be a multiple of twice the heads"):
        dataclasses.replace(CHARACTERS, heads=3)
