"""Tensors to bytes and back, bit by bit; and metadata that a stranger wrote."""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest
import torch

from transport.errors import InvalidArgument, MessageMismatch, ProtocolError
from transport.message import tensors as room
from transport.message.specs import MessageSpec, TensorSpec
from transport.message.tensors import DTYPES, fillable, memory, payload_sum, prepare
from transport.wire.format import pack

GENERATOR = torch.Generator().manual_seed(7)


def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor of any bits at all, NaNs with payloads among them."""
    made = torch.empty(shape, dtype=dtype)
    if made.numel():
        high = 2 if dtype is torch.bool else 256
        raw = torch.randint(high, (made.nbytes,), dtype=torch.uint8, generator=GENERATOR)
        memory(made)[:] = memory(raw)
    return made


def bits(tensor: torch.Tensor) -> bytes:
    """Return a tensor's bytes in C order, without the code under test."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous().clone()
    return bytes(whole.reshape(-1).view(torch.uint8).tolist()) if whole.numel() else b""


FORMS: dict[str, Callable[[torch.dtype], torch.Tensor]] = {
    "0-dim": lambda d: random_bits(d, ()),
    "empty": lambda d: random_bits(d, (0,)),
    "empty inside": lambda d: random_bits(d, (3, 0, 2)),
    "contiguous": lambda d: random_bits(d, (3, 5, 2)),
    "every other": lambda d: random_bits(d, (4, 6))[:, ::2],
    "transposed": lambda d: random_bits(d, (3, 5)).t(),
    "offset": lambda d: random_bits(d, (7, 3))[2:5],
    "expanded": lambda d: random_bits(d, (1, 3)).expand(4, 3),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", DTYPES)
def test_round_trip_keeps_every_bit(name: str, form: str) -> None:
    original = FORMS[form](DTYPES[name])
    if original.is_floating_point() or original.is_complex():
        original.requires_grad_()
    spec, ready = prepare(original)
    payload = b"".join(bytes(memory(tensor)) for tensor in ready)
    arrived = MessageSpec.from_packed(*spec.packed)
    arrived.fit(len(payload))
    assert arrived == spec == MessageSpec.of(original)
    (target,) = arrived.allocate()
    memory(target)[:] = payload
    assert target.dtype is original.dtype
    assert target.shape == original.shape
    assert not target.requires_grad
    assert target.is_contiguous()
    assert target.data_ptr() % 64 == 0
    assert bits(target) == bits(original) == payload


def test_bits_that_arithmetic_would_lose() -> None:
    words = [0x7FA12345, 0xFFC00001, 0x80000000, 0x00000001, 0x7F800000]  # NaNs, -0.0, denormal
    tensor = torch.empty(5)
    memory(tensor)[:] = struct.pack("<5I", *words)
    spec, (ready,) = prepare(tensor)
    (target,) = spec.allocate()
    memory(target)[:] = memory(ready)
    assert struct.unpack("<5I", memory(target)) == tuple(words)


def test_conjugate_and_negative_views_are_sent_as_what_they_show() -> None:
    z = torch.randn(4, 3, dtype=torch.complex64, generator=GENERATOR)
    for view in (z.conj(), z.conj().imag, z.conj().t(), z.t().conj().imag):
        assert view.is_conj() or view.is_neg()
        _, (ready,) = prepare(view)
        copy = torch.empty(view.shape, dtype=view.dtype)
        memory(copy)[:] = memory(ready)
        assert torch.equal(copy, view)


def test_a_contiguous_tensor_is_sent_from_its_own_memory() -> None:
    tensor = torch.randn(5, 4, requires_grad=True)
    _, (ready,) = prepare(tensor)
    assert ready.data_ptr() == tensor.data_ptr()
    _, (row,) = prepare(tensor[1])
    assert row.data_ptr() == tensor[1].data_ptr()


def test_memory_is_the_tensors_own() -> None:
    tensor = torch.zeros(4, dtype=torch.int32)
    view = memory(tensor)
    assert (len(view), view.readonly, view.format) == (16, False, "B")
    view[4:8] = (77).to_bytes(4, "little")
    assert tensor.tolist() == [0, 77, 0, 0]
    tensor[3] = 5
    assert view[12] == 5
    assert len(memory(torch.empty(3, 0))) == 0


REFUSED: dict[str, Callable[[], object]] = {
    "float": lambda: 3.0,
    "None": lambda: None,
    "list": lambda: [torch.zeros(1)],
    "tuple with a number": lambda: (torch.zeros(1), 2),
    "nested tuple": lambda: (torch.zeros(1), (torch.zeros(1),)),
    "too many": lambda: (torch.zeros(1),) * 257,
    "sparse": lambda: torch.zeros(2, 2).to_sparse(),
    "sparse rows": lambda: torch.zeros(2, 2).to_sparse_csr(),
    "meta device": lambda: torch.zeros(2, device="meta"),
    "uint16": lambda: torch.zeros(2, dtype=torch.uint16),
    "float8": lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
    "nested": lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.filterwarnings("ignore")  # torch's own, about features in beta
def test_what_cannot_be_sent_is_refused(what: str) -> None:
    for check in (prepare, fillable):
        with pytest.raises(InvalidArgument):
            check(REFUSED[what]())  # type: ignore[operator]


def test_what_cannot_be_filled_is_refused() -> None:
    complex_ones = torch.ones(3, dtype=torch.complex64)
    for tensor in (
        torch.zeros(3, 4).t(),
        torch.zeros(1, 3).expand(2, 3),
        torch.zeros(3, requires_grad=True),
        complex_ones.conj(),
        complex_ones.conj().imag,
    ):
        with pytest.raises(InvalidArgument):
            fillable(tensor)
        with pytest.raises(InvalidArgument):
            fillable((torch.zeros(1), tensor))
    assert fillable((torch.zeros(2), torch.zeros(0, 3))).is_tuple
    assert not fillable(torch.zeros(())).is_tuple


def read(meta: object, payload_nbytes: int) -> MessageSpec:
    spec = MessageSpec.from_packed(*pack(meta))
    spec.fit(payload_nbytes)
    return spec


GOOD: list[object] = [False, "float32", [2, 3]]


@pytest.mark.parametrize(
    "meta",
    [
        None,
        7,
        "x",
        {},
        [],
        [False],
        [False, "float32"],
        [False, "float32", [2, 3], "float32", [1]],
        [0, *GOOD[1:]],
        [None, *GOOD[1:]],
        [7, *GOOD],
        [False, "float31", [2, 3]],
        [False, b"float32", [2, 3]],
        [False, ["float32"], [2, 3]],
        [False, {}, [2, 3]],
        [False, "float32", 6],
        [False, "float32", None],
        [False, "float32", {"0": 2}],
        [False, "float32", [2, -3]],
        [False, "float32", [-2, -3]],
        [False, "float32", [2, 3.0]],
        [False, "float32", [True, 6]],
        [False, "float32", [[2], 3]],
        [False, "float32", [2, "3"]],
        [False, "float32", [1] * 65],
        [False, "float32", [2**64 - 1, 0]],
        [False, "float32", [2**32, 2**32]],
        [False, "float32", [2**62, 0]],
        [False, "float32", [2, 4]],
        [True] + ["float32", [2, 3]] * 2,
        [True] + ["int8", [0]] * 257,
    ],
    ids=lambda meta: repr(meta)[:60],
)
def test_metadata_of_strangers(meta: object) -> None:
    with pytest.raises(ProtocolError) as caught:
        read(meta, 24)
    assert len(str(caught.value)) < 5000


def test_metadata_that_is_accepted_can_be_allocated() -> None:
    """Whatever passes the checks does not surprise torch, not even shapes of huge empty tensors."""
    rng = random.Random(3)
    until = time.monotonic() + 1
    accepted = 0
    while time.monotonic() < until:
        sizes = [0, 0, 1, 1, 2, 3, 5, 2**31, 2**40, 2**59, 2**60, 2**61, 2**63 - 1]
        shapes = [rng.choices(sizes, k=rng.randrange(5)) for _ in range(rng.randrange(1, 4))]
        meta = [True] + [x for s in shapes for x in (rng.choice(list(DTYPES)), s)]
        nbytes = rng.choice([0, 4, 8, 16])
        try:
            spec = read(meta, nbytes)
        except ProtocolError:
            continue
        accepted += 1
        made = spec.allocate()
        assert sum(tensor.nbytes for tensor in made) == nbytes
        assert MessageSpec.of(tuple(made)) == spec
    assert accepted > 50


def test_allocation_heeds_neither_default_device_nor_inference_mode() -> None:
    """Bytes are moved by whatever thread waits: its modes are not those of the receiver."""
    spec = MessageSpec((TensorSpec(torch.float32, (2,)),), False)
    with torch.inference_mode():
        (made,) = spec.allocate()
    assert not made.is_inference()
    with torch.device("meta"):
        (made,) = spec.allocate()
    assert made.device.type == "cpu"


def test_a_mismatch_names_both_sides() -> None:
    expected = MessageSpec((TensorSpec(torch.float32, (2, 3)),), False)
    arrived = MessageSpec((TensorSpec(torch.int64, (6,)), TensorSpec(torch.bool, ())), True)
    error = expected.check(arrived, 4, 9)
    assert isinstance(error, MessageMismatch)
    for part in ("rank 4", "tag 9", "float32[2, 3]", "(int64[6], bool[])"):
        assert part in str(error)
    assert expected.check(MessageSpec.of(torch.zeros(2, 3)), 4, 9) is None
    assert expected.check(MessageSpec.of((torch.zeros(2, 3),)), 4, 9) is not None


def test_dtype_names_are_torchs_own() -> None:
    assert {getattr(torch, name) for name in DTYPES} == set(DTYPES.values())
    assert room.unsupported_host() is None


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 64, 1001])
def test_every_flipped_bit_changes_the_sum(nbytes: int) -> None:
    rng = random.Random(nbytes)
    for payload in (bytes(nbytes), b"\xff" * nbytes, rng.randbytes(nbytes)):
        tensor = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        before = payload_sum([tensor])
        assert 0 <= before < 2**64
        assert payload_sum([tensor.clone()]) == before
        for bit in range(8 * nbytes):
            tensor[bit // 8] ^= 1 << bit % 8
            assert payload_sum([tensor]) != before, bit
            tensor[bit // 8] ^= 1 << bit % 8
    assert payload_sum([]) == payload_sum([torch.zeros(0)]) == 0


def test_metadata_that_was_read_before_is_refused_with_another_checksum() -> None:
    data, crc = pack(GOOD)
    assert MessageSpec.from_packed(data, crc) is MessageSpec.from_packed(data, crc)
    with pytest.raises(ProtocolError, match="checksum"):
        MessageSpec.from_packed(data, crc ^ 1)


def test_a_sign_that_torch_has_only_noted_is_worked_out() -> None:
    negative = torch._neg_view(torch.ones(3))
    assert negative.is_neg() and negative.is_contiguous()
    _, (ready,) = prepare(negative)
    assert memory(ready).tobytes() == memory(torch.full((3,), -1.0)).tobytes()
