"""Sparse convolutions: their gradients, and images of any size and number."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sparse_training import check_gradients
from topkast_torch.sparse import _convolutions
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import topkast

CONVOLUTIONS: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
    {"kernel_size": 3, "groups": 2, "bias": False},
    {"kernel_size": 3, "groups": 4, "padding": "same"},
    {"kernel_size": (2, 1), "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": (7, 6)},
    {"kernel_size": (2, 4), "padding": "same"},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even")
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
@pytest.mark.parametrize("images", [3, 0, None])
def test_convolution_gradients(
    backend: str, options: dict[str, Any], images: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_convolutions, "_MAX_ENTRIES", 700)  # a few images at a time, and one
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 8, **options, dtype=torch.float64)
    shape = (4, 7, 6) if images is None else (images, 4, 7, 6)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = copy.deepcopy(dense)
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    opt = topkast.wrap_optimizer(inner, fwd=0.7, bwd=0.4)
    topkast.sparsify(model, opt)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        given = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        found: Tensor = torch.func.functional_call(dense, given, x)
        return found

    check_gradients(model, inputs, convolve)


def convolution(**options: Any) -> Any:
    """A sparse convolution of 4 channels, and the dense one that does the same."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, **options))
    opt = topkast.wrap_optimizer(
        torch.optim.SGD(model.named_parameters(), 0.1), fwd=0.7, bwd=0.4, refresh_every=10**9
    )
    topkast.sparsify(model, opt)
    layer: Any = model[0]

    def dense(images: Tensor) -> Tensor:
        return nn.functional.conv2d(
            images, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation
        )

    return layer, dense


class TestImages:
    """What changes from one call of a convolution to the next."""

    def test_sizes_and_numbers_of_images(self, backend: str) -> None:
        layer, dense = convolution(padding=1, dtype=torch.float64)
        shapes = [(1, 7, 6), (40, 7, 6), (3, 9, 8), (2, 3, 30), (1, 40, 3), (17, 7, 6), (5, 5, 5)]
        batches = [
            torch.randn(count, 4, height, width, dtype=torch.float64, requires_grad=True)
            for count, height, width in shapes
        ]
        outputs = [layer(images) for images in batches]  # more sizes than are remembered
        for images, found in zip(batches, outputs, strict=True):
            expected, grad_output = dense(images), torch.randn_like(found)
            torch.testing.assert_close(found, expected)
            wanted = [images, layer.values]
            gradients = torch.autograd.grad(found, wanted, grad_output)
            torch.testing.assert_close(
                gradients, torch.autograd.grad(expected, wanted, grad_output)
            )

    def test_what_is_remembered_of_them_is_bounded(self) -> None:
        layer, _ = convolution()
        sizes = []
        for width in range(5, 25):
            layer(torch.randn(2, 4, 5, width))
            sizes.append(layer.products.nbytes)
        assert sizes[0] < sizes[3] == sizes[-1]

    def test_attributes_that_are_changed(self, backend: str) -> None:
        layer, dense = convolution()
        images = torch.randn(3, 4, 11, 12)
        layer(images)
        layer.stride = (2, 1)
        torch.testing.assert_close(layer(images), dense(images))
        layer.dilation = (1, 3)
        torch.testing.assert_close(layer(images), dense(images))

    def test_another_dtype_for_one_call(self, backend: str) -> None:
        layer, _ = convolution()
        images = torch.randn(1, 4, 9, 9)
        expected = layer(images)
        given = {name: param.double() for name, param in layer.named_parameters()}
        found = torch.func.functional_call(layer, given, images.double())
        torch.testing.assert_close(found.float(), expected)

    def test_another_default_device(self, backend: str) -> None:
        layer, dense = convolution()
        images = torch.randn(2, 4, 9, 9)
        expected = dense(images)
        with torch.device("meta"):
            found = layer(images)
        torch.testing.assert_close(found, expected)

    def test_frozen_weights_keep_no_images(self) -> None:
        layer, dense = convolution()
        layer.values.requires_grad_(requires_grad=False)
        images = torch.randn(2, 4, 9, 9, requires_grad=True)
        found = layer(images)
        assert found.grad_fn.saved_tensors[0] is None
        grad_output = torch.randn_like(found)
        (gradient,) = torch.autograd.grad(found, images, grad_output)
        (expected,) = torch.autograd.grad(dense(images), images, grad_output)
        torch.testing.assert_close(gradient, expected)

    def test_checkpointing(self, backend: str) -> None:
        """All that is kept for the backward pass is kept where hooks of PyTorch reach it."""
        layer, dense = convolution()
        images = torch.randn(2, 4, 9, 9, requires_grad=True)
        kept: list[Tensor] = []

        def remember(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
            layer(images)
        assert len(kept) == 3  # the input itself, for derivatives of derivatives
        assert kept[0] is images
        assert kept[1].numel() >= images.numel()
        assert kept[2] is layer.values
        found = checkpoint(layer, images, use_reentrant=False)
        gradients = torch.autograd.grad(found.sum(), [images, layer.values])
        expected = torch.autograd.grad(dense(images).sum(), [images, layer.values])
        torch.testing.assert_close(gradients, expected)

    @pytest.mark.parametrize("shape", [(1, 4, 2, 9), (1, 4, 0, 9), (1, 4, 9, 0), (1, 3, 9, 9)])
    def test_images_that_do_not_fit_are_told(self, backend: str, shape: tuple[int, ...]) -> None:
        layer, _ = convolution(padding=(0, 1))
        with pytest.raises(topkast.MismatchError, match=r"does not fit|of 4 channels"):
            layer(torch.randn(shape))
