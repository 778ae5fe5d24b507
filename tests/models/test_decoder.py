"""The decoder leaves out what reaches no prediction, and its numbers are those of the whole."""

import pytest
import torch
from torch import Tensor

from panfm.models.heads import Decoder, spread_rows
from panfm.models.vit import TokenSplit, split_mask, take_tokens


def make_decoder(depth: int) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(input_dim=24, width=32, depth=depth, num_heads=4, output_dim=12, grid=(3, 4)).double()
    for parameter in decoder.parameters():  # zero biases would hide a mistake
        torch.nn.init.normal_(parameter, std=0.3)
    return decoder


def decode_plainly(decoder: Decoder, tokens: Tensor, split: TokenSplit) -> Tensor:
    """MAE's decoder as it is written in its paper: every token through every block."""
    num_prefix = tokens.shape[1] - split.visible.shape[1]
    x = decoder.embed(tokens)
    visible = x[:, num_prefix:] + take_tokens(decoder.positions, split.visible)
    hidden = decoder.mask_token + take_tokens(decoder.positions, split.hidden)
    x = decoder.blocks(torch.cat([x[:, :num_prefix], visible, hidden], dim=1))
    return decoder.predict(decoder.norm(x[:, x.shape[1] - split.hidden.shape[1] :]))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("num_hidden", [0, 5, 12])
def test_it_gives_the_numbers_of_every_token_through_every_block(depth: int, num_hidden: int) -> None:
    decoder = make_decoder(depth)
    split = split_mask(torch.rand(3, 12).argsort(dim=1) < num_hidden)
    tokens = torch.randn(3, 2 + 12 - num_hidden, 24, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, num_hidden, 12, dtype=torch.float64)
    results, gradients = [], []
    for decode in (decoder, lambda *arguments: decode_plainly(decoder, *arguments)):
        decoder.zero_grad()
        tokens.grad = None
        results.append(decode(tokens, split))
        (results[-1] * weight).sum().backward()
        gradients.append([tokens.grad, *(parameter.grad for parameter in decoder.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-11)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-10)


def test_shared_rows_gather_their_gradients_in_float32() -> None:
    table = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    rows = spread_rows(table, torch.zeros(1000, 1, dtype=torch.int64))
    assert rows.dtype == torch.bfloat16 and rows.shape == (1000, 1, 1)
    rows.sum().backward()  # a sum in bfloat16 stops at 256
    assert table.grad.flatten().tolist() == [1000, 0]
