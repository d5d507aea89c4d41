from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ood_kernels.masks import pack_mask, unpack_mask


@settings(deadline=None, max_examples=60)
@given(classes=st.integers(0, 5), width=st.integers(0, 100), seed=st.integers(0, 999))
def test_bit_j_of_word_w_is_column_32w_plus_j(classes, width, seed):
    mask = torch.rand(classes, width, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack_mask(mask)
    assert packed.shape == (classes, -(-width // 32))
    assert packed.dtype == torch.int32
    words = [
        [sum(int(mask[c, j]) << (j % 32) for j in range(width) if j // 32 == w) for w in range(packed.shape[1])]
        for c in range(classes)
    ]
    assert [[word % 2**32 for word in row] for row in packed.tolist()] == words
    assert torch.equal(unpack_mask(packed, width), mask)


def test_any_strides_and_a_neuron_mask():
    mask = torch.rand(70, 9, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(pack_mask(mask.T), pack_mask(mask.T.contiguous()))
    assert torch.equal(pack_mask(mask[:1].expand(5, 9)), pack_mask(mask[:1]).expand(5, 1))
    assert torch.equal(pack_mask(mask[:, 0]), pack_mask(mask[:, :1].T)[0])
    assert torch.equal(unpack_mask(pack_mask(mask.T), 70), mask.T)
    assert torch.equal(unpack_mask(pack_mask(mask[:, 0]), 70), mask[:, 0])


def test_shapes_are_known_without_data():
    packed = pack_mask(torch.empty(10, 2048, dtype=torch.bool, device="meta"))
    assert packed.shape == (10, 64)
    assert unpack_mask(packed, 2048).shape == (10, 2048)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_mask(torch.ones(2, 3)), "mask: expected bool [C, D] or [D], got torch.float32 [2, 3]"),
        (lambda: pack_mask(torch.tensor(True)), "mask: expected bool [C, D] or [D], got torch.bool []"),
        (
            lambda: unpack_mask(torch.zeros(2, 2, dtype=torch.int32), 65),
            "packed: expected int32 [..., 3] for 65 columns, got torch.int32 [2, 2]",
        ),
        (
            lambda: unpack_mask(torch.zeros(2, 3, dtype=torch.int64), 65),
            "packed: expected int32 [..., 3] for 65 columns, got torch.int64 [2, 3]",
        ),
    ],
)
def test_what_is_no_mask_is_refused(call, message):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message
