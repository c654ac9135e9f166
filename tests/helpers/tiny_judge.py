"""A judge and features with random weights."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mos_cli.evaluation.judge import Judge, JudgeConfig, JudgeNet, save_judge


def tiny_judge(folder: Path, words: tuple[str, ...]) -> Judge:
    config = JudgeConfig(words=words, colours=("red",), styles=("noto",), widths=(8, 8, 8, 8), hidden=8)
    torch.manual_seed(0)
    save_judge(JudgeNet(config), config, folder)
    return Judge(folder)


class RandomFeatures(nn.Module):
    """What an untrained convolution sees: enough to tell sharp from blurred."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 32, 5, 2)

    def forward(self, pictures: Tensor) -> Tensor:
        return F.relu(self.convolution(pictures)).mean(dim=(2, 3))
