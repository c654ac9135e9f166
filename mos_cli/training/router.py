"""Training the router and the gates of a base model, and nothing else; the baselines that a router has to beat.

Shapes: Q tokens of a prompt, Z slots, M layers, J blocks, N patches, P values of a patch, C channels, H x W the
latent's size.
"""

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mos_cli.adapters.adapter import Adapter, save_adapter
from mos_cli.adapters.bank import TextBank
from mos_cli.adapters.facts import Prompts
from mos_cli.adapters.loading import patch_values
from mos_cli.adapters.pipeline import PATCH, AdapterPipeline
from mos_cli.adapters.recipe import RouterRecipe
from mos_cli.adapters.routing import TextRouting, no_steering
from mos_cli.adapters.text import EncodedText
from mos_cli.bundles.adapters import ROUTER, AdapterBundle, base_hash, base_name
from mos_cli.bundles.bundle import ADAPTER
from mos_cli.config.recipe import make_recipe
from mos_cli.datasets.captioned import Captioned, collate, to_device
from mos_cli.errors import InputError, UsageError
from mos_cli.routing.rules import parse_rules
from mos_cli.routing.steering import Steerer
from mos_cli.sampling.flow import noised
from mos_cli.sampling.guidance import POSITIVE, SteeringInput
from mos_cli.towers.layers import TokenGrid
from mos_cli.towers.router import uniform_route
from mos_cli.training import checkpoint
from mos_cli.utils.files import atomic_write, make_folder, sha256_of

HELD_OUT_TIMES = 4
"""Times at which every held-out example is predicted."""
SAVE_EVERY = 60.0
"""Seconds between two checkpoints."""
RECIPE = "router.json"
FITS = ("the router", "its static baseline")
"""What is trained, in this order."""
Log = Callable[[str, int, float], None]
"""Called after every step with what is trained, the number of its steps done, and the loss."""


@dataclass(frozen=True)
class Sample:
    """An example: its latent, and its caption's encoding and bank; made once and kept in main memory."""

    z0_1CHW: Tensor
    text: EncodedText
    bank: TextBank


class StaticAdapter(nn.Module):
    """The baseline of one static weight for every layer, the same for all tokens and times, in each block and slot."""

    def __init__(self, layers: int, blocks: int, slots: int) -> None:
        super().__init__()
        self.top_k, self.router = layers, None
        self.logits_MC = nn.Parameter(torch.zeros(layers, blocks * slots))
        self.gates_JZ = nn.Parameter(torch.zeros(blocks, slots))

    def logits(self, states_QS: Tensor, patches_1NP: Tensor, t: float, grid: TokenGrid) -> Tensor:
        return self.logits_MC.expand(1, len(states_QS), -1, -1)


@dataclass(frozen=True)
class Result:
    """The mean squared error on held-out examples: of the router, and of what it has to beat, by name."""

    router: float
    baselines: dict[str, float]

    @property
    def better(self) -> bool:
        """Whether the router is better than every baseline."""
        return self.router < min(self.baselines.values())


class _BegunError(Exception):
    """Stops a drawing at its first pass."""


class _Fit:
    """The training of one module: its weights and their optimiser."""

    def __init__(self, module: Any, recipe: RouterRecipe) -> None:
        self.module, self.recipe = module, recipe
        others = [parameter for parameter in module.parameters() if parameter is not module.gates_JZ]
        self.rates = (recipe.lr, recipe.gate_lr)
        groups = [{"params": others, "lr": recipe.lr}, {"params": [module.gates_JZ], "lr": recipe.gate_lr}]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        # PyTorch makes the state of an unused optimiser by a step with gradients of 0, when it is first asked for.
        get_state_dict(module, self.optimiser)
        for state in self.optimiser.state.values():
            state["step"].zero_()

    def update(self, step: int) -> None:
        """Takes a step, of which the gradients are there; in the second half of the run the rates fall to 0."""
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, 2 * (1 - step / self.recipe.steps))
        self.optimiser.step()
        self.optimiser.zero_grad()
        self.module.gates_JZ.data.clamp_(0, 1)

    def state(self) -> dict[str, Any]:
        module, optimiser = get_state_dict(self.module, self.optimiser)
        return {"module": module, "optimiser": optimiser}

    def load(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.module, self.optimiser, model_state_dict=state["module"], optim_state_dict=state["optimiser"]
        )


class RouterTrainer:
    """Trains the router of a base model.

    Raises:
        InputError: the folder has too few pictures, or one of them cannot be read.
        UsageError: the routes of the recipe do not go with the base model.
    """

    def __init__(self, pipeline: AdapterPipeline, recipe: RouterRecipe, data: Captioned) -> None:
        self.pipeline, self.recipe = pipeline, recipe
        self.base, self.device = pipeline.base, pipeline.device
        side = recipe.canvas // PATCH
        self.grid = TokenGrid(side, side)
        examples = data.pictures.examples
        # Another list would be divided otherwise: the router would be compared on pictures that it has seen.
        self.pictures = hashlib.sha256("\n".join(one.picture.name for one in examples).encode()).hexdigest()
        if len(examples) <= recipe.held_out:
            raise InputError(f"{len(examples)} pictures are too few to hold {recipe.held_out} out: give more")
        shuffled = list(range(len(examples)))
        Random(recipe.seed).shuffle(shuffled)
        samples = [self._sample(Captioned((examples[number],))) for number in shuffled]
        self.held_out, self.samples = samples[: recipe.held_out], samples[recipe.held_out :]
        self.times = [] if recipe.objective == "flow" else self._own_times()
        transformer = pipeline.pipe.transformer
        transformer.enable_gradient_checkpointing()
        for module in transformer.modules():
            # On a CPU, quantised layers give no gradients in evaluation mode.
            if type(module).__module__.startswith("bitsandbytes"):
                module.train()

    def train(
        self,
        folder: Path,
        log: Log = lambda what, step, loss: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> tuple[Adapter, Result]:
        """Trains a router and the static baseline, and compares both with the others on the held-out examples.

        A checkpoint is written every minute, and when `log` raises KeyboardInterrupt: the next call goes on from it.

        Args:
            folder: of the run.
            say: called with what is not as expected.

        Raises:
            InputError: the folder has a run of another recipe, its checkpoints are damaged, or none can be written.
        """
        sizes = (self.pipeline.layers, self.pipeline.blocks, len(self.pipeline.own_layers))
        adapter = Adapter(
            self.recipe.shape,
            states_width=self.pipeline.pipe.text_encoder.config.hidden_size,
            patch_values=patch_values(self.pipeline.pipe.transformer),
            layers=sizes[0],
            blocks=sizes[1],
            slots=sizes[2],
        )
        adapter.initialise(self.recipe.seed)
        static = StaticAdapter(*sizes)
        fits = {name: _Fit(one.to(self.device), self.recipe) for name, one in zip(FITS, (adapter, static), strict=True)}
        self._fit(fits, folder, log, say)
        mean = uniform_route([list(range(sizes[0]))] * (sizes[1] * sizes[2]), self.device)
        baselines = {
            "gates 0": self.loss(None),
            "mean of all layers": self.loss(None, lambda step, branch: mean),
            "one static weight per block": self.loss(static),
        }
        return adapter, Result(self.loss(adapter), baselines)

    @torch.no_grad()
    def loss(self, adapter: Any, steer: Callable[[int, str], SteeringInput] = no_steering) -> float:
        """The mean squared error on the held-out examples, at the same times and with the same noise every time."""
        generator, losses = torch.Generator().manual_seed(self.recipe.seed + 1), []
        for sample in self.held_out:
            for number in range(HELD_OUT_TIMES):
                t = self._time(generator, number)
                with self.error(sample, t, generator, adapter, steer) as error:
                    losses.append(error.item())
        return sum(losses) / len(losses)

    def _fit(self, fits: dict[str, _Fit], folder: Path, log: Log, say: Callable[[str], None]) -> None:
        """Trains one module after the other, from the last checkpoint in the folder on."""
        recipe, accelerator = self.recipe, Accelerator()
        self._keep_recipe(folder)
        plan = checkpoint.Plan(steps=len(fits) * recipe.steps, decay_from=0)
        done, saved = self._resume(fits, folder, accelerator, say), time.monotonic()

        def save() -> None:
            checkpoint.save(folder, done, {name: fit.state() for name, fit in fits.items()}, plan, accelerator)

        while done < plan.steps:
            number, step = divmod(done, recipe.steps)
            name, fit = list(fits.items())[number]
            # Of its own for every step, so that a run that is resumed draws the same numbers.
            seed = Random(f"{recipe.seed}/{done}").getrandbits(63)
            generator, loss = torch.Generator().manual_seed(seed), 0.0
            torch.manual_seed(seed)
            for _ in range(recipe.batch):
                sample = self.samples[int(torch.randint(len(self.samples), (), generator=generator))]
                with self.error(sample, self._time(generator, None), generator, fit.module) as error:
                    (error / recipe.batch).backward()
                loss += error.item() / recipe.batch
            fit.update(step)
            done += 1
            try:
                log(name, step + 1, loss)
            except KeyboardInterrupt:
                save()
                raise
            if done == plan.steps or time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()

    def _resume(self, fits: dict[str, _Fit], folder: Path, accelerator: Accelerator, say: Callable[[str], None]) -> int:
        """Loads the newest checkpoint that is whole; returns the number of steps done."""
        paths = checkpoint.found(folder)
        for number, path in enumerate(paths):
            try:
                state = checkpoint.load(
                    path, {name: fit.state() for name, fit in fits.items()}, accelerator.num_processes
                )
            except InputError as error:
                if number == len(paths) - 1:
                    raise
                say(f"{error}".split(": delete")[0] + f": going on from step {checkpoint.step_of(paths[number + 1])}")
                continue
            for name, fit in fits.items():
                fit.load(state[name])
            return checkpoint.step_of(path)
        return 0

    def _keep_recipe(self, folder: Path) -> None:
        """Writes the recipe and the base model's hash into the folder; raises InputError if others are there."""
        kept = self.recipe.model_dump(mode="json", exclude={"data"})
        kept |= {"base_hash": base_hash(self.pipeline.bundle), "pictures": self.pictures}
        path = folder / RECIPE
        if not path.exists():
            make_folder(folder)
            atomic_write(path, json.dumps(kept, indent=1).encode())
        try:
            there = json.loads(path.read_bytes())
            differences = [name for name in kept if there.get(name) != kept[name]]
        except (ValueError, AttributeError):
            raise InputError(f"{path} is damaged: restore it, or choose another folder with --run") from None
        if differences:
            raise InputError(
                f"{folder} holds a run of another recipe: choose another folder with --run, or change back "
                f"{', '.join(differences)}"
            )

    def _sample(self, one: Captioned) -> Sample:
        picture, caption = one.pick(Random(0), self.recipe.canvas)
        pipe = self.pipeline.pipe
        if not caption:
            raise InputError(f"{one.examples[0].picture.name} has an empty caption")
        text = self.pipeline.encode(caption)
        with torch.no_grad():
            picture_13HW = to_device(collate([picture]), self.device).to(pipe.vae.dtype)
            return Sample(self.base.latents(pipe, picture_13HW), text, self.pipeline.bank(text))

    def _time(self, generator: torch.Generator, number: int | None) -> float:
        """A time: random, or one of the model's own steps; of held-out examples the number-th of four."""
        if self.recipe.objective == "flow":
            if number is not None:
                return (number + 0.5) / HELD_OUT_TIMES
            return float(torch.rand((), generator=generator)) * 0.98 + 0.01
        count = len(self.times)
        return self.times[int(torch.randint(count, (), generator=generator)) if number is None else number % count]

    def _own_times(self) -> list[float]:
        """The times of the model's default steps, as its pipeline chooses them: it is stopped at the first pass."""
        pipe, text, defaults = self.pipeline.pipe, self.samples[0].text, self.pipeline.bundle.index.defaults
        side = self.recipe.canvas
        recipe = make_recipe(
            prompt=text.prompt,
            model=self.pipeline.bundle.ref,
            seed=0,
            steps=defaults.steps,
            cfg=1.0,
            cfg_interval=(0.0, 1.0),
            width=side,
            height=side,
            precision=self.pipeline.precision,
        )

        def stop(*_: Any) -> None:
            raise _BegunError

        handle = pipe.transformer.register_forward_pre_hook(stop)
        prompts = Prompts({POSITIVE: text.embeds_TE}, {POSITIVE: text.mask_T})
        try:
            pipe(
                **self.base.draw_arguments(recipe, prompts),
                width=side,
                height=side,
                num_inference_steps=defaults.steps,
                generator=torch.Generator().manual_seed(0),
            )
        except _BegunError:
            pass
        finally:
            handle.remove()
        return [float(time) / pipe.scheduler.config.num_train_timesteps for time in pipe.scheduler.timesteps]

    @contextmanager
    def error(
        self,
        sample: Sample,
        t: float,
        generator: torch.Generator,
        adapter: Any,
        steer: Callable[[int, str], SteeringInput] = no_steering,
    ) -> Iterator[Tensor]:
        """The mean squared error of a prediction. Gradients are computed within the context.

        Blocks that are computed again for their gradients need the hooks again.
        """
        z0_1CHW = sample.z0_1CHW
        noise_1CHW = torch.randn(z0_1CHW.shape, generator=generator).to(z0_1CHW)
        z_1CHW = noised(z0_1CHW, noise_1CHW, z0_1CHW.new_tensor([t]))
        target_1CHW = noise_1CHW - z0_1CHW
        if self.recipe.routes is not None:
            with torch.no_grad(), self._predicted(sample, z_1CHW, t, None, self._rules(sample)) as told_1CHW:
                target_1CHW = told_1CHW
        with self._predicted(sample, z_1CHW, t, adapter, steer) as predicted_1CHW:
            yield (predicted_1CHW.float() - target_1CHW.float()).pow(2).mean()

    @contextmanager
    def _predicted(
        self, sample: Sample, z_1CHW: Tensor, t: float, adapter: Any, steer: Callable[[int, str], SteeringInput]
    ) -> Iterator[Tensor]:
        explores = self.recipe.epsilon if isinstance(adapter, Adapter) and torch.is_grad_enabled() else 0.0
        routing = TextRouting(
            self.base,
            adapter,
            {POSITIVE: sample.bank},
            self.grid,
            self.pipeline.layers,
            self.pipeline.blocks,
            steer=steer,
            epsilon=explores,
        )
        with routing.attached(self.pipeline.pipe.transformer):
            yield self.base.velocity(self.pipeline.pipe, z_1CHW, t, sample.text.embeds_TE, sample.text.mask_T)

    def _rules(self, sample: Sample) -> Callable[[int, str], SteeringInput]:
        """The steering of the recipe's routes for a caption; a rule whose word it does not have is left out."""
        assert self.recipe.routes is not None
        rules = parse_rules(self.recipe.routes)
        if any(getattr(rule, "steps", None) for rule in rules):
            raise UsageError("routes of a recipe hold at all times: leave steps out")
        return Steerer(
            rules,
            {POSITIVE: sample.text},
            {POSITIVE: range(1)},
            steps=1,
            blocks=self.pipeline.blocks,
            layers=self.pipeline.layers,
            device=self.device,
            own_layers=self.pipeline.own_layers,
        )


def export(adapter: Adapter, recipe: RouterRecipe, bundle: AdapterBundle, folder: Path) -> None:
    """Writes an adapter: its index and its weights, both or neither; an earlier one there is replaced.

    Raises:
        InputError: the folder cannot be written.
    """
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        made = Path(temporary) / "adapter"
        made.mkdir()
        save_adapter(adapter, made / ROUTER)
        index = bundle.index.model_copy(
            update={
                "name": recipe.name,
                "description": f"a router for {bundle.index.name}, trained by {recipe.objective}",
                "base": base_name(bundle.index) if bundle.local is None else str(bundle.local.resolve()),
                "base_hash": base_hash(bundle),
                "router": recipe.shape,
                "files": {ROUTER: sha256_of(made / ROUTER)},
            }
        )
        text = index.model_dump_json(indent=2, by_alias=True, exclude_none=True) + "\n"
        atomic_write(made / ADAPTER, text.encode(), overwrite=False)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
