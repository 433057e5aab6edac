"""PEFT: adapters that are trained sparse, and adapters on sparse models."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem.models import llama, logits, train, wrap
from optimizer_runs import assert_same_bits
from peft import LoraConfig, PeftModel, get_peft_model

import topkast

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def adapted(base: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.0)
    torch.manual_seed(1)
    return get_peft_model(base, config)


def prepared(sparse: bool) -> tuple[Any, Any, Any]:
    """A base that is trained by topkast, and an adapter beside it by a plain optimizer."""
    model = adapted(llama())
    adapter = [param for name, param in model.named_parameters() if "lora_" in name]
    for param in model.parameters():
        param.requires_grad_(True)
    for param in adapter:
        param.requires_grad_(False)
    optimizer = wrap(model, sparse)
    for param in adapter:
        param.requires_grad_(True)
    return model, optimizer, torch.optim.AdamW(adapter, 0.05)


@pytest.mark.parametrize("sparse", [False, True])
class TestSparseAdapters:
    def test_all_rows_learn_and_merging_takes_effect(self, sparse: bool) -> None:
        model = adapted(llama())
        optimizer = wrap(model, sparse)
        assert all("lora_" in name for name in topkast.masks(optimizer))
        train(model, [optimizer], range(40))
        for name, theta in topkast.dense_params(optimizer).items():
            if "lora_B" in name:  # it starts at zero: where it is not, it has learned
                assert (theta != 0).any(1).float().mean() > 0.85, name
        before = logits(model)
        if sparse:
            topkast.densify(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), before)

    def test_they_are_saved_and_loaded(self, tmp_path: Path, sparse: bool) -> None:
        model = adapted(llama())
        optimizer = wrap(model, sparse)
        train(model, [optimizer], range(7))
        before = logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error", topkast.SparseExportWarning)
            if sparse:
                model.save_pretrained(tmp_path, state_dict=topkast.densify(model.state_dict()))
            else:
                model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(llama(), tmp_path)
        torch.testing.assert_close(logits(loaded), before)


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
def test_a_sparse_adapter_that_would_not_load_is_warned_of(tmp_path: Path) -> None:
    model = adapted(llama())
    wrap(model, sparse=True)
    with pytest.warns(topkast.SparseExportWarning, match=r"topkast\.densify"):
        model.save_pretrained(tmp_path)


class TestMergingIntoTheBase:
    def test_into_a_masked_one_it_takes_effect(self) -> None:
        model, optimizer, plain = prepared(sparse=False)
        train(model, [optimizer, plain], range(7))
        before = logits(model)
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), before)

    def test_into_a_sparse_one_it_is_refused_and_densify_lets_it(self) -> None:
        model, optimizer, plain = prepared(sparse=True)
        train(model, [optimizer, plain], range(7))
        before = logits(model)
        with pytest.raises(topkast.MismatchError, match=r"topkast\.densify\(model\) first"):
            copy.deepcopy(model).merge_and_unload()
        assert_same_bits(before, logits(model))
        exported = topkast.densify(copy.deepcopy(model)).merge_and_unload()
        torch.testing.assert_close(logits(exported), before)
        without = model.unload()
        assert (logits(without) - before).abs().max() > 1e-3  # the adapter had an effect
        train(model, [optimizer, plain], range(7, 9))


def test_adapters_for_layers_that_are_sparse_already_are_refused_by_peft() -> None:
    model = llama()
    wrap(model, sparse=True)
    with pytest.raises(ValueError, match=r"Target module SparseLinear.* is not supported"):
        adapted(model)
