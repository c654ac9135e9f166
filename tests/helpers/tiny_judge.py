"""A judge with random weights."""

from pathlib import Path

import torch

from mos_cli.evaluation.judge import Judge, JudgeConfig, JudgeNet, save_judge


def tiny_judge(folder: Path, words: tuple[str, ...]) -> Judge:
    config = JudgeConfig(words=words, colours=("red",), styles=("noto",), widths=(8, 8, 8, 8), hidden=8)
    torch.manual_seed(0)
    save_judge(JudgeNet(config), config, folder)
    return Judge(folder)
