"""Sparse convolutions: gradients, and images of any size and number."""

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
@pytest.mark.parametrize(
    ("images", "rows"), [(3, None), (0, None), (None, None), (3, 4), (3, 8), (3, 2)]
)
def test_convolution_gradients(
    backend: str,
    options: dict[str, Any],
    images: int | None,
    rows: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_convolutions, "_MAX_ENTRIES", 700)  # a few images at a time, and one
    torch.manual_seed(0)
    dense = nn.Conv2d(4, 8, **options, dtype=torch.float64)
    shape = (4, 7, 6) if images is None else (images, 4, 7, 6)
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    model = copy.deepcopy(dense)
    inner = torch.optim.SGD(model.named_parameters(), 0.1)
    # Blocks of 4 or 8 rows may lie across groups; of 2 rows they are windows of two filters.
    window = dense.weight[0, 0].numel() if rows == 2 else 1
    block = None if rows is None else (rows, window)
    opt = topkast.wrap_optimizer(inner, fwd=0.7, bwd=0.4, block=block)
    topkast.sparsify(model, opt)

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        output: Tensor = torch.func.functional_call(dense, params, x)
        return output

    check_gradients(model, inputs, convolve)


def convolution(**options: Any) -> Any:
    """A sparse convolution of 4 channels, and the equivalent dense convolution."""
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
    """Convolutions whose images or attributes change between calls."""

    def test_images_of_any_size_and_number(self, backend: str) -> None:
        layer, dense = convolution(padding=1, dtype=torch.float64)
        shapes = [(1, 7, 6), (40, 7, 6), (3, 9, 8), (2, 3, 30), (1, 40, 3), (17, 7, 6), (5, 5, 5)]
        batches = [
            torch.randn(count, 4, height, width, dtype=torch.float64, requires_grad=True)
            for count, height, width in shapes
        ]
        outputs = [layer(images) for images in batches]  # more sizes than the cache holds
        for images, output in zip(batches, outputs, strict=True):
            expected, grad_output = dense(images), torch.randn_like(output)
            torch.testing.assert_close(output, expected)
            sources = [images, layer.values]
            gradients = torch.autograd.grad(output, sources, grad_output)
            torch.testing.assert_close(
                gradients, torch.autograd.grad(expected, sources, grad_output)
            )

    def test_the_cache_of_image_sizes_is_bounded(self) -> None:
        layer, _ = convolution()
        sizes = []
        for width in range(5, 25):
            layer(torch.randn(2, 4, 5, width))
            sizes.append(layer.products.nbytes)
        assert sizes[0] < sizes[3] == sizes[-1]

    def test_attributes_may_be_changed(self, backend: str) -> None:
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
        params = {name: param.double() for name, param in layer.named_parameters()}
        output = torch.func.functional_call(layer, params, images.double())
        torch.testing.assert_close(output.float(), expected)

    def test_another_default_device(self, backend: str) -> None:
        layer, dense = convolution()
        images = torch.randn(2, 4, 9, 9)
        expected = dense(images)
        with torch.device("meta"):
            output = layer(images)
        torch.testing.assert_close(output, expected)

    def test_frozen_weights_save_no_images(self) -> None:
        layer, dense = convolution()
        layer.values.requires_grad_(requires_grad=False)
        images = torch.randn(2, 4, 9, 9, requires_grad=True)
        output = layer(images)
        assert output.grad_fn.saved_tensors[0] is None
        grad_output = torch.randn_like(output)
        (gradient,) = torch.autograd.grad(output, images, grad_output)
        (expected,) = torch.autograd.grad(dense(images), images, grad_output)
        torch.testing.assert_close(gradient, expected)

    def test_checkpointing(self, backend: str) -> None:
        """All tensors for the backward pass are saved through PyTorch's hooks."""
        layer, dense = convolution()
        images = torch.randn(2, 4, 9, 9, requires_grad=True)
        saved: list[Tensor] = []

        def record(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            layer(images)
        assert len(saved) == 3  # the input is needed for second derivatives
        assert saved[0] is images
        assert saved[1].numel() >= images.numel()
        assert saved[2] is layer.values
        output = checkpoint(layer, images, use_reentrant=False)
        gradients = torch.autograd.grad(output.sum(), [images, layer.values])
        expected = torch.autograd.grad(dense(images).sum(), [images, layer.values])
        torch.testing.assert_close(gradients, expected)

    @pytest.mark.parametrize("shape", [(1, 4, 2, 9), (1, 4, 0, 9), (1, 4, 9, 0), (1, 3, 9, 9)])
    def test_images_that_do_not_fit_raise(self, backend: str, shape: tuple[int, ...]) -> None:
        layer, _ = convolution(padding=(0, 1))
        with pytest.raises(topkast.MismatchError, match=r"does not fit|of 4 channels"):
            layer(torch.randn(shape))
