"""Training on a base model: examples that are encoded once, the loop with its checkpoints, and the loss.

Shapes: N patches, P values of a patch, C channels, H x W the latent's size.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mos_cli.adapters.adapter import Adapter
from mos_cli.adapters.bank import TextBank
from mos_cli.adapters.facts import Prompts, replaced
from mos_cli.adapters.loading import load_transformer
from mos_cli.adapters.pipeline import PATCH, AdapterPipeline
from mos_cli.adapters.recipe import BaseModelRecipe
from mos_cli.adapters.routing import TextRouting, no_steering
from mos_cli.adapters.text import EncodedText
from mos_cli.bundles.adapters import AdapterBundle, base_hash, verify_adapter
from mos_cli.bundles.bundle import find_bundle
from mos_cli.config.recipe import make_recipe
from mos_cli.datasets.captioned import Captioned, collate, to_device
from mos_cli.errors import InputError, ModelError
from mos_cli.inference.loading import DTYPES
from mos_cli.sampling.flow import noised
from mos_cli.sampling.guidance import POSITIVE, SteeringInput
from mos_cli.towers.layers import TokenGrid
from mos_cli.training import checkpoint
from mos_cli.utils.files import atomic_write, make_folder

HELD_OUT_TIMES = 4
"""Times at which every held-out example is predicted."""
SAVE_EVERY = 60.0
"""Seconds between two checkpoints."""
Log = Callable[[str, int, float], None]
"""Called after every step with what is trained, the number of its steps done, and the loss."""


@dataclass(frozen=True)
class Sample:
    """An example: its latent, and its caption's encoding and bank; made once and kept in main memory."""

    z0_1CHW: Tensor
    text: EncodedText
    bank: TextBank


class _BegunError(Exception):
    """Stops a drawing at its first pass."""


class ModuleTraining:
    """The training of one module: its weights and their optimiser.

    Args:
        module: what learns.
        rates: a learning rate for each group of parameters.
        steps: of the run; in its second half the rates fall to 0.
        adapter: what routes the text while the module is trained; None for the base model's own layers.
    """

    def __init__(
        self, module: nn.Module, rates: Sequence[tuple[Sequence[nn.Parameter], float]], steps: int, adapter: Any = None
    ) -> None:
        self.module, self.steps, self.adapter = module, steps, adapter
        self.rates = [rate for _, rate in rates]
        groups = [{"params": list(parameters), "lr": rate} for parameters, rate in rates]
        self.optimiser = torch.optim.AdamW(groups, weight_decay=0.0)
        # PyTorch makes the state of an unused optimiser by a step with gradients of 0, when it is first asked for.
        self.state()
        for state in self.optimiser.state.values():
            state["step"].zero_()

    def update(self, step: int) -> None:
        """Takes a step, of which the gradients are there."""
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * min(1.0, 2 * (1 - step / self.steps))
        self.optimiser.step()
        self.optimiser.zero_grad()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        module, optimiser = get_state_dict(self.module, self.optimiser)
        return {"module": module, "optimiser": optimiser}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over what a checkpoint holds."""
        set_state_dict(
            self.module, self.optimiser, model_state_dict=state["module"], optim_state_dict=state["optimiser"]
        )


class BaseModelTrainer:
    """Trains modules of or beside a base model, one after the other.

    Args:
        kept: the name of the file in which a run keeps its recipe.

    Raises:
        InputError: the folder has too few pictures, or one of them cannot be read.
        ModelError: the teacher is not there, damaged, or another pipeline.
    """

    epsilon = 0.0
    """How often a router that learns chooses a layer at random."""

    def __init__(self, pipeline: AdapterPipeline, recipe: BaseModelRecipe, data: Captioned, kept: str) -> None:
        self.pipeline, self.recipe, self.kept = pipeline, recipe, kept
        self.base, self.device = pipeline.base, pipeline.device
        side = recipe.canvas // PATCH
        self.grid = TokenGrid(side, side)
        examples = data.pictures.examples
        # Another list would be divided otherwise: what learns would be compared on pictures that it has seen.
        self.pictures = hashlib.sha256("\n".join(one.picture.name for one in examples).encode()).hexdigest()
        if len(examples) <= recipe.held_out:
            raise InputError(f"too few pictures to hold {recipe.held_out} out, {len(examples)}: give more")
        shuffled = list(range(len(examples)))
        Random(recipe.seed).shuffle(shuffled)
        samples = [self._sample(Captioned((examples[number],))) for number in shuffled]
        self.held_out, self.samples = samples[: recipe.held_out], samples[recipe.held_out :]
        self.times = [] if recipe.objective == "flow" else self._own_times()
        self.teacher = None if recipe.teacher is None else self._load_teacher(recipe.teacher)
        transformer = pipeline.pipe.transformer
        transformer.enable_gradient_checkpointing()
        for module in transformer.modules():
            # On a CPU, quantised layers give no gradients in evaluation mode.
            if type(module).__module__.startswith("bitsandbytes"):
                module.train()

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

    def fit(self, trainings: Mapping[str, ModuleTraining], folder: Path, log: Log, say: Callable[[str], None]) -> None:
        """Trains one module after the other, from the last checkpoint in the folder on.

        A checkpoint is written every minute, and when `log` raises KeyboardInterrupt: the next call goes on from it.

        Args:
            folder: of the run.
            say: called with what is not as expected.

        Raises:
            InputError: the folder has a run of another recipe, its checkpoints are damaged, or none can be written.
        """
        recipe, accelerator = self.recipe, Accelerator()
        self._keep_recipe(folder)
        plan = checkpoint.Plan(steps=len(trainings) * recipe.steps, decay_from=0)
        done, saved = self._resume(trainings, folder, accelerator, say), time.monotonic()

        def save() -> None:
            states = {name: training.state() for name, training in trainings.items()}
            checkpoint.save(folder, done, states, plan, accelerator)

        while done < plan.steps:
            number, step = divmod(done, recipe.steps)
            name, training = list(trainings.items())[number]
            # Of its own for every step, so that a run that is resumed draws the same numbers.
            seed = Random(f"{recipe.seed}/{done}").getrandbits(63)
            generator, loss = torch.Generator().manual_seed(seed), 0.0
            torch.manual_seed(seed)
            for _ in range(recipe.batch):
                sample = self.samples[int(torch.randint(len(self.samples), (), generator=generator))]
                with self.error(sample, self._time(generator, None), generator, training.adapter) as error:
                    (error / recipe.batch).backward()
                loss += error.item() / recipe.batch
            training.update(step)
            done += 1
            try:
                log(name, step + 1, loss)
            except KeyboardInterrupt:
                save()
                raise
            if done == plan.steps or time.monotonic() - saved > SAVE_EVERY:
                save()
                saved = time.monotonic()

    def _resume(
        self,
        trainings: Mapping[str, ModuleTraining],
        folder: Path,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> int:
        """Loads the newest checkpoint that is whole; returns the number of steps done."""

        def load(path: Path) -> None:
            states = {name: training.state() for name, training in trainings.items()}
            states = checkpoint.load(path, states, accelerator.num_processes)
            for name, training in trainings.items():
                training.load(states[name])

        path = checkpoint.load_newest(checkpoint.found(folder), load, say)
        return 0 if path is None else checkpoint.step_of(path)

    def _keep_recipe(self, folder: Path) -> None:
        """Writes the recipe and the base model's hash into the folder; raises InputError if others are there."""
        kept = self.recipe.model_dump(mode="json", exclude={"data"})
        kept |= {"base_hash": base_hash(self.pipeline.bundle), "pictures": self.pictures}
        path = folder / self.kept
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
        target_1CHW = self.target(sample, z_1CHW, t, noise_1CHW)
        with self.predicted(sample, z_1CHW, t, adapter, steer) as predicted_1CHW:
            yield (predicted_1CHW.float() - target_1CHW.float()).pow(2).mean()

    def target(self, sample: Sample, z_1CHW: Tensor, t: float, noise_1CHW: Tensor) -> Tensor:
        """What is to be predicted, [1, C, H, W]: the velocity to the picture, or to where the teacher gets."""
        if self.teacher is None:
            return noise_1CHW - sample.z0_1CHW
        after, z_taught_1CHW = self._next(t), z_1CHW
        times = torch.linspace(t, after, self.recipe.teacher_steps + 1).tolist()
        for now, then in pairwise(times):
            z_taught_1CHW = z_taught_1CHW + (then - now) * self._teacher_velocity(sample, z_taught_1CHW, now)
        return (z_1CHW - z_taught_1CHW) / (t - after)

    @torch.no_grad()
    def _teacher_velocity(self, sample: Sample, z_1CHW: Tensor, t: float) -> Tensor:
        """What the teacher predicts with its guidance."""
        pipe, cfg = self.pipeline.pipe, self.recipe.teacher_cfg
        with replaced(pipe, "transformer", self.teacher):
            prompts = (sample.text,) if cfg == 1 else (self.pipeline.encode(""), sample.text)
            *negative, positive = (self.base.velocity(pipe, z_1CHW, t, one.embeds_TE, one.mask_T) for one in prompts)
        return positive if not negative else negative[0] + cfg * (positive - negative[0])

    def _next(self, t: float) -> float:
        """The time at which the model's own step from a time ends."""
        return max((time for time in self.times if time < t), default=0.0)

    def _load_teacher(self, name: str) -> nn.Module:
        bundle = find_bundle(name)
        own = self.pipeline.bundle.index.pipeline
        if not isinstance(bundle, AdapterBundle) or bundle.index.pipeline != own:
            raise ModelError(f"{name} cannot teach {self.pipeline.bundle.index.name}: the teacher must be a {own}, too")
        verify_adapter(bundle)
        dtype = DTYPES[self.pipeline.precision]
        return load_transformer(bundle, self.device, dtype=dtype, quant=self.recipe.quant).eval().requires_grad_(False)

    @contextmanager
    def predicted(
        self, sample: Sample, z_1CHW: Tensor, t: float, adapter: Any, steer: Callable[[int, str], SteeringInput]
    ) -> Iterator[Tensor]:
        """What the base model predicts. Gradients are computed within the context."""
        routing = TextRouting(
            self.base,
            adapter,
            {POSITIVE: sample.bank},
            self.grid,
            self.pipeline.layers,
            self.pipeline.blocks,
            steer=steer,
            epsilon=self.epsilon if isinstance(adapter, Adapter) and torch.is_grad_enabled() else 0.0,
        )
        with routing.attached(self.pipeline.pipe.transformer):
            yield self.base.velocity(self.pipeline.pipe, z_1CHW, t, sample.text.embeds_TE, sample.text.mask_T)
