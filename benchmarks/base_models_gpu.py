"""A first check of base models on a GPU: the real sizes with random weights, through the same code as real ones.

    python benchmarks/base_models_gpu.py klein z-image prx --cap 8 --folder FOLDER
    python benchmarks/base_models_gpu.py klein --tiny          rehearses it in a minute, on a CPU too

It writes a diffusers folder of random bf16 weights (16, 21 and 9 GB) and draws from it with the settings that
`mos plan` chooses for `--cap` GiB. One line per measurement: the peak of memory against the plan, seconds of a step
plain, with closed and with open gates, whether closed gates give diffusers' pixels, and the gradients of router and
gates through the quantised transformer. The language model leaves the GPU before the transformer comes, where the plan
says so.

It has been rehearsed with --tiny on a CPU, and never been run on a GPU.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from mos_cli.adapters.adapter import Adapter
from mos_cli.adapters.loading import patch_values
from mos_cli.adapters.pipeline import AdapterPipeline
from mos_cli.adapters.routing import TextRouting
from mos_cli.bundles.adapters import AdapterBundle, BaseNetwork, RouterShape, base_network, read_adapter
from mos_cli.config.recipe import make_recipe
from mos_cli.inference.offload import limit_memory
from mos_cli.inference.profiling import PeakMemory
from mos_cli.planning.candidates import Candidate, candidates, fastest
from mos_cli.sampling.guidance import POSITIVE
from mos_cli.towers.layers import TokenGrid
from mos_cli.utils.devices import choose_device, device_name
from tests.helpers import base_model_sizes, tiny_base_models

PROMPT = "a red fox and a blue dog on a green chessboard in the morning light"
TINY = {"klein": tiny_base_models.klein, "z-image": tiny_base_models.z_image, "prx": tiny_base_models.prx}


def random_tensors(network: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Random bf16 weights for a network that is on the meta device; norms have weights of 1."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = {}
    for name, empty in network.state_dict().items():
        if not empty.is_floating_point():
            tensors[name] = torch.zeros(empty.shape, dtype=empty.dtype)
        elif empty.dim() < 2:
            tensors[name] = torch.full(empty.shape, 1.0 if "norm" in name or "var" in name else 0.0).bfloat16()
        else:
            value = torch.randn(empty.shape, generator=generator, device=device, dtype=torch.bfloat16)
            tensors[name] = (value * empty[0].numel() ** -0.5).cpu()
    return tensors


def write_folder(name: str, folder: Path, device: torch.device) -> None:
    """Writes a diffusers folder of the real size with random weights."""
    pipeline, makers, _ = base_model_sizes.NETWORKS[name]
    parts = dict(zip(("transformer", "text_encoder", "vae"), makers, strict=True))
    for part, make in parts.items():
        (folder / part).mkdir(parents=True)
        with torch.device("meta"):
            network: Any = make()
        tensors = random_tensors(network, device)
        if part == "text_encoder":
            network.config.save_pretrained(folder / part)
            tied = getattr(network.config, "tie_word_embeddings", False)
            tensors = {key: value for key, value in tensors.items() if not (tied and key == "lm_head.weight")}
            save_file(tensors, folder / part / "model.safetensors", {"format": "pt"})
        else:
            network.save_config(folder / part)
            save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    tiny_base_models.tokenizer(256).save_pretrained(folder / "tokenizer")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=name == "klein").save_pretrained(
        folder / "scheduler"
    )
    distilled = ', "is_distilled": true' if name == "klein" else ""
    (folder / "model_index.json").write_text(f'{{"_class_name": "{pipeline}"{distilled}}}\n')


def step_seconds(pipeline: AdapterPipeline, recipe: Any) -> tuple[Any, float, float]:
    """A drawing, the mean seconds of its steps after the first, and the peak of memory in GiB."""
    marks: list[float] = []

    def mark(step: object) -> None:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    with PeakMemory(pipeline.device) as memory:
        drawing = pipeline.draw(recipe, [mark])
    return drawing, (marks[-1] - marks[0]) / (len(marks) - 1), memory.bytes / 2**30


def plain_seconds(pipeline: AdapterPipeline, recipe: Any) -> tuple[Any, float]:
    """Diffusers' own pipeline without hooks, from the same embeddings: its picture and the seconds of a step."""
    from mos_cli.adapters.facts import Prompts

    text, marks = pipeline.encode(recipe.prompt), []

    def mark(pipe: Any, index: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
        return tensors

    image = pipeline.pipe(
        **pipeline.base.draw_arguments(recipe, Prompts({POSITIVE: text.embeds_TE}, {POSITIVE: text.mask_T})),
        width=recipe.width,
        height=recipe.height,
        num_inference_steps=recipe.steps,
        generator=torch.Generator().manual_seed(recipe.seed),
        callback_on_step_end=mark,
    ).images[0]
    return image, (marks[-1] - marks[0]) / (len(marks) - 1)


def gradients(pipeline: AdapterPipeline, adapter: Adapter, size: int) -> tuple[float, float, float]:
    """The largest gradients of the router and of the gates through the transformer, and the peak of memory in GiB."""
    transformer, text = pipeline.pipe.transformer, pipeline.encode(PROMPT)
    transformer.enable_gradient_checkpointing()
    for module in transformer.modules():
        if type(module).__module__.startswith("bitsandbytes"):
            module.train()
    adapter.train().requires_grad_(True)
    grid = TokenGrid(size // 16, size // 16)
    channels = pipeline.pipe.vae.config.latent_channels
    shape = (1, 4 * channels, size // 16, size // 16) if not pipeline.base.rows else (1, channels, size // 8, size // 8)
    z_1CHW = torch.randn(shape, device=pipeline.device, dtype=torch.bfloat16)
    routing = TextRouting(
        pipeline.base, adapter, {POSITIVE: pipeline.bank(text)}, grid, pipeline.layers, pipeline.blocks
    )
    with PeakMemory(pipeline.device) as memory, routing.attached(transformer):
        predicted = pipeline.base.velocity(pipeline.pipe, z_1CHW, 0.6, text.embeds_TE, text.mask_T)
        predicted.float().pow(2).mean().backward()
    head, gates = adapter.router.head.weight.grad, adapter.gates_JZ.grad
    assert head is not None
    assert gates is not None
    return head.abs().max().item(), gates.abs().max().item(), memory.bytes / 2**30


def check(name: str, folder: Path, device: torch.device, arguments: argparse.Namespace) -> None:
    """Writes, loads and measures one base model; one line per measurement."""
    target = folder / name
    if not target.is_dir():
        if arguments.tiny:
            tiny_base_models.save(TINY[name](), target)
        else:
            write_folder(name, target, device)
    bundle = read_adapter(target)
    assert isinstance(bundle, AdapterBundle)
    network: BaseNetwork = base_network(bundle, precision="bf16", references=0)
    side = 64 if arguments.tiny else network.canvas.native[0]
    chosen: Candidate = fastest(candidates(network, (side, side)), arguments.cap)
    print(f"{name} on {device_name(device)}: {chosen.options}; the plan's peak is {chosen.peak / 2**30:.2f} GiB")
    began = time.perf_counter()
    with PeakMemory(device) as memory:
        pipeline = AdapterPipeline(bundle, device=device, precision="bf16", setting=chosen.setting)
    print(f"{name} loading: {time.perf_counter() - began:.1f} s, peak {memory.bytes / 2**30:.2f} GiB", flush=True)
    recipe = make_recipe(
        prompt=PROMPT,
        model=name,
        seed=5,
        steps=4,
        cfg=1.0,
        cfg_interval=(0.0, 1.0),
        width=side,
        height=side,
        precision="bf16",
    )
    pipeline.draw(recipe)
    plain, seconds = plain_seconds(pipeline, recipe)
    print(f"{name} plain: {seconds:.4f} s a step", flush=True)
    sizes = {"layers": pipeline.layers, "blocks": pipeline.blocks, "slots": len(pipeline.own_layers)}
    adapter = Adapter(
        RouterShape(width=64 if arguments.tiny else 512, depth=2, heads=2 if arguments.tiny else 8),
        states_width=pipeline.pipe.text_encoder.config.hidden_size,
        patch_values=patch_values(pipeline.pipe.transformer),
        **sizes,
    )
    adapter.initialise(0)
    pipeline.adapter = adapter.to(device).eval().requires_grad_(False)
    for gate in (0.0, 1.0):
        adapter.gates_JZ.data.fill_(gate)
        drawing, seconds, peak = step_seconds(pipeline, recipe)
        equal = drawing.image.tobytes() == plain.tobytes()
        print(f"{name} gates {gate:g}: {seconds:.4f} s a step, peak {peak:.2f} GiB, plain pixels {equal}", flush=True)
    adapter.gates_JZ.data.fill_(0.4)
    head, gates, peak = gradients(pipeline, adapter, side)
    print(f"{name} gradients: router {head:.2e}, gates {gates:.2e}, peak {peak:.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=sorted(TINY))
    parser.add_argument("--cap", type=float, default=8.0, help="GiB of the GPU that may be used")
    parser.add_argument("--folder", type=Path, default=Path("base-models"), help="where the folders are written")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to rehearse")
    parser.add_argument("--keep", action="store_true", help="keep the folders")
    arguments = parser.parse_args()
    device = choose_device("auto")
    if device.type == "cuda":
        limit_memory(device, arguments.cap)
    for name in arguments.names:
        check(name, arguments.folder, device, arguments)
        if not arguments.keep:
            shutil.rmtree(arguments.folder / name)


if __name__ == "__main__":
    main()
