"""The small image encoder of the comparison, and the captioner that it is trained with.

Shapes: B pictures, H x W their size, C channels, V image tokens, D their width, T caption tokens, S width of a
sentence's state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mos_cli.bundles.shapes import IMAGE_GRID
from mos_cli.towers.understanding import UnderstandingTower

STEM = 24
STAGES = ((32, 2), (48, 2), (64, 1), (96, 2), (128, 1), (192, 2), (256, 1))
"""Channels and stride of the small encoder's stages, each a convolution of 3 x 3."""
TOKEN = 128
"""Width of the captioner's tokens."""


class Encoder(nn.Module):
    """Turns pictures into image tokens like those of `ImageEncoder`, with seven convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages, before = _convolution(3, STEM, 2), nn.ModuleList(), STEM
        for channels, stride in STAGES:
            self.stages.append(_convolution(before, channels, stride))
            before = channels

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each state."""
        return tuple(channels for channels, _ in STAGES)

    def forward(self, pictures_B3HW: Tensor) -> list[Tensor]:
        """The output of each stage for pictures in -1..1 of 128 px, each [B, C, H', W']."""
        x, outputs = self.stem(pictures_B3HW), []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    @torch.no_grad()
    def encode_images(self, pictures_B3HW: Tensor) -> Tensor:
        """As `ImageEncoder.encode_images`."""
        cells = [F.adaptive_avg_pool2d(stage, IMAGE_GRID).flatten(2).mT for stage in self(pictures_B3HW)]
        return torch.stack([F.pad(cell, (0, max(self.widths) - cell.shape[-1])) for cell in cells], 2)


class Captioner(nn.Module):
    """Trains the encoder with captions: its mean token predicts the caption's state, and a decoder of one block
    predicts the caption from its tokens.

    Args:
        sentence: width of a sentence's state, S.
        words: number of different tokens in captions.
        longest: caption tokens at most, T.
    """

    def __init__(self, sentence: int, words: int, longest: int) -> None:
        super().__init__()
        width = STAGES[-1][0]
        self.encoder, self.aligned = Encoder(), nn.Linear(width, sentence)
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.cell, self.cells = nn.Linear(width, TOKEN), nn.Parameter(torch.randn(IMAGE_GRID**2, TOKEN) * 0.02)
        self.word, self.places = nn.Embedding(words, TOKEN), nn.Parameter(torch.randn(longest, TOKEN) * 0.02)
        self.block = nn.TransformerDecoderLayer(
            TOKEN, 4, 2 * TOKEN, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.said = nn.Linear(TOKEN, words)

    def losses(self, pictures_B3HW: Tensor, sentences_BS: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Symmetric InfoNCE, and cross-entropy per caption token; id 0 is padding."""
        with torch.autocast("cpu", torch.bfloat16):
            tokens_BVD = self.encoder(pictures_B3HW)[-1].flatten(2).mT
            pooled_BS = self.aligned(tokens_BVD.mean(1))
            length = ids_BT.shape[1] - 1
            said = self.block(
                self.word(ids_BT[:, :-1]) + self.places[:length],
                self.cell(tokens_BVD) + self.cells,
                tgt_mask=nn.Transformer.generate_square_subsequent_mask(length),
            )
            logits = self.said(said)
        alike_BB = self.scale.exp() * F.normalize(pooled_BS.float(), dim=1) @ F.normalize(sentences_BS, dim=1).T
        same = torch.arange(len(alike_BB))
        matched = (F.cross_entropy(alike_BB, same) + F.cross_entropy(alike_BB.T, same)) / 2
        return matched, F.cross_entropy(logits.float().flatten(0, 1), ids_BT[:, 1:].flatten(), ignore_index=0)


def read(captions: list[str], tower: UnderstandingTower, batch: int = 128) -> tuple[Tensor, Tensor]:
    """States of sentences [B, S], the mean of the last states of their tokens, and their tokens [B, T], from 1."""
    ids, sentences = [torch.empty(0)] * len(captions), torch.empty(len(captions), tower.width)
    order = sorted(range(len(captions)), key=lambda row: len(captions[row]))
    for rows in (order[at : at + batch] for at in range(0, len(order), batch)):
        hidden_states = tower.encode([captions[row] for row in rows])
        last, mask = hidden_states.states_BTMS[:, :, -1].float(), hidden_states.mask_BT.float()[:, :, None]
        sentences[rows] = (last * mask).sum(1) / mask.sum(1)
        for row, encoding in zip(rows, hidden_states.encodings, strict=True):
            ids[row] = torch.tensor(encoding.ids)[torch.tensor(encoding.attention_mask).bool()]
    numbers = torch.unique(torch.cat(ids), return_inverse=True)[1] + 1
    return sentences, nn.utils.rnn.pad_sequence(list(numbers.split([len(each) for each in ids])), batch_first=True)


def _convolution(before: int, after: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
