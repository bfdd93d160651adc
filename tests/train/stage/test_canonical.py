"""The canonical form: contiguous and aligned, forwards and backwards, and cheap when it is."""

import pytest
import torch
from torch import Tensor

from barepp.train.stage.canonical import ALIGNMENT, canonical, canonical_output

DTYPES = [torch.float32, torch.float64, torch.float16, torch.complex64, torch.int64, torch.bool]


def is_canonical(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0 and not tensor.is_conj()


def forms_of(tensor: Tensor) -> list[Tensor]:
    """The same numbers in every layout that a layer might return; tensor is [6, 4, 2]."""
    padded = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    padded[1:] = tensor.flatten()
    forms = [
        tensor,
        tensor.transpose(0, 2).contiguous().transpose(0, 2),
        tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        padded[1:].view(tensor.shape),
        torch.cat([tensor, tensor])[::2][:0],
        tensor[:, :1].expand(6, 4, 2),
        tensor[3],
        tensor[0, 0, 0],
        tensor[1:1],
    ]
    return [*forms, tensor.conj()] if tensor.is_complex() else forms


@pytest.mark.parametrize("dtype", DTYPES)
def test_canonical_keeps_the_numbers_and_copies_only_when_needed(dtype: torch.dtype) -> None:
    for form in forms_of(torch.randint(0, 9, (6, 4, 2)).to(dtype)):
        result = canonical(form)
        assert is_canonical(result)
        assert torch.equal(result, form)
        assert result.shape == form.shape
        assert result.dtype == form.dtype
        assert (result is form) == is_canonical(form)


def test_the_copy_lets_gradients_through() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    canonical(x.t()).square().sum().backward()
    assert torch.equal(x.grad, 2 * x)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "shifted", "plain"])
def test_the_gradient_reaches_the_layer_in_canonical_form(layout: str) -> None:
    seen: list[Tensor] = []
    x = torch.randn(6, 6, requires_grad=True)
    inner = x * 2  # the layer: a hook on what it made sees what enters its backward
    output = canonical_output(inner)
    inner.register_hook(seen.append)
    shifted = torch.randn(37)[1:].view(6, 6)
    gradient = {
        "transposed": torch.randn(6, 6).t(),
        "expanded": torch.randn(1, 6).expand(6, 6),
        "shifted": shifted,
        "plain": torch.randn(6, 6),
    }[layout]
    output.backward(gradient)
    assert is_canonical(seen[0])
    assert torch.equal(seen[0], gradient)
    assert torch.equal(x.grad, 2 * gradient)


def test_an_output_that_was_copied_gets_its_gradient_in_canonical_form_too() -> None:
    seen: list[Tensor] = []
    x = torch.randn(6, 4, requires_grad=True)
    output = canonical_output((x * 2).t())
    output.register_hook(seen.append)
    (output.t().contiguous() * torch.randn(6, 4)).sum().backward()
    assert is_canonical(output)
    assert is_canonical(seen[0])


def test_a_parameter_as_output_collects_no_hooks() -> None:
    parameter = torch.nn.Parameter(torch.randn(4, 4))
    for _ in range(3):
        canonical_output(parameter)
    assert not parameter._backward_hooks
